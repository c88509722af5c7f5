//! Encoding and decoding of every message of RFC 1928, RFC 1929 and RFC 1961: complete, truncated, in pieces, malformed
//! and random bytes. No test opens a socket.

use std::fmt::Debug;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use s5::proto::{
    Addr, Command, Credentials, Datagram, DecodeError, Frame, Greeting, Host, HostName, LoginStatus, Message, Method,
    MethodSelection, OtherProtocol, ProtocolError, Rep, Reply, Request,
};

use crate::*;

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

/// Checks properties of every message: it decodes to itself, a prefix never requests more than the missing bytes, and
/// bytes after the message are ignored. So it decodes from any pieces.
fn check<M: Message + Debug + PartialEq>(message: &M) {
    check_encoding(&message.encode(), message);
}

pub fn check_encoding<M: Message + Debug + PartialEq>(bytes: &[u8], message: &M) {
    assert!((M::MIN_LEN..=M::MAX_LEN).contains(&bytes.len()), "{} bytes of {message:?}", bytes.len());
    for given in 0..bytes.len() {
        let missing = bytes.len() - given;
        match M::decode(&bytes[..given]) {
            Err(DecodeError::Incomplete(n)) => {
                assert!((1..=missing).contains(&n), "{n} requested, {missing} missing, {message:?}")
            }
            other => panic!("{other:?} from {given} bytes of {message:?}"),
        }
    }
    assert_eq!(M::decode(bytes).as_ref(), Ok(message));
    for after in [&[0][..], &[5, 1, 0], &[0xff; 600]] {
        assert_eq!(M::decode(&[bytes, after].concat()).as_ref(), Ok(message), "{} bytes follow", after.len());
    }
}

/// Checks that each part of `prefix` is incomplete, and that `prefix` followed by `last` is invalid.
fn check_bad<M: Message + Debug + PartialEq>(prefix: &[u8], last: &[u8], error: ProtocolError) {
    for given in 0..=prefix.len() {
        let result = M::decode(&prefix[..given]).expect_err("incomplete");
        assert!(matches!(result, DecodeError::Incomplete(1..)), "{result:?} from {:?}", &prefix[..given]);
    }
    let bad = [prefix, last].concat();
    assert_eq!(M::decode(&bad), Err(DecodeError::Invalid(error)), "{bad:?}");
    assert_eq!(M::decode(&[&bad[..], &[1; 600]].concat()), Err(DecodeError::Invalid(error)), "{bad:?} and more bytes");
}

fn name(bytes: &[u8]) -> Addr {
    Addr { host: Host::Name(HostName::new(bytes).expect("valid host name")), port: 443 }
}

fn ip(text: &str) -> Addr {
    text.parse::<SocketAddr>().expect("valid address").into()
}

/// Addresses of each type, with names of several lengths.
fn addrs() -> Vec<Addr> {
    let mut addrs = vec![Addr::UNSPECIFIED, ip("192.0.2.1:65535"), ip("[::]:0"), ip("[2001:db8::1]:1080")];
    addrs.extend([1, 2, 63, 64, 254, 255].map(|length| name(&vec![b'a'; length])));
    addrs.extend(["1.2.3.4", "bücher.example", "a b", "[::1]", "%s"].map(|text| name(text.as_bytes())));
    addrs
}

fn any_addr() -> impl Strategy<Value = Addr> {
    let host = prop_oneof![
        any::<Ipv4Addr>().prop_map(|ip| Host::Ip(ip.into())),
        any::<Ipv6Addr>().prop_map(|ip| Host::Ip(ip.into())),
        vec(any::<char>(), 1..=64).prop_filter_map("not a host name", |text| {
            let text: String = text.into_iter().filter(|c| !c.is_control()).collect();
            HostName::new(text.as_bytes()).ok().map(Host::Name)
        }),
    ];
    (host, any::<u16>()).prop_map(|(host, port)| Addr { host, port })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_message_decodes_to_itself(
        methods in vec(any::<u8>().prop_map(Method), 1..=255),
        uname in vec(any::<u8>(), 1..=255),
        passwd in vec(any::<u8>(), 1..=255),
        command in select(vec![Command::Connect, Command::Bind, Command::UdpAssociate]),
        dst in any_addr(),
        rep: u8,
        token in vec(any::<u8>(), 0..2000),
    ) {
        check(&Greeting { methods });
        check(&Credentials { uname, passwd });
        check(&Request { command, dst: dst.clone() });
        check(&Reply { rep: Rep(rep), bnd: dst });
        check(&Frame::Authentication(token.clone()));
        check(&Frame::Protection(token.clone()));
        check(&Frame::Data(token));
    }

    #[test]
    fn datagram_decodes_to_itself(frag: u8, dst in any_addr(), data in vec(any::<u8>(), 0..2000)) {
        let datagram = Datagram { frag, dst, data: &data };
        let mut bytes = Vec::new();
        datagram.encode_into(&mut bytes);
        prop_assert_eq!(Datagram::decode(&bytes), Ok(datagram));
        let header = bytes.len() - data.len();
        prop_assert!(header <= Datagram::MAX_HEADER_LEN);
        for end in 0..header {
            prop_assert_eq!(Datagram::decode(&bytes[..end]), Err(ProtocolError::TruncatedHeader), "{} bytes", end);
        }
    }

    #[test]
    fn random_bytes_have_one_result_that_more_bytes_do_not_change(
        first in prop_oneof![Just(5), Just(1), any::<u8>()],
        rest in vec(prop_oneof![0_u8..8, any::<u8>()], 0..300),
    ) {
        let bytes = [&[first], &rest[..]].concat();
        check_random::<Greeting>(&bytes);
        check_random::<MethodSelection>(&bytes);
        check_random::<Credentials>(&bytes);
        check_random::<LoginStatus>(&bytes);
        check_random::<Frame>(&bytes);
        check_random::<Request>(&bytes);
        check_random::<Reply>(&bytes);
        if let Ok(datagram) = Datagram::decode(&bytes) {
            let mut encoded = Vec::new();
            datagram.encode_into(&mut encoded);
            prop_assert_eq!(&encoded[2..], &bytes[2..]);
        }
    }
}

/// Checks each prefix: it requests at most the longest message, and no bytes after the message. Additional bytes change
/// neither a message nor an error.
fn check_random<M: Message + Debug + PartialEq>(bytes: &[u8]) {
    let (mut requested, mut last) = (0, None);
    for given in 0..=bytes.len() {
        let now = M::decode(&bytes[..given]);
        assert!(last.as_ref().is_none_or(|last| *last == now), "{last:?} changed at {given} bytes of {bytes:?}");
        match &now {
            Err(DecodeError::Incomplete(n)) => {
                requested = requested.max(given + n);
                assert!(*n >= 1 && requested <= M::MAX_LEN, "{n} requested after {given} bytes of {bytes:?}");
                continue;
            }
            Ok(message) if last.is_none() => {
                assert!(given >= requested, "requested {requested} bytes, decoded {given} of {bytes:?}");
                assert_eq!(M::decode(&message.encode()).as_ref(), Ok(message));
            }
            _ => {}
        }
        last = Some(now);
    }
}

#[test]
fn messages_of_all_lengths_decode_to_themselves() {
    for count in [1, 2, 254, 255] {
        check(&Greeting { methods: (0..count).map(Method).collect() });
    }
    for (ulen, plen) in [(1, 1), (1, 255), (255, 1), (255, 255), (72, 73)] {
        check(&Credentials { uname: vec![0xff; ulen], passwd: vec![0; plen] });
    }
    for dst in addrs() {
        for command in [Command::Connect, Command::Bind, Command::UdpAssociate] {
            check(&Request { command, dst: dst.clone() });
        }
        check(&Reply { rep: Rep::SUCCEEDED, bnd: dst });
    }
    for byte in 0..=255 {
        check(&MethodSelection(Method(byte)));
        check(&LoginStatus(byte));
        check(&Reply { rep: Rep(byte), bnd: Addr::UNSPECIFIED });
    }
}

/// Messages of RFC 1928 sections 3 to 7 and RFC 1929 section 2, encoded by hand.
#[test]
fn encoding_matches_rfc_examples() {
    assert_eq!(Greeting { methods: vec![Method::NONE, Method::PASSWORD] }.encode(), [5, 2, 0, 2]);
    assert_eq!(MethodSelection(Method::NO_ACCEPTABLE).encode(), [5, 0xff]);
    assert_eq!(Credentials { uname: b"me".into(), passwd: b"x".into() }.encode(), b"\x01\x02me\x01x");
    assert_eq!(LoginStatus::SUCCESS.encode(), [1, 0]);
    assert_eq!(LoginStatus::FAILURE.encode(), [1, 1]);
    let request = |command, dst| Request { command, dst }.encode();
    assert_eq!(request(Command::Connect, ip("192.0.2.1:258")), [5, 1, 0, 1, 192, 0, 2, 1, 1, 2]);
    assert_eq!(request(Command::Bind, name(b"ab")), b"\x05\x02\0\x03\x02ab\x01\xbb");
    let v6 = [&[5, 3, 0, 4, 0x20, 1][..], &[0; 13], &[1, 4, 0x38]].concat();
    assert_eq!(request(Command::UdpAssociate, ip("[2001::1]:1080")), v6);
    assert_eq!(Reply { rep: Rep::CONNECTION_REFUSED, bnd: Addr::UNSPECIFIED }.encode(), [5, 5, 0, 1, 0, 0, 0, 0, 0, 0]);
    let mut bytes = vec![9];
    Datagram { frag: 0x82, dst: ip("192.0.2.1:53"), data: b"?" }.encode_into(&mut bytes);
    assert_eq!(bytes, [9, 0, 0, 0x82, 1, 192, 0, 2, 1, 0, 53, b'?'], "encode_into must append");
}

#[test]
fn rsv_is_ignored() {
    for rsv in [1, 5, 0xff] {
        let request = Request { command: Command::Connect, dst: ip("192.0.2.1:80") };
        check_encoding(&[5, 1, rsv, 1, 192, 0, 2, 1, 0, 80], &request);
        let reply = Reply { rep: Rep::SUCCEEDED, bnd: ip("192.0.2.1:80") };
        check_encoding(&[5, 0, rsv, 1, 192, 0, 2, 1, 0, 80], &reply);
        let datagram = Datagram { frag: 0, dst: ip("192.0.2.1:80"), data: b"x" };
        assert_eq!(Datagram::decode(&[rsv, rsv, 0, 1, 192, 0, 2, 1, 0, 80, b'x']), Ok(datagram));
    }
}

#[test]
fn first_invalid_field_is_an_error_at_its_byte() {
    for byte in 0..=255 {
        if byte != 5 {
            check_bad::<Greeting>(&[], &[byte], ProtocolError::Version(byte));
            check_bad::<MethodSelection>(&[], &[byte], ProtocolError::Version(byte));
            check_bad::<Request>(&[], &[byte], ProtocolError::Version(byte));
            check_bad::<Reply>(&[], &[byte], ProtocolError::Version(byte));
        }
        if byte != 1 {
            check_bad::<Credentials>(&[], &[byte], ProtocolError::AuthVersion(byte));
            check_bad::<LoginStatus>(&[], &[byte], ProtocolError::AuthVersion(byte));
            check_bad::<Frame>(&[], &[byte], ProtocolError::AuthVersion(byte));
        }
        if ![1, 2, 3].contains(&byte) {
            check_bad::<Request>(&[5], &[byte], ProtocolError::Command(byte));
        }
        if ![1, 2, 3, 0xff].contains(&byte) {
            check_bad::<Frame>(&[1], &[byte], ProtocolError::MessageType(byte));
        }
        if ![1, 3, 4].contains(&byte) {
            check_bad::<Request>(&[5, 1, 0], &[byte], ProtocolError::AddressType(byte));
            check_bad::<Reply>(&[5, 0, 0], &[byte], ProtocolError::AddressType(byte));
            assert_eq!(Datagram::decode(&[0, 0, 0, byte]), Err(ProtocolError::AddressType(byte)));
        }
    }
    check_bad::<Greeting>(&[5], &[0], ProtocolError::NoMethods);
    check_bad::<Credentials>(&[1], &[0], ProtocolError::EmptyCredential);
    check_bad::<Credentials>(&[1, 2, b'm', b'e'], &[0], ProtocolError::EmptyCredential);
    check_bad::<Request>(&[5, 1, 0, 3], &[0], ProtocolError::InvalidHostName);
    assert_eq!(Datagram::decode(&[0, 0, 0, 3, 0, 0, 80, 1]), Err(ProtocolError::InvalidHostName));
}

#[test]
fn gssapi_abort_has_two_bytes_and_longest_token_65535() {
    check(&Frame::Abort);
    assert_eq!(Frame::Abort.encode(), [1, 0xff]);
    let longest = Frame::Data(vec![7; 65_535]);
    assert_eq!(longest.check_len(), Ok(()));
    assert_eq!(Frame::decode(&longest.encode()), Ok(longest));
    for frame in [Frame::Authentication, Frame::Protection, Frame::Data] {
        assert_eq!(frame(vec![7; 65_536]).check_len(), Err(ProtocolError::TokenLength(65_536)));
    }
}

#[test]
fn datagram_token_requires_exactly_one_data_frame() {
    let frame = Frame::Data(vec![1, 2, 3]).encode();
    assert_eq!(Frame::datagram_token(&mut frame.clone()), Some(&mut [1, 2, 3][..]));
    for length in 0..frame.len() {
        assert_eq!(Frame::datagram_token(&mut frame[..length].to_vec()), None, "{length} bytes");
    }
    assert_eq!(Frame::datagram_token(&mut [&frame[..], &[0]].concat()), None, "one byte too many");
    for other in [Frame::Authentication(vec![1]), Frame::Protection(vec![1]), Frame::Abort] {
        assert_eq!(Frame::datagram_token(&mut other.encode()), None, "{other:?}");
    }
    assert_eq!(Frame::datagram_token(&mut [5, 3, 0, 1, 1]), None, "another version");
}

#[test]
fn invalid_host_name_is_an_error_before_its_port_and_unspecified_in_a_reply() {
    let bad: [&[u8]; 10] =
        [b"\0", b"a\0b", b"host\0", b"a\nb", b"\x1b[2J", b"a\x7f", b"a\xc2\x85", b"\xff", b"\xc3", &[0x80; 255]];
    for bytes in bad {
        let length = u8::try_from(bytes.len()).expect("at most 255 bytes");
        let (last, front) = bytes.split_last().expect("not empty");
        check_bad::<Request>(&[&[5, 1, 0, 3, length], front].concat(), &[*last], ProtocolError::InvalidHostName);
        let reply = [&[5, 0, 0, 3, length], bytes, &[0, 80]].concat();
        assert_eq!(Reply::decode(&reply), Ok(Reply { rep: Rep::SUCCEEDED, bnd: Addr::UNSPECIFIED }));
        assert_eq!(HostName::new(bytes), Err(ProtocolError::InvalidHostName), "{}", bytes.escape_ascii());
    }
    // Servers without an address send an empty name in replies.
    for rep in [Rep::SUCCEEDED, Rep::GENERAL_FAILURE] {
        check_encoding(&[5, rep.0, 0, 3, 0, 0, 80], &Reply { rep, bnd: Addr::UNSPECIFIED });
    }
    for bytes in [&[b'a'; 256][..], b""] {
        assert_eq!(HostName::new(bytes), Err(ProtocolError::InvalidHostName));
    }
}

#[test]
fn protocol_errors_have_a_reply_code_and_name_the_found_value() {
    let table = [
        (ProtocolError::Version(4), 1, "expected SOCKS version 5, found 4"),
        (ProtocolError::AuthVersion(5), 1, "expected authentication version 1, found 5"),
        (ProtocolError::Command(9), 7, "unknown command 9"),
        (ProtocolError::AddressType(2), 8, "unknown address type 2"),
        (ProtocolError::NoMethods, 1, "no authentication method offered"),
        (ProtocolError::EmptyCredential, 1, "empty"),
        (ProtocolError::InvalidHostName, 1, "host name"),
        (ProtocolError::TruncatedHeader, 1, "header"),
    ];
    for (error, rep, text) in table {
        assert_eq!(error.rep(), Rep(rep), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn debug_of_credentials_omits_password() {
    let login = Credentials { uname: b"al\x1bice".into(), passwd: b"hunter2".into() };
    for shown in [format!("{login:?}"), format!("{login:#?}"), format!("{:?}", Some(&login))] {
        assert!(shown.contains("al\\x1bice"), "{shown}");
        let bytes = format!("{:?}", login.passwd);
        for secret in ["hunter2", "104", &bytes, "68756e"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}

#[test]
fn reply_codes_have_the_texts_of_rfc_1928() {
    let table = [
        (Rep::SUCCEEDED, "succeeded"),
        (Rep::GENERAL_FAILURE, "general SOCKS server failure"),
        (Rep::NOT_ALLOWED, "not allowed by ruleset"),
        (Rep::NETWORK_UNREACHABLE, "network unreachable"),
        (Rep::HOST_UNREACHABLE, "host unreachable"),
        (Rep::CONNECTION_REFUSED, "connection refused"),
        (Rep::TTL_EXPIRED, "TTL expired"),
        (Rep::COMMAND_NOT_SUPPORTED, "command not supported"),
        (Rep::ATYP_NOT_SUPPORTED, "address type not supported"),
    ];
    for (code, (rep, text)) in (0..).zip(table) {
        assert_eq!((rep, &*rep.to_string()), (Rep(code), text));
    }
    for code in 9..=255 {
        assert_eq!(Rep(code).to_string(), "unassigned reply code");
    }
}

#[test]
fn methods_commands_and_addresses_are_displayed_as_text() {
    let methods = [(0, "none"), (1, "gssapi"), (2, "password"), (0x80, "method 0x80"), (0xff, "no acceptable method")];
    for (code, text) in methods {
        assert_eq!(Method(code).to_string(), text);
    }
    let commands = [Command::Connect, Command::Bind, Command::UdpAssociate].map(|command| command.to_string());
    assert_eq!(commands, ["connect", "bind", "udp"]);
    let shown = [ip("192.0.2.1:80"), ip("[2001:db8::1]:80"), name(b"a.example"), Addr::UNSPECIFIED];
    let texts = ["192.0.2.1:80", "[2001:db8::1]:80", "a.example:443", "0.0.0.0:0"];
    assert_eq!(shown.map(|addr| addr.to_string()), texts);
    // Addresses that are sent as names.
    for (sent, text) in [("fe80::1%lo", "[fe80::1%lo]:443"), ("::1", "[::1]:443"), ("[::1]", "[::1]:443")] {
        assert_eq!(name(sent.as_bytes()).to_string(), text);
    }
}

#[test]
fn other_protocol_gets_its_own_rejection_and_safe_display() {
    assert_eq!(OtherProtocol(4).rejection(), [0, 0x5b, 0, 0, 0, 0, 0, 0], "SOCKS4: request rejected");
    for first in b"GPCHDTO" {
        let page = String::from_utf8_lossy(OtherProtocol(*first).rejection());
        assert!(page.starts_with("HTTP/1.0 501 ") && page.contains("\r\n\r\n") && page.contains("SOCKS5"), "{page}");
    }
    for first in [0, 1, 2, 3, 6, 0x16, 0x80, b'a', b'\n', 0xff] {
        assert_eq!(OtherProtocol(first).rejection(), b"", "{first}");
    }
    let shown = [OtherProtocol(0x16), OtherProtocol(4), OtherProtocol(b'G'), OtherProtocol(0x1b)]
        .map(|protocol| protocol.to_string());
    assert!(shown[0].contains("TLS") && shown[1].contains("SOCKS4") && shown[2].contains("HTTP"), "{shown:?}");
    assert!(!shown[3].contains('\x1b'), "{:?}", shown[3]);
}

/// A length byte must not reserve memory for bytes that have not arrived. A connection allocates what a decoder
/// requests.
#[test]
fn message_allocates_at_most_its_own_length_and_at_most_the_longest_of_the_rfcs() {
    assert_eq!([Greeting::MAX_LEN, Credentials::MAX_LEN, Request::MAX_LEN, Reply::MAX_LEN], [257, 513, 262, 262]);
    for count in [1, 2, 100, 255] {
        let bytes = [&[5, count][..], &vec![0; count.into()]].concat();
        let methods = Greeting::decode(&bytes).expect("valid greeting").methods;
        assert!(methods.capacity() <= count.into(), "{} for {count}", methods.capacity());
        let bytes = [&[1, count][..], &vec![b'u'; count.into()], &[1, b'p']].concat();
        let login = Credentials::decode(&bytes).expect("valid credentials");
        let capacity = login.uname.capacity() + login.passwd.capacity();
        assert!(capacity <= bytes.len(), "{capacity} for {}", bytes.len());
    }
}

#[test]
fn ipv4_mapped_address_stays_ipv6() {
    let mapped: IpAddr = "::ffff:192.0.2.1".parse().expect("valid address");
    let bytes = Request { command: Command::Connect, dst: SocketAddr::new(mapped, 1).into() }.encode();
    assert_eq!(bytes[3], 4, "ATYP");
    assert_eq!(Request::decode(&bytes).map(|request| request.dst.host), Ok(Host::Ip(mapped)));
}
