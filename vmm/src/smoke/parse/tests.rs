use super::*;
use proptest::prelude::*;

use crate::smoke::scenario::{Action, Ending};

/// A folder with the files that the scenarios below name.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["vmlinuz", "other", "root.img", "data.img"] {
        std::fs::write(folder.path().join(name), "").unwrap();
    }
    folder
}

/// The scenario, or its errors without the folder.
fn read(text: &str) -> Result<Scenario, Vec<String>> {
    let folder = folder();
    Scenario::parse(&folder.path().join("a.toml"), text).map_err(|errors| {
        let prefix = format!("{}/", folder.path().display());
        errors.iter().map(|error| error.to_string().replace(&prefix, "")).collect()
    })
}

/// The errors of a scenario whose machine and step are fine, but for `text`.
fn errors(text: &str) -> Vec<String> {
    let whole = format!("machine.kernel = 'vmlinuz'\n{text}");
    read(&whole).unwrap_err()
}

#[test]
fn ten_lines_are_enough() {
    let scenario =
        read("[machine]\nkernel = 'vmlinuz'\n[[machine.disk]]\npath = 'root.img'\n[[step]]\nwait = 'login: '\n");
    let scenario = scenario.unwrap();
    assert_eq!((&*scenario.name, scenario.timeout), ("a", TIMEOUT));
    assert_eq!((scenario.cells.len(), scenario.cells[0].keys.len()), (1, 0));
    assert!(scenario.cells[0].machine.kernel.is_absolute());
    let step = &scenario.steps[0];
    assert_eq!((&*step.title, step.place.ends_with("/a.toml:6")), ("wait for \"login: \"", true));
}

#[test]
fn every_step() {
    let text = r#"
        name = "all of it"
        timeout = "5m"
        silence = "1.5s"
        [machine]
        kernel = "vmlinuz"
        disk = [{ path = "root.img" }, { path = "data.img", id = "data" }]
        [fail]
        warning = "warn"
        allow = ['harmless']
        [[step]]
        wait-regex = '^login: $'
        timeout = "20s"
        measure = "boot"
        max = "800ms"
        [[step]]
        send = "root"
        [[step]]
        key = "ctrl-c"
        [[step]]
        run = "uname -r"
        status = "any"
        output-regex = '^6\.'
        measure = "uname"
        [[step]]
        pause = "2s"
        [[step]]
        power-button = true
        [[step]]
        expect = "reboot"
        [[step]]
        exit-code = 33
        [[step]]
        check-file = "out"
        absent = true
        [[step]]
        check-disk = "data"
        [[step]]
        check-disk = "disk0"
        file = "/etc/hostname"
        content = "x\n"
    "#;
    let scenario = read(text).unwrap();
    let titles: Vec<_> = scenario.steps.iter().map(|step| step.title.rsplit('/').next().unwrap()).collect();
    assert_eq!(scenario.steps.len(), 11, "{titles:?}");
    assert_eq!(scenario.steps[0].title, "wait for /^login: $/");
    let boot = scenario.steps[0].measure.as_ref().unwrap();
    assert_eq!((boot.max, boot.since_step), (Some(Duration::from_millis(800)), false));
    assert!(scenario.steps[3].measure.as_ref().unwrap().since_step);
    assert!(matches!(scenario.steps[1].action, Action::Send(ref bytes) if bytes == b"root\n"));
    assert!(matches!(scenario.steps[3].action, Action::Run { status: None, .. }));
    assert!(matches!(scenario.steps[7].action, Action::Expect(Ending::Code(33))));
    assert!(matches!(scenario.steps[9].action, Action::CheckDisk { disk: 1, .. }));
    assert!(scenario.checks_disk(0) && scenario.checks_disk(1) && !scenario.checks_disk(2));
    let silence = Some(Silence { limit: Duration::from_millis(1500), is_said: true });
    let silences: Vec<_> = scenario.steps.iter().map(|step| step.silence).collect();
    // Nobody waits for a console that is paused.
    assert_eq!((silences[0], silences[1], silences[4], silences[6]), (silence, silence, None, silence));
}

#[test]
fn silence_has_a_limit_if_nothing_is_said() {
    let silences = |text: &str| {
        let steps = "[[step]]\nwait = 'x'\n[[step]]\nwait = 'x'\ntimeout = '9s'\n[[step]]\nrun = 'true'\n";
        let scenario = read(&format!("{text}\nmachine = {{ kernel = 'vmlinuz' }}\n{steps}")).unwrap();
        scenario.steps.iter().map(|step| step.silence.map(|it| (it.limit.as_secs(), it.is_said))).collect::<Vec<_>>()
    };
    assert_eq!(silences(""), [Some((60, false)), None, None]);
    assert_eq!(silences("timeout = '10m'"), [Some((300, false)), None, None]);
    assert_eq!(silences("silence = '5s'"), [Some((5, true)); 3]);
    assert_eq!(silences("silence = 'off'"), [None; 3]);
    assert_eq!(errors("silence = 'no'\n[[step]]\nwait = 'x'").len(), 1);
}

/// Which of two filesystems a step means cannot be seen, and is asked before anything starts.
#[test]
fn a_disk_with_two_filesystems() {
    let folder = folder();
    let path = folder.path().join("root.img");
    let script = "truncate -s 16M \"$0\" && printf 'label: gpt\\nsize=4MiB\\nsize=4MiB\\n' | sfdisk -q \"$0\" && \
                  for at in 1 5; do mke2fs -qF -t ext4 -E offset=$((at << 20)) \"$0\" 4M || exit; done";
    let mut shell = std::process::Command::new("sh");
    let made = shell.args(["-c", script]).arg(&path).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output().unwrap();
    if made.status.code() == Some(127) {
        skip::because("no sfdisk or mke2fs");
        return;
    }
    let parse = |step: &str| {
        let text = format!(
            "machine = {{ kernel = 'vmlinuz', disk = [{{ path = 'root.img' }}] }}\n[[step]]\nexpect = 'poweroff'\n\
             [[step]]\ncheck-disk = 'disk0'\n{step}"
        );
        Scenario::parse(&folder.path().join("a.toml"), &text)
    };
    let errors = parse("").unwrap_err();
    let expected = "a.toml:5: check-disk: disk0 has an ext filesystem in several partitions (1: ext4, 2: ext4); write partition = 1";
    assert!(errors.len() == 1 && errors[0].to_string().ends_with(expected), "{errors:?}");
    assert_eq!(parse("partition = 2").unwrap().steps[1].title, "check the filesystem of partition 2 of disk0");
    assert!(parse("partition = 0").unwrap_err()[0].to_string().ends_with("partition: partitions are counted from 1"));
}

#[test]
fn disks_are_snapshots_unless_said_otherwise() {
    let disks = "disk = [{ path = 'root.img' }, { path = 'root.img', id = 'b', readonly = true }, \
                 { path = 'data.img', id = 'c', snapshot = false }]";
    let scenario = read(&format!("[machine]\nkernel = 'vmlinuz'\n{disks}\n[[step]]\nwait = 'x'\n")).unwrap();
    let access: Vec<_> = scenario.cells[0].machine.disks.iter().map(|disk| disk.access).collect();
    assert_eq!(access, [Access::Snapshot, Access::Read, Access::Write]);
}

#[test]
fn a_matrix_has_a_machine_for_every_choice() {
    let text = r#"
        [machine]
        kernel = "vmlinuz"
        disk = [{ path = "root.img" }]
        [matrix]
        kernel = ["vmlinuz", "other"]
        cpus = [1, 2]
        aio = ["native", "threads"]
        cache = ["none", "writeback"]
        exclude = [{ aio = "native", cache = "writeback" }]
        [[step]]
        wait = "x"
    "#;
    let scenario = read(text).unwrap();
    assert_eq!(scenario.cells.len(), 2 * 2 * 3);
    let last = scenario.cells.last().unwrap();
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let keys = [pair("kernel", "other"), pair("cpus", "2"), pair("aio", "threads"), pair("cache", "writeback")];
    assert_eq!(last.keys, keys);
    assert!(last.machine.kernel.ends_with("other"));
    assert_eq!((last.machine.cpus, last.machine.disks[0].aio.unwrap().name()), (2, "threads"));
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_file() {
    let text = "nam = 'x'\ntimeout = 5\n[machine]\nkernel = 'missing'\ncpus = 0\nserial = 'pty'\n[[machine.disk]]\n\
                path = 'gone.img'\n[matrix]\ncpus = [1, 'two']\naio = []\n[[step]]\nwait-regex = 'a('\n[[step]]\nwiat = 'x'\n";
    let errors = read(text).unwrap_err();
    let expected = [
        "a.toml:1: unknown key \"nam\"; did you mean \"name\"? (keys: name, timeout, silence, machine, matrix, fail, step)",
        "a.toml:2: timeout: not a time; write it like \"500ms\", \"30s\" or \"5m\"",
        "a.toml:4: kernel: missing: No such file or directory (os error 2); name a file that can be read",
        "a.toml:5: cpus = 0: a machine has at least 1 CPU",
        "a.toml:6: serial: the scenario reads the console itself; leave it out",
        "a.toml:7: disk: gone.img: No such file or directory (os error 2); name an image that can be read",
        "a.toml:10: cpus: not a number of CPUs; write it like 2",
        "a.toml:11: aio: a list of values; write it like aio = [\"a\", \"b\"]",
        "a.toml:13: wait-regex: no regular expression: ",
        "a.toml:15: unknown key \"wiat\"; did you mean \"wait\"? (keys: wait, ",
    ];
    assert_eq!(errors.len(), expected.len(), "{errors:#?}");
    for (error, expected) in errors.iter().zip(expected) {
        assert!(error.starts_with(expected), "{error}\n{expected}");
    }
}

#[test]
fn what_is_impossible() {
    let quotes = format!("[[step]]\nrun = \"echo {}\"", "'".repeat(2000));
    for (text, complaint) in [
        ("", "a.toml:1: there is no [[step]]; write one, such as wait = \"login:\" below it"),
        ("step = 1", "a.toml:2: step: steps are tables; write [[step]]"),
        ("[[step]]\ntimeout = '1s'", "a.toml:2: step: a step does something: one of wait, wait-regex, "),
        ("[[step]]\nwait = 'a'\nsend = 'b'", "a.toml:4: send: a step does one thing, and this one has wait already"),
        ("[[step]]\nsend = 'a'\ntimeout = '1s'", "a.toml:4: unknown key \"timeout\" (keys: send)"),
        ("[[step]]\nsend = \"a\\nb\"", "a.toml:3: send: one line without control characters"),
        ("[[step]]\nkey = 'F1'", "a.toml:3: key: no such key; write ctrl-c, "),
        ("[[step]]\nexpect = 'sleep'", "a.toml:3: expect: \"sleep\" is none of poweroff, reboot, panic, triple-fault"),
        ("[[step]]\nexit-code = 256", "a.toml:3: exit-code: not a number from 0 to 255"),
        ("[[step]]\nwait = 'a'\nmax = '1s'", "a.toml:4: max: of which time? write measure = \"NAME\" too"),
        (&quotes, "a.toml:3: run: it becomes 80"),
        ("[[step]]\nrun = 'x'\noutput = 'a'\noutput-regex = 'b'", "a.toml:5: output-regex: there is output already"),
        (
            "[[step]]\nexpect = 'poweroff'\n[[step]]\nwait = 'x'",
            "a.toml:4: step: the machine has ended in line 2; only check-file and check-disk can follow",
        ),
        (
            "[[step]]\ncheck-file = 'x'",
            "a.toml:2: step: a machine that runs cannot be checked; write expect = \"poweroff\" before",
        ),
        (
            "machine.no-reboot = true\n[[step]]\nexpect = 'reboot'\n[[step]]\nwait = 'x'",
            "a.toml:5: step: the machine has ended in line 3",
        ),
        (
            "[[step]]\nexpect = 'panic'\n[[step]]\ncheck-disk = 'disk0'",
            "a.toml:5: check-disk: the machine has no disk \"disk0\" (it has none)",
        ),
        // A character device in the place of a block device.
        (
            "machine.disk = [{ path = '/dev/null' }]\n[[step]]\nexpect = 'panic'\n[[step]]\ncheck-disk = 'disk0'",
            "a.toml:6: check-disk: disk0 is /dev/null: only an image in a file can be copied; make one, or say readonly = \
             true or snapshot = false",
        ),
        (
            "matrix.aio = ['threads']\n[[step]]\nwait = 'x'",
            "a.toml:2: aio: the machine has no disk that it could be of",
        ),
        ("matrix.cpu = [1]\n[[step]]\nwait = 'x'", "a.toml:2: unknown key \"cpu\"; did you mean \"cpus\"?"),
        ("matrix.cpus = [1, 1]\n[[step]]\nwait = 'x'", "a.toml:2: cpus: 1 is given twice; give it once"),
        (
            "matrix = { cpus = [1], exclude = [{ cpus = 2 }] }\n[[step]]\nwait = 'x'",
            "a.toml:2: exclude: the matrix has no such machine; leave it out",
        ),
        (
            "matrix = { cpus = [1], exclude = [{ cpus = 1 }] }\n[[step]]\nwait = 'x'",
            "a.toml:2: exclude: no machine is left; exclude fewer",
        ),
        (
            "machine.disk = [{ path = 'root.img' }]\nmatrix = { aio = ['native'], cache = ['unsafe'] }\n[[step]]\nwait = 'x'",
            "a.toml:3: matrix: aio=native does not go with cache=unsafe; write exclude = [{ aio = \"native\", cache = \
             \"unsafe\" }]",
        ),
        (
            "fail.warnings = 'warn'\n[[step]]\nwait = 'x'",
            "a.toml:2: unknown key \"warnings\"; did you mean \"warning\"?",
        ),
        ("fail.warning = 'no'\n[[step]]\nwait = 'x'", "a.toml:2: warning: \"no\" is none of fail, warn, ignore"),
        ("fail.deny = ['a(']\n[[step]]\nwait = 'x'", "a.toml:2: deny: no regular expression: "),
        ("timeout = '0s'\n[[step]]\nwait = 'x'", "a.toml:2: timeout: no time at all"),
        ("timeout = '400h'\n[[step]]\nwait = 'x'", "a.toml:2: timeout: not a time"),
        ("step = [", "a.toml:2: "),
    ] {
        let errors = errors(text);
        assert!(errors.len() == 1 && errors[0].starts_with(complaint), "{text}\n{errors:#?}");
    }
    assert_eq!(read("[[step]]\nwait = 'x'").unwrap_err().len(), 1);
    // One mistake does not hide another in the same step.
    let disk = "machine.disk = {}\n[[step]]\nexpect = 'panic'\n[[step]]\ncheck-disk = 'x'\nfile = 'x'\nmatches = '('\n\
                partition = 0\n[[step]]\nrun = 'x'\nstatus = 'y'\noutput-regex = '('";
    let lines: Vec<_> = errors(disk).iter().map(|error| error.split(": ").next().unwrap().to_owned()).collect();
    assert_eq!(lines, ["a.toml:2", "a.toml:6", "a.toml:7", "a.toml:8", "a.toml:9", "a.toml:12", "a.toml:13"]);
    let list = "a.toml:2: disk: a list of tables; write [[machine.disk]] and its keys below it";
    assert_eq!(errors("machine.disk = 'x'\n[[step]]\nwait = 'x'"), [list]);
    assert_eq!(
        errors("cpus = 2\n[[step]]\nwait = 'x'"),
        ["a.toml:2: cpus: belongs to the machine; write it below [machine]"]
    );
    assert_eq!(
        read("[machine]\n[[step]]\nwait = 'x'").unwrap_err(),
        ["a.toml:1: the machine has no kernel; write kernel = \"FILE\""]
    );
}

#[test]
fn a_file_that_cannot_be_read() {
    let folder = folder();
    let missing = folder.path().join("missing.toml");
    let errors = Scenario::read(&missing).unwrap_err();
    assert!(
        errors[0]
            .to_string()
            .ends_with("missing.toml: No such file or directory (os error 2); name a scenario that can be read")
    );
}

proptest! {
    #[test]
    fn no_text_panics(
        text in any::<String>(),
        near in "(\\[(machine|matrix|fail)\\]|\\[\\[step\\]\\]|(wait|run|expect|key|cpus|kernel|timeout|allow|exclude) = (1|'a'|\\['a'\\]|\\{\\})|\n){0,8}",
    ) {
        let _ = (read(&text), read(&near));
    }
}
