//! UDP ASSOCIATE (RFC 1928 sections 4, 6 and 7): one association, from its reply to the end of its control connection.
//!
//! The relay socket is on the address that the client connected to and takes datagrams from the client alone: the
//! kernel filters, by connect(2). What can't be relayed is dropped in silence, and nothing that a datagram or an ICMP
//! message can do ends an association.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_lite::AsyncReadExt as _;

use super::batch::{Batch, BatchSocket, Run, Style};
use super::record::Record;
use super::session::Refusal;
use super::{Filtering, Server, address_for, bind_within};
use crate::conn::{Conn, until};
use crate::dial::{Failure, canonical, unspecified};
use crate::policy::is_unicast;
use crate::proto::{Addr, Datagram, Host, MAX_UDP, Name, Rep};
use crate::reactor::{Alarm, wake_later};
use crate::reassembly::{Reassembler, split};

/// How many datagrams of one socket are relayed before another one gets its turn. What was received at once is relayed
/// at once, and may be more.
const BUDGET: usize = 64;
/// Room in the kernel for a burst, in octets, where it grants that much.
const SOCKET_BUFFER: usize = 1 << 20;
/// How many octets on the control connection are read and ignored before it is taken for a mistake.
const MAX_CONTROL: usize = 64 * 1024;
/// How many addresses an association remembers having sent to; the oldest is forgotten first.
const MAX_CONTACTED: usize = 4096;
/// How many names an association remembers the addresses of; then it begins anew.
const MAX_NAMES: usize = 256;
/// How many names an association may be looking up at once.
const MAX_LOOKUPS: usize = 16;
/// How many octets may wait for look-ups in an association.
const MAX_WAITING: usize = 128 * 1024;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What the associations of a thread use in turn.
#[derive(Default)]
struct Scratch {
    batch: Batch,
    /// The header of the answers of a run.
    header: Vec<u8>,
}

pub(super) async fn serve(server: &Server, control: &mut Conn, dst: &Addr, record: &mut Record) -> Result<(), Refusal> {
    let failed = |error| Refusal::reply(Rep::GENERAL_FAILURE, error);
    let client = client_addr(record.client, dst);
    let relay = relay_socket(server, control, client).map_err(failed)?;
    let local = relay.get_ref().local_addr().map_err(failed)?;
    server.succeed(control, server.advertised(local), record).await?;
    let association = Association {
        server,
        record,
        relay,
        client,
        outward: [None, None],
        contacted: Contacted::default(),
        names: HashMap::new(),
        lookups: Vec::new(),
        reassembler: Reassembler::default(),
        last: Instant::now(),
    };
    let why = association.run(control).await;
    record.error = why.map(Into::into);
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
    BatchSocket::new(socket.into(), Style::BEST)
}

struct Association<'a> {
    server: &'a Server,
    record: &'a Record,
    relay: BatchSocket,
    /// The port is 0 until it is known.
    client: SocketAddr,
    /// One socket a family towards all targets, once it is needed: IPv4, IPv6.
    outward: [Option<BatchSocket>; 2],
    contacted: Contacted,
    names: HashMap<Name, Resolution>,
    lookups: Vec<(Name, Lookup)>,
    reassembler: Reassembler,
    last: Instant,
}

type Lookup = Pin<Box<dyn Future<Output = Result<Vec<SocketAddr>, Failure>>>>;

/// What an association knows of a name.
enum Resolution {
    /// Datagrams that wait for it: port and payload.
    Pending(Vec<(u16, Vec<u8>)>),
    Known(Vec<SocketAddr>),
}

impl Association<'_> {
    /// Relays until the control connection ends, which is how an association should end, or something else is said.
    async fn run(mut self, control: &mut Conn) -> Option<&'static str> {
        let mut ended = std::pin::pin!(control_end(control));
        let mut alarm = Alarm::default();
        poll_fn(|cx| {
            if let Poll::Ready(why) = ended.as_mut().poll(cx) {
                return Poll::Ready(why);
            }
            let mut now = Instant::now();
            let more = SCRATCH.with_borrow_mut(|scratch| self.poll_sockets(cx, now, scratch));
            // What waited for a name may have gone out by a socket that nobody has looked at yet.
            if self.poll_lookups(cx) || more {
                wake_later(cx);
                return Poll::Pending;
            }
            loop {
                self.reassembler.expire(now);
                let idle = self.last + self.server.options.idle_timeout;
                if now >= idle {
                    return Poll::Ready(Some("idle for too long"));
                }
                ready!(alarm.poll(cx, self.reassembler.deadline().map_or(idle, |deadline| deadline.min(idle))));
                now = Instant::now();
            }
        })
        .await
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
        more
    }

    fn take_from_client(&mut self, now: Instant, batch: &Batch) {
        let mut no_header = Vec::new();
        let run = &mut Run::new(&mut no_header);
        for (from, octets) in batch.datagrams() {
            // Until the port is known, datagrams from several may have come; and not every kernel filters by port 0.
            if from.ip() != self.client.ip() || ![0, from.port()].contains(&self.client.port()) {
                continue;
            }
            let Ok(datagram) = Datagram::decode(octets) else { continue };
            if self.client.port() == 0 {
                self.client = from;
                if let Err(error) = self.relay.get_ref().connect(from) {
                    log::debug!("udp: connect to {from}: {error}");
                }
            }
            self.last = now;
            match self.reassembler.push(now, datagram) {
                Some((Addr { host: Host::Ip(ip), port }, Cow::Borrowed(data))) => {
                    self.send_in_run(run, canonical(ip, port), data);
                }
                Some((dst, data)) => {
                    self.send_run(run);
                    match dst.host {
                        Host::Ip(ip) => self.send(&[canonical(ip, dst.port)], &data),
                        Host::Name(name) => self.send_to_name(name, dst.port, &data),
                    }
                }
                None => {}
            }
        }
        self.send_run(run);
    }

    fn send_in_run<'a>(&mut self, run: &mut Run<'a>, dst: SocketAddr, data: &'a [u8]) {
        if run.peer() != Some(dst) {
            self.send_run(run);
            if !self.contact(dst) {
                return;
            }
            run.begin(dst, |_| {});
        }
        if !run.push(data) {
            self.send_run(run);
            run.push(data);
        }
    }

    fn send_run(&mut self, run: &mut Run<'_>) {
        let Some(dst) = run.peer().filter(|_| !run.is_empty()) else { return };
        let sent = self.outward(dst).map_or(0, |socket| socket.send_run(Some(dst), run));
        run.clear();
        self.record.moved.up.fetch_add(sent as u64, Ordering::Relaxed);
    }

    fn send_to_name(&mut self, name: Name, port: u16, data: &[u8]) {
        let has_room = self.waiting() + data.len() <= MAX_WAITING;
        match self.names.get_mut(&name) {
            Some(Resolution::Known(addrs)) => {
                let mut addrs = addrs.clone();
                addrs.iter_mut().for_each(|addr| addr.set_port(port));
                self.send(&addrs, data);
            }
            Some(Resolution::Pending(waiting)) if has_room => waiting.push((port, data.to_vec())),
            None if has_room && self.lookups.len() < MAX_LOOKUPS => {
                if self.names.len() >= MAX_NAMES {
                    self.names.retain(|_, known| matches!(known, Resolution::Pending(_)));
                }
                let (resolver, dst) = (self.server.resolver.clone(), Addr { host: Host::Name(name.clone()), port });
                let deadline = Instant::now() + self.server.options.connect_timeout;
                let lookup =
                    async move { until(deadline, resolver.lookup(&dst)).await.unwrap_or(Err(Failure::Resolver)) };
                self.lookups.push((name.clone(), Box::pin(lookup)));
                self.names.insert(name, Resolution::Pending(vec![(port, data.to_vec())]));
            }
            Some(Resolution::Pending(_)) | None => {}
        }
    }

    /// How many octets wait for look-ups, each datagram counted as somewhat more than it has.
    fn waiting(&self) -> usize {
        let waiting = self.lookups.iter().filter_map(|(name, _)| match self.names.get(name) {
            Some(Resolution::Pending(waiting)) => Some(waiting),
            _ => None,
        });
        waiting.flatten().map(|(_, data)| data.len() + 64).sum()
    }

    /// Sends what waited for the names that are resolved now. True when there were any.
    fn poll_lookups(&mut self, cx: &mut Context<'_>) -> bool {
        let mut done = Vec::new();
        self.lookups.retain_mut(|(name, lookup)| match lookup.as_mut().poll(cx) {
            Poll::Ready(found) => {
                done.push((name.clone(), found));
                false
            }
            Poll::Pending => true,
        });
        let any = !done.is_empty();
        for (name, found) in done {
            // A name that failed is forgotten, so that the next datagram asks again.
            let waiting = self.names.remove(&name);
            let Ok(addrs) = found else { continue };
            self.names.insert(name.clone(), Resolution::Known(addrs));
            if let Some(Resolution::Pending(waiting)) = waiting {
                for (port, data) in waiting {
                    self.send_to_name(name.clone(), port, &data);
                }
            }
        }
        any
    }

    /// Sends to the first of the addresses that takes it.
    fn send(&mut self, addrs: &[SocketAddr], data: &[u8]) {
        for addr in addrs {
            if self.contact(*addr)
                && self.outward(*addr).and_then(|socket| socket.send_octets(Some(*addr), data)).is_ok()
            {
                self.record.moved.up.fetch_add(data.len() as u64, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Whether somebody can be there; then he may answer. Before anything is sent: the answer may be here sooner than
    /// sending returns.
    fn contact(&mut self, addr: SocketAddr) -> bool {
        let may_be = addr.port() != 0 && is_unicast(addr.ip());
        if may_be {
            self.contacted.insert(addr.ip());
        }
        may_be
    }

    fn outward(&mut self, addr: SocketAddr) -> io::Result<&BatchSocket> {
        let [v4, v6] = &mut self.outward;
        let socket = if addr.is_ipv4() { v4 } else { v6 };
        match socket {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(udp_socket(SocketAddr::new(unspecified(addr.ip()), 0))?)),
        }
    }

    fn take_from_targets(&mut self, now: Instant, batch: &Batch, header: &mut Vec<u8>) {
        let run = &mut Run::new(header);
        for (from, data) in batch.datagrams() {
            if run.peer() != Some(from) {
                self.answer_run(run);
                if !self.may_answer(from) {
                    continue;
                }
                run.begin(from, |header| Datagram { frag: 0, dst: from.into(), data: &[] }.write(header));
            }
            self.last = now;
            if run.header() + data.len() > MAX_UDP {
                self.answer_run(run);
                self.answer_in_fragments(from, data);
            } else if !run.push(data) {
                self.answer_run(run);
                run.push(data);
            }
        }
        self.answer_run(run);
    }

    fn may_answer(&self, from: SocketAddr) -> bool {
        let is_open = self.server.options.udp_filtering == Filtering::EndpointIndependent;
        (is_open || self.contacted.includes(from.ip())) && self.client.port() != 0
    }

    fn answer_run(&self, run: &mut Run<'_>) {
        if !run.is_empty() {
            let sent = self.relay.send_run(None, run);
            self.record.moved.down.fetch_add(sent as u64, Ordering::Relaxed);
        }
    }

    /// An answer that has no room behind its header.
    fn answer_in_fragments(&self, from: SocketAddr, data: &[u8]) {
        let send = |octets: &Vec<u8>| self.relay.send_octets(None, octets).is_ok();
        if split(&from.into(), data, MAX_UDP).is_some_and(|datagrams| datagrams.iter().all(send)) {
            self.record.moved.down.fetch_add(data.len() as u64, Ordering::Relaxed);
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

/// The addresses that the client has sent to.
#[derive(Default)]
struct Contacted {
    last: Option<IpAddr>,
    ips: HashSet<IpAddr>,
    order: VecDeque<IpAddr>,
}

impl Contacted {
    fn insert(&mut self, ip: IpAddr) {
        // The usual case, at no cost. Only another insertion could have it forgotten.
        if self.last.replace(ip) == Some(ip) || !self.ips.insert(ip) {
            return;
        }
        self.order.push_back(ip);
        if self.order.len() > MAX_CONTACTED {
            let oldest = self.order.pop_front();
            oldest.map(|ip| self.ips.remove(&ip));
        }
    }

    fn includes(&self, ip: IpAddr) -> bool {
        self.ips.contains(&ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_too_many_addresses_is_forgotten() {
        let mut contacted = Contacted::default();
        let ip = |n: u32| IpAddr::V4(Ipv4Addr::from(n));
        (0..=4096).for_each(|n| contacted.insert(ip(n)));
        assert!(!contacted.includes(ip(0)));
        assert!(contacted.includes(ip(1)) && contacted.includes(ip(4096)));
        assert_eq!(contacted.ips.len(), MAX_CONTACTED);
    }
}
