//! Many tunnels on one thread: opened and closed as fast as possible, or kept open for round trips.

use crate::*;

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
    pub fn wait(&mut self, time: Duration) -> Result<Vec<usize>, BenchError> {
        let millis = u16::try_from(time.as_millis()).unwrap_or(u16::MAX);
        let count = match self.epoll.wait(&mut self.ready, millis) {
            Err(nix::Error::EINTR) => 0,
            count => count?,
        };
        Ok(self.ready[..count].iter().map(|event| event.data() as usize).collect())
    }

    /// Like `wait`, but fails after `IDLE_TIMEOUT` without an event.
    pub fn wait_any(&mut self) -> Result<Vec<usize>, BenchError> {
        let keys = self.wait(IDLE_TIMEOUT)?;
        match keys.is_empty() {
            false => Ok(keys),
            true => Err(failed(format!("no progress for {} s", IDLE_TIMEOUT.as_secs()))),
        }
    }
}

/// Readable and writable, edge-triggered: each answer is a new event.
pub fn edge_triggered() -> EpollFlags {
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
        Ok(Self { pending: PendingTunnel::begin(via, socks::CONNECT, to)?, started, sent_byte: None, answered: false })
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
    let begin = |events: &Events, key| {
        let short = ShortTunnel::begin(via, echo)?;
        events.add(&short.pending.stream, key, edge_triggered())?;
        Ok::<_, BenchError>(Some(short))
    };
    let mut slots = (0..concurrency).map(|key| begin(&events, key)).collect::<Result<Vec<_>, _>>()?;
    while slots.iter().any(Option::is_some) {
        for key in events.wait_any()? {
            let Some(short) = &mut slots[key] else { continue };
            if short.advance()? {
                times.add(short.started.elapsed());
                // Closes the tunnel before the next one begins.
                slots[key] = None;
                if started.elapsed() < time {
                    slots[key] = begin(&events, key)?;
                }
            }
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
            let pending = PendingTunnel::begin(via, socks::CONNECT, echo)?;
            events.add(&pending.stream, pending_tunnels.len(), edge_triggered())?;
            pending_tunnels.push(Some(pending));
        }
        for key in events.wait_any()? {
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
        for key in events.wait_any()?.into_iter().filter(|key| std::mem::take(&mut open[*key])) {
            match (&tunnels[key]).read(&mut [0; 2]) {
                Ok(1) => left -= 1,
                _ => return Err(corrupt("an idle tunnel did not echo a byte")),
            }
        }
    }
    Ok(())
}

/// The state of one round trip.
struct RoundTrip {
    sent: Instant,
    message: &'static [u8],
    received: usize,
}

/// Keeps one message in flight on each tunnel until the time is over. Returns the times of the round trips.
pub fn round_trips(tunnels: &[TcpStream], time: Duration) -> Result<Times, BenchError> {
    let (mut events, mut times, started) = (Events::new()?, Times::default(), Instant::now());
    let begin = |mut tunnel: &TcpStream, number| {
        let trip = RoundTrip { sent: Instant::now(), message: message(number), received: 0 };
        tunnel.write_all(trip.message)?;
        Ok::<_, BenchError>(trip)
    };
    let mut trips = Vec::with_capacity(tunnels.len());
    for (key, tunnel) in tunnels.iter().enumerate() {
        events.add(tunnel, key, EpollFlags::EPOLLIN)?;
        trips.push(begin(tunnel, key)?);
    }
    let mut left = tunnels.len();
    while left > 0 {
        for key in events.wait_any()? {
            if trips[key].receive(&tunnels[key])? {
                times.add(trips[key].sent.elapsed());
                match started.elapsed() < time {
                    true => trips[key] = begin(&tunnels[key], key + times.len())?,
                    false => left -= 1,
                }
            }
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
        // Empty after the last round trip: an answer would be one too many.
        let rest = &self.message[self.received..];
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
