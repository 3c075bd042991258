//! A scenario's file. Every complaint starts with file and line, and all of them are made at once. Used on the main thread,
//! before anything starts.

mod matrix;
mod step;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::choose::Access;
use toml::de::{DeTable, DeValue};

use super::pattern::Pattern;
use super::scenario::{Scenario, Silence};
use super::trouble::{KINDS, Rules, Weight};
use crate::config::{ConfigError, Entry, KEYS as MACHINE_KEYS, Place, Request, Source, scalar, unknown_key};

const KEYS: [&str; 7] = ["name", "timeout", "silence", "machine", "matrix", "fail", "step"];

/// How long a machine may take when nothing is said.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The longest time that can be written: more than a week.
const LONGEST: f64 = 1e6;

impl Scenario {
    /// Reads `file`. Relative paths in it start at its folder.
    ///
    /// # Errors
    /// All that is wrong with it, a line each, in the order of the file.
    pub fn read(file: &Path) -> Result<Self, Vec<ConfigError>> {
        let shown = file.display();
        let wrong = |what: String| vec![ConfigError::new(format!("{shown}: {what}"))];
        let bytes = std::fs::read(file).map_err(|error| wrong(format!("{error}; name a scenario that can be read")))?;
        let text = String::from_utf8(bytes).map_err(|_| wrong("not text; name a TOML file".to_owned()))?;
        Self::parse(file, &text)
    }

    /// Understands `text`, the content of `file`.
    ///
    /// # Errors
    /// As for [`Scenario::read`].
    pub fn parse(file: &Path, text: &str) -> Result<Self, Vec<ConfigError>> {
        let source = Source { path: file, text };
        let document = source.parse().map_err(|error| vec![error])?;
        let mut reader = Reader { source, errors: Vec::new(), machine_lines: BTreeMap::new() };
        let scenario = reader.scenario(document.get_ref());
        if reader.errors.is_empty() { Ok(scenario) } else { Err(reader.in_order()) }
    }
}

/// Reads on after a mistake, to find the others.
struct Reader<'a> {
    source: Source<'a>,
    /// With the line it is about.
    errors: Vec<(usize, ConfigError)>,
    /// Where the keys of `[machine]` are.
    machine_lines: BTreeMap<String, usize>,
}

/// `silence`.
#[derive(Clone, Copy)]
enum Patience {
    /// Nothing is said: half of `timeout`.
    Half,
    Said(Duration),
    Off,
}

/// A table and the line it begins at.
type Table<'t> = (usize, &'t DeTable<'t>);

impl Reader<'_> {
    fn scenario(&mut self, document: &DeTable<'_>) -> Scenario {
        let file = self.source.path.to_owned();
        let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let mut name = stem.unwrap_or_default();
        let (mut timeout, mut silence) = (TIMEOUT, Patience::Half);
        let mut rules = Rules::default();
        let (mut machine, mut matrix, mut steps) = (None, None, None);
        for entry in self.source.entries(document) {
            match entry.key {
                "name" => name = self.name(&entry).unwrap_or(name),
                "timeout" => timeout = self.duration(&entry).unwrap_or(timeout),
                "silence" => silence = self.silence(&entry).unwrap_or(silence),
                "machine" => machine = self.table(&entry),
                "matrix" => matrix = self.table(&entry),
                "fail" => rules = self.rules(&entry),
                "step" => steps = Some(entry),
                key if MACHINE_KEYS.contains(&key) => {
                    self.wrong(entry.line, key, "belongs to the machine; write it below [machine]");
                }
                key => self.unknown(entry.line, key, &KEYS),
            }
        }
        let request = machine.map(|machine| self.machine(machine));
        let cells = if let (Some(request), Some((line, _))) = (&request, machine) {
            self.cells(request, line, matrix)
        } else {
            self.wrong(1, "", "there is no [machine]; write one, with kernel = \"FILE\" below it");
            Vec::new()
        };
        let silence = match silence {
            Patience::Off => None,
            Patience::Said(limit) => Some(Silence { limit, is_said: true }),
            Patience::Half => Some(Silence { limit: timeout / 2, is_said: false }),
        };
        let steps = if let Some(entry) = &steps {
            self.steps(entry, cells.first().map(|cell| &cell.machine), silence)
        } else {
            self.wrong(1, "", "there is no [[step]]; write one, such as wait = \"login:\" below it");
            Vec::new()
        };
        Scenario { name, file, timeout, cells, rules, steps }
    }

    /// `[machine]`: the keys of `skiff run --config`, but the console is the runner's.
    fn machine(&mut self, (_, table): Table<'_>) -> Request {
        let mut request = Request::default();
        for entry in self.source.entries(table) {
            self.machine_lines.insert(entry.key.to_owned(), entry.line);
            if entry.key == "serial" {
                self.wrong(entry.line, "serial", "the scenario reads the console itself; leave it out");
            } else if ["disk", "net"].contains(&entry.key) && !matches!(entry.value, DeValue::Array(_)) {
                let what = format!("a list of tables; write [[machine.{}]] and its keys below it", entry.key);
                self.wrong(entry.line, entry.key, what);
            } else if let Err(error) = request.set_entry(&self.source, &entry) {
                self.errors.push((entry.line, error));
            }
        }
        // Of what may be written to, only what the scenario says so of is.
        for disk in request.disks.iter_mut().flatten() {
            disk.access.get_or_insert(Access::Snapshot);
        }
        request
    }

    /// `[fail]`.
    fn rules(&mut self, entry: &Entry<'_>) -> Rules {
        let mut rules = Rules::default();
        let Some((_, table)) = self.table(entry) else { return rules };
        for entry in self.source.entries(table) {
            match entry.key {
                "allow" => rules.allow = self.regexes(&entry),
                "deny" => rules.deny = self.regexes(&entry),
                key => {
                    if let Some(kind) = KINDS.iter().position(|kind| kind.name == key) {
                        rules.weights[kind] = self.one_of(&entry, &Weight::ALL).unwrap_or(Weight::Fail);
                    } else {
                        let keys: Vec<_> = KINDS.iter().map(|kind| kind.name).chain(["allow", "deny"]).collect();
                        self.unknown(entry.line, key, &keys);
                    }
                }
            }
        }
        rules
    }

    fn regexes(&mut self, entry: &Entry<'_>) -> Vec<Pattern> {
        let DeValue::Array(items) = entry.value else {
            self.wrong(entry.line, entry.key, "a list of regular expressions; write it like ['pattern', 'other']");
            return Vec::new();
        };
        let mut patterns = Vec::new();
        for item in items {
            let line = self.source.line(item.span().start);
            let regex = match item.get_ref() {
                DeValue::String(text) => Pattern::regex(text),
                _ => Err("not a text; write a regular expression in quotes".to_owned()),
            };
            match regex {
                Ok(pattern) => patterns.push(pattern),
                Err(what) => self.wrong(line, entry.key, what),
            }
        }
        patterns
    }

    /// A name that can stand in a file's name and in a report.
    fn name(&mut self, entry: &Entry<'_>) -> Option<String> {
        let name = self.text(entry)?;
        if name.is_empty() || name.contains(|letter: char| letter.is_control() || letter == '/') {
            return self.none(entry, "a name is one line without slashes; write it like \"boots\"");
        }
        Some(name)
    }

    fn text(&mut self, entry: &Entry<'_>) -> Option<String> {
        match entry.value {
            DeValue::String(text) => Some(text.to_string()),
            _ => self.none(entry, "not a text; write it in quotes"),
        }
    }

    fn boolean(&mut self, entry: &Entry<'_>) -> Option<bool> {
        match entry.value {
            DeValue::Boolean(on) => Some(*on),
            _ => self.none(entry, "say true or false"),
        }
    }

    fn pattern(&mut self, entry: &Entry<'_>) -> Option<Pattern> {
        let text = self.text(entry)?;
        self.kept(entry, Pattern::text(&text))
    }

    fn regex(&mut self, entry: &Entry<'_>) -> Option<Pattern> {
        let text = self.text(entry)?;
        self.kept(entry, Pattern::regex(&text))
    }

    fn path(&mut self, entry: &Entry<'_>) -> Option<PathBuf> {
        let text = self.text(entry)?;
        let place = self.source.place(entry.line, entry.key);
        place.path(&text).map_err(|error| self.errors.push((entry.line, error))).ok()
    }

    fn duration(&mut self, entry: &Entry<'_>) -> Option<Duration> {
        let time = match entry.value {
            DeValue::String(text) => duration(text),
            _ => None,
        };
        match time {
            Some(time) if !time.is_zero() => Some(time),
            Some(_) => self.none(entry, "no time at all; write it like \"30s\""),
            None => self.none(entry, "not a time; write it like \"500ms\", \"30s\" or \"5m\""),
        }
    }

    fn silence(&mut self, entry: &Entry<'_>) -> Option<Patience> {
        match entry.value {
            DeValue::String(text) if text == "off" => Some(Patience::Off),
            _ => self.duration(entry).map(Patience::Said),
        }
    }

    fn one_of<T: Copy>(&mut self, entry: &Entry<'_>, all: &[(&str, T)]) -> Option<T> {
        let text = self.text(entry)?;
        let found = all.iter().find(|one| one.0 == text).map(|one| one.1);
        let names = || all.iter().map(|one| one.0).collect::<Vec<_>>().join(", ");
        found.or_else(|| self.none(entry, format!("{text:?} is none of {}", names())))
    }

    fn table<'t>(&mut self, entry: &Entry<'t>) -> Option<Table<'t>> {
        match entry.value {
            DeValue::Table(table) => Some((entry.line, table)),
            _ => self.none(entry, format!("a table; write [{}]", entry.key)),
        }
    }

    /// The number of a key, from `0` to `most`.
    fn number(&mut self, entry: &Entry<'_>, most: u32) -> Option<u32> {
        let number = match entry.value {
            DeValue::Integer(_) => scalar(entry.value).and_then(|text| text.parse().ok()),
            _ => None,
        };
        number.filter(|number| *number <= most).or_else(|| self.none(entry, format!("not a number from 0 to {most}")))
    }

    fn kept<T>(&mut self, entry: &Entry<'_>, value: Result<T, String>) -> Option<T> {
        value.map_err(|what| self.wrong(entry.line, entry.key, what)).ok()
    }

    fn none<T>(&mut self, entry: &Entry<'_>, what: impl std::fmt::Display) -> Option<T> {
        self.wrong(entry.line, entry.key, what);
        None
    }

    fn unknown(&mut self, line: usize, key: &str, keys: &[&str]) {
        self.errors.push((line, unknown_key(&self.source.place(line, ""), key, keys)));
    }

    fn wrong(&mut self, line: usize, key: &str, what: impl std::fmt::Display) {
        self.errors.push((line, self.source.place(line, key).error(what)));
    }

    fn place(&self, line: usize, key: &str) -> Place {
        self.source.place(line, key)
    }

    fn in_order(mut self) -> Vec<ConfigError> {
        self.errors.sort_by_key(|error| error.0);
        self.errors.into_iter().map(|error| error.1).collect()
    }
}

/// A number with a unit: ms, s, m or h.
fn duration(text: &str) -> Option<Duration> {
    let at = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
    let (number, unit) = text.split_at(at);
    let unit = match unit.trim_start() {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let seconds = number.parse::<f64>().ok()? * unit;
    (seconds <= LONGEST).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests;
