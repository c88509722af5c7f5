//! The target of the tunnels, a separate process. It has a TCP echo, bulk streams in both directions, a UDP echo, and a
//! sink that counts the datagrams it receives.

use std::io::{Read, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::atomic::AtomicU16;

use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};

use crate::*;

/// First argument of this program when it runs as the target.
pub const TARGET: &str = "target";
/// The echo closes a stream after a message of at most this number of bytes.
const MAX_LAST_MESSAGE: usize = 1;
/// Idle timeout of bulk streams, longer than the stalls of the soak.
const STREAM_TIMEOUT: Duration = Duration::from_secs(60);
/// Receive buffer in bytes of sockets that must not lose datagrams.
const SOCKET_BUFFER_SIZE: usize = 16 << 20;

/// The target's process and addresses.
pub struct Target {
    _process: Process,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub echo: SocketAddrV4,
    pub bulk: SocketAddrV4,
    pub udp_echo: SocketAddrV4,
    pub sink: SocketAddrV4,
}

/// Datagrams of the current step of a flood that the sink has received: step, received, duplicates, corrupt.
pub type SinkCounts = [u64; 4];

impl Target {
    pub fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(TARGET);
        let mut process = Process::start_with_pipes(&command)?;
        let (requests, answers) = (process.child().stdin.take(), process.child().stdout.take());
        let (Some(requests), Some(answers)) = (requests, answers) else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let mut answers = BufReader::new(answers);
        let ports = numbers(&mut answers)?;
        let &[echo, bulk, udp_echo, sink] = ports.as_slice() else { return Err(io::ErrorKind::InvalidData.into()) };
        let at = |port: u64| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port as u16);
        let [echo, bulk, udp_echo, sink] = [at(echo), at(bulk), at(udp_echo), at(sink)];
        Ok(Self { _process: process, requests, answers, echo, bulk, udp_echo, sink })
    }

    pub fn sink_counts(&mut self) -> Result<SinkCounts, BenchError> {
        writeln!(self.requests)?;
        numbers(&mut self.answers)?.try_into().map_err(|_| failed("the sink does not answer"))
    }
}

fn numbers(answers: &mut BufReader<ChildStdout>) -> io::Result<Vec<u64>> {
    let mut line = String::new();
    answers.read_line(&mut line)?;
    Ok(line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
}

/// Downloads from the target and verifies the data, or uploads to it, and it verifies. Returns the number of bytes.
pub fn transfer(
    stream: &TcpStream,
    is_upload: bool,
    limit: TransferLimit,
    compare_all: bool,
) -> Result<u64, BenchError> {
    if is_upload {
        return upload(stream, stream, limit, compare_all);
    }
    begin_download(stream, limit)?;
    finish_download(stream, compare_all)
}

pub fn begin_download(stream: &TcpStream, limit: TransferLimit) -> io::Result<()> {
    request(stream, b'd', limit)
}

pub fn finish_download(mut stream: &TcpStream, compare_all: bool) -> Result<u64, BenchError> {
    let bytes = pattern::receive(stream, compare_all)?;
    stream.write_all(&[1])?;
    Ok(bytes)
}

/// Uploads to the target, which verifies the data. Returns the number of bytes.
pub fn upload(
    mut to: impl Write,
    mut from: impl Read,
    limit: TransferLimit,
    compare_all: bool,
) -> Result<u64, BenchError> {
    request(&mut to, if compare_all { b'U' } else { b'u' }, limit)?;
    let bytes = pattern::send(to, limit)?;
    let mut answer = [0; 8];
    from.read_exact(&mut answer)?;
    match u64::from_le_bytes(answer) {
        got if got == bytes => Ok(bytes),
        got => Err(BenchError::Corrupt(format!("sent {bytes} bytes, the target has verified {got}"))),
    }
}

fn request(mut stream: impl Write, kind: u8, limit: TransferLimit) -> io::Result<()> {
    let mut request = [kind; 17];
    request[1..9].copy_from_slice(&(limit.time.as_millis() as u64).to_le_bytes());
    request[9..].copy_from_slice(&limit.bytes.to_le_bytes());
    stream.write_all(&request)
}

/// Runs the target: prints its ports, then answers each line on stdin with the counts of the sink.
pub fn run() -> io::Result<()> {
    let (echo, bulk) = (listener()?, listener()?);
    let (udp_echo, sink) = (large_buffer_socket()?, large_buffer_socket()?);
    let ports = [echo.local_addr()?, bulk.local_addr()?, udp_echo.local_addr()?, sink.local_addr()?];
    let count = Arc::new(Mutex::new(SinkState::default()));
    let shared = count.clone();
    thread::spawn(move || exit_on_end(serve_echo(&echo)));
    thread::spawn(move || exit_on_end(serve_bulk(&bulk)));
    thread::spawn(move || exit_on_end(serve_datagrams(&udp_echo)));
    thread::spawn(move || exit_on_end(serve_sink(&sink, &shared)));
    let mut out = io::stdout();
    writeln!(out, "{}", ports.map(|addr| addr.port().to_string()).join(" "))?;
    for line in io::stdin().lines() {
        line?;
        let [step, received, duplicates, corrupt] = count.lock().expect("not poisoned").counts;
        writeln!(out, "{step} {received} {duplicates} {corrupt}")?;
    }
    Ok(())
}

/// Ends the process when a service ends. Otherwise its failure would look like a failure of the proxy.
fn exit_on_end(result: Result<(), impl std::fmt::Display>) {
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

/// Listens on a port outside of the range for outgoing connections, because that range may be exhausted.
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

/// Returns a UDP socket with a receive buffer of `SOCKET_BUFFER_SIZE`, or the system's maximum.
pub fn large_buffer_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_SIZE).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_SIZE)?;
    }
    Ok(socket)
}

/// Serves all streams on one thread, which leaves more CPU to the proxy.
///
/// After a message of one byte the target closes first. Otherwise the connections in TIME-WAIT would use up the ports
/// for outgoing connections of proxy and load generator.
fn serve_echo(listener: &TcpListener) -> Result<(), BenchError> {
    let mut events = Events::new()?;
    listener.set_nonblocking(true)?;
    let listening = listener.as_raw_fd() as usize;
    events.add(listener, listening, EpollFlags::EPOLLIN)?;
    let (mut streams, mut buffer): (Vec<Option<TcpStream>>, _) = (Vec::new(), vec![0; 16 * 1024]);
    loop {
        for key in events.wait(Duration::MAX)? {
            if key == listening {
                while let Ok((stream, _)) = listener.accept() {
                    let key = stream.as_raw_fd() as usize;
                    stream.set_nodelay(true)?;
                    events.add(&stream, key, EpollFlags::EPOLLIN)?;
                    streams.resize_with(streams.len().max(key + 1), || None);
                    streams[key] = Some(stream);
                }
            } else if let Some(stream) = &mut streams[key] {
                // The calls do not block long: the data has arrived, and the client is waiting for the echo.
                let echoed = stream.read(&mut buffer).and_then(|got| stream.write_all(&buffer[..got]).map(|()| got));
                if !echoed.is_ok_and(|got| got > MAX_LAST_MESSAGE) {
                    streams[key] = None;
                }
            }
        }
    }
}

fn serve_bulk(listener: &TcpListener) -> io::Result<()> {
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        // The client detects errors.
        thread::spawn(move || serve_bulk_stream(&stream));
    }
}

fn serve_bulk_stream(mut stream: &TcpStream) -> Result<(), BenchError> {
    stream.set_read_timeout(Some(STREAM_TIMEOUT))?;
    stream.set_write_timeout(Some(STREAM_TIMEOUT))?;
    stream.set_nodelay(true)?;
    let mut request = [0; 17];
    stream.read_exact(&mut request)?;
    let number = |at: usize| request[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let limit = TransferLimit { time: Duration::from_millis(number(1)), bytes: number(9) };
    if request[0] == b'd' {
        pattern::send(stream, limit)?;
        // Waits until the client closes.
        return Ok(stream.read_exact(&mut request[..1])?);
    }
    let got = pattern::receive(stream, request[0] == b'U').unwrap_or(0);
    stream.write_all(&got.to_le_bytes())?;
    stream.read(&mut request).map(drop)?;
    Ok(())
}

fn serve_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        // Errors are ICMP messages about earlier datagrams.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let _ = socket.send_to(&buffer[..length], from);
    }
}

#[derive(Default)]
struct SinkState {
    counts: SinkCounts,
    seen: Vec<u64>,
}

impl SinkState {
    fn add(&mut self, datagram: &[u8]) {
        let Some(number) = udp::number(datagram) else { return self.counts[3] += 1 };
        let (step, number) = (number >> 32, number & 0xffff_ffff);
        if step < self.counts[0] {
            // A late datagram of an earlier step.
            return;
        }
        if step > self.counts[0] {
            *self = Self { counts: [step, 0, 0, 0], seen: Vec::new() };
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.seen.len() {
            self.seen.resize(word + 1024, 0);
        }
        let is_duplicate = self.seen[word] & bit != 0;
        self.counts[1 + usize::from(is_duplicate)] += 1;
        self.seen[word] |= bit;
    }
}

fn serve_sink(socket: &UdpSocket, count: &Mutex<SinkState>) -> io::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        if let Ok(length @ MIN_PAYLOAD..) = socket.recv(&mut buffer) {
            count.lock().expect("not poisoned").add(&buffer[..length]);
        }
    }
}
