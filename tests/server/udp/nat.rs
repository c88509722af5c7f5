//! A client behind a NAT, which removes the mapping of its port after a second of silence. The next datagram comes from
//! another port.
//!
//! | host | addresses |
//! | --- | --- |
//! | the client | 10.8.0.2 |
//! | the NAT | 10.8.0.1, 10.9.0.2 |
//! | the server | 10.9.0.1, 10.9.1.1 |
//! | the target | 10.9.1.2 |

use std::thread::sleep;

use super::association::{Association, receive, socket};
use crate::guard::hosts::Host;
use crate::guard::tools::{log_in, send_request, udp_target};
use crate::*;

const CLIENT: &str = "10.8.0.2";
const TARGET: &str = "10.9.1.2";

/// More than the silence after which another port of the client may take over, and than the NAT keeps a mapping.
const SILENCE: Duration = Duration::from_millis(2200);

/// Takes the client's end of the server's network from the namespace of process $1, and adds a link of its own to it.
const NAT: &str = "set -e; ip link set lo up
    nsenter --net=/proc/$1/ns/net ip link set c0 netns $$
    ip addr add 10.9.0.2/24 dev c0; ip link set c0 up
    ip link add n0 type veth peer name home netns $1; ip addr add 10.8.0.1/24 dev n0; ip link set n0 up
    nft 'table ip nat {
        chain out { type nat hook postrouting priority 100; oifname \"c0\" masquerade fully-random; }
    }'
    for name in udp_timeout udp_timeout_stream; do echo 1 > /proc/sys/net/netfilter/nf_conntrack_$name; done
    echo 1 > /proc/sys/net/ipv4/ip_forward
    echo ready; exec cat";
const HOME: &str = "set -e; ip addr add 10.8.0.2/24 dev home; ip link set home up
    ip route add 10.9.0.0/24 via 10.8.0.1";

/// Starts the process that has the network namespace of the NAT.
fn nat() -> RunningProgram {
    let pid = std::process::id().to_string();
    let nat = RunningProgram::start(Command::new("unshare").args(["--net", "sh", "-c", NAT, "sh", &pid]));
    nat.stdout(|stdout| stdout == b"ready\n");
    let home = run(Command::new("sh").args(["-c", HOME]), b"", TIMEOUT);
    assert!(home.status.success(), "{home:?}");
    nat
}

#[test]
fn udp_client_behind_a_nat_gets_answers_after_its_mapping_is_gone() {
    let test = "udp::nat::udp_client_behind_a_nat_gets_answers_after_its_mapping_is_gone";
    if !is_installed("nft") || !in_namespace(test, "", "") {
        return;
    }
    let host = Host::new();
    let _nat = nat();
    let (target, dst) = udp_target(TARGET);
    let echo = |association: &Association, data: &[u8]| {
        association.send(dst, data);
        let (received, egress) = receive(&target);
        assert_eq!(received, data);
        target.send_to(data, egress).expect("datagram sent");
        assert_eq!(association.receive(), (dst, data.to_vec()));
    };
    // A port for each association, and one that associations share.
    let servers: [(&str, &[&str]); 2] = [("10.9.0.1:1080", &[]), ("10.9.0.1:1081", &["--udp-ports", "5000"])];
    let sessions = servers.map(|(listen, args)| {
        let mut command = host.command(env!("CARGO_BIN_EXE_s5"));
        command.args(["serve", "-v", "--allow-open-relay", "--listen", listen]).args(args);
        let server = Server::start_with(&mut command, 1);
        let (mut control, socket) = (log_in(server.addr(), ip(CLIENT), None), socket(ip(CLIENT)));
        // The client announces the address and port that it knows, not those that the NAT selects.
        let announced = socket.local_addr().expect("local address").to_string();
        let (rep, bnd) = send_request(&mut control, UDP_ASSOCIATE, &announced);
        assert_eq!(rep, 0, "{listen}");
        let association = Association { control, socket, bnd };
        echo(&association, b"first");
        echo(&association, b"second");
        (server, association)
    });
    sleep(SILENCE);
    for (server, association) in sessions {
        echo(&association, b"after the silence");
        let text = " msg=detail id=1 module=s5::server::association::client_socket text=\"udp: client 10.9.0.2: port ";
        server.wait_log(|log| log.lines().any(|line| line.contains(text) && line.contains(" replaces ")));
        echo(&association, b"last");
        association.control.set_nonblocking(true).expect("option set");
        let end = retry(|| association.control.peek(&mut [0]));
        assert!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "control connection: {end:?}");
    }
}
