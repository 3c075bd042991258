//! Who takes part in a run: skiff, and those it is compared with that are there, run the guest and can do some of the work.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use anyhow::bail;

use super::Measured;
use super::cell::Content;
use super::image::Image;
use super::machine::Machines;
use super::plan::Plan;
use super::subject::Subject;

/// Those who take part, and what there is to say of the others.
pub(super) struct Field {
    /// Skiff first.
    pub(super) subjects: Vec<Subject>,
    /// A line for each who was left out of something.
    pub(super) left_out: Vec<String>,
    /// Who cannot take part is left out, and that is no error.
    if_there: bool,
}

impl Field {
    /// Those of the plan whose programs are there.
    ///
    /// # Errors
    /// When one is not that must be.
    pub(super) fn of(plan: &Plan) -> anyhow::Result<Self> {
        let mut field = Self { subjects: plan.subjects(), left_out: Vec::new(), if_there: plan.if_there };
        field.keep(find)?;
        Ok(field)
    }

    /// Keeps those who run the guest, and of whom some cell can be asked for.
    ///
    /// # Errors
    /// When one does not that must.
    pub(super) fn try_out(
        &mut self,
        machines: &Machines<'_>,
        cells: &[Measured],
        images: &BTreeMap<Content, Image>,
    ) -> anyhow::Result<()> {
        self.keep(|subject| {
            if subject.program().is_none() {
                return Ok(());
            }
            let Some(able) = cells.iter().find(|cell| subject.lacks(&cell.cell, cell.engine()).is_none()) else {
                let why = cells.iter().find_map(|cell| subject.lacks(&cell.cell, cell.engine())).unwrap_or_default();
                return Err(Obstacle::new(format!("it can do the work of no cell: {why}"), "ask for other cells"));
            };
            let path = images[&able.cell.work.content].path();
            match machines.try_out(subject, &able.cell, able.engine(), &path) {
                // Interrupted, it shows nothing, and no measurement follows.
                Err(error) if !machines.stop.load(Ordering::Relaxed) => {
                    Err(Obstacle::new(format!("the guest does not run there: {error:#}"), "mend that"))
                }
                _ => Ok(()),
            }
        })?;
        for &subject in &self.subjects {
            let mut reasons = BTreeMap::<&str, usize>::new();
            for cell in cells {
                if let Some(why) = subject.lacks(&cell.cell, cell.engine()) {
                    *reasons.entry(why).or_default() += 1;
                }
            }
            let lines = reasons.into_iter().map(|(why, count)| {
                format!("{} is left out of {count} of {} cells: {why}", subject.name(), cells.len())
            });
            self.left_out.extend(lines);
        }
        Ok(())
    }

    /// Those who can do the work of a cell.
    pub(super) fn able(&self, cell: &Measured) -> impl Iterator<Item = Subject> {
        self.subjects.iter().copied().filter(|subject| subject.lacks(&cell.cell, cell.engine()).is_none())
    }

    /// Those with whom `check` is content.
    fn keep(&mut self, check: impl Fn(Subject) -> Result<(), Obstacle>) -> anyhow::Result<()> {
        let mut kept = Vec::new();
        for &subject in &self.subjects {
            let name = subject.name();
            match check(subject) {
                Ok(()) => kept.push(subject),
                Err(Obstacle { why, .. }) if self.if_there => self.left_out.push(format!("{name} is left out: {why}")),
                Err(Obstacle { why, remedy }) => bail!("--vs {name}: {why}; {remedy} or leave {name} out"),
            }
        }
        self.subjects = kept;
        Ok(())
    }
}

/// Why somebody cannot take part.
struct Obstacle {
    why: String,
    remedy: &'static str,
}

impl Obstacle {
    fn new(why: String, remedy: &'static str) -> Self {
        Self { why, remedy }
    }
}

/// Whether the program of `subject` is there and says its version.
fn find(subject: Subject) -> Result<(), Obstacle> {
    let Some(program) = subject.program() else { return Ok(()) };
    let mut version = Command::new(program);
    match version.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(Obstacle::new(format!("{program} --version fails"), "mend that")),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let package = subject == Subject::Qemu;
            let remedy = if package { "install it (apt-get install qemu-system-x86)" } else { "install it" };
            Err(Obstacle::new(format!("there is no {program}"), remedy))
        }
        Err(error) => Err(Obstacle::new(format!("{program}: {error}"), "mend that")),
    }
}
