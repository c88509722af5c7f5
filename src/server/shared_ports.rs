//! The UDP port that all associations share (`--udp-ports` with a single port).
//!
//! Each association has a socket that is bound to the port and connected to its client, so the kernel delivers the
//! client's datagrams to it. Datagrams from a port of a client that no association has yet are received by one more
//! socket for each client address. They are handed over to an association of this address that waits for a port, the
//! oldest one first, or else to one whose port is silent. With GSSAPI, they are handed over to these in turn, at most
//! 16, until one can unwrap them. If none can, the next datagrams are handed over to others.

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures_lite::stream::Stream as _;
use smol::channel::{self, Receiver, Sender};

use super::local_addr::with_port;
use super::shares::{ExtraGuard, lock};
use super::worker::{self, Priority};
use crate::net::{BatchSocket, RecvBatch, share_port};
use crate::proto::{Datagram, Frame};

/// Datagrams that are received before other tasks run.
const MAX_DATAGRAMS_PER_TURN: usize = 64;
/// Datagrams that wait for an association until it has connected its socket to their port. More are dropped.
const MAX_HANDED_OVER: usize = 32;
/// Associations with GSSAPI that try to unwrap one datagram: any host can send a forged one.
const MAX_TRIED: usize = 16;

thread_local! {
    /// Buffer for received datagrams, which all groups of a thread share.
    static RECEIVED: RefCell<RecvBatch> = RefCell::default();
}

/// The clients of all shared ports.
#[derive(Default)]
pub(super) struct SharedPorts {
    groups: Mutex<HashMap<GroupKey, Group>>,
    is_replaced: AtomicBool,
}

/// A datagram with its sender.
type Received = (SocketAddr, Vec<u8>);

/// The local address, and the client's IP address.
type GroupKey = (SocketAddr, IpAddr);

/// The associations of one client address, oldest first.
#[derive(Default)]
struct Group {
    members: Vec<Arc<Member>>,
    /// Index of the first member that tries to unwrap datagrams.
    first: usize,
    /// The task of the group ends when this is dropped. The guards are for its descriptor, counted against the client of
    /// the association that has started it.
    task: Option<(Sender<Infallible>, Vec<ExtraGuard>)>,
}

/// The part of an association that the task of its group uses.
pub(super) struct Member {
    is_protected: bool,
    /// The client's port. 0: not known yet.
    port: AtomicU16,
    /// Set while datagrams from other ports are accepted too.
    accepts_other_ports: AtomicBool,
    handed_over: Sender<Received>,
}

/// An association in its group. Dropping it ends the membership.
pub(super) struct Membership {
    ports: Arc<SharedPorts>,
    key: GroupKey,
    member: Arc<Member>,
    handed_over: Pin<Box<Receiver<Received>>>,
}

impl SharedPorts {
    /// Adds an association of a client that has connected to `local`. Port 0 of `client`: not known yet. `count_socket`
    /// counts the socket of a new group.
    pub(super) fn join(
        self: &Arc<Self>,
        local: SocketAddr,
        client: SocketAddr,
        is_protected: bool,
        count_socket: impl FnOnce() -> io::Result<Vec<ExtraGuard>>,
    ) -> io::Result<Membership> {
        let (sender, receiver) = channel::bounded(MAX_HANDED_OVER);
        let member = Arc::new(Member {
            is_protected,
            port: client.port().into(),
            accepts_other_ports: AtomicBool::new(client.port() == 0),
            handed_over: sender,
        });
        let key = (local, client.ip());
        let mut groups = lock(&self.groups);
        if groups.get(&key).is_none_or(|group| group.task.is_none()) {
            let (shares, socket) = (count_socket()?, BatchSocket::bind(local, share_port)?);
            // Filters by address only. Sockets that are connected to a port take precedence.
            socket.get_ref().connect(with_port(client, 0))?;
            let (is_used, receiver) = channel::bounded(1);
            groups.entry(key).or_default().task = Some((is_used, shares));
            worker::spawn_boxed(Priority::Normal, self.clone().run_group(key, socket, receiver));
        }
        let group = groups.entry(key).or_default();
        group.members.push(member.clone());
        self.on_change(group);
        drop(groups);
        Ok(Membership { ports: self.clone(), key, member, handed_over: Box::pin(receiver) })
    }

    /// Leaves datagrams from new ports to the process that replaces this one, except while an association of their client
    /// waits for its first one.
    pub(super) fn on_replaced(&self) {
        self.is_replaced.store(true, Ordering::Relaxed);
        lock(&self.groups).values_mut().for_each(|group| self.on_change(group));
    }

    fn on_change(&self, group: &mut Group) {
        let has_port = |member: &Arc<Member>| member.port.load(Ordering::Relaxed) != 0;
        if self.is_replaced.load(Ordering::Relaxed) && group.members.iter().all(has_port) {
            group.task = None;
        }
    }

    /// Hands datagrams over until the group has no members. At the end, those that the socket still has go to a new group
    /// of the same client.
    async fn run_group(self: Arc<Self>, key: GroupKey, socket: BatchSocket, is_used: Receiver<Infallible>) {
        let mut is_used = Box::pin(is_used);
        poll_fn(|cx| {
            RECEIVED.with_borrow_mut(|received| {
                let mut budget = MAX_DATAGRAMS_PER_TURN;
                while socket.poll_receive(cx, received, &mut budget) {
                    for (from, bytes) in received.datagrams() {
                        let _ = self.hand_over(key, from, bytes, None);
                    }
                }
            });
            is_used.as_mut().poll_next(cx).map(drop)
        })
        .await;
    }

    /// Hands a datagram over to an association. An unprotected one gets the port of the datagram. Protected ones are
    /// tried in turn, up to a limit, because only unwrapping shows whose datagram it is. `tried` has just failed.
    /// Returns false if there is none to try.
    fn hand_over(&self, key: GroupKey, from: SocketAddr, bytes: &[u8], tried: Option<&Arc<Member>>) -> bool {
        let is_protected = Frame::datagram_token(&mut bytes.to_vec()).is_some();
        if from.ip() != key.1 || !is_protected && Datagram::decode(bytes).is_err() {
            return false;
        }
        let mut groups = lock(&self.groups);
        let Some(Group { members, first, .. }) = groups.get_mut(&key) else { return false };
        let (start, limit) = if is_protected { (*first, MAX_TRIED) } else { (0, usize::MAX) };
        let (before, after) = members.split_at(start.min(members.len()));
        let is_tried = |member: &Arc<Member>| tried.is_some_and(|tried| Arc::ptr_eq(member, tried));
        let candidates = after.iter().chain(before).filter(|member| member.is_protected == is_protected);
        let rank = |member: &Member| member.rank(from.port());
        let mut candidates = candidates.filter(|member| is_tried(member) || rank(member).is_some()).take(limit);
        let untried = candidates.clone().skip_while(|member| tried.is_some() && !is_tried(member));
        let usable = untried.filter(|member| !(is_tried(member) || is_protected && member.handed_over.is_full()));
        let Some(member) = usable.min_by_key(|member| rank(member)) else {
            if candidates.nth(MAX_TRIED - 1).is_some_and(is_tried) {
                *first = members.iter().position(is_tried).map_or(0, |index| index + 1);
            }
            return false;
        };
        if !is_protected {
            member.set_port(from.port(), false);
        }
        member.handed_over.try_send((from, bytes.to_vec())).is_ok()
    }
}

impl Member {
    /// Returns how well the association fits to a datagram from this port, lower is better; `None`: not at all.
    fn rank(&self, port: u16) -> Option<u8> {
        let rank = match self.port.load(Ordering::Relaxed) {
            current if current == port => 0,
            0 => 1,
            _ if self.accepts_other_ports.load(Ordering::Relaxed) => 2,
            _ => return None,
        };
        Some(if self.is_protected { 0 } else { rank })
    }

    fn set_port(&self, port: u16, accepts_other_ports: bool) {
        self.port.store(port, Ordering::Relaxed);
        self.accepts_other_ports.store(accepts_other_ports, Ordering::Relaxed);
    }
}

impl Membership {
    /// Sets the port of the client, and whether other ports of the client may replace it.
    pub(super) fn set_port(&self, port: u16, accepts_other_ports: bool) {
        self.member.set_port(port, accepts_other_ports);
        lock(&self.ports.groups).get_mut(&self.key).into_iter().for_each(|group| self.ports.on_change(group));
    }

    /// Hands a datagram that this association cannot unwrap over to the next one. Returns false if there is none.
    pub(super) fn pass_on(&self, from: SocketAddr, bytes: &[u8]) -> bool {
        self.ports.hand_over(self.key, from, bytes, Some(&self.member))
    }

    /// Returns the next datagram that was handed over.
    pub(super) fn poll_handed_over(&mut self, cx: &mut Context<'_>) -> Option<Received> {
        match self.handed_over.as_mut().poll_next(cx) {
            Poll::Ready(datagram) => datagram,
            Poll::Pending => None,
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut groups = lock(&self.ports.groups);
        let Some(group) = groups.get_mut(&self.key) else { return };
        group.members.retain(|member| !Arc::ptr_eq(member, &self.member));
        self.ports.on_change(group);
        if group.members.is_empty() {
            groups.remove(&self.key);
        }
    }
}
