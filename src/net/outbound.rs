//! Options of all sockets to targets, peers and upstream proxies: the interface and the mark of their packets, and which
//! addresses of a name are used first. They are the same for the whole process, and set once.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use socket2::{Domain, SockRef, Socket, Type};

static OPTIONS: OnceLock<OutboundOptions> = OnceLock::new();

/// The options. By default, the system decides.
#[derive(Clone, Debug, Default)]
pub struct OutboundOptions {
    /// Name of the only interface to use (SO_BINDTODEVICE).
    pub interface: Option<String>,
    /// Mark of the packets (SO_MARK).
    pub mark: Option<u32>,
    /// `Some(true)`: the IPv4 addresses of a name are first. `Some(false)`: the IPv6 addresses.
    pub prefers_ipv4: Option<bool>,
}

impl OutboundOptions {
    /// Applies the options to all sockets from now on. Only the first call of a process has an effect.
    pub fn set_for_process(self) {
        let _ = OPTIONS.set(self);
    }
}

/// Returns the name of the only interface to use, for messages.
pub(super) fn interface() -> &'static str {
    OPTIONS.get().and_then(|options| options.interface.as_deref()).unwrap_or_default()
}

/// Returns the end of a message about a source address. Only a server has options here.
pub(super) fn source_hint() -> &'static str {
    OPTIONS.get().map_or("", |_| " (set by --outbound, or outbound= of a rule)")
}

/// Sets interface and mark of a socket before it is bound or connected.
pub fn set_outbound_options(socket: &impl AsFd) -> io::Result<()> {
    let Some(OutboundOptions { interface, mark, .. }) = OPTIONS.get() else { return Ok(()) };
    let socket = SockRef::from(socket);
    if let Some(name) = interface {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("--outbound-interface {name}: {error}"));
        socket.bind_device(Some(name.as_bytes())).map_err(named)?;
    }
    mark.map_or(Ok(()), |mark| socket.set_mark(mark))
}

/// Binds a socket for datagrams to a target or a proxy.
pub fn bind_outbound(local: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM, None)?;
    set_outbound_options(&socket)?;
    socket.bind(&local.into())?;
    Ok(socket.into())
}

/// Moves the addresses of the preferred family to the front, and keeps the order within each family.
// Not by a stable sort, which takes 4 KB of code.
pub(super) fn sort_by_preference(addrs: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(prefers_ipv4) = OPTIONS.get().and_then(|options| options.prefers_ipv4) else { return addrs };
    let (mut sorted, others): (Vec<_>, Vec<_>) = addrs.into_iter().partition(|addr| addr.is_ipv4() == prefers_ipv4);
    sorted.extend(others);
    sorted
}
