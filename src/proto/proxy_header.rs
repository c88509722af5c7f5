//! The header of the PROXY protocol, versions 1 and 2: a load balancer sends it first, with the address of its client
//! (proxy-protocol.txt of HAProxy).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::codec::{DecodeError, Message, MessageReader, ProtocolError};

/// Start of version 1, which is a line of text.
const V1_START: &[u8] = b"PROXY ";
/// Longest line of version 1 with its CRLF, in bytes.
const MAX_V1_LEN: usize = 107;
/// Start of version 2.
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Length of signature, command, family and LEN, in bytes.
const V2_FIXED_LEN: usize = 16;

/// The client that a load balancer forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyHeader {
    /// The client's address, canonical; the port may be 0. `None` if the balancer connects for itself, such as for a
    /// health check, or if its client has no IP address.
    pub client: Option<SocketAddr>,
}

impl ProxyHeader {
    /// Returns whether these bytes, which are not a message of SOCKS, begin a header.
    pub fn is_start(bytes: &[u8]) -> bool {
        bytes.starts_with(V1_START) || !bytes.is_empty() && is_prefix(bytes, V2_SIGNATURE)
    }

    /// Returns whether these bytes may become the start of a header of version 1, as the first bytes of `POST` do not.
    pub fn may_become_start(bytes: &[u8]) -> bool {
        bytes.len() < V1_START.len() && is_prefix(bytes, V1_START)
    }
}

impl Message for ProxyHeader {
    /// That of `PROXY UNKNOWN`.
    const MIN_LEN: usize = 15;
    /// Longer headers of version 2 are refused. Those of HAProxy have less than 1 KiB, unless they have a certificate.
    const MAX_LEN: usize = 4096;

    fn decode_fields(reader: &mut MessageReader<'_>) -> Result<Self, DecodeError> {
        let client = match reader.remaining {
            bytes if is_prefix(bytes, V2_SIGNATURE) => decode_v2(reader)?,
            bytes if is_prefix(bytes, V1_START) => decode_v1(reader)?,
            _ => return Err(invalid("neither \"PROXY \" nor the signature of version 2")),
        };
        let client = client.map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port));
        if client.is_some_and(|client| !is_unicast(client.ip())) {
            return Err(invalid("the client's address is not a unicast address"));
        }
        Ok(Self { client })
    }

    /// Appends nothing: s5 sends no header.
    fn encode_into(&self, _: &mut Vec<u8>) {}
}

/// Returns whether one is the start of the other.
fn is_prefix(bytes: &[u8], expected: &[u8]) -> bool {
    bytes.iter().zip(expected).all(|(byte, expected)| byte == expected)
}

fn is_unicast(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => (Ipv4Addr::new(1, 0, 0, 0)..Ipv4Addr::new(224, 0, 0, 0)).contains(&ip),
        IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast(),
    }
}

fn invalid(reason: &'static str) -> DecodeError {
    ProtocolError::ProxyHeader(reason).into()
}

/// Reads a line. Returns address and port of the client.
fn decode_v1(reader: &mut MessageReader<'_>) -> Result<Option<(IpAddr, u16)>, DecodeError> {
    let Some(end) = reader.remaining.iter().take(MAX_V1_LEN).position(|byte| *byte == b'\n') else {
        let is_too_long = reader.remaining.len() >= MAX_V1_LEN;
        let incomplete = DecodeError::Incomplete(reader.min_missing.max(1));
        return Err(if is_too_long { invalid("a line of more than 107 bytes") } else { incomplete });
    };
    let line = reader.take(end + 1, 0)?.strip_prefix(V1_START).and_then(|line| line.strip_suffix(b"\r\n"));
    let mut words = line.and_then(|line| str::from_utf8(line).ok()).unwrap_or_default().split(' ');
    let family = words.next();
    if family == Some("UNKNOWN") {
        return Ok(None);
    }
    let family_of = |ip: &IpAddr| Some(if ip.is_ipv4() { "TCP4" } else { "TCP6" });
    let mut ip = || words.next()?.parse().ok().filter(|ip| family_of(ip) == family);
    let (client_ip, server_ip) = (ip(), ip());
    let mut port = || words.next().and_then(|word| word.parse().ok().filter(|port: &u16| port.to_string() == word));
    match (client_ip, server_ip, port(), port(), words.next()) {
        (Some(ip), Some(_), Some(port), Some(_), None) => Ok(Some((ip, port))),
        _ => Err(invalid("expected TCP4 or TCP6, two addresses and two ports, or UNKNOWN, after \"PROXY \"")),
    }
}

/// Reads version 2 with its optional fields (TLVs), which are ignored. Returns address and port of the client.
fn decode_v2(reader: &mut MessageReader<'_>) -> Result<Option<(IpAddr, u16)>, DecodeError> {
    reader.take(V2_SIGNATURE.len(), ProxyHeader::MIN_LEN - V2_SIGNATURE.len())?;
    let [command, family, high, low] = reader.array()?;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if V2_FIXED_LEN + length > ProxyHeader::MAX_LEN {
        return Err(invalid("more than 4096 bytes"));
    }
    let rest = reader.take(length, 0)?;
    match (command, family) {
        // LOCAL, or no family, or a Unix socket.
        (0x20, _) | (0x21, 0 | 0x31) => Ok(None),
        (0x21, 0x11) => decode_client::<4>(rest),
        (0x21, 0x21) => decode_client::<16>(rest),
        (0x21, 0x12 | 0x22 | 0x32) => Err(invalid("a client that sends datagrams")),
        (0x21, _) => Err(invalid("an unknown address family or transport")),
        (0x22..=0x2f, _) => Err(invalid("a command other than LOCAL and PROXY")),
        _ => Err(invalid("the signature of version 2 with another version")),
    }
}

/// Reads two addresses and two ports. Returns address and port of the client.
fn decode_client<const N: usize>(bytes: &[u8]) -> Result<Option<(IpAddr, u16)>, DecodeError>
where
    IpAddr: From<[u8; N]>,
{
    let reader = &mut MessageReader { remaining: bytes, min_missing: 0 };
    let mut read = || Ok((reader.array::<N>()?, reader.array::<N>()?, reader.array()?, reader.array::<2>()?));
    let (ip, _, port, _) = read().map_err(|_: DecodeError| invalid("shorter than its addresses"))?;
    Ok(Some((ip.into(), u16::from_be_bytes(port))))
}
