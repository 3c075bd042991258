//! Tables that sfdisk(8) wrote, and what it reads in them itself.

use super::*;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A tool of the host with this script as its input; `None`, said loudly, where it is missing.
fn tool(program: &str, arguments: &[&str], script: &str) -> Option<Vec<u8>> {
    let path = "/usr/sbin:/sbin:/usr/bin:/bin";
    let mut shell = Command::new("sh");
    shell.env("PATH", path).args(["-c", &format!("printf '{script}' | \"$0\" \"$@\""), program]).args(arguments);
    let output = shell.output().unwrap();
    if output.status.code() == Some(127) {
        skip::because(format_args!("{program} is not installed"));
        return None;
    }
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(output.stdout)
}

/// An image of 64 MiB with the partition table that sfdisk makes of `script`.
fn partitioned(folder: &Path, script: &str) -> Option<std::path::PathBuf> {
    let image = folder.join("disk.img");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    tool("sfdisk", &["--quiet", image.to_str().unwrap()], script).map(|_| image)
}

fn layout(image: &Path) -> Layout {
    Layout::of(&File::open(image).unwrap())
}

fn ext4(image: &Path, begin: u64, size: u64) -> Option<()> {
    let (offset, size) = (format!("offset={begin}"), format!("{}K", size >> 10));
    tool("mke2fs", &["-qF", "-t", "ext4", "-E", &offset, image.to_str().unwrap(), &size], "").map(|_| ())
}

#[test]
fn tables_are_read_as_sfdisk_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    for script in [
        "label: gpt\\nsize=8MiB\\nsize=30MiB\\nstart=50MiB\\n",
        "label: gpt\\nstart=1MiB,size=2MiB\\n",
        "label: dos\\nsize=8MiB\\ntype=5\\nsize=10MiB\\nsize=10MiB,type=82\\nsize=5MiB\\n",
        "label: dos\\nsize=8MiB\\nsize=4MiB\\nsize=4MiB\\nsize=2MiB,type=b\\n",
        "label: dos\\ntype=f\\nsize=10MiB\\n",
    ] {
        let Some(image) = partitioned(folder.path(), script) else { return };
        let Some(said) = tool("sfdisk", &["--json", image.to_str().unwrap()], "") else { return };
        let said: Value = serde_json::from_slice(&said).unwrap();
        let said = said["partitiontable"]["partitions"].as_array().unwrap().iter();
        let expected: Vec<_> = said
            // One that holds others has no filesystem.
            .filter(|one| !["5", "f"].contains(&one["type"].as_str().unwrap()))
            .map(|one| {
                let node = one["node"].as_str().unwrap().rsplit("disk.img").next().unwrap().to_owned();
                (
                    node.parse::<u32>().unwrap(),
                    one["start"].as_u64().unwrap() * 512,
                    one["size"].as_u64().unwrap() * 512,
                )
            })
            .collect();
        let found: Vec<_> = layout(&image).partitions.iter().map(|one| (one.number, one.begin, one.size)).collect();
        assert_eq!(found, expected, "{script}");
        assert!(!found.is_empty());
    }
}

/// Numbers and begins, as sfdisk counts them: a table of the chain that has no partition is none.
#[test]
fn a_logical_partition_that_was_removed() {
    let folder = tempfile::tempdir().unwrap();
    let Some(image) = partitioned(folder.path(), "label: dos\\ntype=5\\nsize=10MiB\\nsize=10MiB\\n") else { return };
    let [_, second] = &layout(&image).partitions[..] else { panic!("two logical partitions") };
    // The first entry of the table where the extended partition begins, at 1 MiB.
    let file = File::options().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 16], MIB + 446).unwrap();
    let Some(said) = tool("sfdisk", &["--json", image.to_str().unwrap()], "") else { return };
    // It says first that it leaves something out.
    let begin = said.iter().position(|byte| *byte == b'{').unwrap();
    let said: Value = serde_json::from_slice(&said[begin..]).unwrap();
    let last = &said["partitiontable"]["partitions"][1];
    assert!(last["node"].as_str().unwrap().ends_with("disk.img5"), "{said}");
    assert_eq!(last["start"].as_u64().unwrap() * SECTOR, second.begin);
    assert_eq!(layout(&image).partitions, [Partition { number: 5, ..second.clone() }]);
}

/// What was on a disk before its table, and was not removed, counts no more.
#[test]
fn the_rest_of_something_older() {
    let folder = tempfile::tempdir().unwrap();
    let Some(image) = partitioned(folder.path(), "label: gpt\\nsize=8MiB\\nsize=8MiB\\n") else { return };
    let replace = |image: &Path| {
        let arguments = ["--quiet", "--wipe", "never", image.to_str().unwrap()];
        tool("sfdisk", &arguments, "label: dos\\nstart=4MiB,size=16MiB\\n").unwrap();
    };
    replace(&image);
    let found: Vec<_> = layout(&image).partitions.iter().map(|one| (one.number, one.begin)).collect();
    assert_eq!(found, [(1, 4 * MIB)]);

    let image = folder.path().join("whole.img");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    if ext4(&image, 0, 64 * MIB).is_none() {
        return;
    }
    replace(&image);
    assert_eq!(layout(&image).ext(Some(1)), Ok(4 * MIB));
    ext4(&image, 4 * MIB, 16 * MIB).unwrap();
    assert_eq!((layout(&image).whole, layout(&image).ext(None)), (None, Ok(4 * MIB)));
}

#[test]
fn which_filesystem_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let Some(image) = partitioned(folder.path(), "label: gpt\\nsize=8MiB\\nsize=16MiB\\nsize=16MiB\\n") else { return };
    let begin = |number: usize| layout(&image).partitions[number - 1].begin;
    let unknown = "has no ext filesystem in its partitions (1: unknown, 2: unknown, 3: unknown)";
    assert_eq!(layout(&image).ext(None), Err(unknown.to_owned()));
    assert_eq!(layout(&image).ext(Some(2)), Ok(begin(2)), "it may be damaged: e2fsck says how");
    if ext4(&image, begin(2), 16 * MIB).is_none() {
        return;
    }
    assert_eq!(layout(&image).ext(None), Ok(begin(2)));
    std::os::unix::fs::FileExt::write_all_at(&File::options().write(true).open(&image).unwrap(), b"XFSB", begin(1))
        .unwrap();
    assert_eq!(layout(&image).ext(Some(1)), Err("is xfs; only ext2, ext3 and ext4 can be looked into".to_owned()));
    ext4(&image, begin(3), 16 * MIB).unwrap();
    let several = "has an ext filesystem in several partitions (1: xfs, 2: ext4, 3: ext4); write partition = 2";
    assert_eq!(layout(&image).ext(None), Err(several.to_owned()));
    assert_eq!(layout(&image).ext(Some(3)), Ok(begin(3)));
    assert_eq!(layout(&image).ext(Some(4)), Err("has no partition 4 (1: xfs, 2: ext4, 3: ext4)".to_owned()));

    let whole = folder.path().join("whole.img");
    File::create(&whole).unwrap().set_len(16 * MIB).unwrap();
    let none = "has no partition 1 (no partition table, and no filesystem that is known)";
    assert_eq!((layout(&whole).ext(None), layout(&whole).ext(Some(1))), (Ok(0), Err(none.to_owned())));
    ext4(&whole, 0, 16 * MIB).unwrap();
    assert_eq!((layout(&whole).whole, layout(&whole).ext(None)), (Some("ext4"), Ok(0)));
}

proptest! {
    /// Whatever a guest writes: what is said to be there lies on the disk.
    #[test]
    fn no_table_leads_astray(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..4096),
        is_gpt: bool,
        kind in proptest::sample::select(vec![0_u8, 5, 0x83]),
        first in 0_u8..9,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        if bytes.len() > 512 + 92 {
            bytes[510..512].copy_from_slice(b"\x55\xaa");
            bytes[450] = if is_gpt { PROTECTIVE } else { kind };
            bytes[454..458].copy_from_slice(&[first, 0, 0, 0]);
            if is_gpt {
                bytes[512..520].copy_from_slice(b"EFI PART");
                bytes[584..592].copy_from_slice(&u64::from(first).to_le_bytes());
                bytes[596..600].copy_from_slice(&128_u32.to_le_bytes());
            }
        }
        std::fs::write(&image, &bytes).unwrap();
        let found = layout(&image);
        prop_assert!(found.partitions.len() <= MOST as usize);
        prop_assert!(found.partitions.iter().all(|it| it.size > 0 && it.begin + it.size <= bytes.len() as u64));
    }
}
