//! UDP ASSOCIATE (RFC 1928 sections 4, 6 and 7): one association, from its reply to the end of its control connection.
//!
//! The client's socket is bound to the address that the client connected to, and connected to the client, so that the
//! kernel drops datagrams from other senders. Datagrams that can't be relayed are dropped silently. Neither a datagram
//! nor an ICMP message can end an association.

mod name_cache;
mod sent_to;
mod upstream;

use std::borrow::Cow;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_lite::AsyncReadExt as _;

use super::local_addr::{bind_in_range, reachable_addr};
use super::options::Filtering;
use super::reply::{SessionError, SessionResult};
use super::session_log::{with_addr, with_target};
use super::state::{Server, Session};
use crate::conn::{Conn, Protection};
use crate::net::{BatchSocket, GsoBatch, IdleTimer, RateLimit, RecvBatch, canonical, unspecified, wake_later};
use crate::policy::rules::{AccessRequest, Route};
use crate::proto::{Addr, Datagram, Host, HostName, MAX_UDP4_PAYLOAD};
use crate::reassembly::{Reassembler, fragment};
use name_cache::NameCache;
use sent_to::SentTo;
use upstream::Upstream;

/// Datagrams relayed from one socket before the next one gets its turn. The last receive call may exceed it.
const MAX_DATAGRAMS_PER_TURN: usize = 64;
/// SO_RCVBUF and SO_SNDBUF in bytes, for bursts. The kernel may grant less.
const SOCKET_BUFFER_SIZE: usize = 1 << 20;
/// Bytes on the control connection that are read and ignored. More end the association.
const MAX_CONTROL_BYTES: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Buffers that are shared by all associations of a thread.
#[derive(Default)]
struct Scratch {
    received: RecvBatch,
    /// The SOCKS header of the answers in one batch.
    header: Vec<u8>,
}

pub(super) async fn serve(session: &mut Session, control: &mut Conn, dst: &Addr) -> SessionResult<()> {
    // Opens all hops that the rules may select: if one is down, the client receives an error instead of losing
    // datagrams later.
    let mut upstreams = Vec::new();
    for route in session.policy.policy.rules.possible_routes(&session.log.access_request()) {
        if let Route::Hop(index) = route {
            session.log.via = Some(session.server().hop(index)?);
            upstreams.push(Upstream::open(session.server(), index).await?);
        }
    }
    let client = client_addr(session.log.client(), dst);
    let client_socket = bind_client_socket(session.server(), control, client).map_err(SessionError::general_failure)?;
    let local = client_socket.get_ref().local_addr().map_err(SessionError::general_failure)?;
    let bnd = session.server().advertised_addr(local);
    session.reply_success(control, bnd.into(), || None).await?;
    let association = Association {
        rate_limit: session.permit.rate_limit().cloned(),
        session,
        protection: control.protection().cloned(),
        client_socket,
        client,
        egress: [None, None],
        upstreams,
        sent_to: SentTo::default(),
        name_cache: NameCache::default(),
        reassembler: Reassembler::default(),
        last_activity: Instant::now(),
    };
    if let Some(error) = association.run(control).await {
        session.log.set_error(error);
    }
    Ok(())
}

/// Returns the address that may use the association: the IP address of the control connection (DST.ADDR is ignored),
/// and DST.PORT. Port 0 stands for the port of the first datagram. A client on a Unix socket sends from loopback.
fn client_addr(client: Option<SocketAddr>, dst: &Addr) -> SocketAddr {
    let mut client = client.unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
    client.set_port(dst.port);
    client
}

fn bind_client_socket(server: &Server, control: &Conn, client: SocketAddr) -> io::Result<BatchSocket> {
    let local = reachable_addr(control.local_addr(), unspecified(client.ip()))?;
    let socket = bind_in_range(server.options.udp_ports.as_ref(), local, bind_udp)?;
    // Connecting to port 0 filters by address only.
    socket.get_ref().connect(client)?;
    Ok(socket)
}

fn bind_udp(local: SocketAddr) -> io::Result<BatchSocket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(local), socket2::Type::DGRAM, None)?;
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&local.into())?;
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_SIZE);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_SIZE);
    socket.set_nonblocking(true)?;
    BatchSocket::new(socket.into())
}

struct Association<'a> {
    session: &'a mut Session,
    rate_limit: Option<RateLimit>,
    /// Of the control connection, used for datagrams too (RFC 1961 section 5).
    protection: Option<Protection>,
    client_socket: BatchSocket,
    /// Port 0 until the first datagram.
    client: SocketAddr,
    /// The sockets for targets, IPv4 and IPv6, created when first used.
    egress: [Option<BatchSocket>; 2],
    upstreams: Vec<Upstream>,
    sent_to: SentTo,
    name_cache: NameCache,
    reassembler: Reassembler,
    last_activity: Instant,
}

impl Association<'_> {
    /// Relays until the association ends. Returns `None` when the client closes the control connection, else an error.
    async fn run(mut self, control: &mut Conn) -> Option<String> {
        let mut ended = std::pin::pin!(wait_for_control_end(control));
        let mut timer = IdleTimer::default();
        poll_fn(|cx| {
            if let Poll::Ready(reason) = ended.as_mut().poll(cx) {
                return Poll::Ready(reason.map(Into::into));
            }
            if let Some(reason) = self.recheck_policy().or_else(|| self.poll_upstream_closed(cx)) {
                return Poll::Ready(Some(reason));
            }
            let mut now = Instant::now();
            let has_more = SCRATCH.with_borrow_mut(|scratch| self.relay_ready(cx, now, scratch));
            // Resolved datagrams may have been sent through a new socket, which has not been polled for answers yet.
            if self.send_resolved(cx) || has_more {
                wake_later(cx);
                return Poll::Pending;
            }
            loop {
                self.reassembler.expire(now);
                let idle = self.last_activity + self.session.server().options.idle_timeout;
                if now >= idle {
                    return Poll::Ready(Some(crate::net::RelayError::IdleTimeout.to_string()));
                }
                ready!(timer.poll(cx, self.reassembler.deadline().map_or(idle, |deadline| deadline.min(idle))));
                now = Instant::now();
            }
        })
        .await
    }

    /// Applies a reloaded policy. Returns an error if the policy denies the association, or may route datagrams through
    /// a hop that is not open.
    fn recheck_policy(&mut self) -> Option<String> {
        let Session { permit, policy, log } = &mut *self.session;
        let denial = permit.server.policy.recheck(log, &log.policy_generation, || None);
        if denial.is_some() || log.policy_generation.get() == policy.generation {
            return denial;
        }
        *policy = permit.server.policy.current();
        let is_available = |route: &Route| match route {
            Route::Direct => true,
            Route::Hop(hop) => self.upstreams.iter().any(|upstream| upstream.hop_index == *hop),
        };
        let has_all_upstreams = policy.policy.rules.possible_routes(&log.access_request()).iter().all(is_available);
        (!has_all_upstreams).then(|| "the reloaded rules use a hop that this association has not opened".into())
    }

    fn poll_upstream_closed(&mut self, cx: &mut Context<'_>) -> Option<String> {
        let closed = self.upstreams.iter_mut().find_map(|upstream| match upstream.poll_closed(cx) {
            Poll::Ready(closed) => Some(closed.0),
            Poll::Pending => None,
        });
        closed.map(|proxy| format!("proxy {proxy} closed its association"))
    }

    /// Relays received datagrams in both directions. Returns true if there may be more.
    fn relay_ready(&mut self, cx: &mut Context<'_>, now: Instant, scratch: &mut Scratch) -> bool {
        let Scratch { received, header } = scratch;
        let mut budget = MAX_DATAGRAMS_PER_TURN;
        while budget > 0 && self.client_socket.poll_receive(cx, received, budget) {
            budget = budget.saturating_sub(received.count());
            self.relay_from_client(now, received);
        }
        let mut has_more = budget == 0;
        for family in 0..self.egress.len() {
            let mut budget = MAX_DATAGRAMS_PER_TURN;
            while let (Some(Some(socket)), 1..) = (self.egress.get(family), budget) {
                if !socket.poll_receive(cx, received, budget) {
                    break;
                }
                budget = budget.saturating_sub(received.count());
                self.relay_from_targets(now, received, header);
            }
            has_more |= budget == 0;
        }
        has_more | self.relay_from_upstreams(cx, now)
    }

    fn relay_from_upstreams(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let mut has_more = false;
        for upstream in &self.upstreams {
            let mut budget = MAX_DATAGRAMS_PER_TURN;
            while budget > 0
                && let Poll::Ready(received) = upstream.poll_recv(cx)
            {
                budget -= 1;
                // Errors are ICMP messages about earlier datagrams. The hop's association ends with its connection.
                let Ok((from, data)) = received else { continue };
                self.last_activity = now;
                if self.client.port() != 0
                    && self.is_upstream_answer_allowed(upstream, &from)
                    && self.charge(data.len())
                {
                    self.send_answer(&from, &data);
                }
            }
            has_more |= budget == 0;
        }
        has_more
    }

    fn relay_from_client(&mut self, now: Instant, received: &RecvBatch) {
        let mut no_header = Vec::new();
        let batch = &mut GsoBatch::new(&mut no_header);
        for (from, bytes) in received.datagrams() {
            // The socket may hold datagrams from other ports received before connect(2), and not every kernel filters
            // a socket that is connected to port 0.
            if from.ip() != self.client.ip() || ![0, from.port()].contains(&self.client.port()) {
                continue;
            }
            if let Some(protection) = &self.protection {
                if let Some(plain) = protection.unwrap_datagram(&mut bytes.to_vec()) {
                    self.relay_protected(now, from, &plain);
                }
                continue;
            }
            let Ok(datagram) = Datagram::decode(bytes) else { continue };
            self.on_client_datagram(now, from);
            match self.reassembler.push(now, datagram) {
                Some((Addr { host: Host::Ip(ip), port }, Cow::Borrowed(data))) => {
                    self.queue(batch, canonical(ip, port), data);
                }
                Some((dst, data)) => {
                    self.flush(batch);
                    self.send_to(dst, &data);
                }
                None => {}
            }
        }
        self.flush(batch);
    }

    fn relay_protected(&mut self, now: Instant, from: SocketAddr, bytes: &[u8]) {
        let Ok(datagram) = Datagram::decode(bytes) else { return };
        self.on_client_datagram(now, from);
        if let Some((dst, data)) = self.reassembler.push(now, datagram) {
            self.send_to(dst, &data);
        }
    }

    /// Records the activity, and sets the client's port to that of its first datagram.
    fn on_client_datagram(&mut self, now: Instant, from: SocketAddr) {
        self.last_activity = now;
        if self.client.port() == 0 {
            self.client = from;
            if let Err(error) = self.client_socket.get_ref().connect(from) {
                log::debug!("udp: connect to {from}: {error}");
            }
        }
    }

    fn send_to(&mut self, dst: Addr, data: &[u8]) {
        match dst.host {
            Host::Ip(ip) => self.send_to_addr(canonical(ip, dst.port), data),
            Host::Name(name) => self.send_to_name(name, dst.port, data),
        }
    }

    /// Adds a datagram to the batch. If it does not fit, the batch is sent first.
    fn queue<'a>(&mut self, batch: &mut GsoBatch<'a>, dst: SocketAddr, data: &'a [u8]) {
        if batch.peer() != Some(dst) {
            self.flush(batch);
            match self.route_to(dst, None) {
                Some(Route::Direct) => batch.begin(dst, |_| {}),
                Some(Route::Hop(hop)) => return self.send_via_hop(hop, &dst.into(), data),
                None => return,
            }
        }
        if !self.charge(data.len()) {
            return;
        }
        if !batch.push(data) {
            self.flush(batch);
            batch.push(data);
        }
    }

    fn flush(&mut self, batch: &mut GsoBatch<'_>) {
        let Some(dst) = batch.peer().filter(|_| !batch.is_empty()) else { return };
        self.sent_to.insert(dst.ip(), None);
        let sent = self.egress_socket(dst).map_or(0, |socket| socket.send_batch(Some(dst), batch));
        batch.clear();
        self.count_sent(sent);
    }

    fn send_to_addr(&mut self, dst: SocketAddr, data: &[u8]) {
        match self.route_to(dst, None) {
            Some(Route::Direct) if self.charge(data.len()) => self.send_to_first(&[dst], None, data),
            Some(Route::Hop(hop)) => self.send_via_hop(hop, &dst.into(), data),
            Some(Route::Direct) | None => {}
        }
    }

    /// Sends to a name, or queues the datagram until it is resolved. Names that are denied, or that a hop resolves, are
    /// not resolved here.
    fn send_to_name(&mut self, name: HostName, port: u16, data: &[u8]) {
        let dst = Addr { host: Host::Name(name), port };
        let request = with_target(self.session.log.client_request(), &dst);
        match self.session.policy.authorize(&request) {
            Err(_) => return,
            Ok(Some(Route::Hop(hop))) => return self.send_via_hop(hop, &dst, data),
            Ok(Some(Route::Direct) | None) => {}
        }
        let server = self.session.server();
        let Host::Name(name) = &dst.host else { return };
        let deadline = Instant::now() + server.options.connect_timeout;
        let Some(addrs) = self.name_cache.get_or_wait(name, port, data, &server.resolver, deadline) else { return };
        let routes: Vec<_> =
            addrs.into_iter().filter_map(|addr| Some((addr, self.route_to(addr, Some(name))?))).collect();
        if let Some((addr, Route::Hop(hop))) = routes.first() {
            return self.send_via_hop(*hop, &(*addr).into(), data);
        }
        let direct = routes.iter().filter(|(_, route)| *route == Route::Direct).map(|(addr, _)| *addr);
        if self.charge(data.len()) {
            self.send_to_first(&direct.collect::<Vec<_>>(), Some(name), data);
        }
    }

    /// Sends the datagrams whose names have been resolved. Returns false if there are none.
    fn send_resolved(&mut self, cx: &mut Context<'_>) -> bool {
        let resolved = self.name_cache.poll(cx);
        let has_resolved = !resolved.is_empty();
        for (name, waiting) in resolved {
            for (port, data) in waiting {
                self.send_to_name(name.clone(), port, &data);
            }
        }
        has_resolved
    }

    /// Tries the addresses in turn until a send call succeeds.
    fn send_to_first(&mut self, addrs: &[SocketAddr], name: Option<&HostName>, data: &[u8]) {
        for addr in addrs {
            // Inserted first, because the answer may arrive before the send call returns.
            self.sent_to.insert(addr.ip(), name);
            if self.egress_socket(*addr).and_then(|socket| socket.send_bytes(Some(*addr), data)).is_ok() {
                return self.count_sent(data.len());
            }
        }
    }

    fn send_via_hop(&mut self, hop: usize, dst: &Addr, data: &[u8]) {
        if !self.charge(data.len()) {
            return;
        }
        let upstream = self.upstreams.iter_mut().find(|upstream| upstream.hop_index == hop);
        if upstream.is_some_and(|upstream| upstream.send(dst, data)) {
            self.count_sent(data.len());
        }
    }

    fn count_sent(&self, bytes: usize) {
        self.session.log.bytes.up.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns the route to an address. `name` is the name that the client has sent to, if any. Returns `None` for denied
    /// addresses, port 0, and multicast and broadcast without a rule that names them in `to`.
    fn route_to(&self, addr: SocketAddr, name: Option<&HostName>) -> Option<Route> {
        let request = AccessRequest { target_name: name, ..with_addr(self.session.log.client_request(), addr) };
        self.session.policy.authorize(&request).ok().flatten()
    }

    /// Takes `bytes` from the rate limit. Returns false if it is exhausted: the datagram is to be dropped.
    fn charge(&self, bytes: usize) -> bool {
        self.rate_limit.as_ref().is_none_or(|rate_limit| rate_limit.try_take(bytes, Instant::now()))
    }

    fn egress_socket(&mut self, addr: SocketAddr) -> io::Result<&BatchSocket> {
        let [v4, v6] = &mut self.egress;
        let socket = if addr.is_ipv4() { v4 } else { v6 };
        match socket {
            Some(socket) => Ok(socket),
            unset => Ok(unset.insert(bind_udp(SocketAddr::new(unspecified(addr.ip()), 0))?)),
        }
    }

    fn relay_from_targets(&mut self, now: Instant, received: &RecvBatch, header: &mut Vec<u8>) {
        let batch = &mut GsoBatch::new(header);
        for (from, data) in received.datagrams() {
            if batch.peer() != Some(from) {
                self.flush_answers(batch);
                if !self.is_answer_allowed(from) {
                    continue;
                }
                batch.begin(from, |header| Datagram { frag: 0, dst: from.into(), data: &[] }.encode_into(header));
            }
            self.last_activity = now;
            if !self.charge(data.len()) {
                continue;
            }
            if self.protection.is_some() || batch.header_len() + data.len() > MAX_UDP4_PAYLOAD {
                self.flush_answers(batch);
                self.send_answer(&from.into(), data);
            } else if !batch.push(data) {
                self.flush_answers(batch);
                batch.push(data);
            }
        }
        self.flush_answers(batch);
    }

    /// Returns whether an answer is relayed: with address-dependent filtering, the client has to have sent to this IP
    /// address. In both modes the rules still have to allow datagrams to it, on the direct route.
    fn is_answer_allowed(&self, from: SocketAddr) -> bool {
        let accepts_any = self.session.server().options.udp_filtering == Filtering::EndpointIndependent;
        let sent_to = self.sent_to.get(from.ip());
        (accepts_any || sent_to.is_some())
            && self.client.port() != 0
            && self.route_to(from, sent_to.flatten()) == Some(Route::Direct)
    }

    /// Returns whether an answer through a hop is relayed. Filtering by sender is left to the hop. The rules are
    /// evaluated here, unless the client has sent to a name, which only the hop has resolved.
    fn is_upstream_answer_allowed(&self, upstream: &Upstream, from: &Addr) -> bool {
        let request = with_target(self.session.log.client_request(), from);
        upstream.has_sent_to_names || self.session.policy.authorize(&request).is_ok()
    }

    fn flush_answers(&self, batch: &mut GsoBatch<'_>) {
        if !batch.is_empty() {
            let sent = self.client_socket.send_batch(None, batch);
            self.session.log.bytes.down.fetch_add(sent as u64, Ordering::Relaxed);
        }
    }

    /// Sends an answer outside of a batch: protected, from a hop, or fragmented since it is too long with its header.
    fn send_answer(&self, from: &Addr, data: &[u8]) {
        let send = |bytes: &Vec<u8>| match &self.protection {
            Some(protection) => {
                protection.wrap(bytes).is_ok_and(|bytes| self.client_socket.send_bytes(None, &bytes).is_ok())
            }
            None => self.client_socket.send_bytes(None, bytes).is_ok(),
        };
        let overhead = self.protection.as_ref().map_or(0, Protection::max_overhead);
        if fragment(from, data, MAX_UDP4_PAYLOAD.saturating_sub(overhead))
            .is_some_and(|datagrams| datagrams.iter().all(send))
        {
            self.session.log.bytes.down.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }
}

/// Waits until the client closes the control connection, or returns an error if it sends too much data on it.
async fn wait_for_control_end(control: &mut Conn) -> Option<&'static str> {
    let mut ignored = [0; 256];
    let mut total = 0;
    while let Ok(n @ 1..) = control.read(&mut ignored).await {
        total += n;
        if total > MAX_CONTROL_BYTES {
            return Some("too much data on the control connection");
        }
    }
    None
}
