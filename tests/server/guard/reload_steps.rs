//! A reload at each step of a session. Unchanged files have no effect; a denial by new files applies as if they had
//! been loaded from the start.

use super::tools::{
    ALICE, Setup, assert_no_connection, assert_no_datagram, associate, log_in, only_bob, request_for, udp_target,
};
use crate::support::dns::Answer;
use crate::udp::association::{datagram_name, receive};
use crate::*;

/// A step of the client.
#[derive(Clone)]
enum Step {
    Send(Vec<u8>),
    Expect(Vec<u8>),
}

fn steps(dst: SocketAddr) -> Vec<Step> {
    let login = login_message(b"alice", b"secret");
    let request = request_for(CONNECT, &dst.to_string());
    let halves = |bytes: &[u8]| {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        [Step::Send(first.to_vec()), Step::Send(second.to_vec())]
    };
    let mut steps = halves(&[5, 1, 2]).to_vec();
    steps.push(Step::Expect(vec![5, 2]));
    steps.extend(halves(&login));
    steps.push(Step::Expect(vec![1, 0]));
    steps.extend(halves(&request));
    // VER, REP and RSV; the remaining bytes are read together with the data of the target.
    steps.push(Step::Expect(vec![5, 0, 0]));
    steps
}

/// Runs the steps until an unexpected answer. Returns true if all steps succeed.
fn run_steps(stream: &mut TcpStream, steps: &[Step]) -> bool {
    steps.iter().all(|step| match step {
        Step::Send(bytes) => stream.write_all(bytes).is_ok(),
        Step::Expect(expected) => {
            let mut bytes = vec![0; expected.len()];
            stream.read_exact(&mut bytes).is_ok() && bytes == *expected
        }
    })
}

/// Changes of the files.
const CHANGES: [&str; 4] = ["nothing", "remove alice", "deny alice", "deny the target"];

fn apply_change(setup: &Setup, change: &str, dst: SocketAddr) -> String {
    match change {
        "nothing" => setup.reload(),
        "remove alice" => setup.reload_users(only_bob()),
        "deny alice" => setup.reload_rules("deny user=alice\n"),
        _ => setup.reload_rules(&format!("deny to=127.0.0.1 port={}\n", dst.port())),
    }
}

/// Sends a request that waits for its target while the files change. Returns the client's connection.
fn change_during(setup: &Setup, change: &str, request: &[u8], dst: SocketAddr) -> TcpStream {
    let mut stream = log_in(setup.server.addr(), unused_client_ip(), ALICE);
    stream.write_all(request).expect("request sent");
    assert_no_data(&stream, Duration::from_millis(50));
    assert!(apply_change(setup, change, dst).contains("reload: users: "));
    stream
}

#[test]
fn reload_applies_at_each_step_before_reply() {
    for threads in ["1", "2"] {
        for change in CHANGES {
            let (target, dst) = listener(V4);
            let steps = steps(dst);
            // After the last step but one the request is complete. The tests below cover the time after it.
            for step in 0..steps.len() - 1 {
                let setup = Setup::new(&["--threads", threads]);
                let mut stream = connect_from_ip(&setup.server, unused_client_ip());
                stream.set_nodelay(true).expect("option set");
                assert!(run_steps(&mut stream, &steps[..step]));
                let line = apply_change(&setup, change, dst);
                assert!(line.contains("reload: users: "), "{line}");
                let succeeds = run_steps(&mut stream, &steps[step..]);
                assert_eq!(succeeds, change == "nothing", "{change} before step {step}:\n{}", setup.server.log());
                if succeeds {
                    accept(&target).0.write_all(b"hello").expect("data sent");
                    assert_eq!(read_exact(&mut stream, 12)[7..], *b"hello", "data after the reply");
                }
                assert_no_connection(&target);
            }
        }
    }
}

#[test]
fn reload_applies_while_connecting() {
    let cases = CHANGES.map(|change| {
        let setup = Setup::new(&[]);
        let slow = FullBacklog::new();
        let dst = slow.addr;
        let stream = change_during(&setup, change, &request_for(CONNECT, &dst.to_string()), dst);
        (change, setup, slow, stream)
    });
    // All cases run at once, because each takes a second.
    for (change, _setup, slow, mut stream) in cases {
        stream.write_all(b"early").expect("data sent");
        if change == "nothing" {
            let mut target = slow.accept();
            assert_eq!(read_reply(&mut stream).0, 0);
            assert_eq!(read_exact(&mut target, 5), b"early");
        } else {
            // The target has not answered yet.
            assert_eq!(read_reply(&mut stream).0, 2, "{change}");
        }
    }
}

/// Starts a resolver that does not answer until the returned sender is dropped.
fn start_blocked_resolver() -> (dns::Queries, mpsc::Sender<()>) {
    let (release, released) = mpsc::channel();
    let queries = dns::start_with(move |name, nth| {
        // The first query is blocked, and with it all later ones.
        if name == "slow.test" && nth == 0 {
            let _ = released.recv();
        }
        Answer::addrs([[127, 0, 0, 1].into()])
    });
    (queries, release)
}

#[test]
fn reload_applies_to_connect_while_resolving() {
    enter_namespace!("", dns::RESOLV);
    let (_queries, release) = start_blocked_resolver();
    let cases = CHANGES.map(|change| {
        let setup = Setup::new(&[]);
        let (target, dst) = listener(V4);
        let request = request_for(CONNECT, &format!("slow.test:{}", dst.port()));
        let stream = change_during(&setup, change, &request, dst);
        (change, setup, target, stream)
    });
    drop(release);
    for (change, _setup, target, mut stream) in cases {
        assert_eq!(read_reply(&mut stream).0, if change == "nothing" { 0 } else { 2 }, "{change}");
        if change == "nothing" {
            accept(&target);
        }
        assert_no_connection(&target);
    }
}

#[test]
fn reload_applies_to_datagrams_while_resolving() {
    enter_namespace!("", dns::RESOLV);
    let (_queries, release) = start_blocked_resolver();
    let setup = Setup::new(&[]);
    let [(good, good_addr), (bad, bad_addr), (other, other_addr)] = [(); 3].map(|()| udp_target("127.0.0.1"));
    let [good_port, bad_port] = [good_addr, bad_addr].map(|addr| addr.port());
    let association = associate(setup.server.addr(), unused_client_ip(), ALICE);
    for port in [bad_port, good_port] {
        association.send_raw(&datagram_name(0, "slow.test", port, b"hello"));
    }
    // When this datagram by address arrives, the other two are waiting for the name.
    association.send(other_addr, b"after them");
    receive(&other);
    assert!(setup.reload_rules(&format!("deny to=127.0.0.1 port={bad_port}\n")).ends_with("sessions closed: 0"));
    drop(release);
    assert_eq!(receive(&good).0, b"hello");
    assert_no_datagram(&bad);
}
