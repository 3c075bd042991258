//! Datagrams that come back as they were sent. The network may lose some: they are sent again, a few times.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::content::{Content, PIECE};

/// A datagram begins with its number, little-endian.
const HEADER: usize = 8;

const WINDOW: usize = 8;
const TRIES: u32 = 20;
const PATIENCE: Duration = Duration::from_millis(500);

fn datagram(content: &Content, number: u64, size: usize) -> Vec<u8> {
    [&number.to_le_bytes(), &content.at(number, 0)[..size - HEADER]].concat()
}

/// Sends back what is intact, for ever; says what is not.
pub(crate) fn serve(socket: &UdpSocket, content: &Content) -> anyhow::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        let (size, client) = socket.recv_from(&mut buffer)?;
        let Some((number, _)) = buffer[..size].split_first_chunk::<HEADER>() else { continue };
        if buffer[..size] == datagram(content, u64::from_le_bytes(*number), size) {
            // A full queue of the socket is a loss like any other.
            let _ = socket.send_to(&buffer[..size], client);
        } else {
            println!("{client}: a datagram of {size} bytes is not what was sent");
        }
    }
}

/// `count` datagrams of 100 bytes that nobody answers, no faster than a queue of an interface takes them.
pub(crate) fn shout(address: &str, count: usize) -> anyhow::Result<()> {
    let (content, socket) = (Content::new(), UdpSocket::bind("0.0.0.0:0")?);
    for number in 0..count {
        socket.send_to(&datagram(&content, number as u64, 100), address)?;
        if number % WINDOW == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// `count` datagrams of sizes from `smallest` to `largest`, spread evenly.
pub(crate) fn exchange(address: &str, count: usize, smallest: usize, largest: usize) -> anyhow::Result<()> {
    ensure!(smallest >= HEADER && largest < PIECE, "sizes from {HEADER} to {}", PIECE - 1);
    let content = Content::new();
    let unspecified = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(unspecified)?;
    socket.connect(address).with_context(|| format!("connecting to {address}"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let size = |number: usize| smallest + (largest - smallest) * number / count.max(2).saturating_sub(1);
    let all: Vec<_> = (0..count).map(|number| datagram(&content, number as u64, size(number))).collect();
    let mut lost = 0;
    for (window, datagrams) in all.chunks(WINDOW).enumerate() {
        lost += one_window(&socket, (window * WINDOW) as u64, datagrams)?;
    }
    println!("intact: {count} datagrams of {smallest} to {largest} bytes; {lost} sent again");
    Ok(())
}

/// Sends until all came back, and returns how many had to be sent again.
fn one_window(socket: &UdpSocket, first: u64, datagrams: &[Vec<u8>]) -> anyhow::Result<usize> {
    let mut missing: BTreeMap<u64, &Vec<u8>> = (first..).zip(datagrams).collect();
    let (mut buffer, mut again) = (vec![0; PIECE], 0);
    for attempt in 0..TRIES {
        again += if attempt == 0 { 0 } else { missing.len() };
        for datagram in missing.values() {
            match socket.send(datagram) {
                // Nobody is there yet, the link is down, or an earlier one was refused.
                Err(error) if attempt + 1 < TRIES => println!("sending: {error}"),
                result => _ = result?,
            }
        }
        while !missing.is_empty() {
            match socket.recv(&mut buffer) {
                Ok(size) => {
                    let number = buffer[..size].first_chunk().map_or(u64::MAX, |number| u64::from_le_bytes(*number));
                    // One that came twice is not missing any more.
                    if let Some(sent) = missing.get(&number) {
                        ensure!(buffer[..size] == sent[..], "datagram {number} came back as something else");
                        missing.remove(&number);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => println!("receiving: {error}"),
            }
        }
        if missing.is_empty() {
            return Ok(again);
        }
    }
    anyhow::bail!(
        "{} datagrams never came back, the first of {} bytes",
        missing.len(),
        missing.first_key_value().map_or(0, |(_, datagram)| datagram.len())
    )
}
