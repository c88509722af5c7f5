//! The addresses of a name that datagrams are sent to: which one to use, and when to look the name up again. Time is an
//! argument.
//!
//! UDP has no handshake, so only an answer shows that an address works. After an ICMP error, or after a second without
//! an answer, the next address is used. An address that answers is kept.

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Time from the first unanswered datagram to an address to the use of the next address.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Time between two lookups of a name. Replaces [`ANSWER_TIMEOUT`] for an address that has answered: many protocols
/// send for some time without an answer.
pub const LOOKUP_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of addresses of a name that are tried. Further ones are ignored.
pub const MAX_ADDRS: usize = 16;
/// Maximum number of ports of a name with a state of their own. Above it, the oldest is forgotten.
const MAX_PORTS: usize = 8;

const _: () = assert!(MAX_ADDRS <= u16::BITS as usize, "PortState::failed has a bit for each address");

/// The addresses of one name.
#[derive(Debug)]
pub struct NameAddrs {
    /// The result of the last successful lookup. The families alternate, and the ports are not used.
    addrs: Vec<SocketAddr>,
    /// Start of the last lookup.
    pub(crate) looked_up: Instant,
    /// Oldest first. Each port has its own state: the services of a host need not listen on the same addresses.
    ports: Vec<PortState>,
}

#[derive(Debug)]
struct PortState {
    /// Address in use. A later lookup need not contain it.
    current: SocketAddr,
    has_answered: bool,
    /// Time of the first datagram to `current` after its last answer.
    unanswered_since: Option<Instant>,
    /// Addresses with an error since the last lookup, as bits of their indexes. They are used again when all have failed.
    failed: u16,
}

impl NameAddrs {
    /// `addrs` is the result of a lookup that has started at `now`.
    pub fn new(now: Instant, addrs: &[SocketAddr]) -> Self {
        Self { addrs: alternate_families(addrs), looked_up: now, ports: Vec::new() }
    }

    /// Returns the address for a datagram to `port` that is sent now; `None` if the name has no address.
    pub fn select(&mut self, now: Instant, port: u16) -> Option<SocketAddr> {
        let state = match self.ports.iter().position(|state| state.current.port() == port) {
            Some(i) => self.ports.get_mut(i)?,
            None => {
                let mut current = *self.addrs.first()?;
                current.set_port(port);
                if self.ports.len() >= MAX_PORTS {
                    self.ports.remove(0);
                }
                self.ports.push(PortState { current, has_answered: false, unanswered_since: None, failed: 0 });
                self.ports.last_mut()?
            }
        };
        let is_trusted = state.has_answered && position(&self.addrs, state.current.ip()).is_some();
        let timeout = if is_trusted { LOOKUP_INTERVAL } else { ANSWER_TIMEOUT };
        if state.unanswered_since.is_some_and(|since| now.saturating_duration_since(since) >= timeout) {
            state.advance(&self.addrs);
        }
        state.unanswered_since.get_or_insert(now);
        Some(state.current)
    }

    /// Records that a datagram to `addr` was not delivered. Returns false if all addresses have failed; otherwise
    /// [`NameAddrs::select`] returns another one.
    pub fn fail(&mut self, addr: SocketAddr) -> bool {
        let Some(state) = self.ports.iter_mut().find(|state| state.current.port() == addr.port()) else { return false };
        state.failed |= position(&self.addrs, addr.ip()).map_or(0, |i| 1 << i);
        state.current.ip() != addr.ip() || state.advance(&self.addrs)
    }

    /// Returns true if a datagram to `addr` may have to be sent again to another address, after an error.
    pub fn is_uncertain(&self, addr: SocketAddr) -> bool {
        let state = self.ports.iter().find(|state| state.current == addr);
        self.addrs.len() > 1 && state.is_some_and(|state| !state.has_answered)
    }

    /// Records an answer. It may be late, and its port may differ from the one that was sent to, as with TFTP.
    pub fn on_answer(&mut self, from: SocketAddr) {
        let is_known_port = self.ports.iter().any(|state| state.current.port() == from.port());
        let listed = self.addrs.iter().find(|addr| addr.ip() == from.ip());
        for state in self.ports.iter_mut().filter(|state| !is_known_port || state.current.port() == from.port()) {
            if let Some(addr) = listed.filter(|_| !state.has_answered) {
                state.current = with_port(*addr, state.current.port());
            }
            if state.current.ip() == from.ip() {
                (state.has_answered, state.unanswered_since) = (true, None);
                state.failed &= !position(&self.addrs, from.ip()).map_or(0, |i| 1 << i);
            }
        }
    }

    /// Returns true if `ip` is an address of the name, or is still in use.
    pub fn contains(&self, ip: IpAddr) -> bool {
        position(&self.addrs, ip).is_some() || self.ports.iter().any(|state| state.current.ip() == ip)
    }

    /// Returns true if the caller must look the name up and call [`NameAddrs::update`]; at most once per
    /// [`LOOKUP_INTERVAL`].
    pub fn start_lookup(&mut self, now: Instant) -> bool {
        let is_due = now.saturating_duration_since(self.looked_up) >= LOOKUP_INTERVAL;
        if is_due {
            self.looked_up = now;
            self.ports.iter_mut().for_each(|state| state.failed = 0);
        }
        is_due
    }

    /// Replaces the addresses by the result of a lookup. An address that is no longer among them is used only while it
    /// answers: the flow of a client would not survive a change of the address.
    pub fn update(&mut self, addrs: &[SocketAddr]) {
        if addrs.is_empty() {
            return;
        }
        self.addrs = alternate_families(addrs);
        for state in &mut self.ports {
            state.failed = 0;
            if !state.has_answered && position(&self.addrs, state.current.ip()).is_none() {
                state.advance(&self.addrs);
            }
        }
    }
}

impl PortState {
    /// Selects the next address that has not failed. If all have, forgets that, selects the next one and returns false.
    fn advance(&mut self, addrs: &[SocketAddr]) -> bool {
        let next = position(addrs, self.current.ip()).map_or(0, |i| i + 1);
        let mut order = addrs.iter().enumerate().cycle().skip(next).take(addrs.len());
        let working = order.clone().find(|(i, _)| self.failed & 1 << i == 0);
        if working.is_none() {
            self.failed = 0;
        }
        if let Some((_, addr)) = working.or_else(|| order.next()) {
            self.current = with_port(*addr, self.current.port());
        }
        (self.has_answered, self.unanswered_since) = (false, None);
        working.is_some()
    }
}

fn position(addrs: &[SocketAddr], ip: IpAddr) -> Option<usize> {
    addrs.iter().position(|addr| addr.ip() == ip)
}

fn with_port(mut addr: SocketAddr, port: u16) -> SocketAddr {
    addr.set_port(port);
    addr
}

/// Alternates the families, starting with the first one, and keeps the order within each (RFC 8305 section 4). So a
/// family without a route costs one second and not one for each address. Returns at most [`MAX_ADDRS`].
pub fn alternate_families(addrs: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_first_family = |addr: &&SocketAddr| addrs.first().is_some_and(|first| first.is_ipv4() == addr.is_ipv4());
    let (mut first, mut second) =
        (addrs.iter().filter(is_first_family), addrs.iter().filter(|addr| !is_first_family(addr)));
    let mut mixed = Vec::new();
    while mixed.len() < addrs.len().min(MAX_ADDRS) {
        mixed.extend(first.next().into_iter().chain(second.next()));
    }
    mixed.truncate(MAX_ADDRS);
    mixed
}
