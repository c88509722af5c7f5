//! Sockets and timers: the event loop, name resolution, connecting, relaying, batches of datagrams. Knows no SOCKS.

mod datagrams;
mod descriptors;
mod dial;
mod loop_waker;
mod outbound;
mod rate_limit;
pub mod reactor;
mod relay;
mod resolve;
mod socket;
mod stream;
mod threads;
mod timer;

pub(crate) use datagrams::{BatchSocket, GsoBatch, RecvBatch, share_port};
pub use datagrams::{DATAGRAM_BUFFER_SIZE, retry_refused};
pub use descriptors::{MAX_DESCRIPTORS, receive_descriptors, send_descriptors, take_descriptor};
pub use dial::{
    DialError, DialLimits, LimitGuard, LocalAddr, SHORT_KEEPALIVE_TIME, Unlimited, bind_error, connect_unix, dial,
    send_queue, set_keepalive, set_reset_after_delivery, set_tcp_options, shorten_keepalive, unspecified, with_scope,
};
pub use outbound::{OutboundOptions, bind_outbound, set_outbound_options};
pub use rate_limit::{RateLimit, TokenBucket};
pub use reactor::{Interest, wake_later, yield_now};
pub use relay::{
    ByteCounts, RELAY_BUFFER_SIZE, RelayError, RelayOp, RelayOptions, RelayOutcome, RelayResult, RelayStats, Side,
    UNDELIVERED_GRACE, relay,
};
pub use resolve::{canonical, lookup, parse_literal, service_port};
pub use socket::{ACCEPT_RETRY_DELAY, Io, accept};
pub use stream::{SocketOp, SocketPoll, Stream};
pub use threads::{ThreadPool, unblock};
pub use timer::{IdleTimer, sleep, sleep_until, timeout_at};
