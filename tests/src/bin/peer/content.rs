//! Bytes that both ends know: a table of pseudo-random ones, read round and round from a place that the seed decides. Its
//! length is a prime, so that no page, segment or buffer repeats in the place of another.

/// The largest piece that [`Content::at`] gives: a datagram's or a frame's worth.
pub(crate) const PIECE: usize = 1 << 16;

const PERIOD: usize = 1_000_003;

pub(crate) struct Content(Vec<u8>);

impl Content {
    pub(crate) fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut table = Vec::with_capacity(PERIOD + PIECE);
        while table.len() < PERIOD {
            // Marsaglia's xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            table.extend(state.to_le_bytes());
        }
        table.truncate(PERIOD);
        table.extend_from_within(..PIECE);
        Self(table)
    }

    /// [`PIECE`] bytes of the stream `seed` from `position` on.
    pub(crate) fn at(&self, seed: u64, position: u64) -> &[u8] {
        let start = (seed.wrapping_mul(7919).wrapping_add(position) % PERIOD as u64) as usize;
        &self.0[start..start + PIECE]
    }
}
