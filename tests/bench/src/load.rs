//! The mixed load of the soak: clients that use tunnels and compare each byte, and clients that reset, stall or
//! disconnect.

use std::thread::Scope;

use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};

use crate::*;

const BUSY_TUNNELS: usize = 32;
const IDLE_TUNNELS: usize = 500;
const ASSOCIATIONS: usize = 4;
/// Time between two round trips on idle tunnels.
const IDLE_TIME: Duration = Duration::from_secs(20);
/// Time for which a stalling client does not read.
const STALL_TIME: Duration = Duration::from_secs(4);
/// Maximum number of errors in the report.
const MAX_SHOWN_ERRORS: usize = 20;

/// One round of a client. The argument is the number of the round.
type Client = fn(&Load, usize) -> Result<(), BenchError>;

/// State shared by all clients.
pub struct Load {
    via: Via,
    proxy: SocketAddrV4,
    echo: SocketAddrV4,
    bulk: SocketAddrV4,
    udp_echo: SocketAddrV4,
    /// A port that refuses connections.
    closed: SocketAddrV4,
    is_over: AtomicBool,
    /// Times of the round trips since the last sample.
    pub times: Mutex<Times>,
    pub errors: Mutex<Vec<String>>,
    pub counts: Counts,
}

/// Counters of the load so far.
#[derive(Default)]
pub struct Counts {
    pub trips: AtomicU64,
    pub tunnels: AtomicU64,
    pub bytes: AtomicU64,
    pub datagrams: AtomicU64,
    pub lost: AtomicU64,
    pub misbehaved: AtomicU64,
    pub errors: AtomicU64,
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

impl Load {
    pub fn new(running: &RunningProxy, target: &Target) -> Result<Self, BenchError> {
        let Via::Socks(proxy) = running.via else { return Err(BenchError::Unsupported) };
        let port = target::listen_anywhere()?.local_addr()?.port();
        Ok(Self {
            via: running.via,
            proxy,
            echo: target.echo,
            bulk: target.bulk,
            udp_echo: target.udp_echo,
            closed: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
            is_over: AtomicBool::new(false),
            times: Mutex::default(),
            errors: Mutex::default(),
            counts: Counts::default(),
        })
    }

    pub fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// Sleeps for `time` or until the end of the load. Returns false at the end.
    fn sleep_until_over(&self, time: Duration) -> bool {
        let started = Instant::now();
        while started.elapsed() < time && !self.is_over.load(Ordering::Relaxed) {
            sleep(time.min(Duration::from_millis(100)));
        }
        !self.is_over.load(Ordering::Relaxed)
    }

    fn record_error(&self, name: &str, error: &BenchError) {
        add(&self.counts.errors, 1);
        let mut errors = self.errors.lock().expect("not poisoned");
        if errors.len() < MAX_SHOWN_ERRORS {
            errors.push(format!("{name}: {error}"));
        }
    }

    /// Starts all clients. They end soon after `end`.
    pub fn start<'scope, 'env: 'scope>(&'env self, scope: &'scope Scope<'scope, 'env>) {
        let clients: [(&str, Client); 9] = [
            ("round trips", Self::trips),
            ("idle tunnels", Self::idle),
            ("short tunnels", Self::short),
            ("download", |load, _| load.transfer(false)),
            ("upload", |load, _| load.transfer(true)),
            ("datagrams", Self::datagrams),
            ("reset", |load, _| load.reset()),
            ("stall", Self::stall),
            ("disconnect", Self::disconnect),
        ];
        for (name, client) in clients {
            scope.spawn(move || {
                for round in 0.. {
                    if let Err(error) = client(self, round) {
                        self.record_error(name, &error);
                    }
                    if !self.sleep_until_over(Duration::from_millis(300)) {
                        return;
                    }
                }
            });
        }
    }

    fn trips(&self, _: usize) -> Result<(), BenchError> {
        let open = tunnels::open(self.via, self.echo, BUSY_TUNNELS)?;
        while self.sleep_until_over(Duration::from_millis(300)) {
            let times = tunnels::round_trips(&open, Duration::from_millis(100))?;
            add(&self.counts.trips, times.len());
            self.times.lock().expect("not poisoned").merge(&times);
        }
        Ok(())
    }

    fn idle(&self, _: usize) -> Result<(), BenchError> {
        let open = tunnels::open(self.via, self.echo, IDLE_TUNNELS)?;
        loop {
            let is_running = self.sleep_until_over(IDLE_TIME);
            add(&self.counts.trips, tunnels::round_trips(&open, Duration::ZERO)?.len());
            if !is_running {
                return tunnels::close(open);
            }
        }
    }

    fn short(&self, _: usize) -> Result<(), BenchError> {
        let times = tunnels::short_tunnels(self.via, self.echo, 8, Duration::from_millis(50))?;
        add(&self.counts.tunnels, times.len());
        Ok(())
    }

    fn transfer(&self, is_upload: bool) -> Result<(), BenchError> {
        let stream = socks::connect(self.via, self.bulk)?;
        let limit = TransferLimit::for_bytes(48 << 20);
        let bytes = target::transfer(&stream, is_upload, limit, true)?;
        add(&self.counts.bytes, bytes as usize);
        if bytes == limit.bytes { Ok(()) } else { Err(corrupt(format!("{bytes} bytes"))) }
    }

    /// Uses a few associations. One of them is replaced in each round.
    fn datagrams(&self, _: usize) -> Result<(), BenchError> {
        let open = |_| Association::open(self.via, self.udp_echo);
        let mut all = (0..ASSOCIATIONS).map(open).collect::<Result<Vec<_>, _>>()?;
        for size in [512, 1200].into_iter().cycle() {
            let trips = udp::round_trips(&mut all, size, 4, Duration::from_millis(50))?;
            add(&self.counts.datagrams, trips.times.len());
            add(&self.counts.lost, trips.lost as usize);
            if !self.sleep_until_over(Duration::from_millis(300)) {
                break;
            }
            all[0] = open(0)?;
        }
        Ok(())
    }

    /// Resets the connection during a download, and with an unread echo.
    fn reset(&self) -> Result<(), BenchError> {
        let mut stream = socks::connect(self.via, self.bulk)?;
        target::begin_download(&stream, TransferLimit::for_bytes(64 << 20))?;
        stream.read_exact(&mut vec![0; 1 << 20])?;
        reset(&stream)?;
        let mut stream = socks::connect(self.via, self.echo)?;
        stream.write_all(&[0; 1000])?;
        reset(&stream)?;
        add(&self.counts.misbehaved, 2);
        Ok(())
    }

    /// Stops reading for `STALL_TIME`. Then reads all data, or disconnects.
    fn stall(&self, round: usize) -> Result<(), BenchError> {
        let limit = TransferLimit::for_bytes(16 << 20);
        let stream = socks::connect(self.via, self.bulk)?;
        target::begin_download(&stream, limit)?;
        self.sleep_until_over(STALL_TIME);
        add(&self.counts.misbehaved, 1);
        if round.is_multiple_of(2) {
            return Ok(());
        }
        match target::finish_download(&stream, true)? {
            bytes if bytes == limit.bytes => Ok(()),
            bytes => Err(corrupt(format!("{bytes} bytes after a stall"))),
        }
    }

    /// Disconnects at each stage of the handshake, or requests a target that refuses.
    fn disconnect(&self, round: usize) -> Result<(), BenchError> {
        const PREFIXES: &[&[u8]] =
            &[b"", b"\x05", b"\x05\x01\x00", b"\x05\x01\x00\x05\x01\x00\x01\x7f", b"GET / HTTP/1.1\r\n\r\n"];
        add(&self.counts.misbehaved, 1);
        let at = round % (2 * PREFIXES.len() + 1);
        let Some(prefix) = PREFIXES.get(at / 2) else {
            return match socks::connect(self.via, self.closed) {
                Err(BenchError::Failed(_)) => Ok(()),
                _ => Err(failed("a tunnel to a closed port was opened")),
            };
        };
        let mut stream = TcpStream::connect(self.proxy)?;
        stream.write_all(prefix)?;
        self.sleep_until_over(Duration::from_millis(if round.is_multiple_of(3) { 1000 } else { 0 }));
        if at.is_multiple_of(2) {
            reset(&stream)?;
        }
        Ok(())
    }
}

/// Sets SO_LINGER, so that close(2) sends a reset.
fn reset(stream: &TcpStream) -> Result<(), BenchError> {
    Ok(setsockopt(stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?)
}
