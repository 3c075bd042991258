//! The arrows between the crates, as ARCHITECTURE.md draws them: who may depend on whom, and on which library; and its map.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Our crates and those of ours that each may use.
const ARROWS: [(&str, &[&str]); 7] = [
    ("skiff", &["devices", "boot", "block", "guest"]),
    ("devices", &["block"]),
    ("block", &[]),
    ("boot", &[]),
    ("guest", &[]),
    ("skip", &[]),
    ("tests", &["guest", "skip"]),
];

/// Libraries that stand for a subject, and the crates that may know it.
const SUBJECTS: [(&str, &[&str]); 8] = [
    ("kvm-ioctls", &["skiff"]),
    ("kvm-bindings", &["skiff"]),
    ("clap", &["skiff", "tests"]),
    ("virtio-queue", &["devices"]),
    ("virtio-bindings", &["devices"]),
    ("linux-loader", &["boot"]),
    ("acpi_tables", &["boot"]),
    ("io-uring", &["block"]),
];

fn metadata() -> Metadata {
    MetadataCommand::new().no_deps().exec().expect("cargo metadata")
}

/// The normal dependencies of each crate of the workspace, by name. Tests may look across.
fn dependencies(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let normal = |package: &cargo_metadata::Package| {
        let kept = package.dependencies.iter().filter(|dependency| dependency.kind == DependencyKind::Normal);
        kept.map(|dependency| dependency.name.clone()).collect()
    };
    metadata.workspace_packages().iter().map(|package| (package.name.to_string(), normal(package))).collect()
}

#[test]
fn every_crate_is_in_the_picture() {
    let ours: BTreeSet<_> = dependencies(&metadata()).into_keys().collect();
    assert_eq!(ours, ARROWS.iter().map(|(name, _)| (*name).to_owned()).collect());
}

#[test]
fn arrows_point_one_way() {
    let all = dependencies(&metadata());
    for (name, allowed) in ARROWS {
        for dependency in all[name].iter().filter(|dependency| all.contains_key(*dependency)) {
            assert!(allowed.contains(&dependency.as_str()), "{name} must not know {dependency}");
        }
    }
}

#[test]
fn subjects_stay_where_they_belong() {
    let all = dependencies(&metadata());
    for (library, allowed) in SUBJECTS {
        let users: Vec<_> = all.iter().filter(|(_, libraries)| libraries.contains(library)).collect();
        for (name, _) in users {
            assert!(allowed.contains(&name.as_str()), "{name} must not know {library}");
        }
    }
}

/// Folders of sources two levels deep; what is below a subject is its own affair.
#[test]
fn every_folder_is_on_the_map() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).expect("the map");
    let rows = text.lines().skip_while(|line| *line != "| folder | what is in it |").skip(2);
    let rows = rows.take_while(|line| line.starts_with('|')).filter_map(|line| line.split('|').nth(1));
    let named: BTreeSet<_> =
        rows.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(|name| root.join(name)).collect();
    for folder in &named {
        assert!(folder.is_dir(), "{}: not there", folder.display());
    }
    let inside = |folder: &Path| -> Vec<_> {
        let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
        entries.filter(|path| path.is_dir()).collect()
    };
    for package in metadata().workspace_packages() {
        let sources = package.manifest_path.as_std_path().with_file_name("src");
        assert!(named.contains(&sources), "{} is not on the map", sources.display());
        // A module that is a folder of its own, such as virtio, has its parts on the map.
        let first = inside(&sources);
        let second: Vec<_> =
            first.iter().filter(|folder| folder.ends_with("virtio")).flat_map(|it| inside(it)).collect();
        for folder in first.iter().chain(&second) {
            assert!(named.contains(folder), "{} is not on the map", folder.display());
        }
    }
}
