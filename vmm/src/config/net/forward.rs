//! `forward=`: ports of the host that lead to the guest, through passt. Main thread.

use std::fmt::{self, Display, Formatter};
use std::net::Ipv4Addr;

/// A port of the host, or several, that lead to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// UDP, else TCP.
    pub udp: bool,
    /// The host's address; `None` for all of them.
    pub address: Option<Ipv4Addr>,
    /// The host's ports, first and last.
    pub from: (u16, u16),
    /// The guest's port for the first of them; those after it follow.
    pub to: u16,
}

impl Forward {
    /// Reads `tcp:[ADDRESS:]PORT[-PORT][:GUEST-PORT]`, or the same with `udp:`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || "not a forward; write it like tcp:2222:22, udp:5353:53 or tcp:127.0.0.1:8000-8010:8000".to_owned();
        let mut words: Vec<_> = text.split(':').collect();
        let udp = match words.remove(0) {
            "tcp" => false,
            "udp" => true,
            _ => return Err(wrong()),
        };
        let address = words.first().filter(|part| part.contains('.')).map(|part| part.parse().map_err(|_| wrong()));
        let address = address.transpose()?;
        let ports = &words[usize::from(address.is_some())..];
        let port =
            |text: &str| text.parse::<u16>().ok().filter(|&port| port != 0 && !text.starts_with('+')).ok_or_else(wrong);
        let (from, to) = match *ports {
            [from] => (from, None),
            [from, to] => (from, Some(to)),
            _ => return Err(wrong()),
        };
        let (first, last) = from.split_once('-').unwrap_or((from, from));
        let from = (port(first)?, port(last)?);
        let to = to.map_or(Ok(from.0), port)?;
        if from.1 < from.0 || to.checked_add(from.1 - from.0).is_none() {
            return Err("the ports end before they begin, or past 65535".to_owned());
        }
        Ok(Self { udp, address, from, to })
    }

    /// Whether both want a port of the host.
    pub(super) fn collides(&self, other: &Self) -> bool {
        let address = self.address.is_none() || other.address.is_none() || self.address == other.address;
        self.udp == other.udp && address && self.from.0 <= other.from.1 && other.from.0 <= self.from.1
    }
}

impl Display for Forward {
    /// As it is written.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        out.write_str(if self.udp { "udp:" } else { "tcp:" })?;
        if let Some(address) = self.address {
            write!(out, "{address}:")?;
        }
        match self.from {
            (first, last) if first == last => write!(out, "{first}")?,
            (first, last) => write!(out, "{first}-{last}")?,
        }
        write!(out, ":{}", self.to)
    }
}
