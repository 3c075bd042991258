//! A command that a shell in the guest is to run, and how its output and its status are found among what a terminal says:
//! the echo of what was typed, wrapped wherever the shell likes, prompts, the kernel's messages. Any thread.

use std::sync::atomic::{AtomicU32, Ordering};

/// Kept of the output, in bytes.
const MOST: usize = 1 << 20;

/// A command that was typed.
#[derive(Debug)]
pub(super) struct Shell {
    command: String,
    /// Stands for this command and no other.
    number: u32,
    /// The first mark was seen: what came before is the echo.
    begun: bool,
    output: String,
}

impl Shell {
    pub(super) fn new(command: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { command: command.to_owned(), number, begun: false, output: String::new() }
    }

    /// What to type, with Enter at its end: the command between two marks, which the shell puts together. So their echo is none of them. `eval`
    /// keeps a comment or a missing quote in the command from swallowing the second.
    pub(super) fn input(&self) -> String {
        let quoted = self.command.replace('\'', "'\\''");
        let number = self.number;
        format!("echo smoke-\"{number}\"-begin; eval '{quoted}'; echo smoke-\"{number}\"-end-$?-\n")
    }

    /// Takes a line of the console; the command's exit status if it has ended.
    pub(super) fn take(&mut self, line: &str) -> Option<u8> {
        let mark = format!("smoke-{}-", self.number);
        if line.contains(&format!("{mark}begin")) {
            self.output.clear();
            self.begun = true;
            return None;
        }
        let end = format!("{mark}end-");
        let (before, after) = match line.split_once(&end) {
            Some((before, after)) => (before, after.split_once('-').and_then(|(status, _)| status.parse().ok())),
            None => (line, None),
        };
        if after.is_none() || !before.is_empty() {
            self.add(before);
        }
        after
    }

    fn add(&mut self, line: &str) {
        if self.begun && self.output.len() + line.len() < MOST {
            self.output += line;
            self.output.push('\n');
        }
    }

    /// What the command said, as lines.
    pub(super) fn output(&self) -> String {
        self.output.trim_end_matches('\n').to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// The lines that a terminal shows, with the mark of any number replaced by this command's.
    fn take(shell: &mut Shell, console: &str) -> Option<u8> {
        console.lines().find_map(|line| shell.take(&line.replace('@', &shell.number.to_string())))
    }

    #[test]
    fn echo_prompts_and_wrapping_are_no_output() {
        let mut shell = Shell::new("uname -r");
        let console = "root@guest:~# echo smoke-\"@\"-begin; eval 'uname -r'; echo smo\nke-\"@\"-end-$?-\nsmoke-@-begin\n\
                       6.1.0\nsmoke-@-end-0-\nroot@guest:~# ";
        assert_eq!(take(&mut shell, &console.replace("root@", "root:")), Some(0));
        assert_eq!(shell.output(), "6.1.0");
    }

    #[test]
    fn an_echo_is_no_output_even_if_a_kernel_message_is_in_the_mark() {
        let mut shell = Shell::new("echo OK");
        let console = "# echo smoke-\"@\"-begin; eval 'echo OK'; echo smoke-\"@\"-end-$?-\nsmoke-@-be[ 1.0] usb\ngin\nOK\nsmoke-@-end-0-\n";
        assert_eq!(take(&mut shell, console), Some(0));
        assert_eq!(shell.output(), "");
    }

    #[test]
    fn output_without_a_line_end() {
        let mut shell = Shell::new("printf x; false");
        assert_eq!(take(&mut shell, "# smoke-@-begin\none\n\nxsmoke-@-end-1-\n"), Some(1));
        assert_eq!(shell.output(), "one\n\nx");
    }

    /// Real shells understand what is typed, and say what is looked for.
    #[test]
    fn shells_agree() {
        for (command, output, status) in [
            ("echo one; echo two", "one\ntwo", 0),
            ("false", "", 1),
            ("(exit 77) # a comment", "", 77),
            ("echo 'it''s'; echo \"$((6 * 7))\"", "its\n42", 0),
            ("echo \"it's\"", "it's", 0),
            ("no-such-command 2>/dev/null", "", 127),
        ] {
            for program in ["sh", "bash"] {
                let mut shell = Shell::new(command);
                let ran = Command::new(program).arg("-c").arg(shell.input()).stderr(Stdio::null()).output().unwrap();
                let console = String::from_utf8(ran.stdout).unwrap();
                assert_eq!(console.lines().find_map(|line| shell.take(line)), Some(status), "{program}: {command}");
                assert_eq!(shell.output(), output, "{program}: {command}");
            }
        }
    }
}
