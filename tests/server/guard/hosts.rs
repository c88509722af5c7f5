//! Clients and targets on other hosts than the server. The server has its own network namespace, with an address in
//! each of two networks. All other addresses belong to the namespace of the test, at the other ends of two veth pairs.
//!
//! | host | addresses |
//! | --- | --- |
//! | the server | 10.9.0.1, 10.9.1.1; fd09::1, fd09:1::1 |
//! | clients | 10.9.0.2, 10.9.0.3; fd09::2, fd09::3 |
//! | targets | 10.9.1.2, 10.9.1.3; fd09:1::2; 169.254.169.254, and 224.0.0.251 (multicast group) |

use super::tools::{assert_no_connection, assert_no_datagram, associate, log_in, send_request, udp_target};
use crate::udp::association::{Association, datagram, receive, socket};
use crate::*;

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
pub struct Host(Child);

impl Host {
    pub fn new() -> Self {
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

    /// A command that runs in this namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.0.id())).args(["--", program]);
        command
    }

    /// Starts a server in this namespace, and waits until it listens on `count` addresses.
    fn s5(&self, listen: &str, count: usize, args: &[&str]) -> Server {
        let mut command = self.command(env!("CARGO_BIN_EXE_s5"));
        Server::start_with(command.args(["serve", "--listen", listen]).args(args), count)
    }

    /// Starts a server on every address, open to all clients.
    pub fn serve(&self, args: &[&str]) -> Server {
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
pub fn server_addr() -> SocketAddr {
    addr("10.9.0.1:1080")
}

fn associate_from(client: &str) -> Association {
    associate(server_addr(), ip(client), None)
}

#[test]
fn remote_client_reaches_other_hosts_but_not_server_or_link() {
    enter_namespace!("", "");
    let host = Host::new();
    // A second server on loopback of the server's host logs every client that reaches it.
    let inner = host.s5("127.0.0.1:7000", 2, &["-v", "--listen", "[::1]:7000"]);
    let targets = [TARGET, "fd09:1::2"].map(|at| TcpListener::bind((ip(at), 0)).expect("free port"));
    let metadata = TcpListener::bind((METADATA, 80)).expect("free port");
    let protected = "127.0.0.1:7000 127.9.9.9:7000 0.0.0.0:7000 0.1.2.3:7000 [::1]:7000 [::]:7000 [::ffff:127.0.0.1]:7000 \
        [::ffff:0.0.0.0]:7000 [64:ff9b::7f00:1]:7000 [64:ff9b:1::7f00:1]:7000 =127.0.0.1:7000 \
        =[::1]:7000 127.1:7000 localhost:7000 169.254.169.254:80 [::ffff:169.254.169.254]:80 [64:ff9b::a9fe:a9fe]:80 [fe80::1]:80 \
        [fd00:ec2::254]:80 224.0.0.251:80 [ff02::1]:80 255.255.255.255:80";
    let own_listeners =
        "10.9.0.1:1080 10.9.1.1:1080 [::ffff:10.9.0.1]:1080 =10.9.1.1:1080 [fd09::1]:1080 [fd09:1::1]:1080";
    let clients = [(ip(CLIENT), server_addr()), (ip("fd09::2"), server_addr_v6())];
    // An allow without to= allows none of these targets.
    for rules in [&[][..], &["--allow", "from=10.9.0.0/16,fd09::/64"]] {
        let _server = host.serve(rules);
        for (client, server) in clients {
            let rep = |dst: &str| send_request(&mut log_in(server, client, None), CONNECT, dst).0;
            for target in &targets {
                assert_eq!(rep(&target.local_addr().expect("local address").to_string()), 0, "{rules:?}");
                target.accept().expect("connection accepted");
            }
            for dst in protected.split(' ').chain(own_listeners.split(' ')) {
                let rep = rep(dst);
                // Without a resolver, localhost may be unknown.
                assert!(rep == 2 || rep != 0 && dst.starts_with("localhost"), "{client} {rules:?}: {dst}: {rep}");
            }
            let bind = |dst: &str| send_request(&mut log_in(server, client, None), BIND, dst);
            assert_eq!(bind("127.0.0.1:0").0, 2, "{client} {rules:?}");
            let (rep, bnd) = bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
            assert_eq!((rep, bnd.ip()), (0, server.ip()), "{client} {rules:?}");
        }
        assert_no_connection(&metadata);
        assert!(!inner.log().contains("session"), "{}", inner.log());
    }
    let rules = ["to=127.0.0.1 from=10.9.0.2", "to=169.254.169.254 port=80", "to=10.9.1.1 port=1080"];
    let _server = host.serve(&rules.map(|rule| ["--allow", rule]).concat());
    for (dst, expected) in [
        ("127.0.0.1:7000", 0),
        ("0.0.0.0:7000", 0),
        ("[::ffff:127.0.0.1]:7000", 0),
        ("10.9.1.1:1080", 0),
        (METADATA_DST, 0),
        ("[::1]:7000", 2),
        ("169.254.169.254:7000", 2),
        ("10.9.0.1:1080", 2),
    ] {
        let mut stream = log_in(server_addr(), ip(CLIENT), None);
        assert_eq!(send_request(&mut stream, CONNECT, dst).0, expected, "{dst}");
        if dst == METADATA_DST {
            metadata.accept().expect("connection accepted");
        } else if expected == 0 {
            stream.write_all(&[5, 1, 0]).expect("data sent");
            assert_eq!(read_exact(&mut stream, 2), [5, 0], "{dst}");
        }
    }
    inner.wait_log(|log| log.contains("session"));
}

const METADATA_DST: &str = "169.254.169.254:80";

pub fn server_addr_v6() -> SocketAddr {
    addr("[fd09::1]:1080")
}

/// Binds a socket that is a member of the multicast group.
fn member(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((GROUP, port)).expect("free port");
    socket.join_multicast_v4(&GROUP, &TARGET.parse().expect("valid address")).expect("joined");
    socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    socket
}

#[test]
fn datagrams_reach_only_allowed_targets() {
    enter_namespace!("", "");
    let host = Host::new();
    let [(target, target_addr), (denied, denied_addr), (metadata, metadata_addr)] =
        [TARGET, OTHER_TARGET, METADATA].map(udp_target);
    let member = member(5353);
    let server = host.serve(&["--deny", "to=10.9.1.3 command=udp"]);
    let other = associate_from(OTHER_CLIENT);
    let association = associate_from(CLIENT);
    let nested = datagram(0, target_addr, b"nested");
    // Denied: the listeners, the relay of this association, and the unused relay of another client. An unused relay
    // accepts any port of its client, but not datagrams of the server itself.
    let own_listeners = [addr("10.9.0.1:1080"), addr("10.9.1.1:1080"), addr("127.0.0.1:1080")];
    for dst in own_listeners.into_iter().chain([denied_addr, metadata_addr, addr("224.0.0.251:5353"), addr("[::1]:9")])
    {
        association.send(dst, &nested);
    }
    association.send(target_addr, b"allowed");
    assert_eq!(receive(&target).0, b"allowed", "an earlier datagram was relayed");
    [&target, &denied, &metadata, &member].into_iter().for_each(assert_no_datagram);
    drop(association);
    server.wait_log(|log| log.contains("from=10.9.0.2") && log.contains(" up=7 down=0 "));
    let association = associate_from(CLIENT);
    for dst in [association.bnd, other.bnd] {
        association.send(dst, &nested);
    }
    association.send(target_addr, b"allowed");
    assert_eq!(receive(&target).0, b"allowed", "a relay accepted a datagram of the server itself");
    assert_no_datagram(&target);
    // The other association still works for its client.
    other.send(target_addr, b"other");
    assert_eq!(receive(&target).0, b"other");
    drop(server);
    let _server = host.serve(&["--allow", "to=224.0.0.251,169.254.0.0/16 command=udp"]);
    let association = associate_from(CLIENT);
    association.send(addr("224.0.0.251:5353"), b"group");
    association.send(metadata_addr, b"link");
    assert_eq!((receive(&member).0, receive(&metadata).0), (b"group".to_vec(), b"link".to_vec()));
}

#[test]
fn udp_relay_accepts_one_port_of_its_client_only() {
    enter_namespace!("", "");
    let host = Host::new();
    let _server = host.serve(&[]);
    let hosts = [
        (server_addr(), ip(CLIENT), ip(OTHER_CLIENT), TARGET),
        (server_addr_v6(), ip("fd09::2"), ip("fd09::3"), "fd09:1::2"),
    ];
    for (server, client, other_client, target) in hosts {
        let (target, target_addr) = udp_target(target);
        let exchange = |association: &Association, round: usize| {
            association.send(target_addr, b"client");
            let (data, relay) = receive(&target);
            assert_eq!(data, b"client", "round {round}");
            assert_no_datagram(&target);
            target.send_to(b"answer", relay).expect("datagram sent");
            assert_eq!(association.receive(), (target_addr, b"answer".to_vec()));
        };
        // The hosts find each other, which can take more than the 2 s after which another port is accepted.
        exchange(&associate(server, client, None), 0);
        let association = associate(server, client, None);
        let port = association.socket.local_addr().expect("local address").port();
        let same_port = UdpSocket::bind((other_client, port)).expect("the port is free in this namespace");
        let (other_host, second) = (socket(other_client), socket(client));
        let stray = datagram(0, target_addr, b"stray");
        for round in 0..3 {
            for sender in [&other_host, &same_port].into_iter().chain((round > 0).then_some(&second)) {
                // Fails in later rounds, after an ICMP error.
                let _ = sender.send_to(&stray, association.bnd);
            }
            exchange(&association, round);
        }
    }
}
