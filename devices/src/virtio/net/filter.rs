//! Which received frames the driver wants (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3). Changed by the control queue; each worker has
//! a copy.

/// Addresses of a kind that are kept. A driver that gives more gets all frames of the kind.
pub(super) const MOST_ADDRESSES: usize = 64;

/// An Ethernet address.
pub(super) type Address = [u8; 6];

const BROADCAST: Address = [0xff; 6];

/// Bytes at the start of a frame that it is judged by: addresses, type, VLAN tag.
pub(super) const JUDGED: usize = 16;

/// The type of a frame with a VLAN tag (IEEE 802.1Q).
const VLAN: [u8; 2] = [0x81, 0x00];

/// The addresses of one kind that are let through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// Those besides the interface's own.
    pub(super) addresses: Vec<Address>,
    /// There were too many to keep.
    pub(super) overflow: bool,
    /// All are let through.
    pub(super) all: bool,
    /// None is, whatever else is said.
    pub(super) none: bool,
}

impl Table {
    fn takes(&self, address: Address) -> bool {
        !self.none && (self.all || self.overflow || self.addresses.contains(&address))
    }
}

/// What a driver wants to receive. As long as it has not said otherwise, everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// The interface's own address.
    pub(super) own: Address,
    pub(super) promiscuous: bool,
    pub(super) unicast: Table,
    pub(super) multicast: Table,
    pub(super) no_broadcast: bool,
    /// A bit a VLAN; `None`: all of them.
    pub(super) vlans: Option<Box<[u64; 64]>>,
}

impl Filter {
    /// For the interface `own`; with `vlans` the driver names those that it wants.
    pub(super) fn new(own: Address, vlans: bool) -> Self {
        Self {
            own,
            promiscuous: true,
            unicast: Table::default(),
            multicast: Table::default(),
            no_broadcast: false,
            vlans: vlans.then(|| Box::new([0; 64])),
        }
    }

    /// Whether a frame that begins with `start` is wanted.
    pub(super) fn takes(&self, start: &[u8; JUDGED]) -> bool {
        if self.promiscuous {
            return true;
        }
        if start[12..14] == VLAN && !self.takes_vlan(u16::from_be_bytes([start[14], start[15]])) {
            return false;
        }
        let to = [start[0], start[1], start[2], start[3], start[4], start[5]];
        match to {
            BROADCAST => !self.no_broadcast,
            _ if to[0] & 1 == 1 => self.multicast.takes(to),
            _ => !self.unicast.none && to == self.own || self.unicast.takes(to),
        }
    }

    /// Adds the VLAN `id` to the wanted ones, or takes it away; `false` if there is no such VLAN.
    pub(super) fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let word = self.vlans.as_mut().and_then(|vlans| vlans.get_mut(usize::from(id / 64)));
        let Some(word) = word else { return false };
        let bit = 1 << (id % 64);
        *word = if wanted { *word | bit } else { *word & !bit };
        true
    }

    /// The lower 12 bits of a tag are the VLAN.
    fn takes_vlan(&self, tag: u16) -> bool {
        let id = tag & 0xfff;
        self.vlans.as_ref().is_none_or(|vlans| vlans[usize::from(id / 64)] >> (id % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Address = [0x52, 0x54, 0, 1, 2, 3];
    const OTHER: Address = [0x52, 0x54, 0, 1, 2, 4];
    const GROUP: Address = [0x33, 0x33, 0, 0, 0, 1];

    fn to(address: Address) -> [u8; JUDGED] {
        let mut start = [0; JUDGED];
        start[..6].copy_from_slice(&address);
        start
    }

    fn takes(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, BROADCAST].map(|address| filter.takes(&to(address)))
    }

    #[test]
    fn each_switch_lets_its_kind_through() {
        let mut filter = Filter::new(OWN, false);
        assert_eq!(takes(&filter), [true; 4], "a driver that says nothing gets all");
        filter.promiscuous = false;
        assert_eq!(takes(&filter), [true, false, false, true]);
        filter.unicast.addresses = vec![OTHER];
        filter.multicast.addresses = vec![GROUP];
        assert_eq!(takes(&filter), [true; 4]);
        (filter.unicast.none, filter.multicast.none, filter.no_broadcast) = (true, true, true);
        assert_eq!(takes(&filter), [false; 4]);
        let mut filter = Filter { promiscuous: false, ..Filter::new(OWN, false) };
        filter.unicast.all = true;
        assert_eq!(takes(&filter), [true, true, false, true]);
        filter.multicast.overflow = true;
        assert_eq!(takes(&filter), [true; 4]);
    }

    #[test]
    fn vlans_are_named_one_by_one() {
        let tagged = |tag: [u8; 2]| {
            let mut start = to(OWN);
            start[12..].copy_from_slice(&[0x81, 0, tag[0], tag[1]]);
            start
        };
        let mut filter = Filter { promiscuous: false, ..Filter::new(OWN, true) };
        // Priority 7 and VLAN 5.
        assert!(!filter.takes(&tagged([0xe0, 5])));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        assert!(
            filter.takes(&tagged([0xe0, 5])) && filter.takes(&tagged([0x0f, 0xff])) && !filter.takes(&tagged([0, 6]))
        );
        assert!(filter.set_vlan(5, false));
        assert!(!filter.takes(&tagged([0xe0, 5])) && filter.takes(&to(OWN)));
        filter.promiscuous = true;
        assert!(filter.takes(&tagged([0xe0, 5])));
        assert!(!Filter::new(OWN, false).set_vlan(1, true), "not agreed on");
    }
}
