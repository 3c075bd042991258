//! The program at both ends of a network under test, in the guest and beside it. What it transfers it compares with what
//! was sent, and says so.

mod content;
mod names;
mod packet;
mod sizes;
mod tap;
mod tcp;
mod udp;

use std::ffi::OsString;
use std::net::{TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use clap::Parser;

use content::Content;

#[derive(Debug, Parser)]
enum Command {
    /// Answer everything below, over TCP and UDP at this port
    Serve { port: u16 },
    /// Transfer over TCP in both directions at once
    Tcp { address: String, streams: u64, up: u64, down: u64 },
    /// Have datagrams sent back
    Udp { address: String, count: usize, smallest: usize, largest: usize },
    /// Send datagrams to somebody who need not be there
    Shout { address: String, count: usize },
    /// Requests and responses of one byte over TCP
    Requests { address: String, seconds: u64 },
    /// Answer raw frames
    Echo { interface: String },
    /// Have raw frames of these sizes answered: A-B or A-B/STEP
    Frames { interface: String, sizes: Vec<String> },
    /// Send raw frames of these sizes, to an interface or to who connects to a socket, until `count` has all of them
    Sizes { to: String, sizes: Vec<String> },
    /// Compare frames that `sizes` sends at the other end
    Count { interface: String },
    /// Send raw frames until the interface is gone
    Flood { interface: String },
    /// Answer every question for an address, over UDP at port 53 of this address
    Names { address: String },
    /// Send frames with odd headers for the device
    Odd { interface: String, count: u32 },
    /// Open a queue of a TAP with these flags of TUNSETIFF, and leave it to a program that takes the place of this one
    HandIn { interface: String, flags: String, number: i32, command: Vec<OsString> },
    /// Open so many queues of a TAP, and keep them
    Hold { interface: String, count: usize },
    /// Let the open macvtap of this number look full for ever, and leave it to a program that takes the place of this one
    Full { number: i32, command: Vec<OsString> },
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Serve { port } => serve(port),
        Command::Tcp { address, streams, up, down } => tcp::transfer(&address, streams, up, down),
        Command::Udp { address, count, smallest, largest } => udp::exchange(&address, count, smallest, largest),
        Command::Shout { address, count } => udp::shout(&address, count),
        Command::Requests { address, seconds } => tcp::requests(&address, Duration::from_secs(seconds)),
        Command::Echo { interface } => packet::echo(&interface),
        Command::Frames { interface, sizes } => packet::ask(&interface, &all_sizes(&sizes)?),
        Command::Sizes { to, sizes } => sizes::send(&to, &all_sizes(&sizes)?),
        Command::Count { interface } => sizes::count(&interface),
        Command::Flood { interface } => packet::flood(&interface),
        Command::Names { address } => names::serve(&address),
        Command::Odd { interface, count } => packet::odd_headers(&interface, count),
        Command::HandIn { interface, flags, number, command } => tap::hand_in(&interface, &flags, number, &command),
        Command::Hold { interface, count } => tap::hold(&interface, count),
        Command::Full { number, command } => tap::full(number, &command),
    }
}

fn serve(port: u16) -> anyhow::Result<()> {
    let content: &Content = Box::leak(Box::new(Content::new()));
    // Every address, of both families.
    let (listener, socket) = (TcpListener::bind(("::", port))?, UdpSocket::bind(("::", port))?);
    println!("serving");
    thread::spawn(move || udp::serve(&socket, content));
    tcp::serve(&listener, content)
}

fn all_sizes(ranges: &[String]) -> anyhow::Result<Vec<usize>> {
    let mut sizes = Vec::new();
    for range in ranges {
        let (range, step) = range.split_once('/').unwrap_or((range, "1"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse()?, last.parse()?);
        sizes.extend((first..=last).step_by(step.parse()?));
    }
    Ok(sizes)
}
