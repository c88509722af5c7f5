//! Clients of the cluster, which know only the address of HAProxy.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::lab::{TARGET, on};
use crate::support::*;

/// The addresses of HAProxy.
pub const PROXY: [&str; 2] = ["10.2.0.10:1080", "[fd00:2::10]:1080"];
/// Time limit of one session of the load, which includes a lost SYN.
const SESSION_LIMIT: Duration = Duration::from_secs(8);

/// Connects to HAProxy from a client, and sends a request without login. Returns the connection, REP and BND.
pub fn request_from(client: &str, command: u8, dst: SocketAddr) -> (TcpStream, u8, SocketAddr) {
    let proxy = addr(PROXY[usize::from(dst.is_ipv6())]);
    let mut stream = on(client, || greet_at(proxy));
    stream.write_all(&request(command, dst)).expect("request sent");
    let (rep, bnd) = read_reply(&mut stream);
    (stream, rep, bnd)
}

/// Opens a tunnel to the target.
pub fn tunnel_from(client: &str) -> TcpStream {
    on(client, || connect(TARGET[0]))
}

/// Opens a tunnel from this host.
pub fn connect(dst: &str) -> TcpStream {
    let mut stream = greet_at(addr(PROXY[0]));
    stream.write_all(&request(CONNECT, addr(dst))).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0, "CONNECT {dst}");
    stream
}

/// Opens a tunnel to the target as a user, whose password is `secret`.
pub fn login_tunnel_from(client: &str, user: &str) -> TcpStream {
    let mut stream = on(client, || TcpStream::connect(PROXY[0])).expect("HAProxy accepts");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    select_password(&mut stream);
    assert_eq!(send_login(&mut stream, user.as_bytes(), b"secret"), 0, "{user}");
    stream.write_all(&request(CONNECT, addr(TARGET[0]))).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0, "CONNECT from {client}");
    stream
}

/// One whole session: connects, exchanges data, half-closes, and waits for the end of the target.
pub fn session() -> io::Result<()> {
    let mut stream = TcpStream::connect(addr(PROXY[0]))?;
    stream.set_read_timeout(Some(SESSION_LIMIT))?;
    stream.set_write_timeout(Some(SESSION_LIMIT))?;
    stream.write_all(&[5, 1, 0])?;
    stream.read_exact(&mut [0; 2])?;
    stream.write_all(&request(CONNECT, addr(TARGET[0])))?;
    let mut reply = [0; 10];
    stream.read_exact(&mut reply)?;
    stream.write_all(&reply)?;
    stream.shutdown(Shutdown::Write)?;
    let mut echoed = Vec::new();
    stream.read_to_end(&mut echoed)?;
    if reply[1] == 0 && echoed == reply { Ok(()) } else { Err(io::Error::other(format!("{reply:?}, {echoed:?}"))) }
}

/// Sessions of client1 at a constant rate, however long each of them takes.
pub struct Load {
    started: Instant,
    is_over: AtomicBool,
    begun: AtomicUsize,
    /// When each failed session began, and why it failed.
    errors: Mutex<Vec<(Instant, String)>>,
}

/// Threads of the load. At 300 sessions per second, a session may take 200 ms.
const THREADS: usize = 60;

impl Load {
    /// Runs sessions while `work` runs. Returns the number of sessions, and the errors.
    pub fn run(rate: u32, work: impl FnOnce(&Self)) -> (usize, Vec<(Instant, String)>) {
        let load = Self {
            started: Instant::now(),
            is_over: AtomicBool::new(false),
            begun: AtomicUsize::new(0),
            errors: Mutex::default(),
        };
        thread::scope(|scope| {
            on("client1", || (0..THREADS).for_each(|_| drop(scope.spawn(|| load.sessions(rate)))));
            // Otherwise the load would go on after a panic.
            let worked = catch_unwind(AssertUnwindSafe(|| work(&load)));
            load.is_over.store(true, Ordering::Relaxed);
            worked.unwrap_or_else(|panic| resume_unwind(panic));
        });
        let (count, took) = (load.begun.into_inner(), load.started.elapsed().as_secs_f64());
        eprintln!("{count} sessions, {:.0} per second", count as f64 / took);
        (count, load.errors.into_inner().expect("not poisoned"))
    }

    fn sessions(&self, rate: u32) {
        while !self.is_over.load(Ordering::Relaxed) {
            let n = u32::try_from(self.begun.fetch_add(1, Ordering::Relaxed)).expect("fewer sessions");
            let at = self.started + Duration::from_secs(1) * n / rate;
            thread::sleep(at.saturating_duration_since(Instant::now()));
            let begin = Instant::now();
            if let Err(error) = session() {
                let text = format!("{:?}, after {:?}: {error}", begin - self.started, begin.elapsed());
                self.errors.lock().expect("not poisoned").push((begin, text));
            }
        }
    }

    /// Waits until this many further sessions have begun.
    pub fn wait(&self, count: usize) {
        let before = self.begun.load(Ordering::Relaxed);
        wait_until("sessions of the load", LONG_TIMEOUT, || self.begun.load(Ordering::Relaxed) >= before + count);
    }
}
