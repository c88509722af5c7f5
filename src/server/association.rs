//! UDP ASSOCIATE (RFC 1928 sections 4, 6 and 7): one association, from its reply to the end of its control connection.
//!
//! The client's socket is bound to the address that the client connected to, and connected to the client. So the kernel
//! drops datagrams from other senders. Datagrams that can't be relayed are dropped silently. Neither a datagram
//! nor an ICMP message can end an association.

mod client_socket;
mod egress;
mod name_cache;
mod sent_to;
mod upstream;

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::iter::once;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use super::args::Filtering;
use super::policy_handle::Denial;
use super::reply::{SessionError, SessionResult};
use super::session_log::{DropLog, with_addr, with_target};
use super::state::Session;
use crate::counters::Counter::{
    self, DropDenied, DropFragment, DropLookup, DropMalformed, DropRate, DropSender, DropUnsent,
};
use crate::counters::{self, OpenGuard};
use crate::net::{GsoBatch, IdleTimer, RateLimit, RecvBatch, canonical, wake_later};
use crate::policy::rules::{AccessRequest, Route};
use crate::proto::{Addr, Datagram, Host, HostName};
use crate::reassembly::Reassembler;
use client_socket::ClientSocket;
use egress::{DIRECT_SOCKETS, Egress, OutboundSocket};
use name_cache::{NameCache, Resolved};
use upstream::{only_route, open_only_route};

/// Datagrams relayed from one socket before the next socket is polled. The last receive call may exceed it.
const MAX_DATAGRAMS_PER_TURN: usize = 64;
thread_local! {
    /// Buffers that all associations of a thread share: for received datagrams, and for the batch to send.
    static BUFFERS: RefCell<(RecvBatch, Vec<u8>)> = RefCell::default();
}

pub(super) async fn serve(session: &mut Session, dst: &Addr) -> SessionResult<()> {
    let hop = only_route(session).and_then(|route| session.server().options.hops.get(route.hop?));
    let sockets = hop.map_or(DIRECT_SOCKETS, |hop| hop.association_sockets());
    let admitted = session.server().limiter.admit_association(session.log.client_key(), sockets);
    let _shares = admitted.map_err(SessionError::general_failure)?;
    let egress = Egress { upstreams: open_only_route(session).await?, ..Egress::default() };
    let client = ClientSocket::bind(session, dst).await.map_err(SessionError::general_failure)?;
    let local = client.socket.get_ref().local_addr().map_err(SessionError::general_failure)?;
    let bnd = session.advertised_addr(&session.server().options.advertise_udp, local);
    session.reply_success(bnd.into(), || None).await?;
    let _guard = OpenGuard::new(Counter::OpenAssociations);
    let relay = AssociationRelay {
        name_cache: NameCache::new(session.dial_limits(), session.server().options.connect_timeout),
        rate_limit: session.permit.rate_limit(),
        session,
        client,
        egress,
        batch_route: Route::default(),
        reassembler: Reassembler::default(),
        drop_log: DropLog::default(),
        last_activity: Instant::now(),
    };
    if let Some(error) = relay.run().await {
        session.log.set_error(error);
    }
    Ok(())
}

struct AssociationRelay<'a> {
    session: &'a mut Session,
    rate_limit: RateLimit,
    client: ClientSocket,
    egress: Egress,
    /// Route of the datagrams in the batch.
    batch_route: Route,
    name_cache: NameCache,
    reassembler: Reassembler,
    drop_log: DropLog,
    last_activity: Instant,
}

impl AssociationRelay<'_> {
    /// Relays until the association ends. Returns `None` when the client closes the control connection, else an error.
    async fn run(mut self) -> Option<String> {
        let mut timer = IdleTimer::default();
        let ended = poll_fn(|cx| {
            if let Poll::Ready(reason) = self.client.poll_control_end(&mut self.session.conn, cx) {
                return Poll::Ready(reason);
            }
            if let Some(reason) = self.recheck_policy() {
                return Poll::Ready(Some(reason));
            }
            let mut now = Instant::now();
            BUFFERS.with_borrow_mut(|(received, to_send)| self.relay_ready(cx, now, received, to_send));
            self.send_resolved(cx);
            match self.egress.poll_upstreams(self.session, cx) {
                Ok(sent) => self.count_sent(sent),
                Err(reason) => return Poll::Ready(Some(reason)),
            }
            loop {
                self.reassembler.expire(now);
                counters::add(DropFragment, self.reassembler.take_lost());
                let idle = self.last_activity + self.session.server().options.idle_timeout;
                if now >= idle {
                    return Poll::Ready(Some(crate::net::RelayError::IdleTimeout.to_string()));
                }
                let others = [self.reassembler.deadline(), self.client.release_silent_port(now)];
                ready!(timer.poll(cx, others.into_iter().flatten().fold(idle, Instant::min)));
                now = Instant::now();
            }
        })
        .await;
        for upstream in self.egress.upstreams.iter().filter(|upstream| upstream.dropped > 0) {
            self.session.log.log_hop(&upstream.hop, upstream.dropped, "not open when datagrams needed it");
        }
        ended
    }

    /// Applies a reloaded policy. Returns an error if the policy denies the association.
    fn recheck_policy(&mut self) -> Option<String> {
        let Session { permit, policy, log, .. } = &mut *self.session;
        let denial = permit.server.policy.recheck(log, &log.policy_generation, || None);
        if denial.is_some() || log.policy_generation.get() == policy.generation {
            return denial;
        }
        *policy = permit.server.policy.current();
        let routes = policy.policy.rules.possible_routes(&log.access_request());
        self.egress.upstreams.retain(|upstream| routes.contains(&upstream.route));
        None
    }

    /// Relays received datagrams in both directions.
    fn relay_ready(&mut self, cx: &mut Context<'_>, now: Instant, received: &mut RecvBatch, to_send: &mut Vec<u8>) {
        while let Some((from, bytes)) = self.client.poll_handed_over(cx) {
            self.relay_from_client(now, once((from, bytes.as_slice())), to_send);
        }
        let mut budget = MAX_DATAGRAMS_PER_TURN;
        while self.client.socket.poll_receive(cx, received, &mut budget) {
            self.relay_from_client(now, received.datagrams(), to_send);
        }
        for index in 0..self.egress.sockets.len() {
            let mut budget = MAX_DATAGRAMS_PER_TURN;
            while let Some(OutboundSocket { socket, .. }) = self.egress.sockets.get(index)
                && socket.poll_receive(cx, received, &mut budget)
            {
                self.relay_from_targets(now, received, to_send);
            }
            self.record_unreachable(cx, index);
        }
        self.relay_from_upstreams(cx, now);
    }

    /// Records the ICMP errors that a socket has received about addresses of names.
    fn record_unreachable(&mut self, cx: &Context<'_>, index: usize) {
        while let Some(OutboundSocket { socket, .. }) = self.egress.sockets.get(index)
            && let Some(addr) = socket.next_unreachable()
        {
            let name = self.egress.sent_to.get(addr.ip()).flatten();
            if let Some((name, data)) = name.and_then(|name| self.name_cache.on_unreachable(name, addr)) {
                self.send_to_name(&name, addr.port(), &data);
                // A new socket has not been polled yet.
                wake_later(cx);
            }
        }
    }

    /// Records that the address of a name has answered.
    fn record_answer(&mut self, from: SocketAddr) {
        if let Some(Some(name)) = self.egress.sent_to.get(from.ip()) {
            self.name_cache.on_answer(name, from);
        }
    }

    fn relay_from_upstreams(&mut self, cx: &mut Context<'_>, now: Instant) {
        for upstream in &self.egress.upstreams {
            let Some(association) = upstream.association() else { continue };
            let mut budget = MAX_DATAGRAMS_PER_TURN;
            while budget > 0
                && let Poll::Ready(received) = association.poll_recv(cx)
            {
                budget -= 1;
                // Errors are ICMP messages about earlier datagrams. They do not end the hop's association.
                let Ok((from, data)) = received else { continue };
                self.last_activity = now;
                if let Host::Ip(ip) = from.host
                    && let Some(Some(name)) = self.egress.sent_to.get(ip)
                {
                    self.name_cache.on_answer(name, SocketAddr::new(ip, from.port));
                }
                // Filtering by sender is left to the hop. The rules are evaluated here, unless the client has sent to a
                // name, which only the hop has resolved.
                let is_allowed = upstream.has_sent_to_names || self.route(&from).is_ok();
                if !is_allowed || !self.client.has_port() {
                    self.on_drop(DropDenied, None, format_args!("answer from {from}, which a rule denies"));
                } else if self.charge(data.len()) {
                    self.send_answer(&from, &data);
                }
            }
            if budget == 0 {
                wake_later(cx);
            }
        }
    }

    fn relay_from_client<'a>(
        &mut self,
        now: Instant,
        received: impl Iterator<Item = (SocketAddr, &'a [u8])>,
        buffer: &mut Vec<u8>,
    ) {
        let batch = &mut GsoBatch::new(buffer);
        for (from, bytes) in received {
            let Some(bytes) = self.client.accept(from, bytes) else {
                let reason = format_args!("{from} is not the client, or the protection is invalid");
                if !self.client.pass_on(from, bytes) {
                    self.on_drop(DropSender, None, reason);
                }
                continue;
            };
            let decoded = Datagram::decode(&bytes).inspect_err(|error| self.on_drop(DropMalformed, None, error));
            let Ok(datagram) = decoded else { continue };
            self.last_activity = now;
            self.client.record_valid(from, now);
            if let Some((dst, data)) = self.reassembler.push(now, datagram) {
                self.queue(batch, dst, &data);
            }
        }
        self.flush(batch);
    }

    /// Adds a datagram to the batch if it fits and has the same destination. Otherwise sends the batch first. Datagrams
    /// that go through a hop or to a name are not batched.
    fn queue(&mut self, batch: &mut GsoBatch<'_>, dst: Addr, data: &[u8]) {
        let addr = match dst.host {
            Host::Ip(ip) => Some(canonical(ip, dst.port)),
            Host::Name(_) => None,
        };
        if addr.is_none() || addr != batch.peer() {
            self.flush(batch);
            match (self.route(&dst), addr) {
                (Ok(Some(route @ Route { hop: None, .. })), Some(addr)) => {
                    self.batch_route = route;
                    batch.begin(addr, |_| {});
                }
                (Ok(route), _) => return self.send(route, &addr.map_or(dst, Addr::from), data),
                (Err(denial), _) => return self.on_drop(DropDenied, Some(&dst), denial),
            }
        }
        if self.charge(data.len()) && !batch.push(data) {
            self.flush(batch);
            batch.push(data);
        }
    }

    /// Returns the route to `dst`. `None`: the rules depend on the addresses of its name.
    fn route(&self, dst: &Addr) -> Result<Option<Route>, Denial<'_>> {
        self.session.policy.authorize(&with_target(self.session.log.client_request(), dst))
    }

    /// Returns the route to an address, or `None` if it is denied. `name`: that the client has sent to, if any.
    fn route_to_addr(&self, addr: SocketAddr, name: Option<&HostName>) -> Option<Route> {
        let request = AccessRequest { target_name: name, ..with_addr(self.session.log.client_request(), addr) };
        self.session.policy.authorize(&request).ok()?
    }

    fn flush(&mut self, batch: &mut GsoBatch<'_>) {
        let peer = batch.peer().filter(|_| batch.has_payload());
        let sent = self.egress.send_batch(self.session, self.batch_route, batch);
        self.count_sent(sent);
        if let Some(peer) = peer.filter(|_| sent == 0) {
            let reason = "not sent: no route, no socket, or its buffer is full";
            self.drop_log.record(&self.session.log, Some(&peer.into()), reason);
        }
    }

    /// Sends a datagram to a hop or a name, or stores it until its name is resolved.
    fn send(&mut self, route: Option<Route>, dst: &Addr, data: &[u8]) {
        let is_sent = match (route, &dst.host) {
            (Some(route @ Route { hop: Some(_), .. }), _) => {
                self.charge(data.len()) && self.send_to_hop(route, dst, data)
            }
            (_, Host::Name(name)) => self.send_to_name(name, dst.port, data),
            (_, Host::Ip(_)) => false,
        };
        if is_sent {
            self.count_sent(data.len());
        }
    }

    /// Sends a datagram to the current address of a name. If it is denied or the send call fails, tries the next one.
    fn send_to_name(&mut self, name: &HostName, port: u16, data: &[u8]) -> bool {
        let now = Instant::now();
        let mut selected = self.name_cache.select(now, name, port);
        if selected.is_none() {
            if !self.name_cache.wait(now, name, port, data) {
                self.on_drop(DropLookup, None, "too many datagrams wait for lookups");
            }
        } else if !self.charge(data.len()) {
            return false;
        }
        while let Some(addr) = selected {
            match self.route_to_addr(addr, Some(name)) {
                // A datagram that a hop loses is not sent again, so that the target sees one sender.
                Some(route @ Route { hop: Some(_), .. }) => {
                    self.egress.sent_to.insert(addr.ip(), Some(name));
                    return self.send_to_hop(route, &addr.into(), data);
                }
                Some(route) if self.egress.send(self.session, route, addr, name, data) => {
                    self.name_cache.on_sent(name, addr, data);
                    return true;
                }
                Some(_) | None => {}
            }
            let has_other = self.name_cache.fail(name, addr);
            selected = if has_other { self.name_cache.select(now, name, port) } else { None };
            if selected.is_none() {
                let reason = format_args!("{} has no address that is allowed and reachable", name.as_str());
                self.on_drop(DropUnsent, None, reason);
            }
        }
        false
    }

    /// Sends a datagram through a hop, or stores it until the association with the hop is open. Returns true if it has
    /// been sent.
    fn send_to_hop(&mut self, route: Route, dst: &Addr, data: &[u8]) -> bool {
        let Session { permit, log, .. } = &mut *self.session;
        let Some(hop) = route.hop.and_then(|hop| permit.server.options.hops.get(hop)) else { return false };
        if self.egress.sent_to.insert_through_hop(dst) {
            log.log_target(dst, None, Some(hop));
        }
        let upstream = self.egress.upstream(log, route, hop);
        upstream.is_some_and(|upstream| upstream.send(self.session, dst, data))
    }

    /// Sends the datagrams whose names have been resolved.
    fn send_resolved(&mut self, cx: &mut Context<'_>) {
        for Resolved { name, result, waiting } in self.name_cache.poll(cx) {
            // A new socket has not been polled yet.
            wake_later(cx);
            self.session.log.log_lookup(Some(&name), &result);
            for (port, data) in waiting {
                let dst = Addr { host: Host::Name(name.clone()), port };
                match (result.as_ref().err(), self.route(&dst)) {
                    (Some(error), _) => self.on_drop(DropLookup, Some(&dst), error),
                    (None, Err(denial)) => self.on_drop(DropDenied, Some(&dst), denial),
                    (None, Ok(route)) => self.send(route, &dst, &data),
                }
            }
        }
    }

    fn count_sent(&self, bytes: usize) {
        self.session.log.bytes.up.fetch_add(bytes as u64, Ordering::Relaxed);
        counters::add(Counter::BytesUp, bytes as u64);
    }

    /// Takes `bytes` from the rate limit. Returns false if it is exhausted: the caller drops the datagram.
    fn charge(&self, bytes: usize) -> bool {
        let is_within = !self.rate_limit.is_limited() || self.rate_limit.try_take(bytes, Instant::now());
        if !is_within {
            self.on_drop(DropRate, None, "rate limit");
        }
        is_within
    }

    fn on_drop(&self, counter: Counter, dst: Option<&Addr>, reason: impl fmt::Display) {
        counters::count(counter);
        self.drop_log.record(&self.session.log, dst, reason);
    }

    fn relay_from_targets(&mut self, now: Instant, received: &RecvBatch, buffer: &mut Vec<u8>) {
        let batch = &mut GsoBatch::new(buffer);
        for (from, data) in received.datagrams() {
            if batch.peer() != Some(from) {
                self.flush_answers(batch);
                if !self.is_answer_allowed(from) {
                    let reason = format_args!("answer from {from}, which a rule or the filter denies");
                    self.on_drop(DropDenied, None, reason);
                    continue;
                }
                self.record_answer(from);
                batch.begin(from, |header| Datagram { frag: 0, dst: from.into(), data: &[] }.encode_into(header));
            }
            self.last_activity = now;
            if !self.charge(data.len()) {
                continue;
            }
            if !self.client.can_batch(batch.header_len() + data.len()) {
                self.flush_answers(batch);
                self.send_answer(&from.into(), data);
            } else if !batch.push(data) {
                self.flush_answers(batch);
                batch.push(data);
            }
        }
        self.flush_answers(batch);
    }

    /// Returns true if the rules allow datagrams to `from` on the direct route, and the client's port is known. With
    /// address-dependent filtering, the client must also have sent to this IP address.
    fn is_answer_allowed(&self, from: SocketAddr) -> bool {
        let accepts_any = self.session.server().options.udp_filtering == Filtering::EndpointIndependent;
        let sent_to = self.egress.sent_to.get(from.ip());
        (accepts_any || sent_to.is_some())
            && self.client.has_port()
            && self.route_to_addr(from, sent_to.flatten()).is_some_and(|route| route.hop.is_none())
    }

    fn flush_answers(&self, batch: &mut GsoBatch<'_>) {
        self.count_answered(self.client.send_batch(batch));
    }

    /// Sends an answer outside of a batch.
    fn send_answer(&self, from: &Addr, data: &[u8]) {
        let is_sent = self.client.send(from, data);
        counters::add(DropUnsent, u64::from(!is_sent));
        self.count_answered(if is_sent { data.len() } else { 0 });
    }

    fn count_answered(&self, bytes: usize) {
        self.session.log.bytes.down.fetch_add(bytes as u64, Ordering::Relaxed);
        counters::add(Counter::BytesDown, bytes as u64);
    }
}
