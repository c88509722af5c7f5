//! The mixed load of the soak: clients that use their tunnels and look at every octet, and clients that misbehave.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Scope, sleep};
use std::time::{Duration, Instant};

use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};

use crate::measure::{Fault, Times, Via, failed, wrong};
use crate::pattern::Plan;
use crate::proxies::Running;
use crate::target::{self, Target};
use crate::udp::{self, Association};
use crate::{socks, tunnels};

const BUSY_TUNNELS: usize = 32;
const IDLE_TUNNELS: usize = 500;
const ASSOCIATIONS: usize = 4;
/// How long idle tunnels are left alone.
const SILENCE: Duration = Duration::from_secs(20);
/// How long one who stalls does so.
const STALL: Duration = Duration::from_secs(4);
/// How many faults are kept to be shown.
const SHOWN: usize = 20;

/// What a kind of client does, given how often it has done so.
type Client = fn(&Load, usize) -> Result<(), Fault>;

/// What all clients share.
pub struct Load {
    via: Via,
    proxy: SocketAddrV4,
    echo: SocketAddrV4,
    bulk: SocketAddrV4,
    udp_echo: SocketAddrV4,
    /// Where nobody listens.
    nobody: SocketAddrV4,
    over: AtomicBool,
    /// Of round trips, since they were last taken.
    pub times: Mutex<Times>,
    pub faults: Mutex<Vec<String>>,
    pub counts: Counts,
}

/// What was done so far.
#[derive(Default)]
pub struct Counts {
    pub trips: AtomicU64,
    pub tunnels: AtomicU64,
    pub octets: AtomicU64,
    pub datagrams: AtomicU64,
    pub lost: AtomicU64,
    pub misbehaved: AtomicU64,
    pub faults: AtomicU64,
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

impl Load {
    pub fn new(running: &Running, target: &Target) -> Result<Self, Fault> {
        let Via::Socks(proxy) = running.via else { return Err(Fault::None) };
        let port = target::listen_anywhere()?.local_addr()?.port();
        Ok(Self {
            via: running.via,
            proxy,
            echo: target.echo,
            bulk: target.bulk,
            udp_echo: target.udp_echo,
            nobody: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
            over: AtomicBool::new(false),
            times: Mutex::default(),
            faults: Mutex::default(),
            counts: Counts::default(),
        })
    }

    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Sleeps, but not past the end; whether it goes on.
    fn rest(&self, time: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < time && !self.over.load(Ordering::Relaxed) {
            sleep(time.min(Duration::from_millis(100)));
        }
        !self.over.load(Ordering::Relaxed)
    }

    fn note(&self, name: &str, fault: &Fault) {
        add(&self.counts.faults, 1);
        let mut faults = self.faults.lock().expect("no panic holds it");
        if faults.len() < SHOWN {
            faults.push(format!("{name}: {fault}"));
        }
    }

    /// Starts all clients, each of which ends soon after `end`.
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
            ("vanish", Self::vanish),
        ];
        for (name, client) in clients {
            scope.spawn(move || {
                for round in 0.. {
                    if let Err(fault) = client(self, round) {
                        self.note(name, &fault);
                    }
                    if !self.rest(Duration::from_millis(300)) {
                        return;
                    }
                }
            });
        }
    }

    fn trips(&self, _: usize) -> Result<(), Fault> {
        let open = tunnels::open(self.via, self.echo, BUSY_TUNNELS)?;
        while self.rest(Duration::from_millis(300)) {
            let times = tunnels::round_trips(&open, Duration::from_millis(100))?;
            add(&self.counts.trips, times.len());
            self.times.lock().expect("no panic holds it").merge(&times);
        }
        Ok(())
    }

    fn idle(&self, _: usize) -> Result<(), Fault> {
        let open = tunnels::open(self.via, self.echo, IDLE_TUNNELS)?;
        loop {
            let goes_on = self.rest(SILENCE);
            add(&self.counts.trips, tunnels::round_trips(&open, Duration::ZERO)?.len());
            if !goes_on {
                return tunnels::close(open);
            }
        }
    }

    fn short(&self, _: usize) -> Result<(), Fault> {
        let times = tunnels::short_tunnels(self.via, self.echo, 8, Duration::from_millis(50))?;
        add(&self.counts.tunnels, times.len());
        Ok(())
    }

    fn transfer(&self, up: bool) -> Result<(), Fault> {
        let stream = socks::connect(self.via, self.bulk)?;
        let plan = Plan::for_octets(48 << 20);
        let octets = if up { target::upload(&stream, plan, true) } else { target::download(&stream, plan, true) }?;
        add(&self.counts.octets, octets as usize);
        if octets == plan.octets { Ok(()) } else { Err(wrong(format!("{octets} octets"))) }
    }

    /// A few associations that stay, and one that is new each time.
    fn datagrams(&self, _: usize) -> Result<(), Fault> {
        let open = |_| Association::open(self.via, self.udp_echo);
        let mut all = (0..ASSOCIATIONS).map(open).collect::<Result<Vec<_>, _>>()?;
        for size in [512, 1200].into_iter().cycle() {
            let trips = udp::round_trips(&all, size, 4, Duration::from_millis(50))?;
            add(&self.counts.datagrams, trips.times.len());
            add(&self.counts.lost, trips.lost as usize);
            if !self.rest(Duration::from_millis(300)) {
                break;
            }
            all[0] = open(0)?;
        }
        Ok(())
    }

    /// Breaks off in the middle of a transfer, each way.
    fn reset(&self) -> Result<(), Fault> {
        let mut stream = socks::connect(self.via, self.bulk)?;
        target::begin_download(&stream, Plan::for_octets(64 << 20))?;
        stream.read_exact(&mut vec![0; 1 << 20])?;
        reset(&stream)?;
        let mut stream = socks::connect(self.via, self.echo)?;
        stream.write_all(&[0; 1000])?;
        reset(&stream)?;
        add(&self.counts.misbehaved, 2);
        Ok(())
    }

    /// Does not read for a while, and then everything, or nothing any more.
    fn stall(&self, round: usize) -> Result<(), Fault> {
        let plan = Plan::for_octets(16 << 20);
        let stream = socks::connect(self.via, self.bulk)?;
        target::begin_download(&stream, plan)?;
        self.rest(STALL);
        add(&self.counts.misbehaved, 1);
        if round.is_multiple_of(2) {
            return Ok(());
        }
        match target::finish_download(&stream, true)? {
            octets if octets == plan.octets => Ok(()),
            octets => Err(wrong(format!("{octets} octets after a stall"))),
        }
    }

    /// Goes away at every point of the handshake, or asks for what can't be had.
    fn vanish(&self, round: usize) -> Result<(), Fault> {
        const SAID: &[&[u8]] =
            &[b"", b"\x05", b"\x05\x01\x00", b"\x05\x01\x00\x05\x01\x00\x01\x7f", b"GET / HTTP/1.1\r\n\r\n"];
        add(&self.counts.misbehaved, 1);
        let at = round % (2 * SAID.len() + 1);
        let Some(said) = SAID.get(at / 2) else {
            return match socks::connect(self.via, self.nobody) {
                Err(Fault::Failed(_)) => Ok(()),
                _ => Err(failed("a tunnel to where nobody listens was opened")),
            };
        };
        let mut stream = TcpStream::connect(self.proxy)?;
        stream.write_all(said)?;
        self.rest(Duration::from_millis(if round.is_multiple_of(3) { 1000 } else { 0 }));
        if at.is_multiple_of(2) {
            reset(&stream)?;
        }
        Ok(())
    }
}

/// Makes the close a reset.
fn reset(stream: &TcpStream) -> Result<(), Fault> {
    Ok(setsockopt(stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?)
}
