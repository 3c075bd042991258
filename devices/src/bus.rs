//! The two address spaces of the machine (port I/O and memory) as sorted tables of devices. Built once, then only read:
//! every vCPU thread looks up without a lock.

use std::sync::Arc;

/// What sits behind a range of ports or of physical addresses. Called on vCPU threads, several at once: a device locks
/// what it must. It sleeps only where its interface makes the guest wait: a virtio reset until nothing is in flight, a
/// serial port until its output has room.
///
/// `offset` is relative to the start of the range; `data` is 1, 2, 4 or 8 bytes as the guest accessed it, little endian,
/// and never reaches past the end of the range. Any combination can come from a hostile guest and none may panic.
pub trait BusDevice: Send + Sync {
    /// Fills `data`. What the device does not define reads as zeroes or ones, as its specification says.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data`. What the device does not define is ignored.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// An immutable table of address ranges, searched by bisection.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Adds `device` at `base..base + len`. Called by the builder, before any vCPU runs.
    ///
    /// # Panics
    /// If the range is empty, wraps or overlaps another: the layout of the machine is ours, so that is a bug of ours.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) {
        let last =
            base.checked_add(len.checked_sub(1).expect("a bus range has a length")).expect("a bus range does not wrap");
        let at = self.ranges.partition_point(|range| range.base < base);
        let clear_below = at == 0 || {
            let below = &self.ranges[at - 1];
            base - below.base >= below.len
        };
        let clear_above = self.ranges.get(at).is_none_or(|above| above.base > last);
        assert!(clear_below && clear_above, "bus ranges overlap at {base:#x}");
        self.ranges.insert(at, Range { base, len, device });
    }

    /// Reads from the device at `address`. Where there is none, or the access leaves its range, the bus floats high.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`. Where there is none, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|range| range.base <= address).checked_sub(1)?;
        let range = &self.ranges[at];
        let offset = address - range.base;
        let end = offset.checked_add(len as u64)?;
        (end <= range.len).then(|| (range.device.as_ref(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn recorder() -> Arc<Recorder> {
        Arc::new(Recorder(Mutex::new(Vec::new())))
    }

    #[test]
    fn finds_the_device_and_its_offset() {
        let (low, high) = (recorder(), recorder());
        let mut bus = Bus::default();
        bus.insert(0x2000, 0x10, high.clone());
        bus.insert(0x1000, 0x10, low.clone());
        bus.write(0x2004, &[1, 2]);
        assert_eq!(*high.0.lock().unwrap(), vec![(4, vec![1, 2])]);
        assert!(low.0.lock().unwrap().is_empty());
        let mut data = [0; 2];
        bus.read(0x100e, &mut data);
        assert_eq!(data, [0x0e, 0x0e]);
    }

    #[test]
    fn floats_where_nothing_is() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, recorder());
        for address in [0, 0xfff, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
        let mut straddling = [0; 4];
        bus.read(0x100e, &mut straddling);
        assert_eq!(straddling, [0xff; 4]);
        bus.write(u64::MAX, &[0; 8]);
    }

    #[test]
    fn a_range_may_end_at_the_top_of_the_address_space() {
        let mut bus = Bus::default();
        bus.insert(u64::MAX - 0xf, 0x10, recorder());
        let mut data = [0; 1];
        bus.read(u64::MAX, &mut data);
        assert_eq!(data, [0xf]);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlap_is_a_bug() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, recorder());
        bus.insert(0x100f, 1, recorder());
    }
}
