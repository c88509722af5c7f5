//! A DNS server of a few lines on 127.0.0.1:53, for inside of a network namespace. The first label of a name says what
//! comes: `nx` and `servfail` their codes, `silent` nothing, anything else the address 127.0.0.1.

use std::net::UdpSocket;
use std::sync::{Arc, Mutex};
use std::thread;

/// What resolv.conf says for it.
pub const RESOLV: &str = "nameserver 127.0.0.1\n";

/// The names that it has been asked for, in order.
pub type Asked = Arc<Mutex<Vec<String>>>;

pub fn start() -> Asked {
    let socket = UdpSocket::bind("127.0.0.1:53").expect("the port is free in here");
    let asked = Asked::default();
    let shared = asked.clone();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((n, from)) = socket.recv_from(&mut query) {
            let (name, answer) = answer(&query[..n]);
            shared.lock().expect("no panic").push(name);
            if let Some(answer) = answer {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    asked
}

/// The name that a query is for, and the answer (RFC 1035 section 4).
fn answer(query: &[u8]) -> (String, Option<Vec<u8>>) {
    const HEADER: usize = 12;
    let (mut labels, mut at) = (Vec::new(), HEADER);
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).into_owned());
        at = end;
    }
    let is_a = query[at + 1..at + 3] == [0, 1];
    let question = &query[HEADER..at + 5];
    let rcode = match labels[0].as_str() {
        "silent" => return (labels.join("."), None),
        "servfail" => 2,
        "nx" => 3,
        _ => 0,
    };
    let answers = u8::from(rcode == 0 && is_a);
    let mut octets = vec![query[0], query[1], 0x81, 0x80 | rcode, 0, 1, 0, answers, 0, 0, 0, 0];
    octets.extend(question);
    if answers == 1 {
        // The name by a pointer to the question, A, IN, a TTL of 0, 4 octets.
        octets.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1]);
    }
    (labels.join("."), Some(octets))
}
