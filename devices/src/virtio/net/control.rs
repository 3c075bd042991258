//! The control queue (virtio 1.2, 5.1.6.5). Owned by the worker of the first pair.

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::Broken;
use super::backend::Port;
use super::buffers::{BufferList, Buffers};
use super::filter::{MOST_ADDRESSES, Table};
use super::header::Rules;
use super::settings::{Settings, Shared};
use crate::virtio::area;
use crate::virtio::queue::{Chain, Virtqueue};

/// Bytes of the class and the command in front of its data.
const COMMAND: usize = 2;

/// The control queue of a device.
pub(super) struct Control {
    pub(super) queue: Virtqueue,
    memory: Arc<GuestMemoryMmap>,
    features: u64,
    chain: Chain,
    list: BufferList,
    /// The command that is done when all workers know: its head and where its answer goes.
    pending: Option<(u16, GuestAddress)>,
}

impl Control {
    pub(super) fn new(queue: Virtqueue, memory: Arc<GuestMemoryMmap>, features: u64) -> Self {
        let list = BufferList::new(memory.clone(), 0);
        Self { queue, memory, features, chain: Chain::default(), list, pending: None }
    }

    /// Begins the next command or answers the last one, if all workers have seen what it changed; `false` if there was
    /// nothing to do.
    pub(super) fn serve(&mut self, port: &mut dyn Port, shared: &Shared) -> Result<bool, Broken> {
        if let Some((head, answer)) = self.pending {
            if shared.is_seen() {
                self.pending = None;
                self.answer(head, answer, VIRTIO_NET_OK)?;
                return Ok(true);
            }
            return Ok(false);
        }
        if !self.queue.pop(&mut self.chain)? {
            return Ok(false);
        }
        let (head, answer) = (self.chain.head, self.gather()?);
        let before = shared.current().clone();
        let after = self.carry_out(&before);
        let after = after.filter(|after| (1..=shared.workers()).contains(&after.pairs) && follow(&before, after, port));
        self.list.pop_front(self.list.count());
        match after {
            Some(after) => {
                shared.change(after);
                self.pending = Some((head, answer));
            }
            None => self.answer(head, answer, VIRTIO_NET_ERR)?,
        }
        Ok(true)
    }

    /// Whether a command waits for other workers.
    pub(super) fn is_waiting(&self) -> bool {
        self.pending.is_some()
    }

    /// Lists what the driver wrote; where it wants the answer.
    fn gather(&mut self) -> Result<GuestAddress, Broken> {
        let mut answer = None;
        for segment in self.chain.segments.iter().filter(|segment| segment.len > 0) {
            if segment.writable {
                answer = answer.or(Some(segment.address));
            } else if !self.list.push(segment.address, segment.len as usize) {
                return Err(Broken::Buffer(self.chain.head));
            }
        }
        answer.ok_or(Broken::NoAnswer(self.chain.head))
    }

    fn answer(&mut self, head: u16, at: GuestAddress, answer: u32) -> Result<(), Broken> {
        area::write_byte(&self.memory, at, answer as u8).map_err(|_| Broken::Buffer(head))?;
        self.queue.push(head, 1);
        Ok(())
    }

    /// The settings after the command in the list; `None` for one that is not known, not agreed on, or not valid.
    fn carry_out(&self, before: &Settings) -> Option<Settings> {
        let data = self.list.first(self.list.count());
        let [class, command] = take(&data, 0)?;
        let (class, command) = (u32::from(class), u32::from(command));
        let mut after = before.clone();
        match class {
            VIRTIO_NET_CTRL_RX => self.set_mode(&mut after, command, take::<1>(&data, COMMAND)?[0])?,
            VIRTIO_NET_CTRL_MAC => self.set_addresses(&mut after, command, &data)?,
            VIRTIO_NET_CTRL_VLAN => {
                let id = u16::from_le_bytes(take(&data, COMMAND)?);
                let wanted = match command {
                    VIRTIO_NET_CTRL_VLAN_ADD => true,
                    VIRTIO_NET_CTRL_VLAN_DEL => false,
                    _ => return None,
                };
                after.filter.set_vlan(id, wanted).then_some(())?;
            }
            VIRTIO_NET_CTRL_MQ if self.agreed(VIRTIO_NET_F_MQ) && command == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                after.pairs = u16::from_le_bytes(take(&data, COMMAND)?);
            }
            VIRTIO_NET_CTRL_GUEST_OFFLOADS if self.agreed(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) => {
                let wanted = u64::from_le_bytes(take(&data, COMMAND)?);
                (command == VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET && wanted & !self.features == 0).then_some(())?;
                after.rules.offloads = Rules::new(wanted).offloads;
            }
            _ => return None,
        }
        Some(after)
    }

    /// 5.1.6.5.1.
    fn set_mode(&self, after: &mut Settings, command: u32, value: u8) -> Option<()> {
        let feature =
            if command <= VIRTIO_NET_CTRL_RX_ALLMULTI { VIRTIO_NET_F_CTRL_RX } else { VIRTIO_NET_F_CTRL_RX_EXTRA };
        self.agreed(feature).then_some(())?;
        let filter = &mut after.filter;
        let switch = match command {
            VIRTIO_NET_CTRL_RX_PROMISC => &mut filter.promiscuous,
            VIRTIO_NET_CTRL_RX_ALLMULTI => &mut filter.multicast.all,
            VIRTIO_NET_CTRL_RX_ALLUNI => &mut filter.unicast.all,
            VIRTIO_NET_CTRL_RX_NOMULTI => &mut filter.multicast.none,
            VIRTIO_NET_CTRL_RX_NOUNI => &mut filter.unicast.none,
            VIRTIO_NET_CTRL_RX_NOBCAST => &mut filter.no_broadcast,
            _ => return None,
        };
        *switch = value != 0;
        Some(())
    }

    /// 5.1.6.5.2.
    fn set_addresses(&self, after: &mut Settings, command: u32, data: &Buffers<'_>) -> Option<()> {
        match command {
            VIRTIO_NET_CTRL_MAC_ADDR_SET if self.agreed(VIRTIO_NET_F_CTRL_MAC_ADDR) => {
                let own: [u8; 6] = take(data, COMMAND)?;
                // Not of a group.
                (own[0] & 1 == 0).then_some(())?;
                after.filter.own = own;
            }
            VIRTIO_NET_CTRL_MAC_TABLE_SET if self.agreed(VIRTIO_NET_F_CTRL_RX) => {
                let next = read_table(&mut after.filter.unicast, data, COMMAND)?;
                read_table(&mut after.filter.multicast, data, next)?;
            }
            _ => return None,
        }
        Some(())
    }

    fn agreed(&self, feature: u32) -> bool {
        self.features >> feature & 1 == 1
    }
}

/// Lets the host follow what is not for the workers alone; `false` if it cannot be.
fn follow(before: &Settings, after: &Settings, port: &mut dyn Port) -> bool {
    let offloads = after.rules.offloads;
    before.rules.offloads == offloads || port.set_offloads(offloads).is_ok()
}

/// The `N` bytes at `offset`, if there are as many.
fn take<const N: usize>(data: &Buffers<'_>, offset: usize) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    (data.get(offset, &mut bytes) == N).then_some(bytes)
}

/// Reads a `struct virtio_net_ctrl_mac` at `offset` into `table`. Returns where it ends.
fn read_table(table: &mut Table, data: &Buffers<'_>, offset: usize) -> Option<usize> {
    let entries = u32::from_le_bytes(take(data, offset)?) as usize;
    let (start, end) = (offset + 4, offset + 4 + 6 * entries);
    if end > data.len() {
        return None;
    }
    table.overflow = entries > MOST_ADDRESSES;
    let kept = if table.overflow { 0 } else { entries };
    table.addresses = (0..kept).map(|entry| take(data, start + 6 * entry)).collect::<Option<_>>()?;
    Some(end)
}
