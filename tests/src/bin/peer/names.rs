//! A name server that knows one address for every name (RFC 1035).

use std::net::{Ipv4Addr, UdpSocket};

/// What every name stands for: TEST-NET-3 of RFC 5737.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);

const HEADER: usize = 12;
const TYPE_A: [u8; 2] = [0, 1];

/// Answers for ever.
pub(crate) fn serve(address: &str) -> anyhow::Result<()> {
    let socket = UdpSocket::bind((address, 53))?;
    println!("serving");
    let mut buffer = [0; 512];
    loop {
        let (size, client) = socket.recv_from(&mut buffer)?;
        if let Some(answer) = answer(&buffer[..size]) {
            socket.send_to(&answer, client)?;
        }
    }
}

/// The answer to a query with one question: an address for type A, nothing for other types.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let name = query.get(HEADER..)?;
    let end = HEADER + name.iter().position(|byte| *byte == 0)? + 1;
    let question = query.get(HEADER..end + 4)?;
    let is_address = query.get(end..end + 2)? == TYPE_A;
    let mut answer = query[..2].to_vec();
    // QR, RD and RA; one question; one answer or none.
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    answer.extend(question);
    if is_address {
        // The name of the question, type A, class IN, a minute, four bytes.
        answer.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(ADDRESS.octets());
    }
    Some(answer)
}
