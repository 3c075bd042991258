//! `rx-bps=`, `tx-bps=` and `pps=`: never faster than that. A slow host only makes it slower.

use std::time::{Duration, Instant};

use tests::{Network, Wired, network};

use super::{set_up, tcp};

/// Bytes a second that each direction may have, and bytes to transfer: four seconds' worth, of which some may be saved up.
const RATE: u32 = 256 << 10;
const BYTES: u32 = 4 * RATE;
const AT_LEAST: Duration = Duration::from_secs(3);

#[test]
fn are_kept_in_both_directions() {
    let folder = tempfile::tempdir().unwrap();
    let Some(network) = Network::new() else { return };
    let Some(initrd) = network::initrd(folder.path()) else { return };
    network.tap("tap0", 1);
    let keys = format!(",rx-bps={}K,tx-bps={}K", RATE >> 10, RATE >> 10);
    let mut guest = Wired::new(&network, &initrd, 1).keys(&keys).boot("tap=tap0");
    set_up(&mut guest);
    let _peer = network.serve(super::PORT);
    for (up, down) in [(BYTES, 1), (1, BYTES)] {
        let started = Instant::now();
        guest.ask(&format!("peer {}", tcp("192.0.2.1", 1, up, down)));
        let took = started.elapsed();
        assert!(took >= AT_LEAST, "{up} bytes up and {down} down took {took:?}");
    }
    super::is_content(&mut guest);
    assert_eq!(guest.power_off().code, Some(0));
}
