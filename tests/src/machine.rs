//! A machine under test: the process, its console on pipes, and the conversation with the guest of
//! `resources/rootfs/init`. Owned by the test thread; dropping it kills the process.

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::{Console, assets};

/// How long a guest may take for anything: an emulated machine on a busy host is slow, a hung one stays so.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A command line of `skiff run`.
#[derive(Debug)]
pub struct Skiff {
    command: Command,
    cmdline: String,
}

impl Default for Skiff {
    fn default() -> Self {
        Self::new()
    }
}

impl Skiff {
    /// `skiff run` and nothing else.
    pub fn new() -> Self {
        Self::of(&assets::skiff())
    }

    /// The same of another build, which is at `program`.
    pub fn of(program: &Path) -> Self {
        let mut command = Command::new(program);
        command.arg("run");
        Self { command, cmdline: String::new() }
    }

    /// The stock kernel with the test guest's initrd and a quiet console: warnings and worse only.
    pub fn linux() -> Self {
        Self::kernel("vmlinuz")
    }

    /// The same with another file of the guest as the kernel.
    pub fn kernel(name: &str) -> Self {
        Self::with(name, &assets::guest("initrd.img"))
    }

    /// The stock kernel with the test guest and fio and mkfs.ext4 in it. `None` if these were not built, which is then
    /// said. The initrd is made in `folder`.
    ///
    /// # Panics
    /// If that cannot be written to.
    pub fn with_tools(folder: &Path) -> Option<Self> {
        let Some(initrd) = assets::tools_initrd(folder) else {
            let reason = "no fio for the guest; resources/rootfs/tools makes it where a mirror can be reached";
            skip::because(reason);
            return None;
        };
        Some(Self::with("vmlinuz", &initrd))
    }

    fn with(kernel: &str, initrd: &Path) -> Self {
        Self::new()
            .option("--kernel", assets::guest(kernel))
            .option("--initrd", initrd)
            .cmdline("console=ttyS0 quiet panic=-1")
    }

    /// A flag.
    #[must_use]
    pub fn flag(mut self, name: &str) -> Self {
        self.command.arg(name);
        self
    }

    /// A flag with its value.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.arg(name).arg(value);
        self
    }

    /// `--cpus`.
    #[must_use]
    pub fn cpus(self, count: u32) -> Self {
        self.option("--cpus", count.to_string())
    }

    /// `--memory`.
    #[must_use]
    pub fn memory(self, size: &str) -> Self {
        self.option("--memory", size)
    }

    /// `--disk path=...` with further keys, such as `,readonly=on`.
    #[must_use]
    pub fn disk(self, path: &Path, keys: &str) -> Self {
        self.option("--disk", format!("path={}{keys}", path.display()))
    }

    /// More words for the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline += words;
        self.cmdline.push(' ');
        self
    }

    /// The command, to be run in another way.
    #[must_use]
    pub fn into_command(mut self) -> Command {
        if !self.cmdline.is_empty() {
            self.command.arg("--cmdline").arg(self.cmdline.trim_end());
        }
        self.command
    }

    /// Starts the machine with its console on pipes.
    ///
    /// # Panics
    /// If the process cannot be started.
    #[must_use]
    pub fn start(self) -> Machine {
        Machine::start(self.into_command())
    }

    /// Starts the test guest and waits until it takes commands.
    ///
    /// # Panics
    /// If it does not get there.
    #[must_use]
    pub fn boot(self) -> Machine {
        let mut machine = self.start();
        machine.wait_ready();
        machine
    }

    /// Runs to the end without input.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn run(self) -> Ended {
        self.start().wait()
    }
}

/// What the guest answered to a command.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Standard output and error.
    pub text: String,
    /// The exit code.
    pub code: i32,
}

/// A process that is gone.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// All it wrote to standard output: the console.
    pub console: String,
    /// All it wrote to standard error: messages.
    pub messages: String,
}

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    input: Option<ChildStdin>,
    console: Console,
    messages: Console,
    status: Option<ExitStatus>,
}

impl Machine {
    /// Starts any command whose standard streams are a console.
    ///
    /// # Panics
    /// If the process cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let input = child.stdin.take();
        let console = Console::reading(child.stdout.take().expect("a piped stdout"));
        let messages = Console::reading(child.stderr.take().expect("a piped stderr"));
        Self { child, input, console, messages, status: None }
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a text on the console, after all that was awaited before, and returns what came in between.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait_for(&mut self, pattern: &str) -> String {
        self.console.wait_for(pattern, PATIENCE).unwrap_or_else(|error| panic!("console: {error}"))
    }

    /// Waits for a text on standard error.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait_for_message(&mut self, pattern: &str) -> String {
        self.messages.wait_for(pattern, PATIENCE).unwrap_or_else(|error| panic!("messages: {error}"))
    }

    /// Waits until the test guest takes commands.
    ///
    /// # Panics
    /// If it does not get there.
    pub fn wait_ready(&mut self) {
        self.wait_for("skiff-guest: ready\n");
    }

    /// Logs in as root, without a password, at a login prompt, and makes the shell answer as the test guest does.
    ///
    /// # Panics
    /// If there is no prompt.
    pub fn log_in(&mut self) {
        self.wait_for("login: ");
        self.send("root\n");
        self.wait_for("# ");
        // The quotes keep the terminal's echo of this line from looking like its effect.
        self.send("stty -echo; echo 'skiff-guest: 'ready; ");
        self.send("while read -r line; do echo '<<<'; sh -c \"$line\" </dev/null; echo \">>> $?\"; done\n");
        self.wait_ready();
    }

    /// Types on the console.
    ///
    /// # Panics
    /// If the machine is gone.
    pub fn send(&mut self, text: &str) {
        let input = self.input.as_mut().expect("the console is open");
        input.write_all(text.as_bytes()).and_then(|()| input.flush()).expect("typing on the console");
    }

    /// Has the test guest run a command of one line.
    ///
    /// # Panics
    /// If no answer comes.
    pub fn run(&mut self, command: &str) -> Answer {
        self.send(&format!("{command}\n"));
        self.wait_for("<<<\n");
        let text = self.wait_for(">>> ");
        let code = self.wait_for("\n");
        Answer { text, code: code.parse().expect("an exit code") }
    }

    /// The output of a command that succeeds, without the space around it.
    ///
    /// # Panics
    /// If no answer comes or the command fails.
    pub fn ask(&mut self, command: &str) -> String {
        let answer = self.run(command);
        assert_eq!(answer.code, 0, "{command}: {}", answer.text);
        answer.text.trim().to_owned()
    }

    /// Sends a signal, by its number's name in kill(1): `TERM`, `INT`.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn signal(&mut self, name: &str) {
        assets::tool("kill", &["-s", name, &self.pid().to_string()]);
    }

    /// Has the guest power off and waits for the end of the machine.
    ///
    /// # Panics
    /// If it does not end.
    pub fn power_off(mut self) -> Ended {
        self.send("poweroff -f\n");
        self.wait()
    }

    /// Waits for the end of the machine.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait(mut self) -> Ended {
        for stream in [&self.console, &self.messages] {
            stream.wait_for_end(PATIENCE).unwrap_or_else(|error| panic!("waiting for the machine: {error}"));
        }
        let status = self.child.wait().expect("waiting for a child");
        self.status = Some(status);
        Ended { code: status.code(), console: self.console.text(), messages: self.messages.text() }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Both fail only if it is gone already.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if thread::panicking() {
            keep_log(self);
        }
    }
}

/// The console of a machine whose test failed: all of it in a file, the end of it with the failure.
fn keep_log(machine: &Machine) {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let name = thread::current().name().unwrap_or("test").replace("::", ".");
    let path = assets::logs().join(format!("{name}.{}.log", SERIAL.fetch_add(1, Ordering::Relaxed)));
    let text = format!("{}\n--- messages\n{}", machine.console.text(), machine.messages.text());
    let lines: Vec<_> = text.lines().collect();
    let end = lines[lines.len().saturating_sub(40)..].join("\n");
    let kept = std::fs::write(&path, &text).map_or_else(|error| format!("not kept: {error}"), |()| "all of it".into());
    eprintln!("--- the console's end ({kept}: {})\n{end}\n---", path.display());
}
