//! Datagrams through associations: round trips with some of them under way, and one-way at rising rates.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::net::{SocketAddrV4, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::prctl::set_timerslack;

use crate::measure::{Fault, Times, Via, failed, wrong};
use crate::pattern::noise;
use crate::socks;
use crate::target::{Target, roomy_socket};
use crate::tunnels::Events;

/// The least that a datagram carries: its number.
pub const SMALLEST: usize = 8;
/// What comes before it on the way to a proxy: RSV, FRAG, ATYP, address, port.
const HEADER: usize = 10;
/// A datagram that has not come back after this long is lost.
const LOST: Duration = Duration::from_millis(200);
/// The pause between the bursts of a flood.
const PAUSE: Duration = Duration::from_micros(50);

/// Every association and every step of a flood has numbers of its own, which begin here.
static NUMBERS: AtomicU64 = AtomicU64::new(1 << 32);

/// What a datagram carries: its number and noise.
pub struct Content;

impl Content {
    fn write(number: u64, datagram: &mut [u8]) {
        let (head, rest) = datagram.split_at_mut(SMALLEST);
        head.copy_from_slice(&number.to_le_bytes());
        rest.copy_from_slice(Self::rest(number, rest.len()));
    }

    fn rest(number: u64, length: usize) -> &'static [u8] {
        let from = (number % 4096) as usize;
        &noise()[from..from + length]
    }

    /// The number, when the rest is as it was sent.
    pub fn number(datagram: &[u8]) -> Option<u64> {
        let (head, rest) = datagram.split_first_chunk()?;
        let number = u64::from_le_bytes(*head);
        (rest == Self::rest(number, rest.len())).then_some(number)
    }
}

/// A socket whose datagrams reach one address of the target.
pub struct Association {
    socket: UdpSocket,
    header: Vec<u8>,
    /// Its numbers are its own: another association's datagrams are wrong here.
    next: Cell<u64>,
    /// Numbers that are taken for lost, but may still come.
    given_up: RefCell<Vec<u64>>,
    /// The stream that keeps it.
    _stream: Option<TcpStream>,
}

impl Association {
    pub fn open(via: Via, to: SocketAddrV4) -> Result<Self, Fault> {
        let socket = roomy_socket()?;
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
        let next = Cell::new(NUMBERS.fetch_add(1 << 32, Ordering::Relaxed));
        Ok(Self { socket, header, next, given_up: RefCell::default(), _stream: stream })
    }

    fn send(&self, number: u64, size: usize) -> io::Result<()> {
        let mut buffer = [0; 2048];
        let start = self.header.len();
        buffer[..start].copy_from_slice(&self.header);
        Content::write(number, &mut buffer[start..start + size]);
        self.socket.send(&buffer[..start + size]).map(drop)
    }

    /// The number of the datagram that came, if one did.
    fn receive(&self, size: usize) -> Result<Option<u64>, Fault> {
        let mut buffer = [0; 2048];
        let length = match self.socket.recv(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            length => length?,
        };
        let datagram = match self.header.is_empty() {
            true => &buffer[..length],
            false if length < HEADER || buffer[..HEADER] != self.header => return Err(wrong("another header")),
            false => &buffer[HEADER..length],
        };
        match Content::number(datagram) {
            Some(number) if datagram.len() == size => Ok(Some(number)),
            _ => Err(wrong("another datagram came back")),
        }
    }
}

/// An association with what is under way on it, by number.
struct Flow<'a> {
    association: &'a Association,
    waiting: Vec<(u64, Instant)>,
}

impl Flow<'_> {
    fn send(&mut self, size: usize) -> Result<(), Fault> {
        let number = self.association.next.get();
        self.association.next.set(number + 1);
        self.waiting.push((number, Instant::now()));
        Ok(self.association.send(number, size)?)
    }

    /// Forgets what is lost; how much that is.
    fn give_up(&mut self) -> u64 {
        let late: Vec<_> = self.waiting.extract_if(.., |(_, sent)| sent.elapsed() >= LOST).collect();
        self.association.given_up.borrow_mut().extend(late.iter().map(|(number, _)| number));
        late.len() as u64
    }
}

/// What round trips came to.
#[derive(Default)]
pub struct Trips {
    pub times: Times,
    pub lost: u64,
}

/// Keeps `window` datagrams of `size` octets under way on each association until the time is over.
pub fn round_trips(all: &[Association], size: usize, window: usize, time: Duration) -> Result<Trips, Fault> {
    let (mut events, mut trips, began) = (Events::new()?, Trips::default(), Instant::now());
    let mut looked = began;
    let mut flows: Vec<_> = all.iter().map(|association| Flow { association, waiting: Vec::new() }).collect();
    for (key, flow) in flows.iter_mut().enumerate() {
        events.add(&flow.association.socket, key, EpollFlags::EPOLLIN)?;
        for _ in 0..window {
            flow.send(size)?;
        }
    }
    while flows.iter().any(|flow| !flow.waiting.is_empty()) {
        let keys: Vec<usize> = events.within(LOST / 4)?.collect();
        let over = began.elapsed() >= time;
        for key in keys {
            turn(&mut flows[key], size, over, &mut trips)?;
        }
        if looked.elapsed() > LOST / 4 {
            looked = Instant::now();
            for flow in &mut flows {
                trips.lost += flow.give_up();
                while !over && flow.waiting.len() < window {
                    flow.send(size)?;
                }
            }
        }
    }
    match trips.times.len() {
        0 => Err(failed("no datagram came back")),
        _ => Ok(trips),
    }
}

fn turn(flow: &mut Flow<'_>, size: usize, over: bool, trips: &mut Trips) -> Result<(), Fault> {
    while let Some(number) = flow.association.receive(size)? {
        let Some(at) = flow.waiting.iter().position(|(waits, _)| *waits == number) else {
            let mut late = flow.association.given_up.borrow_mut();
            let Some(at) = late.iter().position(|given_up| *given_up == number) else {
                return Err(wrong("a datagram came twice, or to another association"));
            };
            late.swap_remove(at);
            continue;
        };
        trips.times.add(flow.waiting.swap_remove(at).1.elapsed());
        if !over {
            flow.send(size)?;
        }
    }
    Ok(())
}

/// How a flood rises.
#[derive(Clone, Copy)]
pub struct Flood {
    pub size: usize,
    pub time: Duration,
    /// From one rate to the next.
    pub rise: f64,
    /// A rate at which something was lost is tried again, since a machine has hiccups of its own.
    pub tries: usize,
}

/// Datagrams a second at which the flood begins.
const SLOWEST: f64 = 20_000.0;
/// The generator has to reach this part of a rate for the step to count.
const KEPT: f64 = 0.97;

impl Flood {
    /// The highest rate of datagrams a second at which none is lost.
    pub fn rate(self, via: Via, target: &mut Target) -> Result<f64, Fault> {
        // The kernel rounds sleeps up by this much, which would make bursts of what should be a flow.
        let _ = set_timerslack(1);
        let association = Association::open(via, target.sink)?;
        association.send(0, self.size)?;
        let (mut best, mut rate) = (0.0, SLOWEST);
        while let Some(reached) = self.passes(&association, target, rate)? {
            best = reached;
            if reached < KEPT * rate {
                // The generator can't do more.
                return Ok(best);
            }
            rate *= self.rise;
        }
        let between = rate / self.rise.sqrt();
        Ok(self.passes(&association, target, between)?.unwrap_or(best))
    }

    /// The rate that was reached, if nothing is lost at it.
    fn passes(self, association: &Association, target: &mut Target, rate: f64) -> Result<Option<f64>, Fault> {
        for _ in 0..self.tries {
            thread::sleep(Duration::from_millis(20));
            let first = NUMBERS.fetch_add(1 << 32, Ordering::Relaxed);
            let count = (rate * self.time.as_secs_f64()) as u64;
            let reached = self.pour(association, rate, first, count)?;
            thread::sleep(Duration::from_millis(50));
            let sunk = target.sunk()?;
            if sunk.twice > 0 || sunk.wrong > 0 {
                return Err(wrong(format!("{} datagrams twice, {} wrong", sunk.twice, sunk.wrong)));
            }
            if sunk.came == count && sunk.step == first >> 32 {
                return Ok(Some(reached));
            }
        }
        Ok(None)
    }

    fn pour(self, association: &Association, rate: f64, first: u64, count: u64) -> Result<f64, Fault> {
        let (began, mut sent) = (Instant::now(), 0);
        while sent < count {
            let due = ((began.elapsed().as_secs_f64() * rate) as u64).min(count);
            while sent < due {
                match association.send(first + sent, self.size) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    result => result?,
                }
                sent += 1;
            }
            thread::sleep(PAUSE);
        }
        Ok(count as f64 / began.elapsed().as_secs_f64())
    }
}
