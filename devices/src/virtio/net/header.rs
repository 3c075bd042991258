//! The header in front of every frame (virtio 1.2, 5.1.6, `struct virtio_net_hdr_v1`), on its way to the driver.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::backend::{HEADER, Offloads};
use super::buffers::Buffers;
use super::filter::{Filter, JUDGED};
use super::statistics::DropReason;

/// Offsets in the header.
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const NUM_BUFFERS: usize = 10;

/// The features that let a device leave an offload to the driver, with those offloads.
pub(super) const GUEST_FEATURES: [(u32, Offloads); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, Offloads::ECN),
    (VIRTIO_NET_F_GUEST_UFO, Offloads::UFO),
    (VIRTIO_NET_F_GUEST_USO4, Offloads::USO4),
    (VIRTIO_NET_F_GUEST_USO6, Offloads::USO6),
];

/// What a driver takes, by the features it accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    /// A frame may be in several chains.
    pub(super) mergeable: bool,
    /// What may be left to do in a frame.
    pub(super) offloads: Offloads,
}

impl Rules {
    pub(super) fn new(features: u64) -> Self {
        let accepted = |feature: u32| features >> feature & 1 == 1;
        let offloads = GUEST_FEATURES.iter().filter(|(feature, _)| accepted(*feature));
        let offloads = offloads.fold(Offloads::NONE, |all, (_, offload)| all | *offload);
        // Nothing without checksums, which the transport did not check (5.1.3.1).
        let offloads = if offloads.contains(Offloads::CSUM) { offloads } else { Offloads::NONE };
        Self { mergeable: accepted(VIRTIO_NET_F_MRG_RXBUF), offloads }
    }

    /// Whether frames may be longer than the link's.
    pub(super) fn takes_segmented(self) -> bool {
        self.offloads & Offloads::SEGMENTED != Offloads::NONE
    }

    /// Whether a frame with these `flags` and `gso_type` may go to the driver.
    fn takes(self, flags: u8, gso_type: u8) -> bool {
        let segments = match u32::from(gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => true,
            VIRTIO_NET_HDR_GSO_TCPV4 => self.offloads.contains(Offloads::TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => self.offloads.contains(Offloads::TSO6),
            VIRTIO_NET_HDR_GSO_UDP => self.offloads.contains(Offloads::UFO),
            VIRTIO_NET_HDR_GSO_UDP_L4 => self.offloads & (Offloads::USO4 | Offloads::USO6) != Offloads::NONE,
            _ => false,
        };
        let ecn = u32::from(gso_type) & VIRTIO_NET_HDR_GSO_ECN == 0 || self.offloads.contains(Offloads::ECN);
        let checksum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 || self.offloads.contains(Offloads::CSUM);
        segments && ecn && checksum
    }
}

/// Completes the header of `frame`, which is in `spread` chains.
///
/// # Errors
/// If the driver does not want such a frame, or did not agree to get one: it waited in the host since before.
pub(super) fn finish(frame: &Buffers<'_>, spread: u16, rules: Rules, filter: &Filter) -> Result<(), DropReason> {
    let (mut header, mut start) = ([0; HEADER], [0; JUDGED]);
    frame.get(0, &mut header);
    frame.get(HEADER, &mut start);
    if !filter.takes(&start) {
        return Err(DropReason::Filtered);
    }
    if !rules.takes(header[FLAGS], header[GSO_TYPE]) {
        return Err(DropReason::Offload);
    }
    if !rules.offloads.contains(Offloads::CSUM) {
        // 5.1.6.4.1: not even that the checksum is right.
        frame.put(FLAGS, &[0]);
    }
    frame.put(NUM_BUFFERS, &spread.to_le_bytes());
    Ok(())
}
