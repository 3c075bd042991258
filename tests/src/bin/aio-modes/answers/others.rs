//! Skiff beside the host without a machine and beside QEMU, and what its vCPUs do meanwhile.

use super::{Count, NEAR, SKIFF, by_engine, iops, missing, section, side_by_side, table, word, work};
use crate::figures::{Cell, Ratio, Results, Verdict, confidence};

/// A vCPU that polls and never waits has all of a CPU, but for what the host does there.
const ALL_OF_A_CPU: f64 = 0.95;

pub(super) fn host(results: &Results) -> String {
    let claim = "Native AIO past the page cache makes user-space back ends as good as the kernel's own";
    let (mut verdicts, mut rows) = (Vec::new(), Vec::new());
    for cells in side_by_side(results) {
        let mut row = vec![work(cells[0])];
        for cell in cells {
            let Some(ratio) = Ratio::of((cell, SKIFF), (cell, "host")) else { continue };
            let verdict = ratio.is_at_least(NEAR);
            verdicts.push(verdict);
            row.push(format!("{}, {}", ratio.text(), word(verdict)));
        }
        rows.push(row);
    }
    if verdicts.is_empty() {
        return missing(claim, "randread");
    }
    let count = Count::of(verdicts);
    let verdict =
        format!("{}: at least {NEAR:.2} of the same engine without a machine? {}.", count.verdict(), count.cells());
    let head = ["skiff / host, at least 0.90", "threads", "native", "io_uring"];
    section(claim, &verdict, &table(&head, &rows))
}

/// What part of the host is aimed at.
fn aim(cell: Cell<'_>) -> f64 {
    match () {
        () if cell.word("content") == "hole" => 0.6,
        () if cell.number("depth") == 1 => 0.85,
        () => 0.95,
    }
}

pub(super) fn known(results: &Results) -> String {
    let claim = "How far skiff is from the host, and never behind QEMU";
    let (mut of_host, mut of_qemu, mut holes, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for cell in results.cells("known") {
        let to = |subject| Ratio::of((cell, SKIFF), (cell, subject));
        let (Some(host), Some(qemu)) = (to("host"), to("qemu")) else { continue };
        let (near, ahead) = (host.is_at_least(aim(cell)), qemu.is_at_least(1.0));
        of_host.push(near);
        of_qemu.push(ahead);
        let is_hole = cell.word("content") == "hole";
        holes.extend(is_hole.then(|| qemu.is_at_least(3.0)));
        let others = ["host", "qemu"].map(|subject| cell.iops(subject).unwrap_or_default());
        rows.push(vec![
            format!("{}, {}", cell.word("aio"), work(cell)),
            iops(cell),
            format!("{:.0}", others[0]),
            format!("{:.0}", others[1]),
            host.text(),
            format!("{:.2}: {}", aim(cell), word(near)),
            qemu.text(),
            word(ahead),
        ]);
    }
    if rows.is_empty() {
        return missing(claim, "known");
    }
    let (host, qemu, holes) = (Count::of(of_host), Count::of(of_qemu), Count::of(holes));
    let verdict = format!(
        "Is the aim of the host's figure reached? {}. Is skiff at least as fast as QEMU with an I/O thread? {}. Three times as fast \
         on holes? {}.\n{}What stands in the way where an aim is not reached: [performance.md](performance.md).",
        host.cells(),
        qemu.cells(),
        holes.cells(),
        second_look(&results.cells("known"))
    );
    let head = ["", "skiff /s", "host /s", "qemu /s", "skiff/host", "aim", "skiff/qemu", "as fast"];
    section(claim, &verdict, &table(&head, &rows))
}

/// What to think of cells that were measured again because of what they had shown.
fn second_look(cells: &[Cell<'_>]) -> String {
    let rounds = || cells.iter().map(|cell| cell.rounds());
    let (Some(first), Some(last)) = (rounds().min(), rounds().max()) else { return String::new() };
    if first == last {
        return String::new();
    }
    // Each look may err, and that they are of the same rounds does not make it more (Boole's inequality).
    let both = confidence(first) + confidence(last) - 100.0;
    format!(
        "Where it was open whether QEMU is faster, {} more rounds were added, at most to four cells. Of those two looks either may \
         err, so what is said of skiff/qemu is right with {:.0} % at least, not {:.0} %.\n",
        last - first,
        both.floor(),
        confidence(first).floor()
    )
}

pub(super) fn vcpu(results: &Results) -> String {
    let claim = "A vCPU must never sleep because of a disk";
    let parts = ["randread", "randwrite"];
    let (mut verdicts, mut rows) = (Vec::new(), Vec::new());
    for cells in parts.iter().flat_map(|part| by_engine(&results.cells(part))) {
        let mut row = vec![work(cells[0])];
        for cell in cells {
            let Some(share) = cell.vcpu_share() else { continue };
            // One that has less waited, or something else had its CPU.
            verdicts.push(if share >= ALL_OF_A_CPU { Verdict::Yes } else { Verdict::Open });
            row.push(format!("{share:.3}"));
        }
        rows.push(row);
    }
    if verdicts.is_empty() {
        return missing(claim, parts[0]);
    }
    let count = Count::of(verdicts);
    let verdict = format!(
        "{}: a vCPU whose guest looks for completions all the time, with a CPU of its own, runs all the time unless something makes \
         it wait. Did it run for at least {ALL_OF_A_CPU:.2} of the time? {}. One that did not has waited, or something else had its CPU.",
        count.verdict(),
        count.cells()
    );
    let head = ["CPU seconds of the vCPU in a second, least of the rounds", "threads", "native", "io_uring"];
    section(claim, &verdict, &table(&head, &rows))
}
