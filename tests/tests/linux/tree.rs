//! A file system made by the guest, with a tree of files copied into it, as the host finds it afterwards.

use std::path::Path;

use tests::{Skiff, assets};

use crate::choices::Choice;

const DISKS: [Choice; 3] = [
    Choice { aio: "threads", cache: "writeback" },
    Choice { aio: "native", cache: "none" },
    Choice { aio: "io_uring", cache: "none" },
];

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The kernel's netfilter modules: 167 files in Debian 12, 7 MB.
fn tree() -> std::path::PathBuf {
    let release = std::fs::read_to_string(assets::guest("release")).unwrap();
    let kernel = assets::target().join("linux/modules/lib/modules").join(release.trim()).join("kernel/net/netfilter");
    assert!(kernel.is_dir(), "{}", kernel.display());
    kernel
}

#[test]
fn a_copied_tree_is_there_for_the_host() {
    let folder = assets::folder_on_disk();
    let name = "linux::tree::a_copied_tree_is_there_for_the_host";
    let Some(skiff) = Skiff::with_tools(folder.path(), name) else { return };
    let tree = tree();
    let source = assets::blank_image(folder.path(), "source.img", 64 << 20);
    assets::tool("mke2fs", &["-qF", "-t", "ext4", "-d", text(&tree), text(&source)]);
    let mut skiff = skiff.cpus(2).memory("512M").disk(&source, ",readonly=on");
    let mut images = Vec::new();
    for Choice { aio, cache } in DISKS {
        let image = assets::blank_image(folder.path(), &format!("{aio}.img"), 64 << 20);
        skiff = skiff.disk(&image, &format!(",aio={aio},cache={cache}"));
        images.push(image);
    }
    let mut guest = skiff.boot();
    guest.ask("mkdir /a /b /c /d && mount -t ext4 -o ro /dev/vda /a");
    for disk in ['b', 'c', 'd'] {
        guest.ask(&format!("mkfs.ext4 -q /dev/vd{disk} && mount -t ext4 /dev/vd{disk} /{disk}"));
    }
    guest.ask("for d in b c d; do cp -a /a/. /$d & done; wait");
    guest.ask("umount /b && umount /c && umount /d");
    assert_eq!(guest.power_off().code, Some(0));
    for image in images {
        // Exit code 0: clean, and nothing to repair.
        assets::tool("e2fsck", &["-f", "-n", text(&image)]);
        let copy = image.with_extension("copy");
        std::fs::create_dir(&copy).unwrap();
        assets::tool("debugfs", &["-R", &format!("rdump / {}", text(&copy)), text(&image)]);
        assets::tool("diff", &["-r", "-x", "lost+found", text(&tree), text(&copy)]);
    }
}
