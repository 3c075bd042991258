//! The engines and cache modes that there are, as users write them.

/// One disk's engine and cache mode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub(crate) aio: &'static str,
    pub(crate) cache: &'static str,
}

const fn choice(aio: &'static str, cache: &'static str) -> Choice {
    Choice { aio, cache }
}

/// Every pair that works together, and the one that is left to skiff.
pub(crate) const CHOICES: [Choice; 13] = [
    choice("auto", "auto"),
    choice("threads", "writeback"),
    choice("threads", "none"),
    choice("threads", "writethrough"),
    choice("threads", "directsync"),
    choice("threads", "unsafe"),
    choice("native", "none"),
    choice("native", "directsync"),
    choice("io_uring", "writeback"),
    choice("io_uring", "none"),
    choice("io_uring", "writethrough"),
    choice("io_uring", "directsync"),
    choice("io_uring", "unsafe"),
];

/// The last letters of the first `count` disks' names: `a` is that of `/dev/vda`.
pub(crate) fn letters(count: usize) -> impl Iterator<Item = char> {
    assert!(count <= 26, "then comes vdaa");
    ('a'..='z').take(count)
}
