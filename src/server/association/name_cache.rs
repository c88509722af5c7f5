//! Cache of the names that an association sends to. Datagrams wait while their name is resolved.

use std::collections::HashMap;
use std::future::Future;
use std::mem::take;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use crate::net::{DialError, Resolver, timeout_at};
use crate::proto::HostName;

/// Maximum number of cached names per association. At the limit, all are removed.
const MAX_CACHED_NAMES: usize = 256;
/// Maximum number of concurrent lookups per association.
const MAX_CONCURRENT_LOOKUPS: usize = 16;
/// Maximum size in bytes of the datagrams that wait for lookups, per association.
const MAX_WAITING_BYTES: usize = 128 * 1024;
/// Bytes added to the size of each waiting datagram, so that the number of empty ones is limited too.
const DATAGRAM_OVERHEAD: usize = 64;

/// A datagram to a name that is being resolved: port and payload.
pub(super) type WaitingDatagram = (u16, Vec<u8>);

/// The addresses of names, and the lookups of others.
#[derive(Default)]
pub(super) struct NameCache {
    names: HashMap<HostName, Vec<SocketAddr>>,
    lookups: Vec<Lookup>,
}

struct Lookup {
    name: HostName,
    addrs: Pin<Box<dyn Future<Output = Result<Vec<SocketAddr>, DialError>>>>,
    waiting: Vec<WaitingDatagram>,
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
        if let Some(addrs) = self.names.get(name) {
            return Some(addrs.iter().map(|addr| with_port(*addr, port)).collect());
        }
        let waiting = self.lookups.iter().flat_map(|lookup| &lookup.waiting);
        if waiting.map(|(_, data)| data.len() + DATAGRAM_OVERHEAD).sum::<usize>() + data.len() > MAX_WAITING_BYTES {
            return None;
        }
        let datagram = (port, data.to_vec());
        if let Some(lookup) = self.lookups.iter_mut().find(|lookup| lookup.name == *name) {
            lookup.waiting.push(datagram);
        } else if self.lookups.len() < MAX_CONCURRENT_LOOKUPS {
            let (resolver, name) = (resolver.clone(), name.clone());
            let lookup_name = name.clone();
            let addrs = Box::pin(async move {
                timeout_at(deadline, resolver.lookup(lookup_name.as_str(), port))
                    .await
                    .unwrap_or(Err(DialError::Resolver))
            });
            self.lookups.push(Lookup { name, addrs, waiting: vec![datagram] });
        }
        None
    }

    /// Polls the lookups. Returns the names resolved since the last call, with their waiting datagrams.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Vec<(HostName, Vec<WaitingDatagram>)> {
        let mut resolved = Vec::new();
        self.lookups.retain_mut(|lookup| {
            let Poll::Ready(result) = lookup.addrs.as_mut().poll(cx) else { return true };
            // Failures are not cached: the next datagram starts a new lookup. Waiting datagrams are dropped.
            if let Ok(addrs) = result {
                if self.names.len() >= MAX_CACHED_NAMES {
                    self.names.clear();
                }
                self.names.insert(lookup.name.clone(), addrs);
                resolved.push((lookup.name.clone(), take(&mut lookup.waiting)));
            }
            false
        });
        resolved
    }
}

fn with_port(mut addr: SocketAddr, port: u16) -> SocketAddr {
    addr.set_port(port);
    addr
}
