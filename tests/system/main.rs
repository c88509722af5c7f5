//! Tests of a server among other programs (`make test-system`): they need root, several network namespaces, a booted
//! systemd, or more time than the other tests.

mod cluster;
mod package;
mod ports;
#[path = "../support/mod.rs"]
mod support;

use std::os::fd::AsFd as _;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use support::*;

/// Runs `work` on a thread in a network namespace. Sockets, threads and programs that it starts stay there.
fn in_network<T: Send>(path: &str, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let namespace = fs::File::open(path).expect("a network namespace");
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).expect("entered the network namespace");
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Returns true if a tunnel to the target still works.
fn is_open(tunnel: &mut TcpStream) -> bool {
    tunnel.write_all(b"x").is_ok() && tunnel.read_exact(&mut [0]).is_ok()
}
