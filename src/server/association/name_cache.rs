//! Cache of the names that an association sends to. Datagrams wait while their name is resolved.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use crate::net::{DialError, Resolver, timeout_at};
use crate::proto::HostName;

/// Maximum number of cached names per association. At the limit, all resolved names are removed.
const MAX_CACHED_NAMES: usize = 256;
/// Maximum number of concurrent lookups per association.
const MAX_CONCURRENT_LOOKUPS: usize = 16;
/// Maximum size in bytes of the datagrams that wait for lookups, per association.
const MAX_WAITING_BYTES: usize = 128 * 1024;
/// Bytes added to the size of each waiting datagram, so that the number of empty ones is limited too.
const DATAGRAM_OVERHEAD: usize = 64;

/// A datagram to a name that is being resolved: port and payload.
pub(super) type WaitingDatagram = (u16, Vec<u8>);

/// Names with their addresses or waiting datagrams.
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
    /// Returns the addresses of a resolved name, with `port`. Otherwise stores the datagram for [`NameCache::poll`] and
    /// starts a lookup, unless one is running. Above a limit the datagram is dropped.
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
                let (resolver, lookup_name) = (resolver.clone(), name.clone());
                let lookup = async move {
                    timeout_at(deadline, resolver.lookup(lookup_name.as_str(), port))
                        .await
                        .unwrap_or(Err(DialError::Resolver))
                };
                self.lookups.push((name.clone(), Box::pin(lookup)));
                self.names.insert(name.clone(), Resolution::Pending(vec![(port, data.to_vec())]));
            }
            Some(Resolution::Pending(_)) | None => {}
        }
        None
    }

    fn waiting_bytes(&self) -> usize {
        let waiting = self.lookups.iter().filter_map(|(name, _)| match self.names.get(name) {
            Some(Resolution::Pending(waiting)) => Some(waiting),
            _ => None,
        });
        waiting.flatten().map(|(_, data)| data.len() + DATAGRAM_OVERHEAD).sum()
    }

    /// Polls the lookups. Returns the names resolved since the last call, with their waiting datagrams.
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
            // Failures are not cached: the next datagram starts a new lookup. Waiting datagrams are dropped.
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
