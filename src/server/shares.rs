//! Limited resources that clients share: how much of each is used at once, by all clients and by one client.
//!
//! A client at its limit waits or is refused; the other clients are not affected. Clients that wait take turns, so that
//! many requests of one client do not delay a request of another one.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smol::channel::{self, Sender};

/// The key that clients are counted by: an IPv4 address, or an IPv6 /64, which usually belongs to one customer. All
/// clients on Unix sockets have the same key.
// The bits of an IPv4 address, or those of the /64 inverted: no client has an address in ffff:ffff::/32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientKey(NonZeroU64);

impl ClientKey {
    /// `client` is `None` on a Unix socket.
    pub fn new(client: Option<IpAddr>) -> Self {
        let bits = match client.map(|ip| ip.to_canonical()) {
            None => 0,
            Some(IpAddr::V4(ip)) => ip.to_bits().into(),
            Some(IpAddr::V6(ip)) => !((ip.to_bits() >> 64) as u64),
        };
        // 0.0.0.0 is no address of a client either.
        Self(NonZeroU64::new(bits).unwrap_or(Self::UNIX))
    }

    const UNIX: NonZeroU64 = NonZeroU64::MIN;
}

/// The address or prefix, as `192.0.2.7` or `2001:db8::/64`.
impl fmt::Display for ClientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match u32::try_from(self.0.get()) {
            Ok(1) => f.write_str("unix"),
            Ok(bits) => Ipv4Addr::from_bits(bits).fmt(f),
            Err(_) => write!(f, "{}/64", Ipv6Addr::from_bits(u128::from(!self.0.get()) << 64)),
        }
    }
}

/// Number of uses above which a client has many: more than a person at a browser has.
const MANY: usize = 64;

/// Locks a value that no panic leaves invalid.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A limited resource, which clients share. Clones are the same resource.
#[derive(Clone, Debug)]
pub(super) struct Shares(Arc<Mutex<Usage>>);

#[derive(Debug)]
struct Usage {
    /// Maximum number of uses at once.
    limit: usize,
    /// Maximum number of uses of one client at once.
    per_client: usize,
    in_use: usize,
    /// The clients that use the resource or wait for it. `None`: those that are not known yet.
    clients: HashMap<Option<ClientKey>, ClientUsage>,
    /// The clients that wait, in the order of their turns.
    turns: BTreeMap<u64, Option<ClientKey>>,
    last_number: u64,
}

#[derive(Debug)]
struct ClientUsage {
    in_use: usize,
    /// Those of `in_use` that an [`ExtraGuard`] has.
    extra: usize,
    /// Key in `Usage::turns`.
    turn: u64,
    /// Requests that wait, oldest first.
    waiting: VecDeque<(u64, Sender<ShareGuard>)>,
}

/// One use of a resource, until it is dropped.
pub(super) struct ShareGuard {
    shares: Shares,
    /// `None`: not known yet.
    client: Option<ClientKey>,
}

/// A further use of a client. It is not counted for the limit of [`ShareGuard::assign`].
pub(super) struct ExtraGuard(Shares, ClientKey);

impl Shares {
    /// Limits the uses at once, of all clients and of each one. Both limits are at least 1.
    pub(super) fn new(limit: usize, per_client: usize) -> Self {
        let (clients, turns) = (HashMap::new(), BTreeMap::new());
        Self(Arc::new(Mutex::new(Usage { limit, per_client, in_use: 0, clients, turns, last_number: 0 })))
    }

    /// Returns `None` if the client or the resource is at its limit. A client that is `None` is not known yet.
    pub(super) fn try_acquire(&self, client: impl Into<Option<ClientKey>>) -> Option<ShareGuard> {
        let client = client.into();
        let is_acquired = self.usage().try_use(client);
        is_acquired.then(|| ShareGuard { shares: self.clone(), client })
    }

    /// Returns `None`, and uses nothing, if the client or the resource has fewer than `count` uses left.
    pub(super) fn try_acquire_extra(&self, client: ClientKey, count: usize) -> Option<Vec<ExtraGuard>> {
        let acquire = |_| {
            let mut usage = self.usage();
            let is_acquired = usage.try_use(Some(client));
            is_acquired.then(|| usage.entry(Some(client)).extra += 1).map(|()| ExtraGuard(self.clone(), client))
        };
        (0..count).map(acquire).collect()
    }

    /// Waits until neither the client nor the resource is at its limit, and it is the client's turn. The caller sets
    /// the deadline. Dropping the future gives up the place in the queue.
    pub(super) async fn acquire(&self, client: impl Into<Option<ClientKey>>) -> ShareGuard {
        let client = client.into();
        loop {
            let (sender, receiver) = channel::bounded(1);
            let number = self.usage().use_or_enqueue(client, sender);
            let Some(number) = number else { return ShareGuard { shares: self.clone(), client } };
            let _place = PlaceInQueue { shares: self, client, number };
            if let Ok(guard) = receiver.recv().await {
                return guard;
            }
        }
    }

    /// Ends a use, of which `extra` are extra ones, and grants it to a request that waits.
    fn release(&self, client: Option<ClientKey>, extra: usize) {
        let mut usage = self.usage();
        usage.entry(client).extra -= extra;
        let next = usage.release(client);
        drop(usage);
        if let Some((sender, client)) = next {
            let _ = sender.try_send(ShareGuard { shares: self.clone(), client });
        }
    }

    fn usage(&self) -> MutexGuard<'_, Usage> {
        lock(&self.0)
    }
}

impl Usage {
    fn has_room(&self, client: Option<ClientKey>) -> bool {
        let in_use = self.clients.get(&client).map_or(0, |client| client.in_use);
        self.in_use < self.limit && (client.is_none() || in_use < self.per_client)
    }

    fn entry(&mut self, client: Option<ClientKey>) -> &mut ClientUsage {
        let unused = || ClientUsage { in_use: 0, extra: 0, turn: 0, waiting: VecDeque::new() };
        self.clients.entry(client).or_insert_with(unused)
    }

    fn try_use(&mut self, client: Option<ClientKey>) -> bool {
        let has_room = self.has_room(client);
        if has_room {
            self.in_use += 1;
            self.entry(client).in_use += 1;
        }
        has_room
    }

    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Returns the number of the request in the queue of its client, or `None` if it need not wait: when there is room
    /// for it, no other request waits that could be granted.
    fn use_or_enqueue(&mut self, client: Option<ClientKey>, sender: Sender<ShareGuard>) -> Option<u64> {
        if self.try_use(client) {
            return None;
        }
        let number = self.next_number();
        let entry = self.entry(client);
        let is_first = entry.waiting.is_empty();
        entry.waiting.push_back((number, sender));
        if is_first {
            entry.turn = number;
            self.turns.insert(number, client);
        }
        Some(number)
    }

    /// Ends a use. Returns the request that can be granted now, and its client.
    fn release(&mut self, client: Option<ClientKey>) -> Option<(Sender<ShareGuard>, Option<ClientKey>)> {
        self.in_use -= 1;
        self.entry(client).in_use -= 1;
        self.update(client);
        // At most `limit / per_client` clients are at their limits and skipped.
        let next = self.turns.values().copied().find(|client| self.has_room(*client))?;
        self.try_use(next);
        let number = self.next_number();
        let entry = self.entry(next);
        let (_, sender) = entry.waiting.pop_front()?;
        // The next turn of the client is after those of all others.
        let turn = std::mem::replace(&mut entry.turn, number);
        self.turns.remove(&turn);
        self.turns.insert(number, next);
        self.update(next);
        Some((sender, next))
    }

    /// Removes a client that does not wait from the turns, and one without uses altogether.
    fn update(&mut self, client: Option<ClientKey>) {
        let Some(entry) = self.clients.get(&client).filter(|entry| entry.waiting.is_empty()) else { return };
        self.turns.remove(&entry.turn);
        if entry.in_use == 0 {
            self.clients.remove(&client);
        }
    }
}

impl ShareGuard {
    /// Returns true if the client has many uses.
    pub(super) fn has_many(&self) -> bool {
        self.shares.usage().clients.get(&self.client).is_some_and(|client| client.in_use - client.extra > MANY)
    }

    /// Makes a reservation a use of `client`. `limit` does not count extra uses; `per_client` does. Returns the limit that
    /// is reached.
    pub(super) fn assign(&mut self, client: ClientKey, limit: usize) -> Result<(), usize> {
        let client = Some(client);
        let mut usage = self.shares.usage();
        let (in_use, extra) = usage.clients.get(&client).map_or((0, 0), |entry| (entry.in_use, entry.extra));
        let limits = [(in_use - extra, limit), (in_use, usage.per_client)];
        if let Some((_, limit)) = limits.into_iter().find(|(used, limit)| used >= limit) {
            return Err(limit);
        }
        usage.entry(client).in_use += 1;
        usage.entry(self.client).in_use -= 1;
        usage.update(self.client);
        drop(usage);
        self.client = client;
        Ok(())
    }
}

/// The place of a request in the queue of its client.
struct PlaceInQueue<'a> {
    shares: &'a Shares,
    client: Option<ClientKey>,
    number: u64,
}

impl Drop for PlaceInQueue<'_> {
    fn drop(&mut self) {
        let mut usage = self.shares.usage();
        if let Some(entry) = usage.clients.get_mut(&self.client) {
            entry.waiting.retain(|(number, _)| *number != self.number);
        }
        usage.update(self.client);
    }
}

impl Drop for ShareGuard {
    fn drop(&mut self) {
        self.shares.release(self.client, 0);
    }
}

impl Drop for ExtraGuard {
    fn drop(&mut self) {
        self.0.release(Some(self.1), 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::{block_on, poll_once};

    use super::*;

    #[test]
    fn clients_that_wait_for_shares_take_turns_and_leave_nothing_behind() {
        let shares = Shares::new(2, 1);
        let [a, b, c] = [1, 2, 3].map(|n| ClientKey::new(Some(Ipv4Addr::from_bits(n).into())));
        let mut requests = [a, a, a, b, b].map(|client| Some(Box::pin(shares.acquire(client))));
        let (a, c) = (shares.try_acquire(a), shares.try_acquire(c));
        let mut poll = |i: usize| requests.get_mut(i).and_then(Option::as_mut).and_then(|r| block_on(poll_once(r)));
        assert!(a.is_some() && c.is_some() && (0..5).all(|i| poll(i).is_none()));
        drop(c);
        assert!(poll(0).is_none(), "a is at its limit");
        let b = poll(3).expect("b is next");
        drop(a);
        let a = poll(0).expect("a has room again");
        drop(b);
        assert!(poll(4).is_some());
        drop(a);
        // Granted to a request that is dropped without having noticed it.
        requests = requests.map(|_| None);
        assert!(requests.iter().all(Option::is_none));
        let usage = shares.usage();
        assert!(usage.in_use == 0 && usage.clients.is_empty() && usage.turns.is_empty());
    }

    #[test]
    fn client_key_is_the_ipv4_address_the_ipv6_prefix_or_unix() {
        let key = |ip: &str| ClientKey::new(ip.parse().ok()).to_string();
        let table = [("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("::1", "::/64"), ("", "unix")];
        table.into_iter().for_each(|(ip, expected)| assert_eq!(key(ip), expected));
        assert_eq!(key("2001:db8:0:1::7"), "2001:db8:0:1::/64");
    }
}
