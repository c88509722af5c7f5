//! Clients and targets on other hosts than the server. The server has its own network namespace, with an address in each
//! of two networks. All other addresses belong to the namespace of the test, at the other ends of two veth pairs.
//!
//! | host | addresses |
//! | --- | --- |
//! | the server | 10.9.0.1, 10.9.1.1; fd09::1, fd09:1::1 |
//! | clients | 10.9.0.2, 10.9.0.3; fd09::2, fd09::3 |
//! | targets | 10.9.1.2, 10.9.1.3; fd09:1::2; 169.254.169.254, and 224.0.0.251 (multicast group) |

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};

use super::tools::{addr, assert_no_connection, assert_no_datagram, associate, ip, is_closed, log_in, send_request};
use crate::support::{
    BIND, CONNECT, Server, TIMEOUT, assert_no_data, connect_from, in_namespace, ping, read_exact, read_reply,
    tcp_server, wait_until,
};
use crate::udp::association::{datagram, receive, socket};

const CLIENT: &str = "10.9.0.2";
const OTHER_CLIENT: &str = "10.9.0.3";
const TARGET: &str = "10.9.1.2";
const OTHER_TARGET: &str = "10.9.1.3";
const METADATA: &str = "169.254.169.254";
const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);

/// Sets up two interfaces in the namespace of the server; their other ends are in the namespace of process $1.
const SERVER_NETWORK: &str = "set -e; ip link set lo up
    for net in 0 1; do
        ip link add s$net type veth peer name c$net netns $1
        ip addr add 10.9.$net.1/24 dev s$net; ip addr add fd09:$net::1/64 dev s$net nodad; ip link set s$net up
    done
    ip route add 169.254.0.0/16 dev s1; ip route add 224.0.0.0/4 dev s1
    echo ready; exec cat";
const CLIENT_NETWORK: &str = "set -e
    ip addr add 10.9.0.2/24 dev c0; ip addr add 10.9.0.3/24 dev c0
    ip addr add 10.9.1.2/24 dev c1; ip addr add 10.9.1.3/24 dev c1; ip addr add 169.254.169.254/32 dev c1
    for n in 2 3; do ip addr add fd09:0::$n/64 dev c0 nodad; done; ip addr add fd09:1::2/64 dev c1 nodad
    ip link set c0 up; ip link set c1 up";

/// The network namespace of the server, and the process that keeps it. Killed when dropped.
struct Host(Child);

impl Host {
    fn new() -> Self {
        let pid = std::process::id().to_string();
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", SERVER_NETWORK, "sh", &pid]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut host = Self(command.spawn().expect("unshare runs"));
        let mut line = String::new();
        let stdout = host.0.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("line read");
        assert_eq!(line, "ready\n", "the server's network is not set up");
        assert!(
            Command::new("sh").args(["-c", CLIENT_NETWORK]).status().expect("sh runs").success(),
            "the other hosts are not set up"
        );
        host
    }

    /// Starts a server in this namespace, and waits until it listens on `count` addresses.
    fn s5(&self, listen: &str, count: usize, args: &[&str]) -> Server {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.0.id()));
        command.args(["--", env!("CARGO_BIN_EXE_s5"), "serve", "--listen", listen]).args(args);
        Server::start_with(&mut command, count)
    }

    /// Starts a server on every address, open to all clients.
    fn serve(&self, args: &[&str]) -> Server {
        self.s5("*:1080", 2, &[&["--allow-open-relay"], args].concat())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Address that clients connect to.
fn server_addr() -> SocketAddr {
    addr("10.9.0.1:1080")
}

/// Returns the REP of a CONNECT by a client on another host.
fn rep(dst: &str) -> u8 {
    send_request(&mut log_in(server_addr(), ip(CLIENT), None), CONNECT, dst).0
}

fn local(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().expect("local address")
}

#[test]
fn remote_client_reaches_other_hosts_but_not_server_or_link() {
    if !in_namespace("guard::hosts::remote_client_reaches_other_hosts_but_not_server_or_link", "", "") {
        return;
    }
    let host = Host::new();
    // A second server on loopback of the server's host logs every client that reaches it.
    let inner = host.s5("127.0.0.1:7000", 1, &[]);
    let inner_v6 = host.s5("[::1]:7000", 1, &[]);
    let target = TcpListener::bind((TARGET, 0)).expect("free port");
    let metadata = TcpListener::bind((METADATA, 80)).expect("free port");
    let target_dst = target.local_addr().expect("local address").to_string();
    let protected = [
        "127.0.0.1:7000",
        "127.9.9.9:7000",
        "0.0.0.0:7000",
        "0.1.2.3:7000",
        "[::1]:7000",
        "[::]:7000",
        "[::ffff:127.0.0.1]:7000",
        "[::ffff:0.0.0.0]:7000",
        "[64:ff9b::7f00:1]:7000",
        "=127.0.0.1:7000",
        "=[::1]:7000",
        "127.1:7000",
        "localhost:7000",
        "169.254.169.254:80",
        "[::ffff:169.254.169.254]:80",
        "[64:ff9b::a9fe:a9fe]:80",
        "[fe80::1]:80",
        "[fd00:ec2::254]:80",
        "224.0.0.251:80",
        "[ff02::1]:80",
        "255.255.255.255:80",
    ];
    let own_listeners = ["10.9.0.1:1080", "10.9.1.1:1080", "[::ffff:10.9.0.1]:1080", "=10.9.1.1:1080"];
    // An allow without to= allows none of these targets.
    for rules in [&[][..], &["--allow", "from=10.9.0.0/16"], &["--allow", "port=1-65535"]] {
        let _server = host.serve(rules);
        assert_eq!(rep(&target_dst), 0, "{rules:?}");
        target.accept().expect("connection accepted");
        for dst in protected.iter().chain(&own_listeners) {
            let rep = rep(dst);
            // Without a resolver, localhost may be unknown.
            assert!(rep == 2 || rep != 0 && dst.starts_with("localhost"), "{rules:?}: {dst}: {rep}");
        }
        assert_no_connection(&metadata);
        assert!(!inner.log().contains("session") && !inner_v6.log().contains("session"), "{}", inner.log());
    }
    let rows: [(&str, &[&str], &[&str]); 4] = [
        ("to=127.0.0.1", &["127.0.0.1:7000", "0.0.0.0:7000", "[::ffff:127.0.0.1]:7000"], &["[::1]:7000", METADATA_DST]),
        ("to=::1 from=10.9.0.2", &["[::1]:7000", "[::]:7000"], &["127.0.0.1:7000"]),
        ("to=169.254.169.254 port=80", &[METADATA_DST], &["127.0.0.1:7000", "169.254.169.254:7000"]),
        ("to=10.9.1.1 port=1080", &["10.9.1.1:1080"], &["10.9.0.1:1080", "127.0.0.1:7000"]),
    ];
    for (rule, allowed, denied) in rows {
        let _server = host.serve(&["--allow", rule]);
        for dst in allowed {
            let mut stream = log_in(server_addr(), ip(CLIENT), None);
            assert_eq!(send_request(&mut stream, CONNECT, dst).0, 0, "{rule}: {dst}");
            if *dst == METADATA_DST {
                metadata.accept().expect("connection accepted");
            } else {
                stream.write_all(&[5, 1, 0]).expect("data sent");
                assert_eq!(read_exact(&mut stream, 2), [5, 0], "{rule}: {dst}");
            }
        }
        for dst in denied {
            assert_eq!(rep(dst), 2, "{rule}: {dst}");
        }
        assert_no_connection(&metadata);
    }
    assert!(
        inner.log().contains("session") && inner_v6.log().contains("session"),
        "the inner servers have not logged their clients"
    );
}

const METADATA_DST: &str = "169.254.169.254:80";

/// Binds a socket that is a member of the multicast group.
fn member(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((GROUP, port)).expect("free port");
    socket.join_multicast_v4(&GROUP, &TARGET.parse().expect("valid address")).expect("joined");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    socket
}

#[test]
fn datagrams_reach_only_allowed_targets() {
    if !in_namespace("guard::hosts::datagrams_reach_only_allowed_targets", "", "") {
        return;
    }
    let host = Host::new();
    let (target, denied, metadata) = (socket(ip(TARGET)), socket(ip(OTHER_TARGET)), socket(ip(METADATA)));
    let member = member(5353);
    let server = host.serve(&["--deny", "to=10.9.1.3 command=udp"]);
    let other = associate(server_addr(), ip(OTHER_CLIENT), None);
    let association = associate(server_addr(), ip(CLIENT), None);
    let nested = datagram(0, local(&target), b"nested");
    // Denied: the listeners, the relay of this association, and the unused relay of another client. An unused relay
    // accepts any port of its client, but not datagrams of the server itself.
    let own_listeners = [addr("10.9.0.1:1080"), addr("10.9.1.1:1080"), addr("127.0.0.1:1080")];
    for dst in
        own_listeners.into_iter().chain([local(&denied), local(&metadata), addr("224.0.0.251:5353"), addr("[::1]:9")])
    {
        association.send(dst, &nested);
    }
    association.send(local(&target), b"allowed");
    assert_eq!(receive(&target).0, b"allowed", "an earlier datagram was relayed");
    [&target, &denied, &metadata, &member].into_iter().for_each(assert_no_datagram);
    drop(association);
    server.wait_log(|log| log.contains("client=10.9.0.2") && log.contains(" up=7 down=0 "));
    let association = associate(server_addr(), ip(CLIENT), None);
    for dst in [association.bnd, other.bnd] {
        association.send(dst, &nested);
    }
    association.send(local(&target), b"allowed");
    assert_eq!(receive(&target).0, b"allowed", "a relay accepted a datagram of the server itself");
    assert_no_datagram(&target);
    // The other association still works for its client.
    other.send(local(&target), b"other");
    assert_eq!(receive(&target).0, b"other");
    drop(server);
    let _server = host.serve(&["--allow", "to=224.0.0.251,169.254.0.0/16 command=udp"]);
    let association = associate(server_addr(), ip(CLIENT), None);
    association.send(addr("224.0.0.251:5353"), b"group");
    association.send(local(&metadata), b"link");
    assert_eq!((receive(&member).0, receive(&metadata).0), (b"group".to_vec(), b"link".to_vec()));
}

#[test]
fn udp_relay_accepts_one_port_of_its_client_only() {
    if !in_namespace("guard::hosts::udp_relay_accepts_one_port_of_its_client_only", "", "") {
        return;
    }
    let host = Host::new();
    let _server = host.serve(&[]);
    let target = socket(ip(TARGET));
    let association = associate(server_addr(), ip(CLIENT), None);
    let (other_host, same_port) =
        (socket(ip(OTHER_CLIENT)), SocketAddr::new(ip(OTHER_CLIENT), local(&association.socket).port()));
    let same_port = UdpSocket::bind(same_port).expect("the port is free in this namespace");
    let second = socket(ip(CLIENT));
    let stray = datagram(0, local(&target), b"stray");
    for round in 0..3 {
        for sender in [&other_host, &same_port].into_iter().chain((round > 0).then_some(&second)) {
            // Fails in later rounds, after an ICMP error.
            let _ = sender.send_to(&stray, association.bnd);
        }
        association.send(local(&target), b"client");
        assert_eq!(receive(&target).0, b"client", "round {round}");
        assert_no_datagram(&target);
    }
    let (_, relay) = {
        association.send(local(&target), b"once more");
        receive(&target)
    };
    target.send_to(b"answer", relay).expect("datagram sent");
    assert_eq!(association.receive(), (local(&target), b"answer".to_vec()));
}

#[test]
fn udp_filtering_decides_which_hosts_may_answer() {
    if !in_namespace("guard::hosts::udp_filtering_decides_which_hosts_may_answer", "", "") {
        return;
    }
    let host = Host::new();
    let (target, other) = (socket(ip(TARGET)), socket(ip(OTHER_TARGET)));
    let filtering = ["--udp-filtering", "endpoint-independent"];
    let rows: [(&[&str], bool); 4] = [
        (&[], false),
        (&filtering, true),
        (&[&filtering[..], &["--deny", "to=10.9.1.3"]].concat(), false),
        (&[&filtering[..], &["--deny", "to=10.9.1.3 command=connect"]].concat(), true),
    ];
    for (args, other_may_answer) in rows {
        let _server = host.serve(args);
        let association = associate(server_addr(), ip(CLIENT), None);
        association.send(local(&target), b"hello");
        let (_, relay) = receive(&target);
        other.send_to(b"unsolicited", relay).expect("datagram sent");
        target.send_to(b"answer", relay).expect("datagram sent");
        if other_may_answer {
            assert_eq!(association.receive(), (local(&other), b"unsolicited".to_vec()), "{args:?}");
        }
        assert_eq!(association.receive(), (local(&target), b"answer".to_vec()), "{args:?}");
    }
}

#[test]
fn bind_accepts_expected_peer_only() {
    if !in_namespace("guard::hosts::bind_accepts_expected_peer_only", "", "") {
        return;
    }
    let host = Host::new();
    let rows: [(&[&str], &str, &str, &str); 4] = [
        (&[], "10.9.1.2:0", OTHER_TARGET, TARGET),
        (&["--deny", "to=10.9.1.3 command=bind"], "0.0.0.0:0", OTHER_TARGET, TARGET),
        (&["--allow", "to=10.9.1.3", "--deny", ""], "0.0.0.0:0", TARGET, OTHER_TARGET),
        // The rules allow two peers; only the expected one is accepted.
        (&["--allow", "to=10.9.1.0/24", "--deny", ""], "10.9.1.3:0", TARGET, OTHER_TARGET),
    ];
    for (rules, dst, wrong_peer, peer) in rows {
        let _server = host.serve(rules);
        let mut client = log_in(server_addr(), ip(CLIENT), None);
        let (rep, bnd) = send_request(&mut client, BIND, dst);
        assert_eq!((rep, bnd.ip()), (0, server_addr().ip()), "{rules:?}");
        for _ in 0..2 {
            assert!(is_closed(&mut connect_from(SocketAddr::new(ip(wrong_peer), 0), bnd)), "{rules:?}");
        }
        assert_no_data(&client, std::time::Duration::from_millis(20));
        let mut peer = connect_from(SocketAddr::new(ip(peer), 0), bnd);
        assert_eq!(read_reply(&mut client), (0, peer.local_addr().expect("local address")), "{rules:?}");
        peer.write_all(b"hello").expect("data sent");
        assert_eq!(read_exact(&mut client, 5), b"hello");
        // The port is closed after the peer has connected.
        wait_until("the port is closed", TIMEOUT, || std::net::TcpStream::connect(bnd).is_err());
    }
    // BIND for a denied peer is refused; 127.0.0.1 of the server is denied to remote clients.
    let _server = host.serve(&["--deny", "to=10.9.1.3"]);
    for dst in ["10.9.1.3:0", "[::ffff:10.9.1.3]:0", "127.0.0.1:0"] {
        assert_eq!(send_request(&mut log_in(server_addr(), ip(CLIENT), None), BIND, dst).0, 2, "{dst}");
    }
}

#[test]
fn rules_distinguish_hosts() {
    if !in_namespace("guard::hosts::rules_distinguish_hosts", "", "") {
        return;
    }
    let host = Host::new();
    let echo = tcp_server(ip(TARGET), |mut stream| {
        let mut other = stream.try_clone().expect("cloned");
        let _ = std::io::copy(&mut stream, &mut other);
    });
    // from= is enough to start without --allow-open-relay.
    let rules = ["--allow", "from=10.9.0.2 to=10.9.1.0/24"];
    let server = host.s5("*:1080", 2, &rules);
    let mut stream = log_in(server_addr(), ip(CLIENT), None);
    assert_eq!(send_request(&mut stream, CONNECT, &echo.to_string()).0, 0);
    ping(&mut stream, b"hello");
    assert_eq!(rep("10.9.0.1:9"), 2);
    assert!(is_closed(&mut connect_from(SocketAddr::new(ip(OTHER_CLIENT), 0), server_addr())));
    server.wait_log(|log| {
        log.contains("client=10.9.0.3") && log.contains("denied: built in, because an allow rule has from= (deny)")
    });
}

#[test]
fn rules_apply_to_ipv6_hosts() {
    if !in_namespace("guard::hosts::rules_apply_to_ipv6_hosts", "", "") {
        return;
    }
    let host = Host::new();
    let inner = host.s5("[::1]:7000", 1, &[]);
    let (server_addr_v6, client) = (addr("[fd09::1]:1080"), ip("fd09::2"));
    let tcp = TcpListener::bind("[fd09:1::2]:0").expect("free port");
    let (target, spoofer) = (socket(ip("fd09:1::2")), socket(ip("fd09::3")));
    let both = tcp_server(ip(TARGET), drop);
    let server = host.serve(&[]);
    let rep = |dst: &str| send_request(&mut log_in(server_addr_v6, client, None), CONNECT, dst).0;
    for dst in [tcp.local_addr().expect("local address").to_string(), both.to_string()] {
        assert_eq!(rep(&dst), 0, "{dst}");
    }
    tcp.accept().expect("connection accepted");
    for dst in [
        "[fd09::1]:1080",
        "[fd09:1::1]:1080",
        "10.9.0.1:1080",
        "[::1]:7000",
        "[::]:7000",
        "127.0.0.1:7000",
        "[fe80::1]:80",
        "[ff02::1]:80",
        "169.254.169.254:80",
    ] {
        assert_eq!(rep(dst), 2, "{dst}");
    }
    assert!(!inner.log().contains("session"), "{}", inner.log());
    let association = associate(server_addr_v6, client, None);
    let _ = spoofer.send_to(&datagram(0, local(&target), b"stray"), association.bnd);
    for dst in [addr("[ff02::1]:9"), addr("[::1]:7000"), server_addr_v6, local(&target)] {
        association.send(dst, b"client");
    }
    assert_eq!(receive(&target).0, b"client");
    drop(association);
    server.wait_log(|log| log.contains("command=udp") && log.contains(" up=6 down=0 "));
    drop(server);
    for (rule, is_v6_allowed) in [
        ("from=fd09::/64", true),
        ("from=fd09::2", true),
        ("from=10.9.0.0/16", false),
        ("from=fd09:1::/64,::/96", false),
    ] {
        let _server = host.s5("*:1080", 2, &["--allow", rule, "--allow", "from=10.9.0.2"]);
        if is_v6_allowed {
            log_in(server_addr_v6, client, None);
        } else {
            assert!(is_closed(&mut connect_from(SocketAddr::new(client, 0), server_addr_v6)), "{rule}");
        }
        log_in(server_addr(), ip(CLIENT), None);
    }
}
