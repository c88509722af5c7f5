//! Encodes the items of a transcript line, and compares received bytes with them.

use super::transcript::Item;
use super::*;

/// Time limit for each expected event. Shorter than the 10 s of RFC 1928 section 6.
pub const LIMIT: Duration = Duration::from_secs(8);
/// Pause between two writes, so that the receiver is likely to read them separately.
pub const GAP: Duration = Duration::from_micros(200);

/// State LISTEN in /proc/net/tcp.
const TCP_LISTEN: &str = "0A";

/// Addresses of the placeholders of a transcript, such as `{echo}`.
#[derive(Debug, Default)]
pub struct Placeholders {
    pub named: Vec<(&'static str, SocketAddr)>,
    /// BND of the last reply.
    pub bnd: Option<SocketAddr>,
}

impl Placeholders {
    fn addr(&self, name: &str) -> Result<SocketAddr, String> {
        if name == "bnd" {
            return self.bnd.ok_or_else(|| "no reply with {bnd} so far".into());
        }
        let found = self.named.iter().find(|(key, _)| *key == name);
        found.map(|(_, addr)| *addr).ok_or_else(|| format!("unknown placeholder {name:?}"))
    }

    /// Returns the expected bytes. `None` means any byte.
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
                Item::ToEnd => return Err("\"...\" is only valid in a line of the server".into()),
            }
        }
        Ok(expected)
    }

    /// Encodes the items as bytes to send.
    pub fn bytes(&self, items: &[Item]) -> Result<Vec<u8>, String> {
        let bytes: Option<Vec<u8>> = self.expected(items)?.into_iter().collect();
        bytes.ok_or_else(|| "\"??\" can't be sent".into())
    }

    /// Compares a received datagram with the items.
    pub fn compare(&self, items: &[Item], got: &[u8]) -> Result<(), String> {
        let expected = self.expected(items)?;
        let is_match = |(expected, got): (&Option<u8>, &u8)| expected.is_none_or(|expected| expected == *got);
        if expected.len() == got.len() && expected.iter().zip(got).all(is_match) {
            return Ok(());
        }
        Err(format!("expected a datagram of {} bytes, received {}: {}", expected.len(), got.len(), hex(got)))
    }

    /// Reads exactly these items from a stream, and returns the bytes. `{bnd}` accepts any loopback address with a
    /// port, and stores it.
    pub fn expect(&mut self, stream: &mut TcpStream, items: &[Item]) -> Result<Vec<u8>, String> {
        let mut got = Vec::new();
        for item in items {
            match item {
                Item::ToEnd => drop(stream.read_to_end(&mut got).map_err(|error| error.to_string())?),
                Item::Named(name) if name == "bnd" => self.bnd = Some(read_addr(stream, &mut got)?),
                Item::Named(name) if name == "same-bnd" => {
                    let bnd = self.addr("bnd")?;
                    expect_bytes(stream, &encode_addr(bnd), &mut got)?;
                }
                Item::Named(name) if name == "greeting" => read_greeting(stream, &mut got)?,
                Item::Named(name) if name == "login" => read_login(stream, &mut got)?,
                Item::Named(name) if name == "request" => read_request(stream, &mut got)?,
                Item::AnyByte => drop(read_byte(stream, &mut got)?),
                item => expect_bytes(stream, &self.bytes(std::slice::from_ref(item))?, &mut got)?,
            }
        }
        Ok(got)
    }
}

/// Encodes ATYP, address and port as in requests, replies and datagrams.
pub fn encode_addr(addr: SocketAddr) -> Vec<u8> {
    message_with_addr([0; 3], addr).split_off(3)
}

fn read_bytes(stream: &mut TcpStream, got: &mut Vec<u8>, count: usize) -> Result<(), String> {
    (0..count).try_for_each(|_| read_byte(stream, got).map(drop))
}

/// Reads a byte, and then as many bytes as it says.
fn read_field(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<(), String> {
    let length = read_byte(stream, got)?;
    read_bytes(stream, got, length.into())
}

fn read_greeting(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<(), String> {
    read_byte(stream, got)?;
    read_field(stream, got)
}

fn read_login(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<(), String> {
    read_greeting(stream, got)?;
    read_field(stream, got)
}

fn read_request(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<(), String> {
    read_bytes(stream, got, 3)?;
    match read_byte(stream, got)? {
        1 => read_bytes(stream, got, 4)?,
        3 => read_field(stream, got)?,
        4 => read_bytes(stream, got, 16)?,
        atyp => return Err(format!("ATYP {atyp} in a request")),
    }
    read_bytes(stream, got, 2)
}

fn expect_bytes(stream: &mut TcpStream, expected: &[u8], got: &mut Vec<u8>) -> Result<(), String> {
    for byte in expected {
        if read_byte(stream, got)? != *byte {
            return Err(format!("expected {byte:02x} as the last byte of {}", hex(got)));
        }
    }
    Ok(())
}

fn read_byte(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<u8, String> {
    let mut byte = [0];
    match retry(|| stream.read(&mut byte)) {
        Ok(1) => {
            got.push(byte[0]);
            Ok(byte[0])
        }
        Ok(_) => Err(format!("EOF after {}", hex(got))),
        Err(error) => Err(format!("after {}: {error}", hex(got))),
    }
}

fn read_addr(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<SocketAddr, String> {
    let start = got.len();
    let ip: IpAddr = match read_byte(stream, got)? {
        1 => read_array::<4>(stream, got)?.into(),
        4 => read_array::<16>(stream, got)?.into(),
        other => return Err(format!("BND has ATYP {other}")),
    };
    let addr = SocketAddr::new(ip, u16::from_be_bytes(read_array(stream, got)?));
    if addr.ip().is_loopback() && addr.port() != 0 {
        Ok(addr)
    } else {
        Err(format!("expected a loopback address with a port as BND, received {}", hex(&got[start..])))
    }
}

fn read_array<const N: usize>(stream: &mut TcpStream, got: &mut Vec<u8>) -> Result<[u8; N], String> {
    read_bytes(stream, got, N)?;
    Ok(got[got.len() - N..].try_into().expect("N bytes"))
}

/// Expects EOF without bytes before it. A reset is accepted too if `allow_reset`.
pub fn expect_end(stream: &mut TcpStream, allow_reset: bool) -> Result<(), String> {
    match retry(|| stream.read(&mut [0])) {
        Ok(0) => Ok(()),
        Ok(_) => Err("expected EOF, received bytes".into()),
        Err(error) if allow_reset && error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(format!("expected EOF: {error}")),
    }
}

/// Waits until `condition` returns true. Returns false after `limit`.
pub fn poll_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

/// Waits until no TCP listener (or no UDP socket) has this address. Returns false after [`LIMIT`].
///
/// Reads /proc/net, because trying to connect or bind is not conclusive. Another process may have taken the port, or a
/// closed connection may still hold it.
pub fn wait_port_free(addr: SocketAddr, is_tcp: bool) -> bool {
    let table = format!("/proc/net/{}{}", if is_tcp { "tcp" } else { "udp" }, if addr.is_ipv6() { "6" } else { "" });
    let bytes = &encode_addr(addr)[1..];
    // The kernel prints each 4 bytes of an address as one number in native byte order.
    let words = bytes[..bytes.len() - 2].chunks(4).map(|word| <[u8; 4]>::try_from(word).expect("chunks of 4"));
    let ip: String = words.map(|word| format!("{:08X}", u32::from_ne_bytes(word))).collect();
    let local_address = format!("{ip}:{:04X}", addr.port());
    let is_user = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields[1] == local_address && (!is_tcp || fields[3] == TCP_LISTEN)
    };
    poll_until(LIMIT, || {
        let table = fs::read_to_string(&table).expect("file read");
        !table.lines().skip(1).any(is_user)
    })
}

/// Formats the first 300 bytes as hex digits for an error message.
pub fn hex(bytes: &[u8]) -> String {
    let shown: Vec<String> = bytes.iter().take(300).map(|byte| format!("{byte:02x}")).collect();
    if shown.is_empty() { "nothing".into() } else { shown.join(" ") }
}
