//! A minimal DNS server on 127.0.0.1:53, for use in a network namespace. By default, the first label of a name selects
//! the answer: NXDOMAIN for `nx`, SERVFAIL for `servfail`, no answer for `silent`, otherwise the address 127.0.0.1.

use super::*;

/// resolv.conf for this server.
pub const RESOLV: &str = "nameserver 127.0.0.1\n";

/// The queried names, in order.
pub type Queries = Arc<Mutex<Vec<String>>>;

/// The answer for a name.
pub enum Answer {
    NoReply,
    /// An RCODE.
    Rcode(u8),
    /// For queries of type A; the answer to AAAA is empty.
    Addrs(Vec<Ipv4Addr>),
}

impl Answer {
    pub fn addrs(ips: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        Self::Addrs(ips.into_iter().collect())
    }
}

/// Starts a server with the default answers.
pub fn start() -> Queries {
    start_with(|name, _| match name.split('.').next() {
        Some("silent") => Answer::NoReply,
        Some("servfail") => Answer::Rcode(2),
        Some("nx") => Answer::Rcode(3),
        _ => Answer::addrs([Ipv4Addr::LOCALHOST]),
    })
}

/// Starts a server. `choose` returns the answer for a name and the number of earlier A queries for it.
pub fn start_with(choose: impl Fn(&str, usize) -> Answer + Send + 'static) -> Queries {
    let socket = UdpSocket::bind("127.0.0.1:53").expect("the port is free in this namespace");
    let queries = Queries::default();
    let shared = queries.clone();
    thread::spawn(move || {
        let mut query = [0; 512];
        let mut a_queries: HashMap<String, usize> = HashMap::new();
        while let Ok((n, from)) = socket.recv_from(&mut query) {
            let (name, is_a, question) = parse(&query[..n]);
            let nth = a_queries.entry(name.clone()).or_default();
            let answer = choose(&name, *nth);
            *nth += usize::from(is_a);
            shared.lock().expect("not poisoned").push(name);
            if let Some(answer) = encode(&query, question, is_a, answer) {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    queries
}

/// Returns a query's name, whether its type is A, and its question section (RFC 1035 section 4).
fn parse(query: &[u8]) -> (String, bool, &[u8]) {
    const HEADER: usize = 12;
    let (mut labels, mut at) = (Vec::new(), HEADER);
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).into_owned());
        at = end;
    }
    (labels.join("."), query[at + 1..at + 3] == [0, 1], &query[HEADER..at + 5])
}

fn encode(query: &[u8], question: &[u8], is_a: bool, answer: Answer) -> Option<Vec<u8>> {
    let (rcode, ips) = match answer {
        Answer::NoReply => return None,
        Answer::Rcode(rcode) => (rcode, Vec::new()),
        Answer::Addrs(ips) => (0, if is_a { ips } else { Vec::new() }),
    };
    let count = u8::try_from(ips.len()).expect("at most 255");
    let mut bytes = vec![query[0], query[1], 0x81, 0x80 | rcode, 0, 1, 0, count, 0, 0, 0, 0];
    bytes.extend(question);
    for ip in ips {
        // A pointer to the question's name, type A, class IN, TTL 0, 4 bytes.
        bytes.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        bytes.extend(ip.octets());
    }
    Some(bytes)
}
