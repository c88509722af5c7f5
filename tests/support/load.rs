//! Whole sessions at a constant rate, while something happens to the server.

use super::*;

/// Time limit of each step of a session, which includes a lost SYN and the wait in a backlog.
const STEP_LIMIT: Duration = Duration::from_secs(20);
/// The threads of the sessions need little: while the server accepts nothing, there are thousands.
const STACK: usize = 256 << 10;

/// Sessions that begin at a constant rate, however long each of them takes.
pub struct Load {
    started: Instant,
    is_over: AtomicBool,
    begun: AtomicUsize,
    /// When each failed session began, and why it failed.
    errors: Mutex<Vec<(Instant, String)>>,
    slowest: Mutex<Duration>,
}

pub struct LoadReport {
    /// Sessions that began per second.
    pub rate: f64,
    pub errors: Vec<(Instant, String)>,
    /// Duration of the slowest session.
    pub slowest: Duration,
}

/// Ends the load, also after a panic.
struct EndGuard<'a>(&'a Load);

impl Drop for EndGuard<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

impl Load {
    /// Runs sessions while `work` runs, in the network namespace of the caller. `session` gets a number.
    pub fn run(rate: u32, session: impl Fn(usize) -> io::Result<()> + Sync, work: impl FnOnce(&Self)) -> LoadReport {
        let load = Self {
            started: Instant::now(),
            is_over: AtomicBool::new(false),
            begun: AtomicUsize::new(0),
            errors: Mutex::default(),
            slowest: Mutex::default(),
        };
        let (this, session) = (&load, &session);
        let rate = thread::scope(|scope| {
            scope.spawn(move || {
                for n in (0..).take_while(|_| !this.is_over.load(Ordering::Relaxed)) {
                    let at = this.started + Duration::from_secs(1) * n / rate;
                    thread::sleep(at.saturating_duration_since(Instant::now()));
                    let thread = thread::Builder::new().stack_size(STACK);
                    thread.spawn_scoped(scope, move || this.count(session)).expect("a thread");
                }
            });
            let _end = EndGuard(this);
            work(this);
            this.begun.load(Ordering::Relaxed) as f64 / this.started.elapsed().as_secs_f64()
        });
        let (errors, slowest) = (load.errors.into_inner(), load.slowest.into_inner());
        let report =
            LoadReport { rate, errors: errors.expect("not poisoned"), slowest: slowest.expect("not poisoned") };
        eprintln!("{:.0} sessions per second, the slowest took {:?}", report.rate, report.slowest);
        report
    }

    fn count(&self, session: impl FnOnce(usize) -> io::Result<()>) {
        let (begin, n) = (Instant::now(), self.begun.fetch_add(1, Ordering::Relaxed));
        let result = session(n);
        let took = begin.elapsed();
        let mut slowest = self.slowest.lock().expect("not poisoned");
        *slowest = took.max(*slowest);
        if let Err(error) = result {
            let text = format!("{:?}, after {took:?}: {error}", begin - self.started);
            self.errors.lock().expect("not poisoned").push((begin, text));
        }
    }

    /// Waits until this many further sessions have begun.
    pub fn wait(&self, count: usize) {
        let before = self.begun.load(Ordering::Relaxed);
        wait_until("sessions of the load", LONG_TIMEOUT, || self.begun.load(Ordering::Relaxed) >= before + count);
    }
}

impl LoadReport {
    /// Returns true if the load had this rate, with a margin for a busy machine. Fails if a session has failed.
    pub fn has_rate(&self, rate: u32) -> bool {
        assert!(self.errors.is_empty(), "{:#?}", self.errors);
        self.rate > f64::from(rate) * 0.9
    }
}

/// Connects with a time limit for each step.
pub fn connect_for_load(addr: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(STEP_LIMIT))?;
    stream.set_write_timeout(Some(STEP_LIMIT))?;
    Ok(stream)
}

/// Opens a tunnel over a stream, sends some bytes through it, and closes it. Returns an error of any step.
pub fn use_once(mut stream: impl io::Read + io::Write, target: SocketAddr) -> io::Result<()> {
    stream.write_all(&[5, 1, 0])?;
    stream.read_exact(&mut [0; 2])?;
    stream.write_all(&request(CONNECT, target))?;
    stream.write_all(b"hello")?;
    let mut answer = [0; 15];
    stream.read_exact(&mut answer)?;
    if answer.ends_with(b"hello") { Ok(()) } else { Err(io::Error::other(format!("{answer:?}"))) }
}
