//! Cache of the names that an association sends to. Datagrams wait while their name is resolved. A lookup that repeats
//! an earlier one runs in the background.

use std::collections::HashMap;
use std::future::Future;
use std::mem::take;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::super::limiter::DialShares;
use crate::name_addrs::NameAddrs;
use crate::net::{DialError, lookup, timeout_at};
use crate::proto::HostName;

/// Maximum number of cached names per association. The one with the oldest lookup is removed first. A name takes up to
/// 1.5 KiB.
const MAX_CACHED_NAMES: usize = 32;
/// Maximum number of concurrent lookups per association.
const MAX_CONCURRENT_LOOKUPS: usize = 16;
/// Maximum size in bytes of the datagrams that wait for lookups, per association.
const MAX_WAITING_BYTES: usize = 128 * 1024;
/// Bytes added to the size of each waiting datagram, so that the number of empty ones is limited too.
const DATAGRAM_OVERHEAD: usize = 64;

/// A datagram to a name that is being resolved: port and payload.
pub(super) type WaitingDatagram = (u16, Vec<u8>);

/// A name whose lookup has ended, and the datagrams that waited for it.
pub(super) struct Resolved {
    pub(super) name: HostName,
    pub(super) result: Result<Vec<SocketAddr>, DialError>,
    pub(super) waiting: Vec<WaitingDatagram>,
}

/// The addresses of names, and the lookups.
pub(super) struct NameCache {
    limits: DialShares,
    /// Time limit of a lookup.
    timeout: Duration,
    names: HashMap<HostName, NameAddrs>,
    lookups: Vec<Lookup>,
    /// The last datagram to an address that has not answered.
    unanswered: Option<(SocketAddr, HostName, Vec<u8>)>,
}

struct Lookup {
    name: HostName,
    started: Instant,
    addrs: Pin<Box<dyn Future<Output = Result<Vec<SocketAddr>, DialError>>>>,
    waiting: Vec<WaitingDatagram>,
}

impl NameCache {
    pub(super) fn new(limits: DialShares, timeout: Duration) -> Self {
        Self { limits, timeout, names: HashMap::new(), lookups: Vec::new(), unanswered: None }
    }

    /// Returns the address to send a datagram to, if the name is resolved.
    pub(super) fn select(&mut self, now: Instant, name: &HostName, port: u16) -> Option<SocketAddr> {
        let addrs = self.names.get_mut(name)?;
        let (selected, is_lookup_due) = (addrs.select(now, port), addrs.start_lookup(now));
        if is_lookup_due {
            self.look_up(now, name);
        }
        selected
    }

    /// Stores a datagram until its name is resolved. Returns false above a limit: the caller drops the datagram.
    pub(super) fn wait(&mut self, now: Instant, name: &HostName, port: u16, data: &[u8]) -> bool {
        let waiting = self.lookups.iter().flat_map(|lookup| &lookup.waiting);
        let size: usize = waiting.map(|(_, data)| data.len() + DATAGRAM_OVERHEAD).sum();
        if size + data.len() <= MAX_WAITING_BYTES
            && let Some(lookup) = self.look_up(now, name)
        {
            lookup.waiting.push((port, data.to_vec()));
            return true;
        }
        false
    }

    /// Records that a datagram was not delivered. Returns false if all addresses of the name have failed.
    pub(super) fn fail(&mut self, name: &HostName, addr: SocketAddr) -> bool {
        self.names.get_mut(name).is_some_and(|addrs| addrs.fail(addr))
    }

    /// Records that a datagram was sent. Keeps it if it may have to be sent again.
    pub(super) fn on_sent(&mut self, name: &HostName, addr: SocketAddr, data: &[u8]) {
        let is_uncertain = self.names.get(name).is_some_and(|addrs| addrs.is_uncertain(addr));
        self.unanswered = is_uncertain.then(|| (addr, name.clone(), data.to_vec()));
    }

    /// Records an ICMP error. Returns a datagram to send to another address of its name: it has not been delivered.
    pub(super) fn on_unreachable(&mut self, name: &HostName, addr: SocketAddr) -> Option<(HostName, Vec<u8>)> {
        if !self.fail(name, addr) {
            return None;
        }
        self.unanswered.take_if(|(to, ..)| *to == addr).map(|(_, name, data)| (name, data))
    }

    pub(super) fn on_answer(&mut self, name: &HostName, from: SocketAddr) {
        if let Some(addrs) = self.names.get_mut(name) {
            addrs.on_answer(from);
        }
    }

    /// Returns the lookup of a name, which it starts if there is none. `None`: too many others are running.
    fn look_up(&mut self, now: Instant, name: &HostName) -> Option<&mut Lookup> {
        if let Some(i) = self.lookups.iter().position(|lookup| lookup.name == *name) {
            return self.lookups.get_mut(i);
        }
        if self.lookups.len() >= MAX_CONCURRENT_LOOKUPS {
            return None;
        }
        let (limits, lookup_name, deadline) = (self.limits.clone(), name.clone(), now + self.timeout);
        let addrs = Box::pin(async move {
            let found = timeout_at(deadline, lookup(lookup_name.as_str(), 0, &limits)).await;
            found.unwrap_or(Err(DialError::Resolver))
        });
        self.lookups.push(Lookup { name: name.clone(), started: now, addrs, waiting: Vec::new() });
        self.lookups.last_mut()
    }

    /// Polls the lookups. Returns those that have ended since the last call.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Vec<Resolved> {
        let mut resolved = Vec::new();
        self.lookups.retain_mut(|lookup| {
            let Poll::Ready(result) = lookup.addrs.as_mut().poll(cx) else { return true };
            match (&result, self.names.get_mut(&lookup.name)) {
                (Ok(addrs), Some(known)) => known.update(addrs),
                (Ok(addrs), None) => {
                    let oldest = self.names.iter().min_by_key(|(_, addrs)| addrs.looked_up);
                    if let Some(oldest) = oldest.filter(|_| self.names.len() >= MAX_CACHED_NAMES) {
                        let oldest = oldest.0.clone();
                        self.names.remove(&oldest);
                    }
                    self.names.insert(lookup.name.clone(), NameAddrs::new(lookup.started, addrs));
                }
                // Failures are not cached: the next datagram starts a new lookup. After a failure in the background,
                // the known addresses stay.
                (Err(_), _) => {}
            }
            let (name, waiting) = (lookup.name.clone(), take(&mut lookup.waiting));
            resolved.push(Resolved { name, result, waiting });
            false
        });
        resolved
    }
}
