//! Many tunnels on one thread: opened and closed as fast as possible, or kept open for round trips.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::measure::{BenchError, IDLE_TIMEOUT, Times, Via, corrupt, failed};
use crate::pattern::noise;
use crate::socks::PendingTunnel;

/// Bytes of a round trip.
pub const MESSAGE_LEN: usize = 64;
/// Maximum number of tunnels that `open` opens at the same time.
const MAX_OPENING: usize = 32;

/// Waits for events on a set of sockets.
pub struct Events {
    epoll: Epoll,
    ready: Vec<EpollEvent>,
}

impl Events {
    pub fn new() -> Result<Self, BenchError> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, ready: vec![EpollEvent::empty(); 256] })
    }

    pub fn add(&self, socket: impl std::os::fd::AsFd, key: usize, flags: EpollFlags) -> Result<(), BenchError> {
        Ok(self.epoll.add(socket, EpollEvent::new(flags, key as u64))?)
    }

    /// Returns the keys of ready sockets, or no keys after `time`.
    pub fn wait(&mut self, time: Duration) -> Result<impl Iterator<Item = usize>, BenchError> {
        let millis = u16::try_from(time.as_millis()).unwrap_or(u16::MAX);
        let count = match self.epoll.wait(&mut self.ready, millis) {
            Err(nix::Error::EINTR) => 0,
            count => count?,
        };
        Ok(self.ready[..count].iter().map(|event| event.data() as usize))
    }

    /// Like `wait`, but fails after `IDLE_TIMEOUT` without an event.
    fn wait_any(&mut self) -> Result<impl Iterator<Item = usize>, BenchError> {
        let mut keys = self.wait(IDLE_TIMEOUT)?.peekable();
        match keys.peek() {
            Some(_) => Ok(keys),
            None => Err(failed(format!("no progress for {} s", IDLE_TIMEOUT.as_secs()))),
        }
    }
}

/// Readable and writable, edge-triggered: each answer is a new event.
fn edge_triggered() -> EpollFlags {
    EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET
}

/// A short tunnel in progress.
struct ShortTunnel {
    pending: PendingTunnel,
    started: Instant,
    sent_byte: Option<u8>,
    answered: bool,
}

impl ShortTunnel {
    fn begin(via: Via, to: SocketAddrV4) -> Result<Self, BenchError> {
        let started = Instant::now();
        Ok(Self { pending: PendingTunnel::begin(via, to)?, started, sent_byte: None, answered: false })
    }

    /// Returns true when the byte has been echoed and the stream has ended.
    fn advance(&mut self) -> Result<bool, BenchError> {
        if self.sent_byte.is_none() {
            if !self.pending.advance()? {
                return Ok(false);
            }
            let byte = self.started.elapsed().subsec_nanos() as u8;
            self.pending.stream.write_all(&[byte])?;
            self.sent_byte = Some(byte);
        }
        loop {
            let mut answer = [0; 2];
            match self.pending.stream.read(&mut answer) {
                Ok(0) if self.answered => return Ok(true),
                Ok(0) => return Err(corrupt("a tunnel was closed before its byte was echoed")),
                Ok(1) if Some(answer[0]) == self.sent_byte && !self.answered => self.answered = true,
                Ok(_) => return Err(corrupt("the echo differs from the byte sent")),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Opens tunnels, `concurrency` at a time. Each echoes one byte, then the target closes it. Returns their times.
pub fn short_tunnels(via: Via, echo: SocketAddrV4, concurrency: usize, time: Duration) -> Result<Times, BenchError> {
    let (mut events, mut times, started) = (Events::new()?, Times::default(), Instant::now());
    let mut slots = Vec::new();
    for key in 0..concurrency {
        let short = ShortTunnel::begin(via, echo)?;
        events.add(&short.pending.stream, key, edge_triggered())?;
        slots.push(Some(short));
    }
    let mut left = concurrency;
    while left > 0 {
        let keys: Vec<usize> = events.wait_any()?.collect();
        for key in keys {
            let Some(short) = &mut slots[key] else { continue };
            if !short.advance()? {
                continue;
            }
            times.add(short.started.elapsed());
            slots[key] = None;
            if started.elapsed() >= time {
                left -= 1;
                continue;
            }
            let short = ShortTunnel::begin(via, echo)?;
            events.add(&short.pending.stream, key, edge_triggered())?;
            slots[key] = Some(short);
        }
    }
    Ok(times)
}

/// Opens tunnels that stay open.
pub fn open(via: Via, echo: SocketAddrV4, count: usize) -> Result<Vec<TcpStream>, BenchError> {
    let mut events = Events::new()?;
    let (mut pending_tunnels, mut open): (Vec<Option<PendingTunnel>>, _) = (Vec::new(), Vec::with_capacity(count));
    while open.len() < count {
        while pending_tunnels.len() < count && pending_tunnels.len() - open.len() < MAX_OPENING {
            let pending = PendingTunnel::begin(via, echo)?;
            events.add(&pending.stream, pending_tunnels.len(), edge_triggered())?;
            pending_tunnels.push(Some(pending));
        }
        let keys: Vec<usize> = events.wait_any()?.collect();
        for key in keys {
            if let Some(mut pending) = pending_tunnels[key].take() {
                match pending.advance()? {
                    true => open.push(pending.stream),
                    false => pending_tunnels[key] = Some(pending),
                }
            }
        }
    }
    Ok(open)
}

/// Closes tunnels by sending one byte. Fails unless its echo arrives.
pub fn close(tunnels: Vec<TcpStream>) -> Result<(), BenchError> {
    let (mut events, mut left, mut open) = (Events::new()?, tunnels.len(), vec![true; tunnels.len()]);
    for (key, mut tunnel) in tunnels.iter().enumerate() {
        events.add(tunnel, key, EpollFlags::EPOLLIN)?;
        tunnel.write_all(&[key as u8])?;
    }
    while left > 0 {
        let keys: Vec<usize> = events.wait_any()?.collect();
        for key in keys.into_iter().filter(|key| std::mem::take(&mut open[*key])) {
            match (&tunnels[key]).read(&mut [0; 2]) {
                Ok(1) => left -= 1,
                _ => return Err(corrupt("an idle tunnel did not echo a byte")),
            }
        }
    }
    Ok(())
}

/// The state of one round trip.
#[derive(Clone)]
struct RoundTrip {
    sent: Instant,
    message: &'static [u8],
    received: usize,
    is_over: bool,
}

/// Keeps one message in flight on each tunnel until the time is over. Returns the times of the round trips.
pub fn round_trips(tunnels: &[TcpStream], time: Duration) -> Result<Times, BenchError> {
    let (mut events, mut times, started) = (Events::new()?, Times::default(), Instant::now());
    let mut trips = Vec::with_capacity(tunnels.len());
    for (key, mut tunnel) in tunnels.iter().enumerate() {
        events.add(tunnel, key, EpollFlags::EPOLLIN)?;
        let message = message(key);
        trips.push(RoundTrip { sent: Instant::now(), message, received: 0, is_over: false });
        tunnel.write_all(message)?;
    }
    let mut left = tunnels.len();
    while left > 0 {
        let keys: Vec<usize> = events.wait_any()?.collect();
        for key in keys {
            let (trip, mut tunnel) = (&mut trips[key], &tunnels[key]);
            if !trip.receive(tunnel)? {
                continue;
            }
            times.add(trip.sent.elapsed());
            if started.elapsed() >= time {
                trip.is_over = true;
                left -= 1;
                continue;
            }
            *trip =
                RoundTrip { sent: Instant::now(), message: message(key + times.len()), received: 0, is_over: false };
            tunnel.write_all(trip.message)?;
        }
    }
    Ok(times)
}

fn message(number: usize) -> &'static [u8] {
    let from = number.wrapping_mul(61) % (noise().len() - MESSAGE_LEN);
    &noise()[from..from + MESSAGE_LEN]
}

impl RoundTrip {
    /// Receives without waiting. Returns true if the echo is complete.
    fn receive(&mut self, mut tunnel: &TcpStream) -> Result<bool, BenchError> {
        let mut buffer = [0; MESSAGE_LEN + 1];
        let got = match tunnel.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            got => got?,
        };
        let rest = if self.is_over { &[] } else { &self.message[self.received..] };
        if got == 0 {
            return Err(corrupt("a tunnel was closed"));
        }
        if got > rest.len() || buffer[..got] != rest[..got] {
            return Err(corrupt("the echo differs from the message"));
        }
        self.received += got;
        Ok(self.received == MESSAGE_LEN)
    }
}
