//! The event loop: sockets and timers.
//!
//! Each thread has its own edge-triggered epoll instance. A socket is registered once for its lifetime, waiting for it
//! costs no system call, and it is read or written only when it may be ready.

mod connect;
mod epoll;
mod socket;
mod timer;

pub use connect::ConnectError;
pub use epoll::{Interest, publish_socket_count, run, wake_all, wake_later, yield_now};
pub use socket::{ACCEPT_RETRY_DELAY, Io, accept};
pub use timer::{IdleTimer, sleep, sleep_until};
