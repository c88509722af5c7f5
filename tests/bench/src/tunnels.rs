//! Many tunnels on one thread: opened and closed as fast as they go, or kept and used for round trips.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::measure::{Fault, PATIENCE, Times, Via, failed, wrong};
use crate::pattern::noise;
use crate::socks::Dial;

/// What a round trip carries.
pub const MESSAGE: usize = 64;
/// How many tunnels are being opened at once when many are to stay open.
const OPENING: usize = 32;

/// Waits for events of a set of sockets, and gives up when none comes.
pub struct Events {
    epoll: Epoll,
    ready: Vec<EpollEvent>,
}

impl Events {
    pub fn new() -> Result<Self, Fault> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, ready: vec![EpollEvent::empty(); 256] })
    }

    pub fn add(&self, socket: impl std::os::fd::AsFd, key: usize, flags: EpollFlags) -> Result<(), Fault> {
        Ok(self.epoll.add(socket, EpollEvent::new(flags, key as u64))?)
    }

    /// The keys of sockets that have something, which are none when the time is over.
    pub fn within(&mut self, time: Duration) -> Result<impl Iterator<Item = usize>, Fault> {
        let millis = u16::try_from(time.as_millis()).unwrap_or(u16::MAX);
        let count = match self.epoll.wait(&mut self.ready, millis) {
            Err(nix::Error::EINTR) => 0,
            count => count?,
        };
        Ok(self.ready[..count].iter().map(|event| event.data() as usize))
    }

    fn next(&mut self) -> Result<impl Iterator<Item = usize>, Fault> {
        let mut keys = self.within(PATIENCE)?.peekable();
        match keys.peek() {
            Some(_) => Ok(keys),
            None => Err(failed(format!("nothing happened for {} s", PATIENCE.as_secs()))),
        }
    }
}

/// Both directions, told once: the answers come one at a time, and what was not there is announced.
fn both() -> EpollFlags {
    EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET
}

/// A short tunnel on its way.
struct Short {
    dial: Dial,
    began: Instant,
    asked: Option<u8>,
    answered: bool,
}

impl Short {
    fn begin(via: Via, to: SocketAddrV4) -> Result<Self, Fault> {
        let began = Instant::now();
        Ok(Self { dial: Dial::begin(via, to)?, began, asked: None, answered: false })
    }

    /// Whether its octet has come back, and then the end.
    fn turn(&mut self) -> Result<bool, Fault> {
        if self.asked.is_none() {
            if !self.dial.turn()? {
                return Ok(false);
            }
            let octet = self.began.elapsed().subsec_nanos() as u8;
            self.dial.stream.write_all(&[octet])?;
            self.asked = Some(octet);
        }
        loop {
            let mut answer = [0; 2];
            match self.dial.stream.read(&mut answer) {
                Ok(0) if self.answered => return Ok(true),
                Ok(0) => return Err(wrong("a tunnel was closed before its octet came back")),
                Ok(1) if Some(answer[0]) == self.asked && !self.answered => self.answered = true,
                Ok(_) => return Err(wrong("another octet came back")),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Opens tunnels, `at_once` at a time: one octet there, the same one back, closed by the target. How long each took.
pub fn short_tunnels(via: Via, echo: SocketAddrV4, at_once: usize, time: Duration) -> Result<Times, Fault> {
    let (mut events, mut times, began) = (Events::new()?, Times::default(), Instant::now());
    let mut slots = Vec::new();
    for key in 0..at_once {
        let short = Short::begin(via, echo)?;
        events.add(&short.dial.stream, key, both())?;
        slots.push(Some(short));
    }
    let mut left = at_once;
    while left > 0 {
        let keys: Vec<usize> = events.next()?.collect();
        for key in keys {
            let Some(short) = &mut slots[key] else { continue };
            if !short.turn()? {
                continue;
            }
            times.add(short.began.elapsed());
            slots[key] = None;
            if began.elapsed() >= time {
                left -= 1;
                continue;
            }
            let short = Short::begin(via, echo)?;
            events.add(&short.dial.stream, key, both())?;
            slots[key] = Some(short);
        }
    }
    Ok(times)
}

/// Tunnels that stay open.
pub fn open(via: Via, echo: SocketAddrV4, count: usize) -> Result<Vec<TcpStream>, Fault> {
    let mut events = Events::new()?;
    let (mut dials, mut open): (Vec<Option<Dial>>, _) = (Vec::new(), Vec::with_capacity(count));
    while open.len() < count {
        while dials.len() < count && dials.len() - open.len() < OPENING {
            let dial = Dial::begin(via, echo)?;
            events.add(&dial.stream, dials.len(), both())?;
            dials.push(Some(dial));
        }
        let keys: Vec<usize> = events.next()?.collect();
        for key in keys {
            if let Some(mut dial) = dials[key].take() {
                match dial.turn()? {
                    true => open.push(dial.stream),
                    false => dials[key] = Some(dial),
                }
            }
        }
    }
    Ok(open)
}

/// Has the target close tunnels, once each has passed an octet both ways.
pub fn close(tunnels: Vec<TcpStream>) -> Result<(), Fault> {
    let (mut events, mut left, mut open) = (Events::new()?, tunnels.len(), vec![true; tunnels.len()]);
    for (key, mut tunnel) in tunnels.iter().enumerate() {
        events.add(tunnel, key, EpollFlags::EPOLLIN)?;
        tunnel.write_all(&[key as u8])?;
    }
    while left > 0 {
        let keys: Vec<usize> = events.next()?.collect();
        for key in keys.into_iter().filter(|key| std::mem::take(&mut open[*key])) {
            match (&tunnels[key]).read(&mut [0; 2]) {
                Ok(1) => left -= 1,
                _ => return Err(wrong("an idle tunnel did not pass an octet")),
            }
        }
    }
    Ok(())
}

/// What comes back of one message.
#[derive(Clone)]
struct Trip {
    sent: Instant,
    message: &'static [u8],
    have: usize,
    over: bool,
}

/// A message a tunnel, and the next one when it has come back, until the time is over. How long each took.
pub fn round_trips(tunnels: &[TcpStream], time: Duration) -> Result<Times, Fault> {
    let (mut events, mut times, began) = (Events::new()?, Times::default(), Instant::now());
    let mut trips = Vec::with_capacity(tunnels.len());
    for (key, mut tunnel) in tunnels.iter().enumerate() {
        events.add(tunnel, key, EpollFlags::EPOLLIN)?;
        let message = message(key);
        trips.push(Trip { sent: Instant::now(), message, have: 0, over: false });
        tunnel.write_all(message)?;
    }
    let mut left = tunnels.len();
    while left > 0 {
        let keys: Vec<usize> = events.next()?.collect();
        for key in keys {
            let (trip, mut tunnel) = (&mut trips[key], &tunnels[key]);
            if !trip.back(tunnel)? {
                continue;
            }
            times.add(trip.sent.elapsed());
            if began.elapsed() >= time {
                trip.over = true;
                left -= 1;
                continue;
            }
            *trip = Trip { sent: Instant::now(), message: message(key + times.len()), have: 0, over: false };
            tunnel.write_all(trip.message)?;
        }
    }
    Ok(times)
}

fn message(number: usize) -> &'static [u8] {
    let from = number.wrapping_mul(61) % (noise().len() - MESSAGE);
    &noise()[from..from + MESSAGE]
}

impl Trip {
    fn back(&mut self, mut tunnel: &TcpStream) -> Result<bool, Fault> {
        let mut buffer = [0; MESSAGE + 1];
        let got = match tunnel.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            got => got?,
        };
        let rest = if self.over { &[] } else { &self.message[self.have..] };
        if got == 0 {
            return Err(wrong("a tunnel was closed"));
        }
        if got > rest.len() || buffer[..got] != rest[..got] {
            return Err(wrong("other octets came back"));
        }
        self.have += got;
        Ok(self.have == MESSAGE)
    }
}
