//! Three nodes behind HAProxy, with src/dist/haproxy.cfg.

mod capacity;
mod clients;
mod lab;
mod manifest;
mod recipes;

use crate::is_open;
use crate::support::*;
use clients::{connect, request_from, run_load, tunnel_from};
use lab::{BEHIND_HAPROXY, CHECK_LIMIT, HOSTS, Lab, NODES, SOURCE, TARGET, lab, on, open_lab, set_link};

/// Fails if HAProxy does not send the address of the client, or if the node does not use it.
#[test]
#[ignore = "make test-system"]
fn connect_reaches_all_nodes_and_the_log_has_the_client() {
    let lab = open_lab!(&NODES, "");
    let tunnels = |_| TARGET.map(|target| request_from("client2", CONNECT, addr(target)).0);
    let mut tunnels: Vec<TcpStream> = (0..3).flat_map(tunnels).collect();
    tunnels.iter_mut().for_each(|tunnel| ping(tunnel, b"through a node"));
    for mut tunnel in tunnels {
        tunnel.shutdown(Shutdown::Write).expect("half-closed");
        assert_eq!(stream_end(&mut tunnel), StreamEnd::Closed(Vec::new()));
    }
    for node in lab.nodes.values() {
        let log = node.wait_log(|log| session_lines(log).len() == 2);
        let is_client = |line: &&str| line.contains("from=10.1.0.12:") || line.contains("from=[fd00:1::12]:");
        assert!(session_lines(&log).iter().all(is_client), "{log}");
    }
}

/// Fails if the reply has the address of HAProxy or that of the node in its own network, or if the node compares the peer
/// with HAProxy.
#[test]
#[ignore = "make test-system"]
fn bind_has_the_address_of_the_node() {
    let _lab = open_lab!(&NODES, "");
    for target in TARGET.map(addr) {
        let (mut client, rep, bnd) = request_from("client1", BIND, target);
        assert_eq!((rep, is_node(bnd)), (0, true), "{bnd}");
        // From another host than that of the request.
        on("client3", || drop(TcpStream::connect(bnd)));
        let mut peer = on("target", || TcpStream::connect(bnd)).expect("the node accepts");
        assert_eq!(read_reply(&mut client), (0, peer.local_addr().expect("local address")));
        peer.write_all(b"from the peer").expect("data sent");
        assert_eq!(read_exact(&mut client, 13), b"from the peer");
        client.write_all(b"to the peer").expect("data sent");
        assert_eq!(read_exact(&mut peer, 11), b"to the peer");
    }
}

/// Fails if the reply has the address of HAProxy or that of the node in its own network, or if the association belongs to
/// HAProxy instead of the client.
#[test]
#[ignore = "make test-system"]
fn udp_has_the_address_of_the_node_and_belongs_to_the_client() {
    let _lab = open_lab!(&NODES, "");
    for (target, any) in TARGET.map(addr).into_iter().zip(["0.0.0.0:0", "[::]:0"]) {
        let (_control, rep, bnd) = request_from("client1", UDP_ASSOCIATE, addr(any));
        assert_eq!((rep, is_node(bnd)), (0, true), "{bnd}");
        let open = || UdpSocket::bind(any).expect("free port");
        let datagram = [message_with_addr([0, 0, 0], target), b"datagram".to_vec()].concat();
        let [other, socket] = ["client2", "client1"].map(|client| on(client, open));
        for socket in [&other, &socket] {
            socket.send_to(&datagram, bnd).expect("datagram sent");
        }
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        let mut answer = [0; 64];
        let n = retry(|| socket.recv(&mut answer)).expect("an answer from the target");
        assert_eq!(answer[..n], datagram);
        assert!(!arrives(&other), "the association belongs to client1");
    }
}

/// Fails if rules or limits see the address of HAProxy.
#[test]
#[ignore = "make test-system"]
fn rules_and_limits_see_the_clients() {
    let _lab = open_lab!(&NODES, "--max-per-client 2 --deny from=10.1.0.13");
    // Each node counts for itself.
    let _tunnels: Vec<TcpStream> = (0..6).map(|_| tunnel_from("client1")).collect();
    assert!(is_refused("client1"));
    assert!(is_refused("client3"));
    assert!(!is_refused("client2"));
}

/// Fails if a client gets a connection to a node that has ended, or if one node ends tunnels of another.
#[test]
#[ignore = "make test-system"]
fn killed_node_loses_only_its_own_tunnels() {
    let mut lab = open_lab!(&NODES, "");
    let mut tunnels: Vec<TcpStream> = (0..9).map(|_| tunnel_from("client2")).collect();
    let mut is_down = Instant::now();
    let errors = run_load(|load| {
        load.wait(100);
        lab.nodes.remove("node1");
        lab.wait_state("node1", "DOWN");
        is_down = Instant::now();
        load.wait(300);
    });
    let late: Vec<_> = errors.iter().filter(|(begun, _)| *begun > is_down).collect();
    assert!(late.is_empty(), "{late:#?}");
    tunnels.retain_mut(is_open);
    assert_eq!(tunnels.len(), 6);
}

/// Like a machine without power: no reset, no answer. Fails if HAProxy does not check the node, or waits for it.
#[test]
#[ignore = "make test-system"]
fn unreachable_node_gets_no_new_sessions() {
    let lab = open_lab!(&NODES, "");
    set_link("node1", "down");
    lab.wait_state("node1", "DOWN");
    let errors = run_load(|load| load.wait(300));
    assert!(errors.is_empty(), "{errors:#?}");
    set_link("node1", "up");
    lab.wait_state("node1", "UP");
    (0..3).for_each(|_| drop(tunnel_from("client1")));
    lab.node("node1").wait_log(|log| ended_sessions(log) > 0);
}

/// Fails if HAProxy prefers some nodes, or does not notice a new one.
#[test]
#[ignore = "make test-system"]
fn new_node_receives_a_third_of_the_new_sessions() {
    let mut lab = open_lab!(&NODES[..2], "");
    lab.wait_state("node3", "DOWN");
    let errors = run_load(|load| {
        lab.start_node("node3");
        lab.wait_state("node3", "UP");
        let before = lab.total_sessions();
        load.wait(900);
        let after = lab.total_sessions();
        let added: Vec<f64> = after.iter().zip(before).map(|(after, before)| (after - before) as f64).collect();
        let share = added[2] / added.iter().sum::<f64>();
        assert!((0.28..0.39).contains(&share), "{added:?}");
    });
    assert!(errors.is_empty(), "{errors:#?}");
}

/// Fails if a reload of HAProxy ends tunnels or refuses connections.
#[test]
#[ignore = "make test-system"]
fn haproxy_reload_keeps_tunnels() {
    let lab = open_lab!(&NODES, "");
    let mut tunnels: Vec<TcpStream> = (0..3).map(|_| tunnel_from("client2")).collect();
    let errors = run_load(|load| {
        lab.reload_haproxy();
        load.wait(300);
    });
    assert!(errors.is_empty(), "{errors:#?}");
    tunnels.iter_mut().for_each(|tunnel| ping(tunnel, b"still open"));
}

/// Returns true for the address of `--advertise` of a node, which the node does not have itself.
fn is_node(bnd: SocketAddr) -> bool {
    let ip = bnd.ip().to_string();
    ["198.51.100.2", "2001:db8::2"].iter().any(|start| ip.strip_prefix(start).is_some_and(|end| "123".contains(end)))
}

/// Returns true if a node closes the connection without an answer.
fn is_refused(client: &str) -> bool {
    let mut stream = on(client, || TcpStream::connect(clients::PROXY[0])).expect("HAProxy accepts");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    let _ = stream.write_all(&[5, 1, 0]);
    !matches!(stream.read(&mut [0; 2]), Ok(1..))
}
