//! The names that an association sends to: looked up once, while the datagrams for them wait.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use crate::conn::timeout_at;
use crate::dial::{DialError, Resolver};
use crate::proto::{Addr, Host, HostName};

/// How many names an association remembers the addresses of; then it begins anew.
const MAX_CACHED_NAMES: usize = 256;
/// How many names an association may be looking up at once.
const MAX_CONCURRENT_LOOKUPS: usize = 16;
/// How many octets may wait for look-ups in an association.
const MAX_WAITING_BYTES: usize = 128 * 1024;
/// What a datagram that waits counts for beyond its payload, in octets.
const DATAGRAM_OVERHEAD: usize = 64;

/// A datagram that waits for a name: port and payload.
pub(super) type WaitingDatagram = (u16, Vec<u8>);

/// What is known of names.
#[derive(Default)]
pub(super) struct NameCache {
    names: HashMap<HostName, Resolution>,
    lookups: Vec<(HostName, Lookup)>,
}

type Lookup = Pin<Box<dyn Future<Output = Result<Vec<SocketAddr>, DialError>>>>;

enum Resolution {
    Pending(Vec<WaitingDatagram>),
    Resolved(Vec<SocketAddr>),
}

impl NameCache {
    /// The addresses of a name, with that port. When they are not known, the datagram waits for them, or is dropped
    /// where too much does so already.
    pub(super) fn get_or_wait(
        &mut self,
        name: &HostName,
        port: u16,
        data: &[u8],
        resolver: &Resolver,
        deadline: Instant,
    ) -> Option<Vec<SocketAddr>> {
        let has_room = self.waiting_bytes() + data.len() <= MAX_WAITING_BYTES;
        match self.names.get_mut(name) {
            Some(Resolution::Resolved(addrs)) => {
                return Some(addrs.iter().map(|addr| with_port(*addr, port)).collect());
            }
            Some(Resolution::Pending(waiting)) if has_room => waiting.push((port, data.to_vec())),
            None if has_room && self.lookups.len() < MAX_CONCURRENT_LOOKUPS => {
                if self.names.len() >= MAX_CACHED_NAMES {
                    self.names.retain(|_, resolution| matches!(resolution, Resolution::Pending(_)));
                }
                let (resolver, dst) = (resolver.clone(), Addr { host: Host::Name(name.clone()), port });
                let lookup = async move {
                    timeout_at(deadline, resolver.lookup(&dst)).await.unwrap_or(Err(DialError::Resolver))
                };
                self.lookups.push((name.clone(), Box::pin(lookup)));
                self.names.insert(name.clone(), Resolution::Pending(vec![(port, data.to_vec())]));
            }
            Some(Resolution::Pending(_)) | None => {}
        }
        None
    }

    /// How many octets wait for look-ups, each datagram counted as somewhat more than it has.
    fn waiting_bytes(&self) -> usize {
        let waiting = self.lookups.iter().filter_map(|(name, _)| match self.names.get(name) {
            Some(Resolution::Pending(waiting)) => Some(waiting),
            _ => None,
        });
        waiting.flatten().map(|(_, data)| data.len() + DATAGRAM_OVERHEAD).sum()
    }

    /// The names that are known now, and what has waited for them.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Vec<(HostName, Vec<WaitingDatagram>)> {
        let mut finished = Vec::new();
        self.lookups.retain_mut(|(name, lookup)| match lookup.as_mut().poll(cx) {
            Poll::Ready(result) => {
                finished.push((name.clone(), result));
                false
            }
            Poll::Pending => true,
        });
        let mut resolved = Vec::new();
        for (name, result) in finished {
            // A name that failed is forgotten, so that the next datagram asks again.
            let waiting = self.names.remove(&name);
            let Ok(addrs) = result else { continue };
            self.names.insert(name.clone(), Resolution::Resolved(addrs));
            if let Some(Resolution::Pending(waiting)) = waiting {
                resolved.push((name, waiting));
            }
        }
        resolved
    }
}

fn with_port(mut addr: SocketAddr, port: u16) -> SocketAddr {
    addr.set_port(port);
    addr
}
