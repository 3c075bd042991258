//! One virtio-blk request (virtio 1.2, 5.2.6): parsed and validated once, finished once. Runs on the queue's worker.

use std::sync::Arc;

use block::SECTOR_SIZE;
use block::engine::{Op, OpKind};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::Broken;
use super::config::{MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, MAX_ZERO_RANGES};
use super::write_cache::WriteCache;
use crate::virtio::area;
use crate::virtio::queue::{Chain, Segment};

/// Bytes of `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;

/// What the guest reads as serial number: NUL-padded.
pub(super) type Serial = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// What decides whether a request is allowed. But for the write cache the same from activation to reset.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Writes are refused.
    pub(super) readonly: bool,
    /// When a write is complete, and whether a flush does something (virtio 1.2, 5.2.6.2).
    pub(super) cache: Arc<WriteCache>,
    /// What was negotiated.
    pub(super) features: u64,
    /// What is zeroed may be given back to the host, if the driver allows it.
    pub(super) may_unmap: bool,
}

impl Rules {
    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

/// What a request asks for, validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Let the engine do this at this offset in bytes; buffers or ranges are in the op given to [`Request::parse`].
    Transfer(OpKind, u64),
    /// Answer with the serial number; the buffers as above.
    Identify,
    /// Answer with this.
    Answer(Status),
}

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// The request is not valid, or the disk failed.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// The type is unknown or not offered.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// A request that has not been answered.
#[derive(Debug)]
#[must_use = "the driver waits for its end"]
pub(super) struct Request {
    head: u16,
    status: GuestAddress,
    /// Bytes of data the driver gets if all goes well.
    data_in: u32,
}

impl Request {
    /// Reads the header of `chain`, once, and fills in what `op` works on: buffers, or ranges. Descriptors may be cut
    /// anywhere: the header is the first 16 device-readable bytes, the status the last device-writable byte (virtio 1.2,
    /// 2.7.4.1).
    ///
    /// # Errors
    /// When there is no place for the status, or readable buffers follow writable ones: there is no way to answer.
    pub(super) fn parse(
        chain: &Chain,
        memory: &GuestMemoryMmap,
        rules: &Rules,
        op: &mut Op,
    ) -> Result<(Self, Action), Broken> {
        op.segments.clear();
        op.ranges.clear();
        if !chain.segments.is_sorted_by_key(|segment| segment.writable) {
            return Err(Broken::Order(chain.head));
        }
        let writable = chain.segments.iter().rfind(|segment| segment.writable && segment.len > 0);
        let status = writable.and_then(|segment| segment.address.checked_add(u64::from(segment.len) - 1));
        let mut request = Self { head: chain.head, status: status.ok_or(Broken::NoStatus(chain.head))?, data_in: 0 };
        let action = match read_header(&chain.segments, memory) {
            Some(header) => request.validate(&header, &chain.segments, rules, op),
            None => Action::Answer(Status::IoError),
        };
        Ok((request, action))
    }

    fn validate(&mut self, header: &Header, segments: &[Segment], rules: &Rules, op: &mut Op) -> Action {
        let buffers = &mut op.segments;
        match header.kind {
            VIRTIO_BLK_T_IN => {
                collect_writable(segments, buffers);
                let Some((offset, len)) = place(header, buffers, rules) else { return Action::Answer(Status::IoError) };
                self.data_in = len;
                Action::Transfer(OpKind::Read, offset)
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if rules.readonly => {
                Action::Answer(Status::IoError)
            }
            VIRTIO_BLK_T_OUT => {
                collect_readable(segments, buffers);
                let Some((offset, _)) = place(header, buffers, rules) else { return Action::Answer(Status::IoError) };
                Action::Transfer(OpKind::Write { durable: rules.cache.is_durable() }, offset)
            }
            VIRTIO_BLK_T_DISCARD if rules.has(VIRTIO_BLK_F_DISCARD) => change(header.kind, segments, rules, op),
            VIRTIO_BLK_T_WRITE_ZEROES if rules.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                change(header.kind, segments, rules, op)
            }
            VIRTIO_BLK_T_FLUSH if !rules.cache.flushes() => Action::Answer(Status::Ok),
            VIRTIO_BLK_T_FLUSH => Action::Transfer(OpKind::Flush, 0),
            VIRTIO_BLK_T_GET_ID => {
                collect_writable(segments, buffers);
                Action::Identify
            }
            _ => Action::Answer(Status::Unsupported),
        }
    }

    /// Writes as much of `serial` as `buffers` take.
    pub(super) fn identify(
        &mut self,
        serial: &Serial,
        buffers: &[(GuestAddress, u32)],
        memory: &GuestMemoryMmap,
    ) -> Status {
        let mut rest = &serial[..];
        for &(address, len) in buffers {
            let (now, later) = rest.split_at(rest.len().min(len as usize));
            if memory.write_slice(now, address).is_err() {
                return Status::IoError;
            }
            self.data_in += now.len() as u32;
            rest = later;
        }
        Status::Ok
    }

    /// Writes the status byte. Returns what goes into the used ring: the head, and the bytes written.
    ///
    /// # Errors
    /// When the byte is not in guest memory.
    pub(super) fn finish(self, status: Status, memory: &GuestMemoryMmap) -> Result<(u16, u32), Broken> {
        area::write_byte(memory, self.status, status as u8).map_err(|_| Broken::NoStatus(self.head))?;
        Ok((self.head, if status == Status::Ok { self.data_in + 1 } else { 1 }))
    }
}

struct Header {
    kind: u32,
    sector: u64,
}

fn read_header(segments: &[Segment], memory: &GuestMemoryMmap) -> Option<Header> {
    let mut bytes = [0; HEADER_BYTES];
    let mut rest = &mut bytes[..];
    for segment in segments.iter().filter(|segment| !segment.writable) {
        let (now, later) = rest.split_at_mut(rest.len().min(segment.len as usize));
        area::read(memory, segment.address, now).ok()?;
        rest = later;
    }
    let complete = rest.is_empty();
    let (kind, sector) = (bytes.first_chunk()?, bytes.last_chunk()?);
    complete.then(|| Header { kind: u32::from_le_bytes(*kind), sector: u64::from_le_bytes(*sector) })
}

/// The readable bytes after the header.
fn collect_readable(segments: &[Segment], buffers: &mut Vec<(GuestAddress, u32)>) {
    let mut skip = HEADER_BYTES as u32;
    for segment in segments.iter().filter(|segment| !segment.writable) {
        let cut = skip.min(segment.len);
        skip -= cut;
        if segment.len > cut {
            // The header was read from the bytes that are cut, so this cannot wrap.
            buffers.push((segment.address.unchecked_add(u64::from(cut)), segment.len - cut));
        }
    }
}

/// The writable bytes before the status.
fn collect_writable(segments: &[Segment], buffers: &mut Vec<(GuestAddress, u32)>) {
    let writable = segments.iter().filter(|segment| segment.writable && segment.len > 0);
    buffers.extend(writable.map(|segment| (segment.address, segment.len)));
    if let Some(last) = buffers.last_mut() {
        last.1 -= 1;
    }
    buffers.pop_if(|last| last.1 == 0);
}

/// Where on the disk the data goes, offset and length in bytes, if that is on the disk and in whole sectors.
fn place(header: &Header, buffers: &[(GuestAddress, u32)], rules: &Rules) -> Option<(u64, u32)> {
    let offset = header.sector.checked_mul(SECTOR_SIZE)?;
    let len: u64 = buffers.iter().map(|&(_, len)| u64::from(len)).sum();
    let on_disk = offset.checked_add(len)? <= rules.size;
    // A chain is at most 4 GiB long (virtio 1.2, 2.7.5). Whole sectors leave room in 32 bits for the status byte, which
    // the used ring counts too.
    let len = u32::try_from(len).ok()?;
    (on_disk && u64::from(len).is_multiple_of(SECTOR_SIZE)).then_some((offset, len))
}

/// What a request to discard or to zero asks for; fills in `op.ranges`.
fn change(kind: u32, segments: &[Segment], rules: &Rules, op: &mut Op) -> Action {
    // Not in the op, whose buffers are for data.
    let mut bytes = [0; RANGE_BYTES * MAX_DISCARD_RANGES as usize];
    let (known, most) = match kind {
        VIRTIO_BLK_T_DISCARD => (0, MAX_DISCARD_RANGES),
        _ => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_ZERO_RANGES),
    };
    let room = &mut bytes[..RANGE_BYTES * most as usize];
    let Some(bytes) = read_ranges(segments, &op.memory, room) else { return Action::Answer(Status::IoError) };
    let durable = rules.cache.is_durable();
    let mut unmap = rules.may_unmap;
    for range in bytes.chunks_exact(RANGE_BYTES) {
        let number = |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
        let (sector, sectors, flags) = (u64::from(number(4)) << 32 | u64::from(number(0)), number(8), number(12));
        if flags & !known != 0 {
            return Action::Answer(Status::Unsupported);
        }
        let end = sector.checked_add(sectors.into()).and_then(|end| end.checked_mul(SECTOR_SIZE));
        match end {
            Some(end) if end <= rules.size && sectors <= MAX_RANGE_SECTORS => op.ranges.push(sector * SECTOR_SIZE..end),
            _ => return Action::Answer(Status::IoError),
        }
        unmap &= flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    }
    let kind = match kind {
        VIRTIO_BLK_T_DISCARD => OpKind::Discard { durable },
        _ => OpKind::WriteZeroes { unmap, durable },
    };
    Action::Transfer(kind, op.ranges.first().map_or(0, |range| range.start))
}

/// Reads the ranges after the header into `bytes`, once; `None` if there are none, not whole ones, or too many.
fn read_ranges<'a>(segments: &[Segment], memory: &GuestMemoryMmap, bytes: &'a mut [u8]) -> Option<&'a [u8]> {
    let mut skip = HEADER_BYTES as u32;
    let mut len = 0_usize;
    for segment in segments.iter().filter(|segment| !segment.writable) {
        let cut = skip.min(segment.len);
        skip -= cut;
        let count = (segment.len - cut) as usize;
        let now = bytes.get_mut(len..len.checked_add(count)?)?;
        // The header was read from the bytes that are cut, so this cannot wrap.
        area::read(memory, segment.address.unchecked_add(u64::from(cut)), now).ok()?;
        len += count;
    }
    (len > 0 && len.is_multiple_of(RANGE_BYTES)).then_some(&bytes[..len])
}
