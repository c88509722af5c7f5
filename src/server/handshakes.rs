//! The unfinished handshakes: sessions from accept to their requests. At the limit, a new connection ends the oldest
//! handshake of the client that has most of them. So a flood from one client ends only its own handshakes. Those whose
//! client is not known yet, behind a load balancer, count as those of one client. The connections of `--metrics` are
//! limited in the same way.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use super::shares::{ClientKey, lock};

/// All unfinished handshakes, or all connections of `--metrics`.
pub(super) struct Handshakes {
    limit: usize,
    unfinished: Arc<Mutex<Unfinished>>,
}

#[derive(Default)]
struct Unfinished {
    /// By number. The waker of the task is set while it waits.
    handshakes: HashMap<u64, (Option<ClientKey>, Option<Waker>)>,
    /// The numbers of each client, in the order of their start.
    clients: HashMap<Option<ClientKey>, BTreeSet<u64>>,
    /// The clients in the order in which they keep their handshakes: the last one has most of them, or else the oldest.
    ranks: BTreeSet<(usize, Reverse<u64>, Option<ClientKey>)>,
    last_number: u64,
}

/// One unfinished handshake until it is dropped.
pub(super) struct HandshakeGuard {
    unfinished: Arc<Mutex<Unfinished>>,
    number: u64,
}

impl Handshakes {
    /// `limit` is the maximum number of unfinished handshakes; 0 is the same as 1.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), unfinished: Arc::default() }
    }

    /// Adds a handshake, after ending another one if there are too many. `client` is `None` if it is not known yet.
    pub(super) fn begin(&self, client: Option<ClientKey>) -> HandshakeGuard {
        let mut unfinished = lock(&self.unfinished);
        let ended = unfinished.end_one_of(self.limit);
        let number = unfinished.begin(client);
        drop(unfinished);
        ended.into_iter().for_each(Waker::wake);
        HandshakeGuard { unfinished: self.unfinished.clone(), number }
    }

    /// Returns the number of the latest handshake.
    pub(super) fn latest(&self) -> u64 {
        lock(&self.unfinished).last_number
    }

    /// Ends a handshake if the limit is reached. Returns false, and ends none, if another one has begun after `latest`:
    /// it may be that of the connection that needed room.
    pub(super) fn make_room(&self, latest: u64) -> bool {
        let mut unfinished = lock(&self.unfinished);
        if unfinished.last_number != latest {
            return false;
        }
        let ended = unfinished.end_one_of(self.limit);
        drop(unfinished);
        ended.into_iter().for_each(Waker::wake);
        true
    }
}

impl Unfinished {
    fn begin(&mut self, client: Option<ClientKey>) -> u64 {
        self.last_number += 1;
        let number = self.last_number;
        self.handshakes.insert(number, (client, None));
        self.change(client, |numbers| numbers.insert(number));
        number
    }

    /// Ends a handshake if there are `limit`. Returns the waker of its task.
    fn end_one_of(&mut self, limit: usize) -> Option<Waker> {
        let (_, Reverse(number), _) = *self.ranks.last().filter(|_| self.handshakes.len() >= limit)?;
        self.remove(number)
    }

    fn remove(&mut self, number: u64) -> Option<Waker> {
        let (client, waker) = self.handshakes.remove(&number)?;
        self.change(client, |numbers| numbers.remove(&number));
        waker
    }

    /// Changes the numbers of a client, and then its rank.
    fn change(&mut self, client: Option<ClientKey>, change: impl FnOnce(&mut BTreeSet<u64>) -> bool) {
        let numbers = self.clients.entry(client).or_default();
        let rank = |numbers: &BTreeSet<u64>| Some((numbers.len(), Reverse(*numbers.first()?), client));
        rank(numbers).map(|rank| self.ranks.remove(&rank));
        change(numbers);
        match rank(numbers) {
            Some(rank) => drop(self.ranks.insert(rank)),
            None => drop(self.clients.remove(&client)),
        }
    }
}

impl HandshakeGuard {
    /// Counts the handshake against its client, which is known now.
    pub(super) fn assign(&self, client: ClientKey) {
        let mut unfinished = lock(&self.unfinished);
        let Some((counted, _)) = unfinished.handshakes.get_mut(&self.number) else { return };
        let unknown = counted.replace(client);
        unfinished.change(unknown, |numbers| numbers.remove(&self.number));
        unfinished.change(Some(client), |numbers| numbers.insert(self.number));
    }

    /// Waits until the handshake has to end for a new connection.
    pub(super) async fn wait_ended(&self) {
        poll_fn(|cx| self.poll_ended(cx)).await;
    }

    fn poll_ended(&self, cx: &Context<'_>) -> Poll<()> {
        let mut unfinished = lock(&self.unfinished);
        let Some((_, waker)) = unfinished.handshakes.get_mut(&self.number) else { return Poll::Ready(()) };
        let is_known = waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        let old = if is_known { None } else { waker.replace(cx.waker().clone()) };
        drop(unfinished);
        drop(old);
        Poll::Pending
    }
}

impl Drop for HandshakeGuard {
    fn drop(&mut self) {
        // Dropped after the lock is released, because that can drop a task and its guard.
        let waker = lock(&self.unfinished).remove(self.number);
        drop(waker);
    }
}
