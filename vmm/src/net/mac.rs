//! MAC addresses of network interfaces: as they are written, and the one an interface has when none is. Main thread.

use std::fmt::{self, Display, Formatter};

/// An address that a network interface can have: not multicast, and not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac([u8; 6]);

/// FNV-1a, 64 bits (draft-eastlake-fnv, 4 and 5): the same from version to version, which the hashes of Rust are not.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

impl Mac {
    /// Reads `52:54:00:12:34:56`.
    ///
    /// # Errors
    /// What is wrong and what to write instead.
    pub fn parse(text: &str) -> Result<Self, String> {
        let octet = |part: &str| {
            let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        let octets: Option<Vec<u8>> = text.split(':').map(octet).collect();
        let octets: Option<[u8; 6]> = octets.and_then(|octets| octets.try_into().ok());
        let octets = octets.ok_or("not a MAC address; write it like 52:54:00:12:34:56")?;
        if octets == [0; 6] {
            return Err("no interface has the address 0; leave mac= out for one of its own".to_owned());
        }
        if octets[0] & 1 != 0 {
            let single = Self([octets[0] & !1 | 2, octets[1], octets[2], octets[3], octets[4], octets[5]]);
            return Err(format!("a multicast address, which no interface can have; {single} is none"));
        }
        Ok(Self(octets))
    }

    /// The address of the interface that `identity` tells from all others: the same each time, and locally administered
    /// (IEEE 802, 8.4). 46 bits come from the identity.
    pub fn derived(identity: &[&[u8]]) -> Self {
        // The length in front of each part keeps ("ab", "c") and ("a", "bc") apart.
        let hash = identity.iter().fold(FNV_OFFSET, |hash, part| {
            let length = (part.len() as u64).to_le_bytes();
            length.iter().chain(*part).fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME))
        });
        // The last bytes change the upper bits least.
        let [.., first, second, third, fourth, fifth, sixth] = (hash ^ hash >> 48).to_be_bytes();
        Self([first & 0xfc | 0x02, second, third, fourth, fifth, sixth])
    }

    /// Takes six bytes, in the order in which they are sent; `None` if no interface can have them.
    pub fn from_octets(octets: [u8; 6]) -> Option<Self> {
        (octets != [0; 6] && octets[0] & 1 == 0).then_some(Self(octets))
    }

    /// Its six bytes, in the order in which they are sent.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl Display for Mac {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(out, "{first:02x}")?;
        rest.iter().try_for_each(|octet| write!(out, ":{octet:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn is_read_and_written() {
        let mac = Mac::parse("52:54:00:aB:0c:ff").unwrap();
        assert_eq!((mac.octets(), mac.to_string().as_str()), ([0x52, 0x54, 0, 0xab, 0x0c, 0xff], "52:54:00:ab:0c:ff"));
    }

    #[test]
    fn what_no_interface_can_have() {
        let none = "not a MAC address; write it like 52:54:00:12:34:56";
        for text in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52-54-00-12-34-56", "5:54:00:12:34:56", "+2:54:00:12:34:56"]
        {
            assert_eq!(Mac::parse(text).unwrap_err(), none, "{text}");
        }
        assert!(Mac::parse("00:00:00:00:00:00").unwrap_err().starts_with("no interface has the address 0"));
        assert_eq!(
            Mac::parse("ff:ff:ff:ff:ff:ff").unwrap_err(),
            "a multicast address, which no interface can have; fe:ff:ff:ff:ff:ff is none"
        );
    }

    #[test]
    fn derived_addresses_differ_and_are_local() {
        let interfaces = (0..1000u32).map(|at| Mac::derived(&[b"host", b"/boot/vmlinuz", &at.to_le_bytes()]));
        let different: HashSet<_> = interfaces.map(Mac::octets).collect();
        assert_eq!(different.len(), 1000);
        // Bits 0 and 1 of the first octet: individual, locally administered.
        assert!(different.iter().all(|octets| octets[0] & 3 == 2));
        assert_ne!(Mac::derived(&[b"ab", b"c"]), Mac::derived(&[b"a", b"bc"]));
        assert_eq!(Mac::derived(&[b"ab", b"c"]), Mac::derived(&[b"ab", b"c"]));
    }
}
