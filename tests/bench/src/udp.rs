//! Datagrams through associations: round trips with a window, and floods in one direction at increasing rates.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::net::{SocketAddrV4, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::prctl::set_timerslack;

use crate::measure::{BenchError, Times, Via, corrupt, failed};
use crate::pattern::noise;
use crate::socks;
use crate::target::{Target, large_buffer_socket};
use crate::tunnels::Events;

/// Smallest payload in bytes: the number of the datagram.
pub const MIN_PAYLOAD: usize = 8;
/// Bytes of the SOCKS header: RSV, FRAG, ATYP, address, port.
const HEADER_LEN: usize = 10;
/// A datagram without an echo after this time counts as lost.
const LOSS_TIMEOUT: Duration = Duration::from_millis(200);
/// Time between the bursts of a flood.
const BURST_INTERVAL: Duration = Duration::from_micros(50);

/// First number of the next association or step of a flood. The ranges do not overlap.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1 << 32);

/// The payload of a datagram: its number and pseudo-random bytes.
pub struct Content;

impl Content {
    fn write(number: u64, datagram: &mut [u8]) {
        let (head, body) = datagram.split_at_mut(MIN_PAYLOAD);
        head.copy_from_slice(&number.to_le_bytes());
        body.copy_from_slice(Self::noise(number, body.len()));
    }

    fn noise(number: u64, length: usize) -> &'static [u8] {
        let from = (number % 4096) as usize;
        &noise()[from..from + length]
    }

    /// Returns the number, or `None` if the payload is corrupt.
    pub fn number(datagram: &[u8]) -> Option<u64> {
        let (head, body) = datagram.split_first_chunk()?;
        let number = u64::from_le_bytes(*head);
        (body == Self::noise(number, body.len())).then_some(number)
    }
}

/// A socket whose datagrams reach one address of the target.
pub struct Association {
    socket: UdpSocket,
    header: Vec<u8>,
    /// Number of the next datagram. Other associations use other ranges.
    next: Cell<u64>,
    /// Numbers that count as lost, but may still arrive.
    expired: RefCell<Vec<u64>>,
    /// The control connection.
    _stream: Option<TcpStream>,
}

impl Association {
    pub fn open(via: Via, to: SocketAddrV4) -> Result<Self, BenchError> {
        let socket = large_buffer_socket()?;
        let (stream, first, header) = match via {
            Via::Direct => (None, to, Vec::new()),
            Via::Socks(proxy) => {
                let (stream, relay) = socks::associate(proxy)?;
                let mut header = vec![0, 0, 0, 1];
                header.extend(to.ip().octets());
                header.extend(to.port().to_be_bytes());
                (Some(stream), relay, header)
            }
        };
        socket.connect(first)?;
        socket.set_nonblocking(true)?;
        let next = Cell::new(NEXT_NUMBER.fetch_add(1 << 32, Ordering::Relaxed));
        Ok(Self { socket, header, next, expired: RefCell::default(), _stream: stream })
    }

    fn send(&self, number: u64, size: usize) -> io::Result<()> {
        let mut buffer = [0; 2048];
        let start = self.header.len();
        buffer[..start].copy_from_slice(&self.header);
        Content::write(number, &mut buffer[start..start + size]);
        self.socket.send(&buffer[..start + size]).map(drop)
    }

    /// Receives a datagram without waiting. Returns its number.
    fn receive(&self, size: usize) -> Result<Option<u64>, BenchError> {
        let mut buffer = [0; 2048];
        let length = match self.socket.recv(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            length => length?,
        };
        let datagram = match self.header.is_empty() {
            true => &buffer[..length],
            false if length < HEADER_LEN || buffer[..HEADER_LEN] != self.header => {
                return Err(corrupt("an answer with another header"));
            }
            false => &buffer[HEADER_LEN..length],
        };
        match Content::number(datagram) {
            Some(number) if datagram.len() == size => Ok(Some(number)),
            _ => Err(corrupt("the echo differs from the datagram")),
        }
    }
}

/// An association and its datagrams in flight, with number and time of sending.
struct Flow<'a> {
    association: &'a Association,
    in_flight: Vec<(u64, Instant)>,
}

impl Flow<'_> {
    fn send(&mut self, size: usize) -> Result<(), BenchError> {
        let number = self.association.next.get();
        self.association.next.set(number + 1);
        self.in_flight.push((number, Instant::now()));
        Ok(self.association.send(number, size)?)
    }

    /// Removes the datagrams that count as lost. Returns their number.
    fn expire(&mut self) -> u64 {
        let late: Vec<_> = self.in_flight.extract_if(.., |(_, sent)| sent.elapsed() >= LOSS_TIMEOUT).collect();
        self.association.expired.borrow_mut().extend(late.iter().map(|(number, _)| number));
        late.len() as u64
    }
}

/// Results of round trips.
#[derive(Default)]
pub struct RoundTrips {
    pub times: Times,
    pub lost: u64,
}

/// Keeps `window` datagrams of `size` bytes in flight on each association until the time is over.
pub fn round_trips(all: &[Association], size: usize, window: usize, time: Duration) -> Result<RoundTrips, BenchError> {
    let (mut events, mut trips, started) = (Events::new()?, RoundTrips::default(), Instant::now());
    let mut last_check = started;
    let mut flows: Vec<_> = all.iter().map(|association| Flow { association, in_flight: Vec::new() }).collect();
    for (key, flow) in flows.iter_mut().enumerate() {
        events.add(&flow.association.socket, key, EpollFlags::EPOLLIN)?;
        for _ in 0..window {
            flow.send(size)?;
        }
    }
    while flows.iter().any(|flow| !flow.in_flight.is_empty()) {
        let keys: Vec<usize> = events.wait(LOSS_TIMEOUT / 4)?.collect();
        let is_over = started.elapsed() >= time;
        for key in keys {
            receive_answers(&mut flows[key], size, is_over, &mut trips)?;
        }
        if last_check.elapsed() > LOSS_TIMEOUT / 4 {
            last_check = Instant::now();
            for flow in &mut flows {
                trips.lost += flow.expire();
                while !is_over && flow.in_flight.len() < window {
                    flow.send(size)?;
                }
            }
        }
    }
    match trips.times.len() {
        0 => Err(failed("no datagram was echoed")),
        _ => Ok(trips),
    }
}

fn receive_answers(flow: &mut Flow<'_>, size: usize, is_over: bool, trips: &mut RoundTrips) -> Result<(), BenchError> {
    while let Some(number) = flow.association.receive(size)? {
        let Some(at) = flow.in_flight.iter().position(|(sent, _)| *sent == number) else {
            let mut late = flow.association.expired.borrow_mut();
            let Some(at) = late.iter().position(|expired| *expired == number) else {
                return Err(corrupt("a datagram arrived twice, or at another association"));
            };
            late.swap_remove(at);
            continue;
        };
        trips.times.add(flow.in_flight.swap_remove(at).1.elapsed());
        if !is_over {
            flow.send(size)?;
        }
    }
    Ok(())
}

/// Parameters of a flood.
#[derive(Clone, Copy)]
pub struct Flood {
    pub size: usize,
    pub time: Duration,
    /// Factor from one rate to the next.
    pub factor: f64,
    /// Attempts at each rate. A datagram may be lost because the machine was busy.
    pub attempts: usize,
}

/// First rate of a flood, in datagrams per second.
const START_RATE: f64 = 20_000.0;
/// Fraction of a rate that the load generator must reach. Otherwise the flood ends.
const MIN_REACHED: f64 = 0.97;

impl Flood {
    /// Returns the highest rate without loss, in datagrams per second.
    pub fn rate(self, via: Via, target: &mut Target) -> Result<f64, BenchError> {
        // The kernel adds the timer slack to sleeps, which would make bursts larger.
        let _ = set_timerslack(1);
        let association = Association::open(via, target.sink)?;
        association.send(0, self.size)?;
        let (mut best, mut rate) = (0.0, START_RATE);
        while let Some(reached) = self.try_rate(&association, target, rate)? {
            best = reached;
            if reached < MIN_REACHED * rate {
                // The load generator is the limit.
                return Ok(best);
            }
            rate *= self.factor;
        }
        let between = rate / self.factor.sqrt();
        Ok(self.try_rate(&association, target, between)?.unwrap_or(best))
    }

    /// Sends at a rate. Returns the rate reached, or `None` if a datagram is lost.
    fn try_rate(self, association: &Association, target: &mut Target, rate: f64) -> Result<Option<f64>, BenchError> {
        for _ in 0..self.attempts {
            thread::sleep(Duration::from_millis(20));
            let first = NEXT_NUMBER.fetch_add(1 << 32, Ordering::Relaxed);
            let count = (rate * self.time.as_secs_f64()) as u64;
            let reached = self.send_at_rate(association, rate, first, count)?;
            thread::sleep(Duration::from_millis(50));
            let sink_counts = target.sink_counts()?;
            if sink_counts.duplicates > 0 || sink_counts.corrupt > 0 {
                return Err(corrupt(format!(
                    "{} duplicate datagrams, {} corrupt",
                    sink_counts.duplicates, sink_counts.corrupt
                )));
            }
            if sink_counts.received == count && sink_counts.step == first >> 32 {
                return Ok(Some(reached));
            }
        }
        Ok(None)
    }

    fn send_at_rate(self, association: &Association, rate: f64, first: u64, count: u64) -> Result<f64, BenchError> {
        let (started, mut sent) = (Instant::now(), 0);
        while sent < count {
            let due = ((started.elapsed().as_secs_f64() * rate) as u64).min(count);
            while sent < due {
                match association.send(first + sent, self.size) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    result => result?,
                }
                sent += 1;
            }
            thread::sleep(BURST_INTERVAL);
        }
        Ok(count as f64 / started.elapsed().as_secs_f64())
    }
}
