//! Datagrams through associations: round trips with a window, and floods in one direction at increasing rates.

use nix::sys::prctl::set_timerslack;

use crate::*;

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

/// Writes the payload of a datagram: its number and pseudo-random bytes.
fn write_payload(number: u64, datagram: &mut [u8]) {
    let (head, body) = datagram.split_at_mut(MIN_PAYLOAD);
    head.copy_from_slice(&number.to_le_bytes());
    body.copy_from_slice(body_of(number, body.len()));
}

fn body_of(number: u64, length: usize) -> &'static [u8] {
    let from = (number % 4096) as usize;
    &noise()[from..from + length]
}

/// Returns the number in a payload, or `None` if it is corrupt.
pub fn number(datagram: &[u8]) -> Option<u64> {
    let (head, body) = datagram.split_first_chunk()?;
    let number = u64::from_le_bytes(*head);
    (body == body_of(number, body.len())).then_some(number)
}

/// A socket whose datagrams reach one address of the target.
pub struct Association {
    socket: UdpSocket,
    header: Vec<u8>,
    /// Number of the next datagram. Other associations use other ranges.
    next: u64,
    /// Datagrams in flight, with number and time of sending.
    in_flight: Vec<(u64, Instant)>,
    /// Numbers that count as lost, but may still arrive.
    expired: Vec<u64>,
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
        let next = NEXT_NUMBER.fetch_add(1 << 32, Ordering::Relaxed);
        Ok(Self { socket, header, next, in_flight: Vec::new(), expired: Vec::new(), _stream: stream })
    }

    fn send(&self, number: u64, size: usize) -> io::Result<()> {
        let mut buffer = [0; 2048];
        let start = self.header.len();
        buffer[..start].copy_from_slice(&self.header);
        write_payload(number, &mut buffer[start..start + size]);
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
        match number(datagram) {
            Some(number) if datagram.len() == size => Ok(Some(number)),
            _ => Err(corrupt("the echo differs from the datagram")),
        }
    }

    /// Sends the next datagram of a round trip.
    fn begin(&mut self, size: usize) -> Result<(), BenchError> {
        self.in_flight.push((self.next, Instant::now()));
        self.next += 1;
        Ok(self.send(self.next - 1, size)?)
    }

    /// Removes the datagrams that count as lost. Returns their number.
    fn expire(&mut self) -> u64 {
        let before = self.expired.len();
        let late = self.in_flight.extract_if(.., |(_, sent)| sent.elapsed() >= LOSS_TIMEOUT);
        self.expired.extend(late.map(|(number, _)| number));
        (self.expired.len() - before) as u64
    }

    /// Receives the answers that have arrived, and begins a new round trip for each one unless the time is over.
    fn receive_answers(&mut self, size: usize, is_over: bool, times: &mut Times) -> Result<(), BenchError> {
        while let Some(number) = self.receive(size)? {
            if let Some(at) = self.in_flight.iter().position(|(sent, _)| *sent == number) {
                times.add(self.in_flight.swap_remove(at).1.elapsed());
                if !is_over {
                    self.begin(size)?;
                }
            } else if let Some(at) = self.expired.iter().position(|expired| *expired == number) {
                self.expired.swap_remove(at);
            } else {
                return Err(corrupt("a datagram arrived twice, or at another association"));
            }
        }
        Ok(())
    }
}

/// Results of round trips.
#[derive(Default)]
pub struct RoundTrips {
    pub times: Times,
    pub lost: u64,
}

/// Keeps `window` datagrams of `size` bytes in flight on each association until the time is over.
pub fn round_trips(
    all: &mut [Association],
    size: usize,
    window: usize,
    time: Duration,
) -> Result<RoundTrips, BenchError> {
    let (mut events, mut trips, started) = (Events::new()?, RoundTrips::default(), Instant::now());
    let mut last_check = started;
    for (key, association) in all.iter_mut().enumerate() {
        events.add(&association.socket, key, EpollFlags::EPOLLIN)?;
        (0..window).try_for_each(|_| association.begin(size))?;
    }
    while all.iter().any(|association| !association.in_flight.is_empty()) {
        let keys = events.wait(LOSS_TIMEOUT / 4)?;
        let is_over = started.elapsed() >= time;
        for key in keys {
            all[key].receive_answers(size, is_over, &mut trips.times)?;
        }
        if last_check.elapsed() > LOSS_TIMEOUT / 4 {
            last_check = Instant::now();
            for association in &mut *all {
                trips.lost += association.expire();
                while !is_over && association.in_flight.len() < window {
                    association.begin(size)?;
                }
            }
        }
    }
    match trips.times.len() {
        0 => Err(failed("no datagram was echoed")),
        _ => Ok(trips),
    }
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
            let [step, received, duplicates, damaged] = target.sink_counts()?;
            if duplicates > 0 || damaged > 0 {
                return Err(corrupt(format!("{duplicates} duplicate datagrams, {damaged} corrupt")));
            }
            if received == count && step == first >> 32 {
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
