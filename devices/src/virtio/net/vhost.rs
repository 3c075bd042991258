#![expect(unsafe_code, reason = "the ioctls of vhost-net, which take addresses of guest memory")]
//! vhost-net (linux/vhost.h): a thread of the kernel moves the frames of one pair of queues between guest memory and a TAP,
//! from the doorbell's eventfd to the interrupt's. Owned by the back end; started and stopped by the worker of the pair, which
//! has nothing else to do then but to watch.

mod rings;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use libc::c_ulong;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::{
    _IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
};

use self::rings::Rings;
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::virtio::queue::QueueLayout;

/// VHOST_VIRTIO.
const TYPE: u32 = 0xaf;
const SET_OWNER: c_ulong = ioctl_expr(_IOC_NONE, TYPE, 0x01, 0);
const GET_FEATURES: c_ulong = ioctl_expr(_IOC_READ, TYPE, 0x00, size_of::<u64>() as u32);
const SET_FEATURES: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x00, size_of::<u64>() as u32);
const SET_MEM_TABLE: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x03, 8);
const SET_VRING_NUM: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x10, size_of::<Number>() as u32);
const SET_VRING_ADDR: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x11, size_of::<Addresses>() as u32);
const SET_VRING_BASE: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x12, size_of::<Number>() as u32);
const GET_VRING_BASE: c_ulong = ioctl_expr(_IOC_READ | _IOC_WRITE, TYPE, 0x12, size_of::<Number>() as u32);
const SET_VRING_KICK: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x20, size_of::<Number>() as u32);
const SET_VRING_CALL: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x21, size_of::<Number>() as u32);
const SET_VRING_ERR: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x22, size_of::<Number>() as u32);
const NET_SET_BACKEND: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x30, size_of::<Number>() as u32);

/// The file that stands for none (VHOST_NET_SET_BACKEND).
const NOTHING: RawFd = -1;

/// `struct vhost_vring_state` and `struct vhost_vring_file`: a number, or a descriptor, for one of the two queues.
#[repr(C)]
struct Number {
    queue: u32,
    value: i32,
}

/// `struct vhost_vring_addr`: where the rings are in our memory.
#[repr(C)]
struct Addresses {
    queue: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Region {
    guest: u64,
    size: u64,
    ours: u64,
    flags: u64,
}

/// What the driver may agree on with the device and the kernel must know of. All kernels of the last ten years do.
const NEEDED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A pair of queues in the kernel, at rest.
#[derive(Debug)]
pub struct Vhost {
    device: File,
}

impl Vhost {
    /// Takes over `device`, `/dev/vhost-net` opened for reading and writing by nobody else.
    ///
    /// # Errors
    /// If it is not that, or the kernel does not do what a device offers.
    pub fn new(device: File) -> io::Result<Self> {
        // SAFETY: no argument.
        check(unsafe { ioctl(&device, SET_OWNER) })?;
        let mut features = 0_u64;
        // SAFETY: the kernel fills in 64 bits.
        check(unsafe { ioctl_with_mut_ref(&device, GET_FEATURES, &mut features) })?;
        if features & NEEDED != NEEDED {
            let missing = NEEDED & !features;
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("it lacks the features {missing:#x}")));
        }
        Ok(Self { device })
    }

    fn set<T>(&self, what: c_ulong, value: &T) -> io::Result<()> {
        // SAFETY: every request of this file reads the structure it is called with, whose size is in the request.
        check(unsafe { ioctl_with_ref(&self.device, what, value) })
    }

    fn set_number(&self, what: c_ulong, queue: u32, value: i32) -> io::Result<()> {
        self.set(what, &Number { queue, value })
    }

    /// Tells it where guest memory is.
    fn set_memory(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        let regions = memory.iter().map(|region| {
            let ours = region.as_ptr() as u64;
            Region { guest: region.start_addr().raw_value(), size: region.len(), ours, flags: 0 }
        });
        // The count and padding, which end where the first region begins.
        let count = memory.num_regions() as u64;
        let mut table = vec![Region { guest: 0, size: 0, ours: 0, flags: count }];
        table.extend(regions);
        // SAFETY: from the last member of the first entry on this is a struct vhost_memory of `count` regions; the kernel
        // reads as many. It uses the memory while `Running` is there, which keeps it.
        check(unsafe { ioctl_with_ptr(&self.device, SET_MEM_TABLE, table.as_ptr().cast::<u64>().wrapping_add(3)) })
    }
}

/// One queue in the kernel.
struct KernelQueue {
    /// Its number in the pair: 0 to the driver, 1 from it.
    side: u32,
    index: u16,
    rings: Rings,
    /// What the kernel polls.
    _kick: EventFd,
    /// What the kernel writes; ours to pass on if it is not that of an interrupt.
    call: EventFd,
    relayed: bool,
}

/// A pair of queues that the kernel serves, as long as this exists and is connected.
pub(super) struct Running {
    vhost: Arc<Vhost>,
    queues: Vec<KernelQueue>,
    /// Written by the kernel when it can do nothing with a ring.
    broken: EventFd,
    _memory: Arc<GuestMemoryMmap>,
}

impl Running {
    /// Hands the queues of a pair to the kernel, which begins when it is connected.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn new(
        vhost: Arc<Vhost>,
        memory: &Arc<GuestMemoryMmap>,
        features: u64,
        queues: [Option<ActiveQueue>; 2],
        interrupt: &dyn Interrupt,
    ) -> io::Result<Self> {
        vhost.set(SET_FEATURES, &(features & NEEDED))?;
        vhost.set_memory(memory)?;
        let broken = EventFd::new(EFD_NONBLOCK)?;
        let mut running = Self { vhost, queues: Vec::new(), broken, _memory: memory.clone() };
        for (side, queue) in (0..).zip(queues) {
            if let Some(queue) = queue {
                running.add(side, queue, memory, interrupt)?;
            }
        }
        Ok(running)
    }

    fn add(
        &mut self,
        side: u32,
        active: ActiveQueue,
        memory: &GuestMemoryMmap,
        interrupt: &dyn Interrupt,
    ) -> io::Result<()> {
        let ActiveQueue { index, queue, kick } = active;
        let QueueLayout { size, desc, driver, device } = queue.layout();
        let ours = |address| {
            let host = memory.get_host_address(GuestAddress(address));
            host.map(|pointer| pointer as u64).map_err(io::Error::other)
        };
        let rings = Rings::new(memory, &queue.layout()).ok_or_else(|| io::Error::other("rings outside of memory"))?;
        let event = interrupt.queue_event(index);
        let relayed = event.is_none();
        let call = event.map_or_else(|| EventFd::new(EFD_NONBLOCK), Ok)?;
        let vhost = &self.vhost;
        vhost.set_number(SET_VRING_NUM, side, size.into())?;
        // The driver begins at the start of its rings.
        vhost.set_number(SET_VRING_BASE, side, 0)?;
        let (desc, used, avail) = (ours(desc)?, ours(device)?, ours(driver)?);
        vhost.set(SET_VRING_ADDR, &Addresses { queue: side, flags: 0, desc, used, avail, log: 0 })?;
        vhost.set_number(SET_VRING_KICK, side, kick.as_raw_fd())?;
        vhost.set_number(SET_VRING_CALL, side, call.as_raw_fd())?;
        vhost.set_number(SET_VRING_ERR, side, self.broken.as_raw_fd())?;
        self.queues.push(KernelQueue { side, index, rings, _kick: kick, call, relayed });
        Ok(())
    }

    /// Lets frames pass to and from `tap`, from where they stopped.
    ///
    /// # Errors
    /// If the kernel takes no such file, or it is of an interface that is gone.
    pub(super) fn connect(&self, tap: BorrowedFd<'_>) -> io::Result<()> {
        self.set_tap(tap.as_raw_fd())
    }

    /// To be called now and then while frames pass.
    pub(super) fn watch(&mut self) {
        self.queues.iter_mut().for_each(|queue| queue.rings.watch());
    }

    /// Stops them; none is under way afterwards. What was said of broken rings is forgotten: a ring that is broken still is when
    /// frames pass again. Buffers of frames that were taken and not sent are given back to the driver. Returns how many could not
    /// be found any more: their driver has lost them.
    pub(super) fn disconnect(&mut self) -> io::Result<u16> {
        self.set_tap(NOTHING)?;
        // Nothing there if nothing was said.
        let _ = self.broken.read();
        let mut lost = 0_u16;
        for queue in &mut self.queues {
            let mut base = Number { queue: queue.side, value: 0 };
            // SAFETY: the kernel reads the number of a queue, and fills in the index of what it takes next.
            check(unsafe { ioctl_with_mut_ref(&self.vhost.device, GET_VRING_BASE, &mut base) })?;
            let forgotten = queue.rings.use_forgotten(base.value.cast_unsigned() as u16);
            lost = lost.saturating_add(forgotten.unknown);
            if forgotten.used > 0 {
                // Full only if it is readable already.
                let _ = queue.call.write(1);
            }
        }
        Ok(lost)
    }

    fn set_tap(&self, fd: RawFd) -> io::Result<()> {
        self.queues.iter().try_for_each(|queue| self.vhost.set_number(NET_SET_BACKEND, queue.side, fd))
    }

    /// Readable when the kernel can do nothing with a ring: the driver broke it, or the interface is gone.
    pub(super) fn broken(&self) -> &EventFd {
        &self.broken
    }

    /// The eventfds that are not those of an interrupt, and the numbers of their queues.
    pub(super) fn relayed(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        self.queues.iter().filter(|queue| queue.relayed).map(|queue| (queue.index, &queue.call))
    }
}

impl Drop for Running {
    /// The rings are the driver's again afterwards.
    fn drop(&mut self) {
        self.set_tap(NOTHING).expect("the kernel lets go of a queue");
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
