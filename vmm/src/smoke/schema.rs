//! docs/smoke.schema.json against what is really read: the same keys, the same verdict about the examples and about
//! scenarios that are wrong. docs/smoke-results.schema.json against what is really written. The validator is Python's.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::Scenario;
use super::report::{Format, sample};
use super::trouble::KINDS;
use crate::config::{DISK_KEYS, KEYS, MEMORY_KEYS, NET_KEYS};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn schema() -> Value {
    read_schema("smoke.schema.json")
}

fn read_schema(name: &str) -> Value {
    let text = std::fs::read_to_string(repository().join("docs").join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Whether each document, in TOML or JSON, keeps to the schema, and the complaint if not; `None` where the validator is missing.
fn validate(schema: &Value, documents: &[&str]) -> Option<Vec<Option<String>>> {
    const CHECK: &str = "
import json, sys
try: import jsonschema, tomllib
except ImportError as missing: print(json.dumps(str(missing))); sys.exit()
asked = json.load(sys.stdin)
jsonschema.Draft202012Validator.check_schema(asked['schema'])
validator = jsonschema.Draft202012Validator(asked['schema'])
def complaint(text):
    try: best = jsonschema.exceptions.best_match(validator.iter_errors(json.loads(text) if text.startswith('{') else tomllib.loads(text)))
    except tomllib.TOMLDecodeError as error: return str(error)
    return best and best.message
print(json.dumps([complaint(text) for text in asked['documents']]))";
    let ask = || {
        let mut python = Command::new("python3");
        let mut python = python.args(["-c", CHECK]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        let asked = json!({"schema": schema, "documents": documents}).to_string();
        python.stdin.take()?.write_all(asked.as_bytes()).ok()?;
        serde_json::from_slice(&python.wait_with_output().ok()?.stdout).ok()
    };
    match ask() {
        Some(Value::Array(answers)) => Some(answers.iter().map(|it| it.as_str().map(str::to_owned)).collect()),
        answer => {
            skip::because(format_args!("python3 cannot validate ({answer:?}); install python3-jsonschema"));
            None
        }
    }
}

/// The files that the scenarios name are there, and empty.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["vmlinuz", "initrd.img", "root.img", "data.img"] {
        std::fs::write(folder.path().join(name), "").unwrap();
    }
    folder
}

#[test]
fn every_key_of_a_machine_is_in_the_schema() {
    let schema = schema();
    let has = |pointer: &str, key: &str| {
        let known = schema.pointer(pointer).is_some_and(|properties| properties.get(key).is_some());
        assert!(known, "docs/smoke.schema.json: {pointer} lacks {key}");
    };
    // The console is the scenario's own.
    for key in KEYS.iter().filter(|key| **key != "serial") {
        has("/$defs/machine/properties", key);
    }
    let kinds = KINDS.map(|kind| kind.name);
    for (pointer, keys) in [
        ("/$defs/disk/properties", &DISK_KEYS[..]),
        ("/$defs/net/properties", &NET_KEYS),
        ("/$defs/machine/properties/memory/oneOf/1/properties", &MEMORY_KEYS),
        ("/properties/fail/properties", &kinds),
    ] {
        for key in keys {
            has(pointer, key);
        }
    }
}

#[test]
fn the_examples_are_scenarios() {
    let folder = folder();
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(repository().join("resources/configs/smoke")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let copy = folder.path().join(path.file_name().unwrap());
        std::fs::write(&copy, &text).unwrap();
        Scenario::read(&copy).unwrap_or_else(|errors| panic!("{errors:?}"));
        texts.push(text);
    }
    assert!(texts.len() >= 4, "{}", texts.len());
    let Some(answers) = validate(&schema(), &texts.iter().map(String::as_str).collect::<Vec<_>>()) else { return };
    assert!(answers.iter().all(Option::is_none), "{answers:?}");
}

/// What the schema and the reader must both take, or both refuse.
#[test]
fn the_schema_and_the_reader_agree() {
    const MACHINE: &str = "machine = { kernel = 'vmlinuz', disk = [{ path = 'root.img' }] }\n";
    let good = [
        "[[step]]\nwait = 'login: '",
        "name = 'a b'\ntimeout = '1.5h'\nsilence = '500 ms'\n[[step]]\nwait-regex = '^# $'\nmeasure = 'm'\nmax = '2s'",
        "[[step]]\nsend = ''\n[[step]]\nkey = 'ctrl-c'\n[[step]]\nkey = 'up'\n[[step]]\nkey = 'y'\n[[step]]\npause = '1s'",
        "[[step]]\nrun = 'true'\nstatus = 'any'\noutput = 'x'\n[[step]]\nrun = 'a'\nstatus = 3\noutput-regex = '.'",
        "[[step]]\nrun = 'a'\ntimeout = '1s'\nmeasure = 'a'\nmax = '1s'\nsince = 'start'",
        "[[step]]\npower-button = true\n[[step]]\nexpect = 'poweroff'\ntimeout = '30s'\n[[step]]\ncheck-disk = 'disk0'",
        "[[step]]\nexit-code = 33\n[[step]]\ncheck-file = 'out'\nabsent = true\n[[step]]\ncheck-file = 'out'",
        "[[step]]\nexpect = 'panic'\n[[step]]\ncheck-disk = 'disk0'\nfile = '/etc/x'\ncontent = \"a\\nb\"",
        "[[step]]\nexpect = 'triple-fault'\n[[step]]\ncheck-disk = 'disk0'\nclean = true\npartition = 128",
        "silence = 'off'\n[[step]]\nwait = 'x'",
        "[matrix]\ncpus = [1, 2]\naio = ['threads', 'auto']\ncache = ['none']\nmemory = ['64M']\n\
         exclude = [{ cpus = 1, aio = 'auto' }]\n[[step]]\nwait = 'x'",
        "machine.net = [{ passt = true, forward = 'tcp:2222:22' }, { tap = 'tap0', vhost = 'auto' }]\n[[step]]\nwait = 'x'",
        "machine.disk = [{ path = 'root.img', snapshot = false }]\n[[step]]\nwait = 'x'",
        "[fail]\nwarning = 'warn'\nroot = 'ignore'\nallow = ['a.*b']\ndeny = ['x']\n[[step]]\nwait = 'x'",
    ];
    let bad = [
        "",
        "step = []",
        "step = 1",
        "[[step]]",
        "[[step]]\ntimeout = '1s'",
        "[[step]]\nwait = ''",
        "[[step]]\nwait = 1",
        "[[step]]\nwait = \"a\\nb\"",
        "[[step]]\nwait = 'a'\nsend = 'b'",
        "[[step]]\nwiat = 'a'",
        "[[step]]\nwait = 'a'\nmax = '1s'",
        "[[step]]\nwait = 'a'\nsince = 'step'",
        "[[step]]\nwait = 'a'\ntimeout = 5",
        "[[step]]\nwait = 'a'\ntimeout = '0s'",
        "[[step]]\nwait = 'a'\ntimeout = '5 min'",
        "[[step]]\nsend = \"a\\nb\"",
        "[[step]]\nsend = 'a'\ntimeout = '1s'",
        "[[step]]\nkey = 'f1'",
        "[[step]]\nkey = 'ctrl-ab'",
        "[[step]]\nrun = ' '",
        "[[step]]\nrun = 'a'\nstatus = 256",
        "[[step]]\nrun = 'a'\nstatus = 'some'",
        "[[step]]\nrun = 'a'\noutput = 'a'\noutput-regex = 'b'",
        "[[step]]\npower-button = false",
        "[[step]]\nexpect = 'sleep'",
        "[[step]]\nexit-code = -1",
        "[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-file = 'a'\ncontains = 'a'\nabsent = true",
        "[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-disk = 'disk0'\ncontains = 'a'",
        "[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-disk = 'disk0'\nclean = true\nfile = '/a'",
        "[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-disk = 'disk0'\nfile = 'a'",
        "[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-disk = 'disk0'\npartition = 0",
        "[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-disk = 'disk0'\npartition = '1'",
        "[[step]]\nexpect = 'poweroff'\n[[step]]\ncheck-disk = 'disk0'\npartition = 129",
        "silence = 'on'\n[[step]]\nwait = 'a'",
        "nam = 'a'\n[[step]]\nwait = 'a'",
        "name = 'a/b'\n[[step]]\nwait = 'a'",
        "machine.serial = 'pty'\n[[step]]\nwait = 'a'",
        "machine.net = [{ passt = true, queue = 1 }]\n[[step]]\nwait = 'a'",
        "machine.disk = [{ path = 'root.img', snapshots = true }]\n[[step]]\nwait = 'a'",
        "machine.cpu = 1\n[[step]]\nwait = 'a'",
        "matrix.aio = []\n[[step]]\nwait = 'a'",
        "matrix.aio = ['aio']\n[[step]]\nwait = 'a'",
        "matrix.cpus = [1, 1]\n[[step]]\nwait = 'a'",
        "matrix.grace = [1]\n[[step]]\nwait = 'a'",
        "fail.warning = 'no'\n[[step]]\nwait = 'a'",
        "fail.warnings = 'warn'\n[[step]]\nwait = 'a'",
        "fail.allow = 'a'\n[[step]]\nwait = 'a'",
        "[[step]]\nwait = ",
    ];
    let folder = folder();
    let file = folder.path().join("a.toml");
    let whole = |text: &&str| match text.strip_prefix("machine.") {
        Some(rest) => format!("machine.kernel = 'vmlinuz'\nmachine.{rest}"),
        None => format!("{MACHINE}{text}"),
    };
    let good: Vec<String> = good.iter().map(whole).collect();
    let bad: Vec<String> = bad.iter().map(whole).collect();
    for text in &good {
        Scenario::parse(&file, text).unwrap_or_else(|errors| panic!("{text}: {errors:?}"));
    }
    for text in &bad {
        assert!(Scenario::parse(&file, text).is_err(), "{text}");
    }
    let all: Vec<&str> = good.iter().chain(&bad).map(String::as_str).collect();
    let Some(answers) = validate(&schema(), &all) else { return };
    for (at, (text, answer)) in all.iter().zip(answers).enumerate() {
        assert_eq!(answer.is_none(), at < good.len(), "{text}: {answer:?}");
    }
}

#[test]
fn results_keep_to_their_schema() {
    let runs = [sample::run(), sample::passed(), sample::hostile()].map(|run| Format::Json.write(&run));
    let [run, ..] = &runs;
    // A schema that takes everything says nothing.
    let wrong = [("\"verdict\"", "\"result\""), ("\"failed\"", "\"broken\""), ("\"at\": ", "\"at\": -")];
    let wrong = wrong.map(|(one, other)| {
        assert!(run.contains(one), "{run}");
        run.replacen(one, other, 1)
    });
    let all: Vec<&str> = runs.iter().chain(&wrong).map(String::as_str).collect();
    let Some(answers) = validate(&read_schema("smoke-results.schema.json"), &all) else { return };
    for (at, answer) in answers.iter().enumerate() {
        assert_eq!(answer.is_none(), at < runs.len(), "{}: {answer:?}", all[at]);
    }
}
