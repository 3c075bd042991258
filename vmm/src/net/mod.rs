//! The host's side of networks: what `--net` names is opened and set up here, on the main thread, before the machine
//! exists. The devices get descriptors.

mod interface;
pub mod mac;
mod passt;
mod socket;
mod tap;
mod vhost;

use std::os::unix::net::UnixStream;
use std::path::{self, Path};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use devices::virtio::net::NetOptions;
use devices::virtio::net::backend::{Backend, Offloads, Port};
use devices::virtio::net::stream::{Reconnect, Stream};

use self::mac::Mac;
use self::passt::Passt;
use self::tap::OpenTap;
use crate::config::{NetBackend, NetConfig, TapSource, VmConfig};

/// A network interface whose back end is open.
pub struct OpenNet {
    /// The host's side; it stays open when the guest reboots.
    pub backend: Arc<Backend>,
    /// How the guest sees it, and where it is counted.
    pub options: NetOptions,
    /// Doorbells arrive through ioeventfds.
    pub ioeventfd: bool,
}

/// Opens the back ends of all interfaces.
///
/// # Errors
/// One line that names the option and the remedy. What was opened is closed then, and what was started ends.
pub fn open(config: &VmConfig) -> anyhow::Result<Vec<OpenNet>> {
    let mut nets: Vec<OpenNet> = Vec::with_capacity(config.nets.len());
    for (number, net) in config.nets.iter().enumerate() {
        let place = named(&net.backend);
        let Opened { backend, mac: own, mtu } = open_backend(net).with_context(|| place.clone())?;
        let mac = net.mac.or(own).unwrap_or_else(|| derive(config, number));
        if let Some(own) = own.filter(|own| *own != mac) {
            tracing::warn!("{place},mac={mac}: the interface hears {own} only; leave mac= out");
        }
        if let Some(other) = nets.iter().find(|other| other.options.mac == mac.octets()) {
            bail!("{place}: its address {mac} is that of {}; give one of them another with mac=", other.options.id);
        }
        let mtu = net.mtu.or(mtu);
        let told = mtu.map(|mtu| format!(", MTU {mtu}")).unwrap_or_default();
        tracing::info!("net {}: {place}: address {mac}{told}", net.id);
        let options = NetOptions {
            number,
            id: net.id.clone(),
            mac: mac.octets(),
            mtu,
            queue_size: net.queue_size,
            limits: net.limits(),
            statistics: Arc::default(),
        };
        nets.push(OpenNet { backend: Arc::new(backend), options, ioeventfd: net.ioeventfd });
    }
    Ok(nets)
}

/// The option, as far as it says what is opened.
fn named(backend: &NetBackend) -> String {
    match backend {
        NetBackend::Tap { source: TapSource::Named { name, .. }, .. } => format!("--net tap={name}"),
        NetBackend::Tap { source: TapSource::New { name, address: (address, bits), .. }, .. } => {
            format!("--net tap={},host-ip={address}/{bits}", name.as_deref().unwrap_or_default())
        }
        NetBackend::Tap { source: TapSource::Descriptor(fd), .. } => format!("--net fd={fd}"),
        NetBackend::Passt { .. } => "--net passt".to_owned(),
        NetBackend::Socket { path, .. } => format!("--net socket={}", path.display()),
    }
}

/// A back end, and what it asks of the guest's interface.
struct Opened {
    backend: Backend,
    /// The address that it must have, if it must have one.
    mac: Option<Mac>,
    /// The MTU that it is told if the configuration says nothing.
    mtu: Option<u16>,
}

fn open_backend(net: &NetConfig) -> anyhow::Result<Opened> {
    match &net.backend {
        NetBackend::Tap { source, path } => {
            let tap = OpenTap::open(source, net.mtu)?;
            let (mac, mtu) = (tap.mac, tap.mtu);
            let backend = tap.backend()?;
            let kernel = vhost::open(*path, &net.id, backend.pairs())?;
            Ok(Opened {
                backend: if let Some(kernel) = kernel { backend.in_kernel(kernel) } else { backend },
                mac,
                mtu,
            })
        }
        NetBackend::Passt { forwards, .. } => {
            let passt = Passt::new(forwards, net.mtu);
            let socket = passt.start()?;
            stream(socket, Box::new(passt.again()))
        }
        NetBackend::Socket { path, .. } => {
            let socket = socket::connect(path).map_err(|error| anyhow!("{}", socket::refusal(path, &error)))?;
            let path = path.clone();
            stream(socket, Box::new(move || socket::connect(&path)))
        }
    }
}

fn stream(socket: UnixStream, reconnect: Reconnect) -> anyhow::Result<Opened> {
    let port: Box<dyn Port> = Box::new(Stream::new(socket, reconnect)?);
    Ok(Opened { backend: Backend::new(vec![port], Offloads::NONE), mac: None, mtu: None })
}

/// The address of the interface at `number` when none is given: it follows from the host, what the machine boots from, and
/// what the interface is connected to, so it is the same each time and another one for each machine.
fn derive(config: &VmConfig, number: usize) -> Mac {
    let absolute = |file: &Path| path::absolute(file).unwrap_or(file.to_owned()).into_os_string().into_encoded_bytes();
    let host = std::fs::read("/etc/machine-id").unwrap_or_default();
    let files = [&config.kernel].into_iter().chain(&config.initrd).chain(config.disks.iter().map(|disk| &disk.path));
    let files: Vec<_> = files.map(|file| absolute(file)).collect();
    let (network, number) = (named(&config.nets[number].backend), number.to_le_bytes());
    let mut identity: Vec<&[u8]> = vec![&host, network.as_bytes(), &number];
    identity.extend(files.iter().map(Vec::as_slice));
    Mac::derived(&identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Place, Request};

    fn addresses(settings: &[(&str, &str)]) -> Vec<Mac> {
        let mut request = Request::default();
        for (key, value) in settings {
            request.set(&Place::flag(key, value), key, value).unwrap();
        }
        let config = request.resolve().unwrap();
        (0..config.nets.len()).map(|number| derive(&config, number)).collect()
    }

    #[test]
    fn an_address_follows_from_the_machine() {
        let plain = [("kernel", "/k"), ("net", "tap=tap0"), ("net", "passt")];
        let [first, second] = addresses(&plain)[..] else { panic!("two interfaces") };
        assert_ne!(first, second);
        assert_eq!(addresses(&plain), [first, second], "the same each time");
        // What an interface may do, and how it shows itself, is no part of what it is.
        assert_eq!(
            addresses(&[("kernel", "/k"), ("net", "tap=tap0,mtu=9000,pps=5,id=lan"), ("net", "passt")]),
            [first, second]
        );
        for other in [
            &[("kernel", "/l"), ("net", "tap=tap0")][..],
            &[("kernel", "/k"), ("initrd", "/i"), ("net", "tap=tap0")],
            &[("kernel", "/k"), ("disk", "/d"), ("net", "tap=tap0")],
            &[("kernel", "/k"), ("net", "tap=tap1")],
        ] {
            assert_ne!(addresses(other), [first], "{other:?}");
        }
    }
}
