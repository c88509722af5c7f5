//! UDP ASSOCIATE (RFC 1928 sections 4, 6 and 7): one association, from its reply to the end of its control connection.
//!
//! The relay socket is on the address that the client connected to and takes datagrams from the client alone: the
//! kernel filters, by connect(2). What can't be relayed is dropped in silence, and nothing that a datagram or an ICMP
//! message can do ends an association.

mod contacts;
mod names;
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

use super::batch::{BatchMode, BatchSocket, GsoBatch, RecvBatch};
use super::rate_limit::RateLimit;
use super::session::{Session, SessionError};
use super::session_log::with_target;
use super::{Filtering, Server, address_for, bind_within};
use crate::conn::{Conn, Protection};
use crate::dial::{canonical, unspecified};
use crate::policy::is_unicast;
use crate::policy::rules::{AccessRequest, Decision, Route};
use crate::proto::{Addr, Datagram, Host, HostName, MAX_UDP4_PAYLOAD};
use crate::reactor::{IdleTimer, wake_later};
use crate::reassembly::{Reassembler, split};
use contacts::Contacts;
use names::Names;
use upstream::Upstream;

/// How many datagrams of one socket are relayed before another one gets its turn. What was received at once is relayed
/// at once, and may be more.
const BUDGET: usize = 64;
/// Room in the kernel for a burst, in octets, where it grants that much.
const SOCKET_BUFFER: usize = 1 << 20;
/// How many octets on the control connection are read and ignored before it is taken for a mistake.
const MAX_CONTROL: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What the associations of a thread use in turn.
#[derive(Default)]
struct Scratch {
    batch: RecvBatch,
    /// The header of the answers of a run.
    header: Vec<u8>,
}

pub(super) async fn serve(session: &mut Session<'_>, control: &mut Conn, dst: &Addr) -> Result<(), SessionError> {
    let server = session.server;
    // All hops that datagrams may have to go through: one that is down is an error now, and not a silence later.
    let mut upstreams = Vec::new();
    for route in session.snapshot.policy.rules.possible_routes(&session.log.access_request()) {
        if let Route::Hop(number) = route {
            session.log.via = Some(server.hop(number)?);
            upstreams.push(Upstream::open(server, number).await?);
        }
    }
    let client = client_addr(session.log.client(), dst);
    let relay = relay_socket(server, control, client).map_err(SessionError::general_failure)?;
    let local = relay.get_ref().local_addr().map_err(SessionError::general_failure)?;
    session.reply_success(control, server.advertised(local).into(), None).await?;
    let association = Association {
        rate_limit: session.quota.as_ref().and_then(|quota| quota.rate_limit.clone()),
        session,
        protection: control.protection().cloned(),
        relay,
        client,
        outward: [None, None],
        upstreams,
        contacts: Contacts::default(),
        names: Names::default(),
        reassembler: Reassembler::default(),
        last: Instant::now(),
    };
    let why = association.run(control).await;
    if let Some(why) = why {
        session.log.set_error(why);
    }
    Ok(())
}

/// Who may use the association: the IP address of the control connection, whatever DST says, and the port of DST, or
/// 0 for the first one that sends. On a Unix socket the client is on this machine.
fn client_addr(client: Option<SocketAddr>, dst: &Addr) -> SocketAddr {
    let mut client = client.unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
    client.set_port(dst.port);
    client
}

fn relay_socket(server: &Server, control: &Conn, client: SocketAddr) -> io::Result<BatchSocket> {
    let local = address_for(control.local_addr(), unspecified(client.ip()))?;
    let socket = bind_within(server.options.udp_ports.as_ref(), local, udp_socket)?;
    // Port 0 leaves the port open and pins the address.
    socket.get_ref().connect(client)?;
    Ok(socket)
}

fn udp_socket(local: SocketAddr) -> io::Result<BatchSocket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(local), socket2::Type::DGRAM, None)?;
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&local.into())?;
    // Bursts fare better with more; the association works with what there is.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    BatchSocket::new(socket.into(), BatchMode::BEST)
}

struct Association<'a, 'b> {
    session: &'a mut Session<'b>,
    rate_limit: Option<RateLimit>,
    /// That of the control connection, which holds for datagrams too (RFC 1961 section 5).
    protection: Option<Protection>,
    relay: BatchSocket,
    /// The port is 0 until it is known.
    client: SocketAddr,
    /// One socket a family towards all targets, once it is needed: IPv4, IPv6.
    outward: [Option<BatchSocket>; 2],
    upstreams: Vec<Upstream>,
    contacts: Contacts,
    names: Names,
    reassembler: Reassembler,
    last: Instant,
}

impl Association<'_, '_> {
    /// Relays until the control connection ends, which is how an association should end, or something else is said.
    async fn run(mut self, control: &mut Conn) -> Option<String> {
        let mut ended = std::pin::pin!(control_end(control));
        let mut alarm = IdleTimer::default();
        poll_fn(|cx| {
            if let Poll::Ready(why) = ended.as_mut().poll(cx) {
                return Poll::Ready(why.map(Into::into));
            }
            if let Some(why) = self.obey_law().or_else(|| self.poll_lost(cx)) {
                return Poll::Ready(Some(why));
            }
            let mut now = Instant::now();
            let more = SCRATCH.with_borrow_mut(|scratch| self.poll_sockets(cx, now, scratch));
            // What waited for a name may have gone out by a socket that nobody has looked at yet.
            if self.poll_names(cx) || more {
                wake_later(cx);
                return Poll::Pending;
            }
            loop {
                self.reassembler.expire(now);
                let idle = self.last + self.session.server.options.idle_timeout;
                if now >= idle {
                    return Poll::Ready(Some("idle for too long".into()));
                }
                ready!(alarm.poll(cx, self.reassembler.deadline().map_or(idle, |deadline| deadline.min(idle))));
                now = Instant::now();
            }
        })
        .await
    }

    /// Lives on under a new law, or says why not.
    fn obey_law(&mut self) -> Option<String> {
        let Session { server, snapshot, log, .. } = &mut *self.session;
        let objection = server.recheck(log, &log.policy_generation, || None);
        if objection.is_some() || log.policy_generation.get() == snapshot.generation {
            return objection;
        }
        *snapshot = server.policy.current();
        let is_open = |route: &Route| match route {
            Route::Direct => true,
            Route::Hop(hop) => self.upstreams.iter().any(|upstream| upstream.number == *hop),
        };
        let are_open = snapshot.policy.rules.possible_routes(&log.access_request()).iter().all(is_open);
        (!are_open).then(|| "the rules now name a hop that it was not opened with".into())
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Option<String> {
        let lost = self.upstreams.iter_mut().find_map(|upstream| match upstream.poll_lost(cx) {
            Poll::Ready(lost) => Some(lost.0),
            Poll::Pending => None,
        });
        lost.map(|proxy| format!("proxy {proxy} ended its association"))
    }

    /// Relays what has come, both ways. True when there may be more.
    fn poll_sockets(&mut self, cx: &mut Context<'_>, now: Instant, scratch: &mut Scratch) -> bool {
        let Scratch { batch, header } = scratch;
        let mut left = BUDGET;
        while left > 0 && self.relay.poll_receive(cx, batch, left) {
            left = left.saturating_sub(batch.count());
            self.take_from_client(now, batch);
        }
        let mut more = left == 0;
        for family in 0..self.outward.len() {
            let mut left = BUDGET;
            while let (Some(Some(socket)), 1..) = (self.outward.get(family), left) {
                if !socket.poll_receive(cx, batch, left) {
                    break;
                }
                left = left.saturating_sub(batch.count());
                self.take_from_targets(now, batch, header);
            }
            more |= left == 0;
        }
        more | self.take_from_upstreams(cx, now)
    }

    fn take_from_upstreams(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let mut more = false;
        for upstream in &self.upstreams {
            let mut left = BUDGET;
            while left > 0
                && let Poll::Ready(received) = upstream.poll_recv(cx)
            {
                left -= 1;
                // An error is about an earlier datagram; the control connection says when it is over.
                let Ok((from, data)) = received else { continue };
                self.last = now;
                if self.client.port() != 0 && self.may_answer_by(upstream, &from) && self.may_pass(data.len()) {
                    self.answer_alone(&from, &data);
                }
            }
            more |= left == 0;
        }
        more
    }

    fn take_from_client(&mut self, now: Instant, batch: &RecvBatch) {
        let mut no_header = Vec::new();
        let run = &mut GsoBatch::new(&mut no_header);
        for (from, octets) in batch.datagrams() {
            // Until the port is known, datagrams from several may have come; and not every kernel filters by port 0.
            if from.ip() != self.client.ip() || ![0, from.port()].contains(&self.client.port()) {
                continue;
            }
            if let Some(protection) = &self.protection {
                let plain = protection.unwrap_datagram(&mut octets.to_vec());
                if let Some(plain) = plain {
                    self.take_protected(now, from, &plain);
                }
                continue;
            }
            let Ok(datagram) = Datagram::decode(octets) else { continue };
            self.hear(now, from);
            match self.reassembler.push(now, datagram) {
                Some((Addr { host: Host::Ip(ip), port }, Cow::Borrowed(data))) => {
                    self.send_in_run(run, canonical(ip, port), data);
                }
                Some((dst, data)) => {
                    self.send_run(run);
                    self.send_to(dst, &data);
                }
                None => {}
            }
        }
        self.send_run(run);
    }

    fn take_protected(&mut self, now: Instant, from: SocketAddr, octets: &[u8]) {
        let Ok(datagram) = Datagram::decode(octets) else { return };
        self.hear(now, from);
        if let Some((dst, data)) = self.reassembler.push(now, datagram) {
            self.send_to(dst, &data);
        }
    }

    /// The client has sent something; the first time, it is known from where.
    fn hear(&mut self, now: Instant, from: SocketAddr) {
        self.last = now;
        if self.client.port() == 0 {
            self.client = from;
            if let Err(error) = self.relay.get_ref().connect(from) {
                log::debug!("udp: connect to {from}: {error}");
            }
        }
    }

    fn send_to(&mut self, dst: Addr, data: &[u8]) {
        match dst.host {
            Host::Ip(ip) => self.send(canonical(ip, dst.port), data),
            Host::Name(name) => self.send_to_name(name, dst.port, data),
        }
    }

    fn send_in_run<'a>(&mut self, run: &mut GsoBatch<'a>, dst: SocketAddr, data: &'a [u8]) {
        if run.peer() != Some(dst) {
            self.send_run(run);
            match self.way(dst, None) {
                Some(Route::Direct) => run.begin(dst, |_| {}),
                Some(Route::Hop(hop)) => return self.send_through(hop, &dst.into(), data),
                None => return,
            }
        }
        if !self.may_pass(data.len()) {
            return;
        }
        if !run.push(data) {
            self.send_run(run);
            run.push(data);
        }
    }

    fn send_run(&mut self, run: &mut GsoBatch<'_>) {
        let Some(dst) = run.peer().filter(|_| !run.is_empty()) else { return };
        self.contacts.insert(dst.ip(), None);
        let sent = self.outward(dst).map_or(0, |socket| socket.send_batch(Some(dst), run));
        run.clear();
        self.has_sent(sent);
    }

    fn send(&mut self, dst: SocketAddr, data: &[u8]) {
        match self.way(dst, None) {
            Some(Route::Direct) if self.may_pass(data.len()) => self.send_to_one_of(&[dst], None, data),
            Some(Route::Hop(hop)) => self.send_through(hop, &dst.into(), data),
            Some(Route::Direct) | None => {}
        }
    }

    /// To a name that is denied nothing is sent, and it is not looked up; nor is one that a hop looks up.
    fn send_to_name(&mut self, name: HostName, port: u16, data: &[u8]) {
        let server = self.session.server;
        let dst = Addr { host: Host::Name(name), port };
        let question = with_target(self.session.log.client_request(), &dst);
        match self.session.snapshot.evaluate(&question) {
            Decision::Deny(_) => return,
            Decision::Allow(_, Route::Hop(hop)) => return self.send_through(hop, &dst, data),
            Decision::Allow(_, Route::Direct) | Decision::Undecided(_) => {}
        }
        let Host::Name(name) = &dst.host else { return };
        let deadline = Instant::now() + server.options.connect_timeout;
        let Some(addrs) = self.names.get_or_wait(name, port, data, &server.resolver, deadline) else { return };
        let ways: Vec<_> = addrs.into_iter().filter_map(|addr| Some((addr, self.way(addr, Some(name))?))).collect();
        if let Some((addr, Route::Hop(hop))) = ways.first() {
            return self.send_through(*hop, &(*addr).into(), data);
        }
        let here = ways.iter().filter(|(_, way)| *way == Route::Direct).map(|(addr, _)| *addr);
        if self.may_pass(data.len()) {
            self.send_to_one_of(&here.collect::<Vec<_>>(), Some(name), data);
        }
    }

    /// Sends what waited for the names that are resolved now. True when there were any.
    fn poll_names(&mut self, cx: &mut Context<'_>) -> bool {
        let known = self.names.poll(cx);
        let any = !known.is_empty();
        for (name, waiting) in known {
            for (port, data) in waiting {
                self.send_to_name(name.clone(), port, &data);
            }
        }
        any
    }

    /// Sends to the first of the addresses that takes it.
    fn send_to_one_of(&mut self, addrs: &[SocketAddr], name: Option<&HostName>, data: &[u8]) {
        for addr in addrs {
            // Before anything is sent: the answer may be here sooner than sending returns.
            self.contacts.insert(addr.ip(), name);
            if self.outward(*addr).and_then(|socket| socket.send_bytes(Some(*addr), data)).is_ok() {
                return self.has_sent(data.len());
            }
        }
    }

    fn send_through(&mut self, hop: usize, dst: &Addr, data: &[u8]) {
        if !self.may_pass(data.len()) {
            return;
        }
        let upstream = self.upstreams.iter_mut().find(|upstream| upstream.number == hop);
        if upstream.is_some_and(|upstream| upstream.send(dst, data)) {
            self.has_sent(data.len());
        }
    }

    fn has_sent(&self, octets: usize) {
        self.session.log.bytes.up.fetch_add(octets as u64, Ordering::Relaxed);
    }

    /// The way to an address that the client knows by that name; none when the rules deny it, or nobody can be there. To
    /// many at once only those get whom a rule lets by address.
    fn way(&self, addr: SocketAddr, name: Option<&HostName>) -> Option<Route> {
        let question = self.session.log.client_request();
        let question =
            AccessRequest { target_name: name, target_ip: Some(addr.ip()), target_port: Some(addr.port()), ..question };
        match self.session.snapshot.evaluate(&question) {
            Decision::Allow(rule, route) => {
                let may_be = is_unicast(addr.ip()) || rule.has_to_condition();
                (addr.port() != 0 && may_be).then_some(route)
            }
            Decision::Deny(_) | Decision::Undecided(_) => None,
        }
    }

    /// Whether the pace of the session has room for so many octets.
    fn may_pass(&self, octets: usize) -> bool {
        self.rate_limit.as_ref().is_none_or(|rate_limit| rate_limit.try_take(octets, Instant::now()))
    }

    fn outward(&mut self, addr: SocketAddr) -> io::Result<&BatchSocket> {
        let [v4, v6] = &mut self.outward;
        let socket = if addr.is_ipv4() { v4 } else { v6 };
        match socket {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(udp_socket(SocketAddr::new(unspecified(addr.ip()), 0))?)),
        }
    }

    fn take_from_targets(&mut self, now: Instant, batch: &RecvBatch, header: &mut Vec<u8>) {
        let run = &mut GsoBatch::new(header);
        for (from, data) in batch.datagrams() {
            if run.peer() != Some(from) {
                self.answer_run(run);
                if !self.may_answer(from) {
                    continue;
                }
                run.begin(from, |header| Datagram { frag: 0, dst: from.into(), data: &[] }.encode_into(header));
            }
            self.last = now;
            if !self.may_pass(data.len()) {
                continue;
            }
            if self.protection.is_some() || run.header_len() + data.len() > MAX_UDP4_PAYLOAD {
                self.answer_run(run);
                self.answer_alone(&from.into(), data);
            } else if !run.push(data) {
                self.answer_run(run);
                run.push(data);
            }
        }
        self.answer_run(run);
    }

    /// Whether the client may have asked for it: it has sent to that address, or to that of everybody, and might send
    /// to where the answer comes from.
    fn may_answer(&self, from: SocketAddr) -> bool {
        let is_open = self.session.server.options.udp_filtering == Filtering::EndpointIndependent;
        let asked = self.contacts.get(from.ip());
        (is_open || asked.is_some())
            && self.client.port() != 0
            && self.way(from, asked.flatten()) == Some(Route::Direct)
    }

    /// The same for what comes through a hop. Which address a name has is the hop's to know, and whom the client has sent
    /// to; but to a client that has sent only to addresses, the rules say from where.
    fn may_answer_by(&self, upstream: &Upstream, from: &Addr) -> bool {
        let question = with_target(self.session.log.client_request(), from);
        upstream.has_names || !matches!(self.session.snapshot.evaluate(&question), Decision::Deny(_))
    }

    fn answer_run(&self, run: &mut GsoBatch<'_>) {
        if !run.is_empty() {
            let sent = self.relay.send_batch(None, run);
            self.session.log.bytes.down.fetch_add(sent as u64, Ordering::Relaxed);
        }
    }

    /// An answer that comes by itself: protected, or through a hop, or without room behind its header.
    fn answer_alone(&self, from: &Addr, data: &[u8]) {
        let send = |octets: &Vec<u8>| match &self.protection {
            Some(protection) => {
                protection.wrap(octets).is_ok_and(|octets| self.relay.send_bytes(None, &octets).is_ok())
            }
            None => self.relay.send_bytes(None, octets).is_ok(),
        };
        let overhead = self.protection.as_ref().map_or(0, Protection::overhead);
        if split(from, data, MAX_UDP4_PAYLOAD.saturating_sub(overhead))
            .is_some_and(|datagrams| datagrams.iter().all(send))
        {
            self.session.log.bytes.down.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }
}

/// Returns when the control connection ends, however it does, or when it carries what it should not.
async fn control_end(control: &mut Conn) -> Option<&'static str> {
    let mut waste = [0; 256];
    let mut total = 0;
    while let Ok(n @ 1..) = control.read(&mut waste).await {
        total += n;
        if total > MAX_CONTROL {
            return Some("data on the control connection");
        }
    }
    None
}
