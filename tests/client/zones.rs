//! Link-local addresses with a zone: of the proxy, of the target and of the listeners. The first server has its own
//! network namespace: it is fe80::1 and fd09::1 on the interface s0. The clients are fe80::2 on c0, the other end of
//! the link, and have no other address there.

use crate::bind::bound_address;
use crate::*;

/// Sets up an interface for the server, whose other end is in the namespace of process $1.
const SERVER_LINK: &str = "set -e; ip link set lo up
    ip link add s0 type veth peer name c0 netns $1; ip link set s0 addrgenmode none; ip link set s0 up
    ip addr add fe80::1/64 dev s0 nodad; ip addr add fd09::1/64 dev s0 nodad
    echo ready; exec cat";
const CLIENT_LINK: &str =
    "set -e; ip link set c0 addrgenmode none; ip link set c0 up; ip addr add fe80::2/64 dev c0 nodad
    ip -6 route add fd09::/64 dev c0";

/// Starts a process that has another network namespace with a link to this one.
fn linked_namespace() -> RunningProgram {
    let pid = std::process::id().to_string();
    let host = RunningProgram::start(Command::new("unshare").args(["--net", "sh", "-c", SERVER_LINK, "sh", &pid]));
    host.stdout(|stdout| stdout == b"ready\n");
    let link = run(Command::new("sh").args(["-c", CLIENT_LINK]), b"", TIMEOUT);
    assert!(link.status.success(), "{link:?}");
    host
}

/// Starts a server in the other namespace.
fn serve_at_link(host: &RunningProgram) -> Server {
    let mut command = Command::new("nsenter");
    command.args([&format!("--net=/proc/{}/ns/net", host.pid()), "--", env!("CARGO_BIN_EXE_s5"), "serve"]);
    command.args(["--listen", "[fe80::1%s0]:1080", "--listen", "[fd09::1]:1080"]);
    command.args(["--allow", "from=fe80::/10 to=fe80::/10"]);
    Server::start_with(&mut command, 2)
}

#[test]
fn link_local_addresses_with_a_zone_are_reached() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let host = linked_namespace();
    let _server = serve_at_link(&host);
    let proxy = "[fe80::1%c0]:1080";
    let any = Ipv6Addr::UNSPECIFIED.into();
    let (tcp, udp) = (echo_server_at(any).port(), udp_echo_server(any).port());
    // The URL form has %25; the source address is on the link of the proxy. The last server has a client without a
    // zone.
    let options = [proxy, "socks5h://[fe80::1%25c0]:1080", "[fe80::1%c0]:1080 -s fe80::2 -R local", "[fd09::1]:1080"];
    for option in options {
        for target in [format!("[fe80::2%s0]:{tcp}"), format!("fe80::2%s0 {tcp}")] {
            assert_eq!(outcome(&format!("connect -x {option} {target}"), b"hello"), success("hello"), "{option}");
        }
        let args = format!("udp -n 1 -w 5 -x {option} [fe80::2%s0]:{udp}");
        assert_eq!(outcome(&args, b"hello\n"), success("hello\n"), "{option}");
    }
}

#[test]
fn server_and_clients_listen_on_and_forward_to_link_local_addresses() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let host = linked_namespace();
    let server = serve_at_link(&host);
    assert!(matches!(server.addr(), SocketAddr::V6(addr) if addr.scope_id() != 0), "{}", server.addr());
    let proxy = "[fe80::1%c0]:1080";
    let any = Ipv6Addr::UNSPECIFIED.into();
    let (tcp, udp) = (echo_server_at(any).port(), udp_echo_server(any).port());
    let near = Server::start(&["-v"]);
    for option in [&["--via", proxy][..], &["--hop", "h=[fe80::1%c0]:1080", "--allow", "via=h"]] {
        let first = Server::start(option);
        for chain in [first.addr().to_string(), format!("{},{proxy}", near.addr())] {
            let args = format!("connect -x {chain} [fe80::2%s0]:{tcp}");
            assert_eq!(outcome(&args, b"hello"), success("hello"), "{chain}");
        }
        let args = format!("udp -n 1 -w 5 -x {} [fe80::2%s0]:{udp}", first.addr());
        assert_eq!(outcome(&args, b"hello\n"), success("hello\n"), "{option:?}");
    }
    let forward = start(&format!("connect -l [fe80::2%c0]:0 -x {proxy} [fe80::2%s0]:{tcp}"));
    let stderr = forward.stderr(|stderr| stderr.ends_with('\n'));
    let at: SocketAddr = stderr.trim_end().rsplit(' ').next().and_then(|at| at.parse().ok()).expect("an address");
    let mut stream = TcpStream::connect(at).expect("the listener accepts");
    stream.write_all(b"hello").expect("data sent");
    assert_eq!(read_exact(&mut stream, 5), b"hello");
    bound_address(&start(&format!("bind -x {proxy} fe80::2%s0")));
    // Without a peer, the request has an IPv4 address, but this server has no route for IPv4.
    bound_address(&start(&format!("bind -x {proxy}")));
    // BIND at a server whose client is on loopback: the zone selects the interface.
    let bound = bound_address(&start(&format!("bind -x {} fe80::1%c0", near.addr())));
    assert_eq!(bound.ip().to_string(), "fe80::2");
    let args = format!("udp -n 1 -w 5 -x {} [fe80::2%c0]:{udp}", near.addr());
    assert_eq!(outcome(&args, b"hello\n"), success("hello\n"));
    let logged = format!(" to=\"[fe80::2%c0]:{udp}\" addr=[");
    near.wait_log(|log| log.lines().any(|line| line.contains("msg=datagram ") && line.contains(&logged)));
    // The lines of a server have the zones of both ends, and can be explained.
    let args = format!("connect -x {proxy} [fe80::2%s0]:{tcp}");
    assert_eq!(outcome(&args, b"hello"), success("hello"));
    let fields = [" from=[fe80::2%", " to=\"[fe80::2%s0]:", " addr=[fe80::2%"];
    let has_zones = |line: &str| fields.iter().all(|field| line.contains(field));
    let log = server.wait_log(|log| log.lines().any(has_zones));
    let line = log.lines().find(|line| has_zones(line)).expect("the line is in the log");
    let rule = ["--allow", "from=fe80::/10 to=fe80::/10"];
    let explained = run(s5().arg("serve").args(rule).args(["--explain", line]), b"", TIMEOUT);
    assert!(explained.status.success(), "{line}: {explained:?}");
    assert_eq!(outcome(&format!("connect --direct [fe80::2%c0]:{tcp}"), b"hello"), success("hello"));
    assert_eq!(outcome(&format!("udp --direct -n 1 -w 5 [fe80::2%c0]:{udp}"), b"hello\n"), success("hello\n"));
}

#[test]
fn link_local_address_without_a_zone_fails_with_the_reason() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let reason = "a link-local address requires a zone, as in fe80::1%eth0";
    let server = Server::start(&[]);
    let (status, _, stderr) = outcome(&format!("connect -x {} [fe80::2]:80", server.addr()), b"");
    assert_eq!((status, stderr.contains("network unreachable (REP 3)")), (Some(103), true), "{stderr}");
    server.wait_log(|log| log.contains(reason));
    assert_line("connect -x [fe80::1]:1080 a:1", 7, &["proxy [fe80::1]:1080: connecting to the proxy", reason]);
    assert_line("connect --direct [fe80::2]:80", 7, &["direct: connecting to the target", reason]);
    assert_line("udp --direct [fe80::2]:53", 7, &["direct: connecting to the target", reason]);
    assert_line("connect -l [fe80::1]:0 a:1", 45, &["listen on [fe80::1]:0: ", reason]);
    assert_line("udp -l [fe80::1]:0 a:1", 45, &["listen on [fe80::1]:0: ", reason]);
    assert_line("serve --listen [fe80::1]:0", 1, &["listen on [fe80::1]:0: ", reason]);
    let (status, _, stderr) = outcome(&format!("bind -x {} fe80::2", server.addr()), b"");
    assert_eq!((status, stderr.contains("network unreachable (REP 3)")), (Some(103), true), "{stderr}");
    server.wait_log(|log| log.matches(reason).count() >= 2);
    // No interface has this name.
    let reason = "no such interface on this machine";
    for (args, status, text) in [
        ("connect -x [fe80::1%nope]:1080 a:1", 5, "proxy [fe80::1%nope]:1080: resolving the proxy's name, for a:1: "),
        ("udp -x [fe80::1%nope]:1080 a:1", 5, "proxy [fe80::1%nope]:1080: resolving the proxy's name, for a:1: "),
        ("connect --direct [fe80::1%nope]:80", 6, "direct: resolving the target's name, for [fe80::1%nope]:80: "),
        ("udp --direct [fe80::1%nope]:80", 6, "direct: resolving the target's name, for [fe80::1%nope]:80: "),
        ("connect -l [fe80::1%nope]:1 a:1", 2, "-l '[fe80::1%nope]:1': "),
        ("udp -l [fe80::1%nope]:1 a:1", 2, "-l '[fe80::1%nope]:1': "),
        ("serve --listen [fe80::1%nope]:1", 1, "listen on [fe80::1%nope]:1: "),
    ] {
        assert_line(args, status, &[text, reason]);
    }
    let (status, _, stderr) = outcome(&format!("connect -x {} [fe80::1%nope]:80", server.addr()), b"");
    assert_eq!((status, stderr.contains("(REP 4)")), (Some(104), true), "{stderr}");
    server.wait_log(|log| log.contains(reason));
    // Only link-local addresses have a zone.
    for addr in ["[::1%lo]:1", "[2001:db8::1%lo]:1", "[fe80::1%]:1"] {
        assert_line(&format!("connect {addr}"), 2, &["invalid IPv6 address"]);
        assert_line(&format!("serve --listen {addr}"), 2, &[addr]);
    }
}
