//! A file system made by the guest, with a tree of files like the source of a kernel copied into it, as the host finds it
//! afterwards.

mod source;

use std::fs;
use std::io::Write;
use std::path::Path;

use tests::{Machine, Skiff, assets};

use self::source::{Source, TOP};
use crate::choices::Choice;

const DISKS: [Choice; 3] = [
    Choice { aio: "threads", cache: "writeback" },
    Choice { aio: "native", cache: "none" },
    Choice { aio: "io_uring", cache: "none" },
];

/// Files in the lab, where a guest is emulated twice over.
const IN_LAB: u32 = 1000;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// What is copied: all of it, in the lab a part; or as many files as SKIFF_TREE says, which may say "whole".
fn source() -> Source {
    match std::env::var("SKIFF_TREE").as_deref() {
        Ok("whole") => Source::WHOLE,
        Ok(files) => Source { files: files.parse().expect("SKIFF_TREE: \"whole\", or a number of files") },
        Err(_) if std::env::var_os("SKIFF_IN_LAB").is_some() => Source { files: IN_LAB },
        Err(_) => Source::WHOLE,
    }
}

/// What is in a folder besides the content of files: kinds, modes, sizes, targets of links.
fn listing(folder: &Path) -> String {
    let find = "cd \"$0\" && find . -mindepth 1 -path ./lost+found -prune -o -type d -printf '%p %M\\n' \
                -o -printf '%p %M %s %l\\n' | sort";
    assets::tool("sh", &["-c", find, text(folder)])
}

/// The whole of it may take longer than anything else that is waited for.
fn unpack(guest: &mut Machine) {
    let signs = "while sleep 20; do echo works; done";
    guest.send(&format!("tar -C /b -xf /dev/vda & tar=$!; {signs} & wait $tar; code=$?; kill $!; exit $code\n"));
    let mut line = String::new();
    while !line.starts_with(">>>") {
        line = guest.wait_for("\n");
    }
    assert_eq!(line, ">>> 0");
}

#[test]
fn a_copied_tree_is_there_for_the_host() {
    let folder = assets::folder_on_disk();
    let Some(skiff) = Skiff::with_tools(folder.path()) else { return };
    let source = source();
    // Past the capture of the test harness.
    let _ = writeln!(std::io::stderr(), "linux::tree::a_copied_tree_is_there_for_the_host: {source}");
    let tree = folder.path().join("tree");
    source.make(&tree).unwrap();
    // As it comes to most disks: from an archive, in few large reads. One of each file waits for the disk each time.
    let archive = folder.path().join("tree.tar");
    assets::tool("tar", &["-C", text(&tree), "-b", "128", "-cf", text(&archive), "."]);
    let mut skiff = skiff.cpus(2).memory("512M").cmdline("mitigations=off").disk(&archive, ",readonly=on");
    let size = (source.bytes() + u64::from(source.files) * 8192 + (64 << 20)).next_multiple_of(1 << 20);
    let mut copies = Vec::new();
    for Choice { aio, cache } in DISKS {
        let image = assets::blank_image(folder.path(), &format!("{aio}.img"), size);
        skiff = skiff.disk(&image, &format!(",aio={aio},cache={cache}"));
        copies.push(image);
    }
    let mut guest = skiff.boot();
    for disk in ['b', 'c', 'd'] {
        let make = format!("mkfs.ext4 -q -b 4096 -i 8192 /dev/vd{disk}");
        guest.ask(&format!("mkdir /{disk} && {make} && mount -t ext4 /dev/vd{disk} /{disk}"));
    }
    unpack(&mut guest);
    for top in 0..TOP {
        guest.ask(&format!("cp -a /b/folder-{top} /c/ && cp -a /c/folder-{top} /d/"));
    }
    guest.ask("umount /b && umount /c && umount /d");
    assert_eq!(guest.power_off().code, Some(0));
    let expected = listing(&tree);
    assert!(expected.lines().count() > source.files as usize);
    for image in copies {
        // Exit code 0: clean, and nothing to repair.
        assets::tool("e2fsck", &["-f", "-n", text(&image)]);
        let copy = image.with_extension("copy");
        fs::create_dir(&copy).unwrap();
        assets::tool("debugfs", &["-R", &format!("rdump / {}", text(&copy)), text(&image)]);
        assets::tool("diff", &["-r", "--no-dereference", "-x", "lost+found", text(&tree), text(&copy)]);
        assert!(listing(&copy) == expected, "{}: modes, sizes or links", image.display());
        fs::remove_dir_all(&copy).unwrap();
        fs::remove_file(&image).unwrap();
    }
}
