//! Items to octets and back: what is sent, and whether what comes is what must come.

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::fixtures::{fixtures, wire};
use super::transcript::Item;

/// How long anything may take that should happen at once; less than the 10 s of RFC 1928 section 6.
pub const LIMIT: Duration = Duration::from_secs(8);
/// Between two pieces of a message, so that the other side has a chance to read them apart. What must come is the
/// same whether it does or not.
pub const GAP: Duration = Duration::from_micros(200);

/// The state of a listening socket in /proc/net/tcp.
const TCP_LISTEN: &str = "0A";

/// What the names of a transcript stand for while it is played.
#[derive(Debug, Default)]
pub struct Names {
    /// What stands for more than an address of the fixtures.
    pub own: Vec<(&'static str, SocketAddr)>,
    /// BND of the last reply.
    pub bnd: Option<SocketAddr>,
}

impl Names {
    fn addr(&self, name: &str) -> Result<SocketAddr, String> {
        if name == "bnd" {
            return self.bnd.ok_or_else(|| "there was no BND yet".into());
        }
        let own = self.own.iter().find(|(known, _)| *known == name).map(|(_, addr)| *addr);
        own.or_else(|| fixtures().addr(name)).ok_or_else(|| format!("nothing is called {name:?}"))
    }

    /// `None` where any octet will do.
    fn wanted(&self, items: &[Item]) -> Result<Vec<Option<u8>>, String> {
        let mut wanted = Vec::new();
        for item in items {
            match item {
                Item::Octets(octets) => wanted.extend(octets.iter().copied().map(Some)),
                Item::Named(name) => {
                    let octets = match name.strip_suffix(":port") {
                        Some(name) => self.addr(name)?.port().to_be_bytes().to_vec(),
                        None => wire(self.addr(name)?),
                    };
                    wanted.extend(octets.into_iter().map(Some));
                }
                Item::Any => wanted.push(None),
                Item::Rest => return Err("\"...\" has no place here".into()),
            }
        }
        Ok(wanted)
    }

    /// What is to be sent.
    pub fn octets(&self, items: &[Item]) -> Result<Vec<u8>, String> {
        let octets: Option<Vec<u8>> = self.wanted(items)?.into_iter().collect();
        octets.ok_or_else(|| "\"??\" can't be sent".into())
    }

    /// Compares a datagram.
    pub fn compare(&self, items: &[Item], got: &[u8]) -> Result<(), String> {
        let wanted = self.wanted(items)?;
        let fits = |(wanted, got): (&Option<u8>, &u8)| wanted.is_none_or(|wanted| wanted == *got);
        if wanted.len() == got.len() && wanted.iter().zip(got).all(fits) {
            return Ok(());
        }
        Err(format!("{} octets instead of {}: {}", got.len(), wanted.len(), hex(got)))
    }

    /// Reads exactly these from a stream. `{bnd}` takes any address of loopback with a port, and keeps it.
    pub fn expect(&mut self, stream: &mut TcpStream, items: &[Item]) -> Result<(), String> {
        let mut got = Vec::new();
        for item in items {
            match item {
                Item::Rest => return stream.read_to_end(&mut got).map(drop).map_err(|error| error.to_string()),
                Item::Named(name) if name == "bnd" => self.bnd = Some(read_addr(stream, &mut got)?),
                Item::Named(name) if name == "same" => {
                    let bnd = self.addr("bnd")?;
                    expect_octets(stream, &wire(bnd), &mut got)?;
                }
                Item::Any => drop(next(stream, &mut got)?),
                item => expect_octets(stream, &self.octets(std::slice::from_ref(item))?, &mut got)?,
            }
        }
        Ok(())
    }
}

fn expect_octets(stream: &mut TcpStream, wanted: &[u8], got: &mut Vec<u8>) -> Result<(), String> {
    for octet in wanted {
        if next(stream, got)? != *octet {
            return Err(format!("octet {octet:02x} was due, and what came is {}", hex(got)));
        }
    }
    Ok(())
}

fn next(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<u8, String> {
    let mut octet = [0];
    match stream.read(&mut octet) {
        Ok(1) => {
            got.push(octet[0]);
            Ok(octet[0])
        }
        Ok(_) => Err(format!("the end came behind {}", hex(got))),
        Err(error) => Err(format!("behind {}: {error}", hex(got))),
    }
}

fn read_addr(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<SocketAddr, String> {
    let length = match next(stream, got)? {
        1 => 4,
        4 => 16,
        other => return Err(format!("BND has ATYP {other}")),
    };
    let octets = (0..length + 2).map(|_| next(stream, got)).collect::<Result<Vec<u8>, _>>()?;
    let (ip, port) = octets.split_at(length);
    let ip: IpAddr = match (<[u8; 4]>::try_from(ip), <[u8; 16]>::try_from(ip)) {
        (Ok(ip), _) => ip.into(),
        (_, Ok(ip)) => ip.into(),
        _ => return Err("no address".into()),
    };
    let addr = SocketAddr::new(ip, u16::from_be_bytes([port[0], port[1]]));
    if addr.ip().is_loopback() && addr.port() != 0 { Ok(addr) } else { Err(format!("BND is {addr}")) }
}

/// Nothing more comes but the end: FIN, or also a reset.
pub fn expect_end(stream: &mut TcpStream, reset_will_do: bool) -> Result<(), String> {
    match stream.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err("more came where the end was due".into()),
        Err(error) if reset_will_do && error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(format!("the end was due: {error}")),
    }
}

/// Whether something comes about soon.
pub fn within(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !is_so() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Whether nobody listens at an address any more, or no UDP socket has it. Neither connecting nor binding would tell:
/// the port may be another's by then, or held by a connection that has ended.
pub fn becomes_free(addr: SocketAddr, tcp: bool) -> bool {
    let table = format!("/proc/net/{}{}", if tcp { "tcp" } else { "udp" }, if addr.is_ipv6() { "6" } else { "" });
    let octets = &wire(addr)[1..];
    // The kernel shows four octets of an address as one number of its own byte order.
    let words = octets[..octets.len() - 2].chunks(4).map(|word| <[u8; 4]>::try_from(word).expect("four octets"));
    let ip: String = words.map(|word| format!("{:08X}", u32::from_ne_bytes(word))).collect();
    let holder = format!("{ip}:{:04X}", addr.port());
    let holds = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields[1] == holder && (!tcp || fields[3] == TCP_LISTEN)
    };
    within(LIMIT, || {
        let table = std::fs::read_to_string(&table).expect("the kernel's table of sockets");
        !table.lines().skip(1).any(holds)
    })
}

/// The first octets of a message, for people.
pub fn hex(octets: &[u8]) -> String {
    let shown: Vec<String> = octets.iter().take(300).map(|octet| format!("{octet:02x}")).collect();
    if shown.is_empty() { "nothing".into() } else { shown.join(" ") }
}
