//! An interface as a table of a configuration file. Main thread.

use devices::virtio::net::Limits;

use super::{DataPath, NetBackend, NetConfig, TapSource};
use crate::config::file::{self, line, text};
use crate::config::place::ConfigError;
use crate::config::value::format_size;

/// Writes an interface as a table of a configuration file.
pub(in crate::config) fn write(out: &mut String, net: &NetConfig) -> Result<(), ConfigError> {
    match &net.backend {
        NetBackend::Tap { source, path } => {
            write_source(out, source);
            match path {
                DataPath::Kernel => line(out, "vhost", text("on")),
                DataPath::Either => line(out, "vhost", text("auto")),
                DataPath::Skiff(limits) => {
                    line(out, "vhost", text("off"));
                    write_limits(out, limits);
                }
            }
        }
        NetBackend::Passt { forwards, limits } => {
            line(out, "passt", true);
            if !forwards.is_empty() {
                line(
                    out,
                    "forward",
                    toml::Value::Array(forwards.iter().map(|forward| text(&forward.to_string())).collect()),
                );
            }
            write_limits(out, limits);
        }
        NetBackend::Socket { path, limits } => {
            line(out, "socket", text(file::path(path)?));
            write_limits(out, limits);
        }
    }
    line(out, "id", text(&net.id));
    if let Some(mac) = net.mac {
        line(out, "mac", text(&mac.to_string()));
    }
    if let Some(mtu) = net.mtu {
        line(out, "mtu", mtu);
    }
    line(out, "ioeventfd", net.ioeventfd);
    line(out, "queue-size", net.queue_size);
    Ok(())
}

fn write_source(out: &mut String, source: &TapSource) {
    match source {
        TapSource::Named { name, queues } => {
            line(out, "tap", text(name));
            line(out, "queues", queues);
        }
        TapSource::New { name, address: (address, bits), queues } => {
            line(out, "tap", text(name.as_deref().unwrap_or_default()));
            line(out, "host-ip", text(&format!("{address}/{bits}")));
            line(out, "queues", queues);
        }
        TapSource::Descriptor(fd) => line(out, "fd", fd),
    }
}

fn write_limits(out: &mut String, limits: &Limits) {
    for (key, rate) in [("rx-bps", limits.rx_bytes), ("tx-bps", limits.tx_bytes)] {
        if let Some(rate) = rate {
            line(out, key, text(&format_size(rate.get())));
        }
    }
    if let Some(rate) = limits.frames {
        line(out, "pps", rate);
    }
}
