//! Decoding of the header of the PROXY protocol: complete, in pieces, malformed. No test opens a socket.

use s5::proto::{DecodeError, Message, ProxyHeader};

use crate::proto::check_encoding;
use crate::*;

/// A header of version 2 with this command, family, addresses and TLVs.
fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).expect("at most 65535 bytes").to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n".as_slice(), &[command, family], &length, rest].concat()
}

/// Addresses and ports of version 2.
fn addrs(client: &str, server: &str) -> Vec<u8> {
    let [client, server] = [client, server].map(|addr| addr.parse::<SocketAddr>().expect("an address"));
    let ip = |addr: SocketAddr| match addr.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    [ip(client), ip(server), client.port().to_be_bytes().into(), server.port().to_be_bytes().into()].concat()
}

#[test]
fn proxy_header_has_the_client_or_none() {
    let (v4, v6) = (addrs("192.0.2.7:4000", "10.0.0.1:1080"), addrs("[2001:db8::7]:4000", "[::1]:1080"));
    let mapped = addrs("[::ffff:192.0.2.7]:4000", "[::ffff:10.0.0.1]:1080");
    let link_local = addrs("[fe80::7]:4000", "[fe80::1]:1080");
    let tlvs = [v4.clone(), [4, 0x0e, 0xac].into(), vec![0; 3756], [0x20, 0xff, 0xff].into()].concat();
    let table: Vec<(Vec<u8>, Option<&str>)> = vec![
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 4000 1080\r\n".into(), Some("192.0.2.7:4000")),
        (b"PROXY TCP4 223.255.255.255 255.255.255.255 65535 65535\r\n".into(), Some("223.255.255.255:65535")),
        (b"PROXY TCP6 2001:db8::7 ::1 4000 1080\r\n".into(), Some("[2001:db8::7]:4000")),
        (b"PROXY TCP6 ::ffff:192.0.2.7 ::1 4000 0\r\n".into(), Some("192.0.2.7:4000")),
        (b"PROXY UNKNOWN\r\n".into(), None),
        (format!("PROXY UNKNOWN {}\r\n", "x".repeat(91)).into(), None),
        (v2(0x21, 0x11, &v4), Some("192.0.2.7:4000")),
        (v2(0x21, 0x11, &tlvs), Some("192.0.2.7:4000")),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 0 1080\r\n".into(), Some("192.0.2.7:0")),
        (v2(0x21, 0x11, &addrs("192.0.2.7:0", "10.0.0.1:1080")), Some("192.0.2.7:0")),
        (v2(0x21, 0x21, &v6), Some("[2001:db8::7]:4000")),
        (v2(0x21, 0x21, &mapped), Some("192.0.2.7:4000")),
        (v2(0x21, 0x21, &link_local), Some("[fe80::7]:4000")),
        (v2(0x20, 0x00, &[]), None),
        (v2(0x20, 0x11, &v4), None),
        (v2(0x20, 0xff, &[0; 4080]), None),
        (v2(0x21, 0x00, b"anything"), None),
        (v2(0x21, 0x31, &[0; 216]), None),
    ];
    for (bytes, client) in table {
        let header = ProxyHeader { client: client.map(|client| client.parse().expect("an address")) };
        check_encoding(&bytes, &header);
        assert!(ProxyHeader::is_start(&bytes));
    }
}

#[test]
fn invalid_proxy_header_is_refused_with_its_reason_as_soon_as_it_is_known() {
    let v4 = addrs("192.0.2.7:4000", "10.0.0.1:1080");
    let multicast = addrs("[ff02::1]:4000", "[::1]:1080");
    let long_line = format!("PROXY UNKNOWN {}\r\n", "x".repeat(92)).into_bytes();
    let table: Vec<(Vec<u8>, &str)> = vec![
        ([5].into(), "neither"),
        (b"G".into(), "neither"),
        (b"PROXY\t".into(), "neither"),
        (b"\r\n\r\n\0\r\nQUIT\r".into(), "neither"),
        (long_line[..107].into(), "more than 107 bytes"),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 4000 1080\n".into(), "expected TCP4"),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 4000\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 4000 1080 1\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4  192.0.2.7 10.0.0.1 4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 +4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 04000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 65536 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 192.0.2.256 10.0.0.1 4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 2001:db8::7 ::1 4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP6 192.0.2.7 10.0.0.1 4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 192.0.2.7 ::1 4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY TCP6 fe80::7%eth0 ::1 4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY UDP4 192.0.2.7 10.0.0.1 4000 1080\r\n".into(), "expected TCP4"),
        (b"PROXY UNKNOWN\xff\r\n".into(), "expected TCP4"),
        (b"PROXY TCP4 0.0.0.1 10.0.0.1 4000 1080\r\n".into(), "not a unicast address"),
        (b"PROXY TCP4 255.255.255.255 10.0.0.1 4000 1080\r\n".into(), "not a unicast address"),
        (b"PROXY TCP6 ::ffff:0.0.0.0 ::1 4000 1080\r\n".into(), "not a unicast address"),
        (b"PROXY TCP6 :: ::1 4000 1080\r\n".into(), "not a unicast address"),
        (v2(0x21, 0x21, &multicast), "not a unicast address"),
        (v2(0x31, 0x11, &v4), "another version"),
        (v2(0x22, 0x11, &v4), "a command other than"),
        (v2(0x21, 0x12, &v4), "datagrams"),
        (v2(0x21, 0x41, &v4), "an unknown address family"),
        (v2(0x21, 0x01, &v4), "an unknown address family"),
        (v2(0x21, 0x11, &v4[..11]), "shorter than its addresses"),
        (v2(0x21, 0x21, &[1; 35]), "shorter than its addresses"),
        (v2(0x21, 0x11, &[0; 4081])[..16].into(), "more than 4096 bytes"),
    ];
    for (bytes, reason) in table {
        let Err(DecodeError::Invalid(error)) = ProxyHeader::decode(&bytes) else { panic!("valid: {bytes:?}") };
        assert!(error.to_string().contains(reason), "{error} for {}", bytes.escape_ascii());
        let before = ProxyHeader::decode(&bytes[..bytes.len() - 1]);
        assert!(matches!(before, Err(DecodeError::Incomplete(_))), "{before:?} before {}", bytes.escape_ascii());
    }
}
