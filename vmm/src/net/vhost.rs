//! Whether the kernel moves the frames of a TAP (`vhost=`). Main thread.

use std::fs::File;
use std::io::{self, ErrorKind};

use anyhow::bail;
use devices::virtio::net::vhost::Vhost;

use crate::config::DataPath;

const DEVICE: &str = "/dev/vhost-net";

/// What moves the frames of so many `pairs` of queues in the kernel; `None` if skiff is to, which is said of the interface `id`
/// where there was a choice.
///
/// # Errors
/// If the kernel must, and cannot.
pub(super) fn open(path: DataPath, id: &str, pairs: u16) -> anyhow::Result<Option<Vec<Vhost>>> {
    let opened = match path {
        DataPath::Skiff(_) => return Ok(None),
        DataPath::Kernel | DataPath::Either => (0..pairs).map(|_| open_one()).collect::<io::Result<Vec<_>>>(),
    };
    match (opened, path) {
        (Ok(kernel), _) => {
            tracing::info!("net {id}: the kernel moves its frames ({DEVICE}), and counts them");
            Ok(Some(kernel))
        }
        (Err(error), DataPath::Either) => {
            tracing::info!("net {id}: skiff moves its frames, for {}", refusal(&error));
            Ok(None)
        }
        (Err(error), _) => bail!("vhost=on: {}, or write vhost=off", refusal(&error)),
    }
}

fn open_one() -> io::Result<Vhost> {
    Vhost::new(File::options().read(true).write(true).open(DEVICE)?)
}

fn refusal(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => format!("{DEVICE}: no such device; load the module with \"sudo modprobe vhost_net\""),
        ErrorKind::PermissionDenied => {
            format!(
                "{DEVICE}: permission denied; allow it with \"sudo chgrp kvm {DEVICE}\" and \"sudo chmod g+rw {DEVICE}\""
            )
        }
        _ => format!("{DEVICE}: {error}"),
    }
}
