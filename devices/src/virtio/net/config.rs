//! The configuration structure of virtio-net (virtio 1.2, 5.1.4), as the driver reads it.

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

/// Bytes of `struct virtio_net_config` up to `mtu`; no feature that is offered defines more.
const BYTES: usize = 12;

/// What the structure tells.
pub(super) struct Config {
    pub(super) mac: [u8; 6],
    pub(super) link_up: bool,
    pub(super) pairs: u16,
    pub(super) mtu: Option<u16>,
}

impl Config {
    pub(super) fn bytes(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.mac);
        if self.link_up {
            put(6, &(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        }
        if self.pairs > 1 {
            put(8, &self.pairs.to_le_bytes());
        }
        if let Some(mtu) = self.mtu {
            put(10, &mtu.to_le_bytes());
        }
        bytes
    }
}
