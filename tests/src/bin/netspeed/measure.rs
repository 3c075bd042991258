//! One machine on one backend: its guest is started, set up, and measured row by row.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use tests::network::Running;
use tests::{Machine, Network, Wired};

use crate::cost::Cost;
use crate::{Backend, Name};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Row {
    /// Guest to host, one stream of TCP
    Send,
    /// Guest to host, four streams
    Send4,
    /// Host to guest, one stream
    Receive,
    /// Host to guest, four streams
    Receive4,
    /// A byte there and a byte back over TCP, one after the other
    Requests,
}

/// What one measurement showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// MiB a second, or requests a second.
    pub(crate) speed: f64,
    /// What it cost, for each MiB or request.
    pub(crate) cost: Cost,
}

/// What all measurements share.
pub(crate) struct Bench<'a> {
    pub(crate) folder: &'a Path,
    pub(crate) initrd: &'a Path,
    /// Another build of skiff.
    pub(crate) other: Option<&'a Path>,
    pub(crate) seconds: u32,
    pub(crate) queues: u32,
}

const PORT: u16 = 7000;

impl Bench<'_> {
    /// Starts a machine and measures all `rows` with it.
    pub(crate) fn run(&self, name: Name, backend: Backend, rows: &[Row]) -> anyhow::Result<Vec<(Row, Sample)>> {
        let network = Network::new().context("no network to measure in")?;
        let queues = if backend == Backend::Passt { 1 } else { self.queues };
        let mut wired = Wired::new(&network, self.initrd, queues).vhost(backend == Backend::Vhost);
        wired = match (name, self.other) {
            (Name::Qemu, _) => wired.qemu(),
            (Name::Other, Some(program)) => wired.program(program),
            _ => wired,
        };
        let _passt;
        let (mut guest, host) = if backend == Backend::Passt {
            let socket = self.folder.join("passt.socket");
            network.uplink();
            _passt = network.passt(&socket);
            let mut guest = wired.boot(&format!("socket={}", socket.display()));
            guest.ask("ip link set eth0 up && udhcpc -i eth0 -n -q -f -t 10");
            (guest, Network::GATEWAY)
        } else {
            network.tap("tap0", queues);
            let mut guest = wired.boot("tap=tap0");
            guest.ask("ip link set eth0 up && ip addr add 192.0.2.2/24 dev eth0");
            (guest, "192.0.2.1")
        };
        let _peer = network.serve(PORT);
        let _iperf: Running = network.start(Command::new("iperf3").args(["-s", "--forceflush"]));
        // The guest's first housekeeping is not what is measured.
        thread::sleep(Duration::from_millis(500));
        rows.iter().map(|row| Ok((*row, self.measure(&mut guest, *row, host)?))).collect()
    }

    fn measure(&self, guest: &mut Machine, row: Row, host: &str) -> anyhow::Result<Sample> {
        let before = Cost::of(guest.pid())?;
        let (speed, count) = match row {
            Row::Send => self.iperf(guest, host, "")?,
            Row::Send4 => self.iperf(guest, host, "-P 4")?,
            Row::Receive => self.iperf(guest, host, "-R")?,
            Row::Receive4 => self.iperf(guest, host, "-R -P 4")?,
            Row::Requests => {
                // passt of 2023 sometimes resets a connection that follows a busy one.
                let run = format!("peer requests {host}:{PORT} {}", self.seconds);
                let text = guest.ask(&format!("{run} 2>/dev/null || {run} 2>/dev/null || {run}"));
                let speed: f64 = text.split(' ').next().context("no number")?.parse()?;
                (speed, speed * f64::from(self.seconds))
            }
        };
        Ok(Sample { speed, cost: Cost::of(guest.pid())?.since(&before).per(count) })
    }

    /// MiB a second, and MiB, as the receiver counts them.
    fn iperf(&self, guest: &mut Machine, host: &str, options: &str) -> anyhow::Result<(f64, f64)> {
        let run = format!("iperf3 -c {host} -t {} {options} -J >/tmp/iperf", self.seconds);
        // Of a long report only what counts: the console is slow.
        let text = guest.ask(&format!("{run}; grep -A 6 sum_received /tmp/iperf || cat /tmp/iperf"));
        let number = |key: &str| -> anyhow::Result<f64> {
            let (_, rest) = text.split_once(&format!("\"{key}\":")).with_context(|| format!("no {key}: {text}"))?;
            Ok(rest.trim_start().split([',', '\n', '\t']).next().context("no number")?.trim().parse()?)
        };
        let (bytes, speed) = (number("bytes")?, number("bits_per_second")? / 8.0);
        ensure!(bytes > 0.0, "nothing arrived: {text}");
        Ok((speed / f64::from(1 << 20), bytes / f64::from(1 << 20)))
    }
}
