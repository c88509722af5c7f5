//! Items to bytes and back: what is sent, and whether what comes is what must come.

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::fixtures::{encode_addr, fixtures};
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
pub struct Placeholders {
    /// What stands for more than an address of the fixtures.
    pub per_session: Vec<(&'static str, SocketAddr)>,
    /// BND of the last reply.
    pub bnd: Option<SocketAddr>,
}

impl Placeholders {
    fn addr(&self, name: &str) -> Result<SocketAddr, String> {
        if name == "bnd" {
            return self.bnd.ok_or_else(|| "there was no BND yet".into());
        }
        let addr = self.per_session.iter().find(|(known, _)| *known == name).map(|(_, addr)| *addr);
        addr.or_else(|| fixtures().addr(name)).ok_or_else(|| format!("nothing is called {name:?}"))
    }

    /// `None` where any byte will do.
    fn expected(&self, items: &[Item]) -> Result<Vec<Option<u8>>, String> {
        let mut expected = Vec::new();
        for item in items {
            match item {
                Item::Bytes(bytes) => expected.extend(bytes.iter().copied().map(Some)),
                Item::Named(name) => {
                    let bytes = match name.strip_suffix(":port") {
                        Some(name) => self.addr(name)?.port().to_be_bytes().to_vec(),
                        None => encode_addr(self.addr(name)?),
                    };
                    expected.extend(bytes.into_iter().map(Some));
                }
                Item::AnyByte => expected.push(None),
                Item::ToEnd => return Err("\"...\" has no place here".into()),
            }
        }
        Ok(expected)
    }

    /// What is to be sent.
    pub fn bytes(&self, items: &[Item]) -> Result<Vec<u8>, String> {
        let bytes: Option<Vec<u8>> = self.expected(items)?.into_iter().collect();
        bytes.ok_or_else(|| "\"??\" can't be sent".into())
    }

    /// Compares a datagram.
    pub fn compare(&self, items: &[Item], got: &[u8]) -> Result<(), String> {
        let expected = self.expected(items)?;
        let fits = |(expected, got): (&Option<u8>, &u8)| expected.is_none_or(|expected| expected == *got);
        if expected.len() == got.len() && expected.iter().zip(got).all(fits) {
            return Ok(());
        }
        Err(format!("{} bytes instead of {}: {}", got.len(), expected.len(), hex(got)))
    }

    /// Reads exactly these from a stream. `{bnd}` takes any address of loopback with a port, and keeps it.
    pub fn expect(&mut self, stream: &mut TcpStream, items: &[Item]) -> Result<(), String> {
        let mut got = Vec::new();
        for item in items {
            match item {
                Item::ToEnd => return stream.read_to_end(&mut got).map(drop).map_err(|error| error.to_string()),
                Item::Named(name) if name == "bnd" => self.bnd = Some(read_addr(stream, &mut got)?),
                Item::Named(name) if name == "same-bnd" => {
                    let bnd = self.addr("bnd")?;
                    expect_bytes(stream, &encode_addr(bnd), &mut got)?;
                }
                Item::AnyByte => drop(read_byte(stream, &mut got)?),
                item => expect_bytes(stream, &self.bytes(std::slice::from_ref(item))?, &mut got)?,
            }
        }
        Ok(())
    }
}

fn expect_bytes(stream: &mut TcpStream, expected: &[u8], got: &mut Vec<u8>) -> Result<(), String> {
    for byte in expected {
        if read_byte(stream, got)? != *byte {
            return Err(format!("byte {byte:02x} was due, and what came is {}", hex(got)));
        }
    }
    Ok(())
}

fn read_byte(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<u8, String> {
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(1) => {
            got.push(byte[0]);
            Ok(byte[0])
        }
        Ok(_) => Err(format!("the end came behind {}", hex(got))),
        Err(error) => Err(format!("behind {}: {error}", hex(got))),
    }
}

fn read_addr(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<SocketAddr, String> {
    let length = match read_byte(stream, got)? {
        1 => 4,
        4 => 16,
        other => return Err(format!("BND has ATYP {other}")),
    };
    let bytes = (0..length + 2).map(|_| read_byte(stream, got)).collect::<Result<Vec<u8>, _>>()?;
    let (ip, port) = bytes.split_at(length);
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
pub fn wait_until(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
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
pub fn wait_port_free(addr: SocketAddr, tcp: bool) -> bool {
    let table = format!("/proc/net/{}{}", if tcp { "tcp" } else { "udp" }, if addr.is_ipv6() { "6" } else { "" });
    let bytes = &encode_addr(addr)[1..];
    // The kernel shows four bytes of an address as one number of its own byte order.
    let words = bytes[..bytes.len() - 2].chunks(4).map(|word| <[u8; 4]>::try_from(word).expect("four bytes"));
    let ip: String = words.map(|word| format!("{:08X}", u32::from_ne_bytes(word))).collect();
    let holder = format!("{ip}:{:04X}", addr.port());
    let holds = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields[1] == holder && (!tcp || fields[3] == TCP_LISTEN)
    };
    wait_until(LIMIT, || {
        let table = std::fs::read_to_string(&table).expect("the kernel's table of sockets");
        !table.lines().skip(1).any(holds)
    })
}

/// The first bytes of a message, for people.
pub fn hex(bytes: &[u8]) -> String {
    let shown: Vec<String> = bytes.iter().take(300).map(|byte| format!("{byte:02x}")).collect();
    if shown.is_empty() { "nothing".into() } else { shown.join(" ") }
}
