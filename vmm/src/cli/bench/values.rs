//! The values of flags, each by its name.

use std::time::Duration;

use block::cache::CacheMode;
use block::engine::Aio;
use guest::workload::Mix;
use skiff::bench::{AUTO, Completion, Content, Subject};
use skiff::config::parse_size;

/// What users write to compare with whoever is there.
pub(super) const ALL: &str = "all";

/// What users write to compare with nobody.
pub(super) const NONE: &str = "none";

/// With whom skiff can be compared.
pub(super) fn opponents() -> Vec<&'static str> {
    Subject::OTHERS.map(Subject::name).into_iter().chain([ALL, NONE]).collect()
}

/// The one of `all` that is called `text`.
fn named<T: Copy>(text: &str, all: &[T], name: fn(T) -> &'static str) -> Result<T, String> {
    let found = all.iter().copied().find(|one| name(*one) == text);
    let names = || all.iter().map(|one| name(*one)).collect::<Vec<_>>().join(", ");
    found.ok_or_else(|| format!("say one of {}", names()))
}

pub(super) fn content(text: &str) -> Result<Content, String> {
    named(text, &Content::OWN, Content::name)
}

/// An engine of the list, or none where that is left to skiff.
#[derive(Clone, Copy, Debug)]
pub(super) struct AioOrAuto(pub(super) Option<Aio>);

pub(super) fn engine(text: &str) -> Result<AioOrAuto, String> {
    if text == AUTO {
        return Ok(AioOrAuto(None));
    }
    named(text, &Aio::ALL, Aio::name).map(|aio| AioOrAuto(Some(aio))).map_err(|names| format!("{names}, {AUTO}"))
}

pub(super) fn completion(text: &str) -> Result<Completion, String> {
    named(text, &Completion::ALL, Completion::name)
}

pub(super) fn cache(text: &str) -> Result<CacheMode, String> {
    named(text, &CacheMode::ALL, CacheMode::name)
}

/// A mix, and the block size behind a colon.
pub(super) fn mix(text: &str) -> Result<(Mix, Option<u32>), String> {
    let (name, block) = text.split_once(':').map_or((text, None), |(name, block)| (name, Some(block)));
    Ok((named(name, &Mix::ALL, Mix::name)?, block.map(block_size).transpose()?))
}

pub(super) fn block_size(text: &str) -> Result<u32, String> {
    let bytes = if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().map_err(|_| "not a size; write it like 4K".to_owned())?
    } else {
        parse_size(text)?
    };
    let good = bytes % 512 == 0 && (512..=4 << 20).contains(&bytes);
    if good { Ok(bytes as u32) } else { Err("a multiple of 512 bytes, at most 4M".to_owned()) }
}

pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.strip_suffix('s').unwrap_or(text).parse::<f64>();
    let good = seconds.ok().filter(|seconds| (0.01..=3600.0).contains(seconds));
    good.map(Duration::from_secs_f64).ok_or_else(|| "seconds between 0.01 and 3600, such as 3 or 0.5".to_owned())
}
