//! `[matrix]`: the machines of a scenario, one for each way to choose a value of every key.

use std::fs::File;
use std::path::Path;

use block::cache::CacheMode;
use block::engine::Aio;
use toml::de::{DeTable, DeValue};

use super::{Reader, Table};
use crate::config::{Entry, Request, VmConfig, scalar};
use crate::smoke::scenario::Cell;

/// What may differ between the machines of a scenario. The last two are those of all its disks.
const KEYS: [&str; 8] = ["kernel", "initrd", "cmdline", "boot-protocol", "cpus", "memory", AIO, CACHE];
const AIO: &str = "aio";
const CACHE: &str = "cache";
const EXCLUDE: &str = "exclude";

/// More machines than anybody waits for.
const MOST: usize = 1000;

/// A key and the values it takes, each with its line.
struct Axis {
    key: String,
    values: Vec<(String, usize)>,
}

/// Keys and values, as a cell has them.
type Keys = Vec<(String, String)>;

impl Reader<'_> {
    /// The machines of `request`, which `[machine]` in `line` makes, under `matrix`.
    pub(super) fn cells(&mut self, request: &Request, line: usize, matrix: Option<Table<'_>>) -> Vec<Cell> {
        self.check_files(request, line);
        let (mut axes, mut excluded, mut at) = (Vec::new(), Vec::new(), line);
        if let Some((matrix_line, table)) = matrix {
            at = matrix_line;
            for entry in self.source.entries(table) {
                match entry.key {
                    EXCLUDE => excluded = self.excluded(&entry),
                    key if KEYS.contains(&key) => axes.extend(self.axis(&entry, request)),
                    key => self.unknown(entry.line, key, &[&KEYS[..], &[EXCLUDE]].concat()),
                }
            }
        }
        if request.kernel.is_none() && !axes.iter().any(|axis| axis.key == "kernel") {
            self.wrong(line, "", "the machine has no kernel; write kernel = \"FILE\"");
            return Vec::new();
        }
        let count = axes.iter().try_fold(1_usize, |count, axis| count.checked_mul(axis.values.len()));
        if count.is_none_or(|count| count > MOST) {
            self.wrong(at, "matrix", format_args!("more than {MOST} machines; leave values out"));
            return Vec::new();
        }
        let mut cells = Vec::new();
        for keys in combinations(&axes) {
            let is_in = |one: &Keys| one.iter().all(|pair| keys.contains(pair));
            if excluded.iter().any(|(one, _)| is_in(one)) {
                continue;
            }
            match self.cell(request, &keys, at) {
                Ok(machine) => cells.push(Cell { keys, machine }),
                // The same in many cells is said once.
                Err(error) if self.errors.iter().any(|other| other.1 == error) => {}
                Err(error) => self.errors.push((at, error)),
            }
        }
        for (one, line) in &excluded {
            if !combinations(&axes).iter().any(|keys| one.iter().all(|pair| keys.contains(pair))) {
                self.wrong(*line, EXCLUDE, "the matrix has no such machine; leave it out");
            }
        }
        if cells.is_empty() && self.errors.is_empty() {
            self.wrong(at, EXCLUDE, "no machine is left; exclude fewer");
        }
        cells
    }

    fn axis(&mut self, entry: &Entry<'_>, request: &Request) -> Option<Axis> {
        let items = match entry.value {
            DeValue::Array(items) if !items.is_empty() => items,
            _ => return self.none(entry, format!("a list of values; write it like {} = [\"a\", \"b\"]", entry.key)),
        };
        if [AIO, CACHE].contains(&entry.key) && request.disks.is_none() {
            return self.none(entry, "the machine has no disk that it could be of; write [[machine.disk]]");
        }
        let mut values: Vec<(String, usize)> = Vec::new();
        for item in items {
            let line = self.source.line(item.span().start);
            let place = self.place(line, entry.key);
            let Some(text) = scalar(item.get_ref()) else {
                self.wrong(line, entry.key, "neither a text nor a number; write one of those");
                continue;
            };
            if values.iter().any(|value| value.0 == text) {
                self.wrong(line, entry.key, format_args!("{text} is given twice; give it once"));
            }
            match self.apply(&mut request.clone(), entry.key, &text, line) {
                Err(error) => {
                    self.errors.push((line, error));
                    continue;
                }
                Ok(()) if ["kernel", "initrd"].contains(&entry.key) => {
                    if let Ok(path) = place.path(&text) {
                        self.check_file(&path, line, entry.key);
                    }
                }
                Ok(()) => {}
            }
            values.push((text, line));
        }
        Some(Axis { key: entry.key.to_owned(), values })
    }

    /// Sets `key` of the machine, or of all its disks.
    fn apply(
        &self,
        request: &mut Request,
        key: &str,
        text: &str,
        line: usize,
    ) -> Result<(), crate::config::ConfigError> {
        let place = self.place(line, key);
        let disks = request.disks.iter_mut().flatten();
        match key {
            AIO => {
                let aio = named(&Aio::ALL, Aio::name, text).map_err(|what| place.error(what))?;
                disks.for_each(|disk| disk.aio = aio);
                Ok(())
            }
            CACHE => {
                let cache = named(&CacheMode::ALL, CacheMode::name, text).map_err(|what| place.error(what))?;
                disks.for_each(|disk| disk.cache = cache);
                Ok(())
            }
            key => request.set(&place, key, text),
        }
    }

    fn cell(&self, request: &Request, keys: &Keys, line: usize) -> Result<VmConfig, crate::config::ConfigError> {
        let mut request = request.clone();
        for (key, text) in keys {
            self.apply(&mut request, key, text, line)?;
        }
        for disk in request.disks.iter().flatten() {
            if let (Some(aio), Some(cache)) = (disk.aio, disk.cache)
                && !aio.goes_with(cache)
            {
                let (aio, cache) = (aio.name(), cache.name());
                return Err(self.place(line, "matrix").error(format_args!(
                    "aio={aio} does not go with cache={cache}; write exclude = [{{ aio = \"{aio}\", cache = \"{cache}\" }}]"
                )));
            }
        }
        request.resolve()
    }

    fn excluded(&mut self, entry: &Entry<'_>) -> Vec<(Keys, usize)> {
        let DeValue::Array(items) = entry.value else {
            self.wrong(
                entry.line,
                EXCLUDE,
                "a list of tables; write it like exclude = [{ aio = \"native\", cpus = 1 }]",
            );
            return Vec::new();
        };
        let mut excluded = Vec::new();
        for item in items {
            let line = self.source.line(item.span().start);
            let keys = match item.get_ref() {
                DeValue::Table(table) => self.excluded_keys(table),
                _ => None,
            };
            match keys {
                Some(keys) => excluded.push((keys, line)),
                None => self.wrong(line, EXCLUDE, "not a table of keys of the matrix, such as { aio = \"native\" }"),
            }
        }
        excluded
    }

    fn excluded_keys(&self, table: &DeTable<'_>) -> Option<Keys> {
        let entries = self.source.entries(table);
        let keys: Option<Keys> =
            entries.iter().map(|entry| Some((entry.key.to_owned(), scalar(entry.value)?))).collect();
        keys.filter(|keys| !keys.is_empty() && keys.iter().all(|pair| KEYS.contains(&&*pair.0)))
    }

    /// What a machine is made of is there, before any starts.
    fn check_files(&mut self, request: &Request, line: usize) {
        for (key, path) in [("kernel", &request.kernel), ("initrd", &request.initrd)] {
            if let Some(path) = path {
                let line = self.machine_lines.get(key).copied().unwrap_or(line);
                self.check_file(path, line, key);
            }
        }
        for disk in request.disks.iter().flatten() {
            if let Err(error) = File::open(&disk.path) {
                let line = self.machine_lines.get("disk").copied().unwrap_or(line);
                self.errors.push((
                    line,
                    disk.place.error(format_args!("{}: {error}; name an image that can be read", disk.path.display())),
                ));
            }
        }
    }

    fn check_file(&mut self, path: &Path, line: usize, key: &str) {
        if let Err(error) = File::open(path) {
            self.wrong(line, key, format_args!("{}: {error}; name a file that can be read", path.display()));
        }
    }
}

/// The one of `all` with this name; `auto` is none of them.
fn named<T: Copy>(all: &[T], name: fn(T) -> &'static str, text: &str) -> Result<Option<T>, String> {
    let found = all.iter().copied().find(|one| name(*one) == text);
    if found.is_some() || text == "auto" {
        return Ok(found);
    }
    let names: Vec<_> = all.iter().map(|one| name(*one)).collect();
    Err(format!("{text:?} is none of auto, {}", names.join(", ")))
}

/// Every way to choose, the last key changing fastest; one way if there is nothing to choose.
fn combinations(axes: &[Axis]) -> Vec<Keys> {
    let mut all = vec![Keys::new()];
    for axis in axes {
        let longer = |keys: &Keys| {
            let keys = keys.clone();
            axis.values.iter().map(move |value| {
                let mut keys = keys.clone();
                keys.push((axis.key.clone(), value.0.clone()));
                keys
            })
        };
        all = all.iter().flat_map(longer).collect();
    }
    all
}
