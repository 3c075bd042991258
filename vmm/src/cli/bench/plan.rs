//! Flags become a plan: what was not said is filled in, and what cannot be is refused.

use std::num::NonZeroUsize;
use std::time::Duration;

use block::cache::CacheMode;
use block::engine::Aio;
use block::engine::threads::DEFAULT_THREADS;
use guest::workload::Mix;
use skiff::bench::{AUTO, Axes, Completion, Content, POLL_US, Place, Plan, Subject};
use skiff::config::format_size;

use super::BenchArgs;
use super::values::{ALL, NONE};
use crate::cli::Failure;

impl BenchArgs {
    pub(super) fn plan(&self) -> Result<Plan, Failure> {
        self.check_lists()?;
        let axes = self.axes();
        let place = match &self.disk {
            Some(path) => Place::Given(path.clone()),
            None => Place::Own(self.dir.clone().unwrap_or_else(|| ".".into()), self.size.unwrap_or(1 << 30)),
        };
        let usage = |line: String| Err(Failure::Usage(line));
        if let Some(path) = &self.disk
            && let Some(mix) = axes.mixes.iter().map(|(mix, _)| mix).find(|mix| mix.writes())
            && !self.destructive
        {
            let (mix, path) = (mix.name(), path.display());
            return usage(format!(
                "--rw {mix} would overwrite {path}; say --destructive if nobody needs what is on it"
            ));
        }
        let largest = axes.cells().iter().map(|cell| cell.work.bs).max().unwrap_or_default();
        match place {
            Place::Own(_, size) if size < largest.into() || size % 4096 != 0 => {
                return usage("--size: at least one block, and a multiple of 4K".to_owned());
            }
            _ => {}
        }
        if axes.cells().is_empty() {
            return usage("--engines native goes past the page cache; add --cache none or directsync".to_owned());
        }
        let said = |word: &str| self.vs.iter().any(|said| said == word);
        let against = Subject::OTHERS.into_iter().filter(|subject| said(ALL) || said(subject.name()));
        let runtime = self.runtime.unwrap_or(Duration::from_secs(if self.full { 3 } else { 1 }));
        Ok(Plan {
            axes,
            place,
            runtime,
            warm_up: runtime / 10,
            repeat: self.repeat.unwrap_or(3),
            against: against.collect(),
            if_there: said(ALL),
            pin: self.pin,
            seed: self.seed,
        })
    }

    /// Nothing is asked for twice, and nothing beside "none" or "all".
    fn check_lists(&self) -> Result<(), Failure> {
        for (word, meaning) in [(NONE, "nothing"), (ALL, "all that are there")] {
            if self.vs.len() > 1 && self.vs.iter().any(|said| said == word) {
                let line = format!("--vs {word} compares with {meaning}; leave out {word}, or the others");
                return Err(Failure::Usage(line));
            }
        }
        let own = |(mix, block): &(Mix, Option<u32>)| match block {
            Some(block) => format!("{}:{}", mix.name(), format_size((*block).into())),
            None => mix.name().to_owned(),
        };
        once("--vs", Some(&self.vs), Clone::clone)?;
        once("--content", self.content.as_ref(), |content| content.name().to_owned())?;
        once("--engines", self.engines.as_ref(), |engine| engine.0.map_or(AUTO, Aio::name).to_owned())?;
        once("--cache", self.cache.as_ref(), |cache| cache.name().to_owned())?;
        once("--depths", self.depths.as_ref(), u16::to_string)?;
        once("--bs", self.bs.as_ref(), |block| format_size((*block).into()))?;
        once("--rw", self.rw.as_ref(), own)?;
        once("--queues", self.queues.as_ref(), u16::to_string)?;
        once("--ioeventfd", self.ioeventfd.as_ref(), Clone::clone)?;
        once("--poll-us", self.poll_us.as_ref(), u32::to_string)?;
        once("--merge", self.merge.as_ref(), Clone::clone)?;
        once("--thread-pool-max", self.thread_pool_max.as_ref(), u8::to_string)?;
        once("--completion", self.completion.as_ref(), |completion| completion.name().to_owned())?;
        once("--busy", self.busy.as_ref(), u16::to_string)
    }

    fn axes(&self) -> Axes {
        fn or<T: Clone>(said: Option<&Vec<T>>, full: bool, all: &[T], few: &[T]) -> Vec<T> {
            said.cloned().unwrap_or_else(|| if full { all } else { few }.to_vec())
        }
        let (full, own) = (self.full && !self.quick, [Content::Written, Content::Hole]);
        let mixes = [Mix::RandRead, Mix::RandWrite, Mix::Read, Mix::Write].map(|mix| (mix, None));
        // Without --destructive an image of the user's is only read.
        let all_mixes: Vec<_> =
            mixes.into_iter().filter(|(mix, _)| self.disk.is_none() || self.destructive || !mix.writes()).collect();
        let switches = |said: &Option<Vec<String>>| -> Vec<bool> {
            said.as_ref().map_or_else(|| vec![true], |said| said.iter().map(|word| word == "on").collect())
        };
        let pools = self.thread_pool_max.iter().flatten().filter_map(|threads| NonZeroUsize::new((*threads).into()));
        let pools: Vec<_> = pools.collect();
        let engines: Option<Vec<_>> = self.engines.as_ref().map(|said| said.iter().map(|engine| engine.0).collect());
        let all = Aio::ALL.map(Some);
        let contents = or(self.content.as_ref(), full, &own, &own[..1]);
        Axes {
            contents: if self.disk.is_some() { vec![Content::Given] } else { contents },
            mixes: or(self.rw.as_ref(), full, &all_mixes, &mixes[..1]),
            blocks: or(self.bs.as_ref(), full, &[4 << 10, 64 << 10, 1 << 20], &[4 << 10]),
            depths: or(self.depths.as_ref(), full, &[1, 4, 32, 128], &[1, 32]),
            queues: or(self.queues.as_ref(), full, &[1, 4], &[1]),
            busy: or(self.busy.as_ref(), full, &[0], &[0]),
            engines: or(engines.as_ref(), full, &all, &all),
            caches: or(
                self.cache.as_ref(),
                full,
                &[CacheMode::None, CacheMode::Writeback],
                &[CacheMode::None, CacheMode::Writeback],
            ),
            ioeventfds: switches(&self.ioeventfd),
            polls: or(self.poll_us.as_ref(), full, &[POLL_US], &[POLL_US]),
            merges: switches(&self.merge),
            pools: if pools.is_empty() { vec![DEFAULT_THREADS] } else { pools },
            completions: or(self.completion.as_ref(), full, &[Completion::Poll], &[Completion::Poll]),
        }
    }
}

/// An error if the list of `flag` has something twice.
fn once<T>(flag: &str, list: Option<&Vec<T>>, name: fn(&T) -> String) -> Result<(), Failure> {
    let names: Vec<_> = list.into_iter().flatten().map(name).collect();
    let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    twice.map_or(Ok(()), |(_, name)| Err(Failure::Usage(format!("{flag} has {name} twice; say it once"))))
}
