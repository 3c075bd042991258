//! Transfers over TCP in both directions at once, each byte compared on arrival, and one-byte requests and responses.
//!
//! A client begins with its seed and the bytes it will send and wants, as three little-endian u64. The server ends with
//! the number of bytes that it got and found right. Zero bytes both ways: requests, which are answered until the client
//! hangs up.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::content::{Content, PIECE};

/// Answers clients for ever.
pub(crate) fn serve(listener: &TcpListener, content: &'static Content) -> anyhow::Result<()> {
    loop {
        let (stream, client) = listener.accept()?;
        thread::spawn(move || {
            if let Err(error) = answer(&stream, content) {
                println!("{client}: {error:#}");
            }
        });
    }
}

fn answer(mut stream: &TcpStream, content: &Content) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let [seed, up, down] = [read_number(stream)?, read_number(stream)?, read_number(stream)?];
    if (up, down) == (0, 0) {
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 {
            stream.write_all(&byte)?;
        }
        return Ok(());
    }
    exchange(stream, content, (seed + 1, down), (seed, up))?;
    stream.write_all(&up.to_le_bytes())?;
    Ok(())
}

/// Transfers `up` and `down` bytes on each of `streams` connections at once, once it has said that these are there.
pub(crate) fn transfer(address: &str, streams: u64, up: u64, down: u64) -> anyhow::Result<()> {
    let content = &Content::new();
    let connect = |_| TcpStream::connect(address).with_context(|| format!("connecting to {address}"));
    let connections = (0..streams).map(connect).collect::<anyhow::Result<Vec<_>>>()?;
    println!("connected");
    thread::scope(|scope| {
        let run = |(stream, seed)| scope.spawn(move || one_transfer(stream, content, seed, up, down));
        let threads: Vec<_> = connections.iter().zip((0..).step_by(2)).map(run).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    println!("intact: {streams} streams, {up} bytes up and {down} down each");
    Ok(())
}

fn one_transfer(mut stream: &TcpStream, content: &Content, seed: u64, up: u64, down: u64) -> anyhow::Result<()> {
    for number in [seed, up, down] {
        stream.write_all(&number.to_le_bytes())?;
    }
    exchange(stream, content, (seed, up), (seed + 1, down))?;
    let counted = read_number(stream).context("the other end did not say that it is content")?;
    ensure!(counted == up, "the other end counted {counted} bytes of {up}");
    Ok(())
}

/// Sends and receives at once; each is a seed and a number of bytes.
fn exchange(stream: &TcpStream, content: &Content, out: (u64, u64), r#in: (u64, u64)) -> anyhow::Result<()> {
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(stream, content, out));
        let received = receive(stream, content, r#in);
        if received.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sent = sender.join().expect("no panic");
        received.and(sent)
    })
}

fn send(mut stream: &TcpStream, content: &Content, (seed, bytes): (u64, u64)) -> anyhow::Result<()> {
    let mut position = 0;
    while position < bytes {
        let count = (bytes - position).min(PIECE as u64);
        stream.write_all(&content.at(seed, position)[..count as usize]).context("sending")?;
        position += count;
    }
    Ok(())
}

fn receive(mut stream: &TcpStream, content: &Content, (seed, bytes): (u64, u64)) -> anyhow::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut position = 0;
    while position < bytes {
        let most = (bytes - position).min(PIECE as u64) as usize;
        let count = stream.read(&mut buffer[..most]).context("receiving")?;
        if count == 0 {
            bail!("the stream ended after {position} of {bytes} bytes");
        }
        if let Some(wrong) = (0..count).find(|&i| buffer[i] != content.at(seed, position)[i]) {
            bail!("byte {} of stream {seed} is not what was sent", position + wrong as u64);
        }
        position += count as u64;
    }
    Ok(())
}

fn read_number(mut stream: &TcpStream) -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// One-byte requests, one after the other, for a while; prints how many were answered a second.
pub(crate) fn requests(address: &str, time: Duration) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[0; 24])?;
    let (started, mut count) = (Instant::now(), 0_u32);
    while started.elapsed() < time {
        let mut byte = [count as u8];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        ensure!(byte[0] == count as u8, "the answer is not the request");
        count += 1;
    }
    println!("{:.1} requests/s", f64::from(count) / started.elapsed().as_secs_f64());
    Ok(())
}
