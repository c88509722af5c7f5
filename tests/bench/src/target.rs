//! What the tunnels lead to, in a process of its own: an echo, bulk streams either way, a datagram echo, and a sink
//! that counts datagrams.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _};
use std::process::{ChildStdin, ChildStdout, Command};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};

use crate::children::Process;
use crate::measure::{Fault, failed};
use crate::pattern::{self, Plan};
use crate::udp::{Content, SMALLEST};

/// The first argument of this program when it is the target.
pub const TARGET: &str = "target";
/// A message to the echo that is no longer than this is the last.
const LAST: usize = 1;
/// How long a bulk stream may stand still: longer than a client of the soak that stalls on purpose.
const STALL: Duration = Duration::from_secs(60);
/// What a socket that must not be the one to lose datagrams asks for, in octets.
const ROOM: usize = 16 << 20;

/// The target as the generator sees it.
pub struct Target {
    _process: Process,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub echo: SocketAddrV4,
    pub bulk: SocketAddrV4,
    pub udp_echo: SocketAddrV4,
    pub sink: SocketAddrV4,
}

/// What the sink got of the latest step of a flood.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sunk {
    pub step: u64,
    pub came: u64,
    pub twice: u64,
    pub wrong: u64,
}

impl Target {
    pub fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(TARGET);
        let mut process = Process::start_with_pipes(&command)?;
        let (orders, answers) = (process.child().stdin.take(), process.child().stdout.take());
        let (Some(orders), Some(answers)) = (orders, answers) else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let mut answers = BufReader::new(answers);
        let ports = numbers(&mut answers)?;
        let &[echo, bulk, udp_echo, sink] = ports.as_slice() else { return Err(io::ErrorKind::InvalidData.into()) };
        let at = |port: u64| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port as u16);
        let [echo, bulk, udp_echo, sink] = [at(echo), at(bulk), at(udp_echo), at(sink)];
        Ok(Self { _process: process, orders, answers, echo, bulk, udp_echo, sink })
    }

    pub fn sunk(&mut self) -> Result<Sunk, Fault> {
        writeln!(self.orders)?;
        match numbers(&mut self.answers)?[..] {
            [step, came, twice, wrong] => Ok(Sunk { step, came, twice, wrong }),
            _ => Err(failed("the sink does not answer")),
        }
    }
}

fn numbers(answers: &mut BufReader<ChildStdout>) -> io::Result<Vec<u64>> {
    let mut line = String::new();
    answers.read_line(&mut line)?;
    Ok(line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
}

/// Asks the target for octets; how many came, all looked at.
pub fn download(stream: &TcpStream, plan: Plan, whole: bool) -> Result<u64, Fault> {
    begin_download(stream, plan)?;
    finish_download(stream, whole)
}

pub fn begin_download(stream: &TcpStream, plan: Plan) -> io::Result<()> {
    order(stream, b'd', plan)
}

pub fn finish_download(mut stream: &TcpStream, whole: bool) -> Result<u64, Fault> {
    let octets = pattern::receive(stream, whole)?;
    stream.write_all(&[1])?;
    Ok(octets)
}

/// Sends octets to the target, which says how many it got and that they were right.
pub fn upload(stream: &TcpStream, plan: Plan, whole: bool) -> Result<u64, Fault> {
    upload_over(stream, stream, plan, whole)
}

pub fn upload_over(mut to: impl Write, mut from: impl Read, plan: Plan, whole: bool) -> Result<u64, Fault> {
    order(&mut to, if whole { b'U' } else { b'u' }, plan)?;
    let octets = pattern::send(to, plan)?;
    let mut answer = [0; 8];
    from.read_exact(&mut answer)?;
    match u64::from_le_bytes(answer) {
        got if got == octets => Ok(octets),
        got => Err(Fault::Wrong(format!("sent {octets} octets, the target has {got} right ones"))),
    }
}

fn order(mut stream: impl Write, what: u8, plan: Plan) -> io::Result<()> {
    let mut order = [what; 17];
    order[1..9].copy_from_slice(&(plan.time.as_millis() as u64).to_le_bytes());
    order[9..].copy_from_slice(&plan.octets.to_le_bytes());
    stream.write_all(&order)
}

/// The process: says its ports, then answers a line with what the sink got, until there are no more lines.
pub fn run() -> io::Result<()> {
    let (echo, bulk) = (listener()?, listener()?);
    let (udp_echo, sink) = (roomy_socket()?, roomy_socket()?);
    let ports = [echo.local_addr()?, bulk.local_addr()?, udp_echo.local_addr()?, sink.local_addr()?];
    let count = Arc::new(Mutex::new(Counter::default()));
    let shared = count.clone();
    thread::spawn(move || end(serve_echo(&echo)));
    thread::spawn(move || end(serve_bulk(&bulk)));
    thread::spawn(move || end(serve_datagrams(&udp_echo)));
    thread::spawn(move || end(swallow(&sink, &shared)));
    let mut out = io::stdout();
    writeln!(out, "{}", ports.map(|addr| addr.port().to_string()).join(" "))?;
    for line in io::stdin().lines() {
        line?;
        let sunk = count.lock().expect("no panic holds it").sunk;
        writeln!(out, "{} {} {} {}", sunk.step, sunk.came, sunk.twice, sunk.wrong)?;
    }
    Ok(())
}

/// Half a target is none: whoever waits for the rest would blame the proxy.
fn end(result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("bench: target: {error}");
    }
    std::process::exit(1);
}

fn listener() -> io::Result<TcpListener> {
    let listener = listen_anywhere()?;
    listen(&listener, Backlog::new(4096)?)?;
    Ok(listener)
}

/// Listens on a port that the system does not give to outgoing connections, of which there may be too many.
pub fn listen_anywhere() -> io::Result<TcpListener> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let mut last = Err(io::ErrorKind::AddrInUse.into());
    for _ in 0..1000 {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add((std::process::id() as u16).wrapping_mul(31));
        last = TcpListener::bind((Ipv4Addr::LOCALHOST, 12_000 + offset % 20_000));
        if last.is_ok() {
            break;
        }
    }
    last
}

/// A datagram socket with as much room as one may have.
pub fn roomy_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    if setsockopt(&socket, sockopt::RcvBufForce, &ROOM).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &ROOM)?;
    }
    Ok(socket)
}

/// One thread for all streams, however many: the CPU is needed elsewhere.
///
/// A message of one octet is the last one: the target closes first, so that nobody's ports for outgoing connections are
/// used up by ones that linger after their end.
fn serve_echo(listener: &TcpListener) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let watch = |fd: &dyn AsFd, key: usize| {
        epoll.add(fd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key as u64)).map_err(io::Error::from)
    };
    listener.set_nonblocking(true)?;
    watch(listener, listener.as_raw_fd() as usize)?;
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    let (mut events, mut buffer) = (vec![EpollEvent::empty(); 256], vec![0; 16 * 1024]);
    loop {
        let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::Error::EINTR) => 0,
            ready => ready?,
        };
        for event in &events[..ready] {
            let key = event.data() as usize;
            if key == listener.as_raw_fd() as usize {
                while let Ok((stream, _)) = listener.accept() {
                    let key = stream.as_raw_fd() as usize;
                    stream.set_nodelay(true)?;
                    watch(&stream, key)?;
                    streams.resize_with(streams.len().max(key + 1), || None);
                    streams[key] = Some(stream);
                }
            } else if let Some(stream) = &mut streams[key] {
                // The streams block, which what was announced does not do, nor what clients that wait for it get back.
                let alive = stream.read(&mut buffer).and_then(|got| stream.write_all(&buffer[..got]).map(|()| got));
                if !alive.is_ok_and(|got| got > LAST) {
                    streams[key] = None;
                }
            }
        }
    }
}

fn serve_bulk(listener: &TcpListener) -> io::Result<()> {
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        // A client that breaks off is its own affair: it knows what it got.
        thread::spawn(move || bulk(&stream));
    }
}

fn bulk(mut stream: &TcpStream) -> Result<(), Fault> {
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    stream.set_nodelay(true)?;
    let mut order = [0; 17];
    stream.read_exact(&mut order)?;
    let number = |at: usize| order[at..at + 8].iter().rev().fold(0, |number, octet| number << 8 | u64::from(*octet));
    let plan = Plan { time: Duration::from_millis(number(1)), octets: number(9) };
    if order[0] == b'd' {
        pattern::send(stream, plan)?;
        // The client closes first, as it does in the other rows.
        return Ok(stream.read_exact(&mut order[..1])?);
    }
    let got = pattern::receive(stream, order[0] == b'U').unwrap_or(0);
    stream.write_all(&got.to_le_bytes())?;
    stream.read(&mut order).map(drop)?;
    Ok(())
}

fn serve_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        // Errors are those of earlier datagrams, whose sender has gone.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let _ = socket.send_to(&buffer[..length], from);
    }
}

#[derive(Default)]
struct Counter {
    sunk: Sunk,
    seen: Vec<u64>,
}

impl Counter {
    fn add(&mut self, datagram: &[u8]) {
        let Some(number) = Content::number(datagram) else { return self.sunk.wrong += 1 };
        let (step, number) = (number >> 32, number & 0xffff_ffff);
        match step.cmp(&self.sunk.step) {
            // What was queued somewhere is no part of the step that runs now.
            std::cmp::Ordering::Less => return,
            std::cmp::Ordering::Greater => *self = Self { sunk: Sunk { step, ..Sunk::default() }, seen: Vec::new() },
            std::cmp::Ordering::Equal => {}
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.seen.len() {
            self.seen.resize(word + 1024, 0);
        }
        match self.seen[word] & bit == 0 {
            true => self.sunk.came += 1,
            false => self.sunk.twice += 1,
        }
        self.seen[word] |= bit;
    }
}

fn swallow(socket: &UdpSocket, count: &Mutex<Counter>) -> io::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        if let Ok(length @ SMALLEST..) = socket.recv(&mut buffer) {
            count.lock().expect("no panic holds it").add(&buffer[..length]);
        }
    }
}
