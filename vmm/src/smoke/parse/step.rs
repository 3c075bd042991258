//! `[[step]]`: one action each, with the keys that go with it.

use block::choose::Access;
use toml::de::{DeTable, DeValue};

use super::Reader;
use crate::config::{Entry, OnReboot, VmConfig};
use crate::smoke::keys;
use crate::smoke::partitions::{self, Layout};
use crate::smoke::scenario::{Action, Content, DiskCheck, Ending, Measuring, Silence, Step};
use crate::smoke::shell::Shell;

/// What a step can do, and the keys that may stand beside it.
const ACTIONS: [(&str, &[&str]); 11] = [
    ("wait", TIMED),
    ("wait-regex", TIMED),
    ("send", &[]),
    ("key", &[]),
    ("run", &["status", "output", "output-regex", "timeout", "measure", "max", "since"]),
    ("pause", &[]),
    ("power-button", &[]),
    ("expect", TIMED),
    ("exit-code", TIMED),
    ("check-file", &["content", "contains", "matches", "absent"]),
    ("check-disk", &["partition", "clean", "file", "content", "contains", "matches", "absent"]),
];

const TIMED: &[&str] = &["timeout", "measure", "max", "since"];

const ENDINGS: [(&str, Ending); 4] = [
    ("poweroff", Ending::Poweroff),
    ("reboot", Ending::Reboot),
    ("panic", Ending::Panic),
    ("triple-fault", Ending::TripleFault),
];

/// What a terminal takes as one line, with its end (termios(3), canonical mode).
const LONGEST_TYPED: usize = 4096;
/// The same, less the words that `run` puts around it.
const LONGEST_LINE: usize = 3900;

/// The entries of one step.
type Entries<'t> = Vec<Entry<'t>>;

impl Reader<'_> {
    /// The steps, in an order that is possible. `machine`: the first of the scenario, if there is one.
    /// `silence`: what the console may do while a step waits.
    pub(super) fn steps(
        &mut self,
        entry: &Entry<'_>,
        machine: Option<&VmConfig>,
        silence: Option<Silence>,
    ) -> Vec<Step> {
        let tables = match entry.value {
            DeValue::Array(tables) if !tables.is_empty() => tables,
            _ => {
                self.wrong(entry.line, "step", "steps are tables; write [[step]]");
                return Vec::new();
            }
        };
        let no_reboot = machine.is_some_and(|machine| machine.on_reboot == OnReboot::Exit);
        let mut steps = Vec::new();
        let mut ended: Option<usize> = None;
        for table in tables {
            let line = self.source.line(table.span().start);
            let step = match table.get_ref() {
                DeValue::Table(table) => self.step(line, table, machine),
                _ => self.none(entry, "steps are tables; write [[step]]"),
            };
            let Some(mut step) = step else { continue };
            // A step that says how long it may take may take it in silence, and so may a command, which often has nothing
            // to say.
            let is_free = step.timeout.is_some() || matches!(step.action, Action::Run { .. });
            step.silence = silence.filter(|silence| silence.is_said || !is_free);
            if matches!(step.action, Action::Pause(_)) {
                step.silence = None;
            }
            match ended {
                Some(end) if step.action.needs_machine() => {
                    let what =
                        format!("the machine has ended in line {end}; only check-file and check-disk can follow");
                    self.wrong(line, "step", what);
                }
                None if !step.action.needs_machine() => {
                    self.wrong(
                        line,
                        "step",
                        "a machine that runs cannot be checked; write expect = \"poweroff\" before",
                    );
                }
                _ => {}
            }
            if step.action.ends_machine(no_reboot) {
                ended.get_or_insert(line);
            }
            steps.push(step);
        }
        steps
    }

    fn step(&mut self, line: usize, table: &DeTable<'_>, machine: Option<&VmConfig>) -> Option<Step> {
        let entries = self.source.entries(table);
        let mut actions = entries.iter().filter(|entry| ACTIONS.iter().any(|action| action.0 == entry.key));
        let names = || ACTIONS.map(|action| action.0).join(", ");
        let Some(first) = actions.next() else {
            let unknown = entries.iter().find(|entry| !ACTIONS.iter().any(|action| action.1.contains(&entry.key)));
            match unknown {
                Some(entry) => self.unknown(entry.line, entry.key, &ACTIONS.map(|action| action.0)),
                None => self.wrong(line, "step", format_args!("a step does something: one of {}", names())),
            }
            return None;
        };
        if let Some(second) = actions.next() {
            let what = format!("a step does one thing, and this one has {} already; begin another [[step]]", first.key);
            self.wrong(second.line, second.key, what);
            return None;
        }
        let allowed = ACTIONS.iter().find(|action| action.0 == first.key).map_or(&[][..], |action| action.1);
        for entry in entries.iter().filter(|entry| entry.key != first.key && !allowed.contains(&entry.key)) {
            self.unknown(entry.line, entry.key, &[&[first.key], allowed].concat());
        }
        let errors = self.errors.len();
        let timeout = find(&entries, "timeout").and_then(|entry| self.duration(entry));
        let measure = self.measure(&entries, first.key == "run");
        let (action, title) = self.action(first, &entries, machine)?;
        let place = format!("{}:{}", self.source.path.display(), first.line);
        (errors == self.errors.len()).then_some(Step { place, title, action, timeout, silence: None, measure })
    }

    fn action(&mut self, entry: &Entry<'_>, all: &Entries<'_>, machine: Option<&VmConfig>) -> Option<(Action, String)> {
        Some(match entry.key {
            "wait" => {
                let pattern = self.pattern(entry)?;
                let title = format!("wait for {pattern}");
                (Action::Wait(pattern), title)
            }
            "wait-regex" => {
                let pattern = self.regex(entry)?;
                let title = format!("wait for {pattern}");
                (Action::Wait(pattern), title)
            }
            "send" => {
                let text = self.line_to_type(entry)?;
                let title = format!("send {text:?}");
                (Action::Send([text.as_bytes(), b"\n"].concat()), title)
            }
            "key" => {
                let name = self.text(entry)?;
                let bytes = self.kept(entry, keys::bytes(&name))?;
                (Action::Send(bytes), format!("press {name}"))
            }
            "run" => self.run(entry, all)?,
            "pause" => {
                let time = self.duration(entry)?;
                (Action::Pause(time), format!("pause for {time:?}"))
            }
            "power-button" if !self.boolean(entry)? => return self.none(entry, "say true, or leave the step out"),
            "power-button" => (Action::PowerButton, "press the power button".to_owned()),
            "expect" => {
                let ending = self.one_of(entry, &ENDINGS)?;
                let name = ENDINGS.iter().find(|one| one.1 == ending).map_or("", |one| one.0);
                (Action::Expect(ending), format!("expect {name}"))
            }
            "exit-code" => {
                let code = self.number(entry, 255)?;
                (Action::Expect(Ending::Code(code as u8)), format!("expect exit code {code}"))
            }
            "check-file" => {
                let path = self.path(entry)?;
                let title = format!("check file {}", path.display());
                (Action::CheckFile { path, content: self.content(all)? }, title)
            }
            _ => self.check_disk(entry, all, machine)?,
        })
    }

    fn run(&mut self, entry: &Entry<'_>, all: &Entries<'_>) -> Option<(Action, String)> {
        let command = self.line_to_type(entry)?;
        if command.trim().is_empty() {
            return self.none(entry, "no command; write one, such as \"uname -r\"");
        }
        let typed = Shell::new(&command).input().len();
        if typed > LONGEST_TYPED {
            let what = format!(
                "it becomes {typed} bytes on the command line, with each quote four times, and a terminal takes {LONGEST_TYPED}"
            );
            return self.none(entry, what);
        }
        // Whatever is wrong with one of them, the others are looked at too.
        let status = match find(all, "status") {
            Some(any) if matches!(any.value, DeValue::String(text) if text == "any") => Some(None),
            Some(entry) => self.number(entry, 255).map(|status| Some(status as u8)),
            None => Some(Some(0)),
        };
        let text = find(all, "output").map(|entry| self.pattern(entry));
        let regex = find(all, "output-regex").map(|entry| (entry, self.regex(entry)));
        let output = match (text, regex) {
            (Some(_), Some((entry, _))) => return self.none(entry, "there is output already; leave one out"),
            (Some(pattern), None) | (None, Some((_, pattern))) => Some(pattern?),
            (None, None) => None,
        };
        let status = status?;
        let title = format!("run {command:?}");
        Some((Action::Run { command, status, output }, title))
    }

    /// What is typed and ended with Enter.
    fn line_to_type(&mut self, entry: &Entry<'_>) -> Option<String> {
        let text = self.text(entry)?;
        if text.contains(char::is_control) {
            return self
                .none(entry, "one line without control characters; use a step for each line, and key = \"ctrl-c\"");
        }
        if text.len() > LONGEST_LINE {
            return self.none(entry, format!("a terminal takes no line longer than {LONGEST_LINE} bytes"));
        }
        Some(text)
    }

    fn measure(&mut self, all: &Entries<'_>, is_run: bool) -> Option<Measuring> {
        let max = find(all, "max").and_then(|entry| self.duration(entry));
        let since = find(all, "since").and_then(|entry| self.one_of(entry, &[("start", false), ("step", true)]));
        if let Some(entry) = find(all, "measure") {
            return Some(Measuring { name: self.name(entry)?, max, since_step: since.unwrap_or(is_run) });
        }
        for entry in ["max", "since"].iter().filter_map(|key| find(all, key)) {
            self.wrong(entry.line, entry.key, "of which time? write measure = \"NAME\" too");
        }
        None
    }

    /// What is asked of a file; `Exists` if nothing more is. `None`: there is a mistake.
    fn content(&mut self, all: &Entries<'_>) -> Option<Content> {
        let mut asked = Vec::new();
        for entry in all {
            let content = match entry.key {
                "content" => Content::Equals(self.text(entry)?),
                "contains" => Content::Has(self.pattern(entry)?),
                "matches" => Content::Has(self.regex(entry)?),
                "absent" if self.boolean(entry)? => Content::Absent,
                _ => continue,
            };
            asked.push((entry, content));
        }
        if let Some((entry, _)) = asked.get(1) {
            return self.none(entry, format!("{} is asked already; use a step for each", asked[0].0.key));
        }
        Some(asked.pop().map_or(Content::Exists, |(_, content)| content))
    }

    fn check_disk(
        &mut self,
        entry: &Entry<'_>,
        all: &Entries<'_>,
        machine: Option<&VmConfig>,
    ) -> Option<(Action, String)> {
        let id = self.text(entry)?;
        // Whatever is wrong with one of them, the others are looked at too.
        let (check, partition) = (self.disk_check(entry, all), self.partition(all));
        let machine = machine?;
        let Some(disk) = machine.disks.iter().position(|disk| disk.id == id) else {
            let ids: Vec<_> = machine.disks.iter().map(|disk| &*disk.id).collect();
            let ids = if ids.is_empty() { "it has none".to_owned() } else { ids.join(", ") };
            return self.none(entry, format!("the machine has no disk {id:?} ({ids})"));
        };
        let (check, partition) = (check?, partition?);
        let (path, access) = (&machine.disks[disk].path, machine.disks[disk].access);
        // What a snapshot wrote is looked at in a copy.
        if access == Access::Snapshot && std::fs::metadata(path).is_ok_and(|image| !image.is_file()) {
            let what = "only an image in a file can be copied; make one, or say readonly = true or snapshot = false";
            return self.none(entry, format!("{id} is {}: {what}", path.display()));
        }
        // Later it is too late to say so: which one is meant cannot be seen.
        if let Ok(file) = std::fs::File::open(path)
            && let layout = Layout::of(&file)
            && partition.is_none()
            && layout.is_ambiguous()
            && let Err(what) = layout.ext(None)
        {
            return self.none(entry, format!("{id} {what}"));
        }
        let on = partition.map_or_else(|| id.clone(), |number| format!("partition {number} of {id}"));
        let title = match &check {
            DiskCheck::Clean => format!("check the filesystem of {on}"),
            DiskCheck::File { path, .. } => format!("check {path} on {on}"),
        };
        Some((Action::CheckDisk { disk, partition, check }, title))
    }

    /// What is asked of a disk.
    fn disk_check(&mut self, entry: &Entry<'_>, all: &Entries<'_>) -> Option<DiskCheck> {
        let content = self.content(all);
        let clean = find(all, "clean").map(|entry| (entry, self.boolean(entry)));
        let file = find(all, "file").map(|entry| (entry, self.text(entry)));
        let file = match file {
            Some((entry, path)) => Some((entry, self.path_in_image(entry, path?))),
            None => None,
        };
        let content = content?;
        Some(match (file, clean) {
            (Some((_, path)), None) => DiskCheck::File { path: path?, content },
            (Some((entry, _)), Some(_)) => {
                return self.none(entry, "a step checks one thing; use another for the file");
            }
            (None, Some((entry, on))) if !on? => return self.none(entry, "say true, or leave it out"),
            (None, _) if !matches!(content, Content::Exists) => {
                return self.none(entry, "the content of what? write file = \"/PATH\" too");
            }
            (None, _) => DiskCheck::Clean,
        })
    }

    /// `None`: there is a mistake.
    #[expect(clippy::option_option, reason = "a mistake, or nothing said")]
    fn partition(&mut self, all: &Entries<'_>) -> Option<Option<u32>> {
        let Some(entry) = find(all, "partition") else { return Some(None) };
        match self.number(entry, partitions::MOST)? {
            0 => self.none(entry, "partitions are counted from 1"),
            number => Some(Some(number)),
        }
    }

    /// debugfs gets it as a word of its command language.
    fn path_in_image(&mut self, entry: &Entry<'_>, path: String) -> Option<String> {
        if !path.starts_with('/') || path.contains(|letter: char| letter.is_control() || letter == '"') {
            return self.none(entry, "a path that begins with / and has neither quotes nor control characters");
        }
        Some(path)
    }
}

fn find<'e, 't>(entries: &'e Entries<'t>, key: &str) -> Option<&'e Entry<'t>> {
    entries.iter().find(|entry| entry.key == key)
}
