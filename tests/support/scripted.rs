//! The proxy's side of a transcript: [`Player`] plays its steps, even ones that violate the protocol;
//! [`ScriptedServer`] does so on its own thread. Also: programs that run in the background of a test.

use std::io::Read;
use std::process::{ChildStdin, ExitStatus};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Condvar, PoisonError};

use super::bytes::{GAP, LIMIT, Placeholders, expect_end, poll_until};
use super::transcript::{Endpoint, Item, Step, script};
use super::*;

/// Accepts a greeting without authentication and a request.
pub const NO_AUTH: &str = "> {greeting}; < 05 00; > {request};";
/// Accepts user name and password.
pub const LOGIN: &str = "> {greeting}; < 05 02; > {login}; < 01 00;";
/// A success reply with an unspecified BND.
pub const SUCCESS: &str = "< 05 00 00 01 00*6;";

/// Accepts a greeting without authentication and a request, and sends `reply`.
pub fn reply(reply: &str) -> String {
    format!("{NO_AUTH} < {reply};")
}

/// The proxy's side of a transcript: one TCP connection and a UDP relay.
pub struct Player {
    pub addr: SocketAddr,
    /// Send each byte on its own.
    pub byte_by_byte: bool,
    pub relay: UdpSocket,
    /// `None` if a second client must be refused.
    listener: Option<TcpListener>,
    stream: Option<TcpStream>,
    /// Set if the client has closed the connection or the test has reset it.
    is_closed: bool,
    /// Source address of the client's last datagram.
    client_udp_addr: Option<SocketAddr>,
    placeholders: Placeholders,
}

impl Player {
    /// Listens at this address. The relay has the same IP address.
    pub fn new(addr: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let relay = UdpSocket::bind((addr.ip(), 0))?;
        relay.set_read_timeout(Some(LIMIT))?;
        let relay_addr = relay.local_addr()?;
        let any_relay = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), relay_addr.port());
        let named = vec![("relay", relay_addr), ("proxy", addr), ("any-relay", any_relay)];
        Ok(Self {
            addr,
            byte_by_byte: false,
            relay,
            listener: Some(listener),
            stream: None,
            is_closed: false,
            client_udp_addr: None,
            placeholders: Placeholders { named, bnd: None },
        })
    }

    /// Plays a step. Returns the bytes that the client has sent in it.
    pub fn step(&mut self, step: &Step) -> Result<Vec<u8>, String> {
        let text = |error: io::Error| error.to_string();
        match step {
            Step::ToServer(items) => {
                self.accept()?;
                return self.placeholders.expect(self.stream.as_mut().ok_or("no connection")?, items);
            }
            Step::ToClient(items) => self.send(items, if self.byte_by_byte { 1 } else { usize::MAX }, GAP)?,
            // Slow enough that the client reads each byte separately.
            Step::SlowlyToClient(items) => self.send(items, 1, Duration::from_millis(2))?,
            Step::UdpToServer(_, items) => {
                let mut buffer = vec![0; 65_536];
                let (n, from) = retry(|| self.relay.recv_from(&mut buffer))
                    .map_err(|error| format!("expected a datagram: {error}"))?;
                self.client_udp_addr = Some(from);
                self.placeholders.compare(items, &buffer[..n])?;
            }
            Step::UdpToClient(endpoint, items) => self.send_datagram(*endpoint, items)?,
            Step::Fin => self.accept()?.shutdown(Shutdown::Write).map_err(text)?,
            Step::Reset => {
                self.accept()?;
                self.is_closed = true;
                self.stream.take().into_iter().for_each(reset);
            }
            Step::Eof | Step::Close => {
                self.is_closed = matches!(step, Step::Close);
                let is_closed = self.is_closed;
                expect_end(self.accept()?, is_closed)?;
            }
            Step::Pause(time) => thread::sleep(*time),
            Step::Quiet(time) => {
                let stream = self.accept()?;
                stream.set_read_timeout(Some(*time)).map_err(text)?;
                if let Ok(n) = retry(|| stream.peek(&mut [0])) {
                    return Err(if n == 0 { "unexpected EOF" } else { "unexpected data" }.into());
                }
                stream.set_read_timeout(Some(LIMIT)).map_err(text)?;
            }
            _ => return Err("this step is only valid with role: server".into()),
        }
        Ok(Vec::new())
    }

    fn send(&mut self, items: &[Item], size: usize, gap: Duration) -> Result<(), String> {
        for piece in self.placeholders.bytes(items)?.chunks(size) {
            // The client may have closed already. Tests check its exit status.
            let _ = self.accept()?.write_all(piece);
            thread::sleep(gap);
        }
        Ok(())
    }

    fn send_datagram(&self, from: Endpoint, items: &[Item]) -> Result<(), String> {
        let bytes = self.placeholders.bytes(items)?;
        let to = self.client_udp_addr.ok_or("no datagram from the client so far")?;
        let from_ip = |ip: IpAddr| UdpSocket::bind((ip, 0)).and_then(|socket| socket.send_to(&bytes, to));
        let sent = match from {
            Endpoint::Expected => self.relay.send_to(&bytes, to),
            Endpoint::OtherPort => from_ip(self.addr.ip()),
            Endpoint::OtherIp => from_ip(Ipv4Addr::new(127, 0, 0, 2).into()),
        };
        sent.map(drop).map_err(|error| error.to_string())
    }

    /// Returns the client's connection. Accepts it at the first call.
    fn accept(&mut self) -> Result<&mut TcpStream, String> {
        if let (None, Some(listener)) = (&self.stream, &self.listener) {
            poll_until(LIMIT, || {
                self.stream = listener.accept().map(|(stream, _)| stream).ok();
                self.stream.is_some()
            });
            let stream = self.stream.as_ref().ok_or("the client did not connect")?;
            let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(LIMIT)));
            ready.and_then(|()| stream.set_nodelay(true)).map_err(|error| error.to_string())?;
        }
        self.stream.as_mut().ok_or_else(|| "no connection".into())
    }

    /// Closes the connection. Fails if the client has sent more bytes.
    pub fn close(&mut self) -> Result<(), String> {
        let Some(mut stream) = self.stream.take().filter(|_| !self.is_closed) else { return Ok(()) };
        let _ = stream.shutdown(Shutdown::Write);
        expect_end(&mut stream, true)
    }

    /// Returns true if a client waits that the transcript does not mention.
    pub fn has_unexpected_client(&self) -> bool {
        self.listener.as_ref().is_some_and(|listener| listener.accept().is_ok())
    }
}

/// A server on 127.0.0.1 that plays a script once, for its first client.
pub struct ScriptedServer {
    pub addr: SocketAddr,
    /// The relay of the script, for tests that act as the relay themselves.
    pub relay: UdpSocket,
    messages: Receiver<Result<Vec<u8>, String>>,
}

impl ScriptedServer {
    pub fn start(steps: &str) -> Self {
        Self::start_at("127.0.0.1:0", steps, drop)
    }

    /// Opens a tunnel and passes the connection to `target`.
    pub fn open_tunnel(target: impl FnOnce(TcpStream) + Send + 'static) -> Self {
        Self::start_at("127.0.0.1:0", &format!("{NO_AUTH} {SUCCESS}"), target)
    }

    /// Passes the connection to `end` after the last step of the script.
    pub fn start_at(addr: &str, steps: &str, end: impl FnOnce(TcpStream) + Send + 'static) -> Self {
        let mut player = Player::new(addr.parse().expect("valid address")).expect("free port");
        let (addr, relay) = (player.addr, player.relay.try_clone().expect("cloned"));
        let (sender, messages) = channel();
        let steps = script(steps);
        thread::spawn(move || {
            let _ = player.accept();
            player.listener = None;
            for step in &steps {
                let result = player.step(step);
                let failed = result.is_err();
                if failed || matches!(step, Step::ToServer(_)) {
                    let _ = sender.send(result);
                }
                if failed {
                    return;
                }
            }
            if let Some(stream) = player.stream.take() {
                end(stream);
            }
        });
        Self { addr, relay, messages }
    }

    /// The server's address, for `-x`.
    pub fn url(&self) -> String {
        self.addr.to_string()
    }

    /// Waits for the next message that the server receives.
    pub fn message(&self) -> Vec<u8> {
        self.messages.recv_timeout(TIMEOUT).expect("a message arrives").expect("the message of the script")
    }

    /// Waits for the end of the script, or for a step that fails. Returns all messages that the server has received.
    pub fn messages(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.messages.recv_timeout(TIMEOUT).ok()?.ok()).collect()
    }
}

/// A program in the background; killed when dropped.
pub struct RunningProgram {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: CollectedOutput,
    stderr: CollectedOutput,
}

impl RunningProgram {
    pub fn start(command: &mut Command) -> Self {
        Self::start_with(command, Stdio::piped(), |_| false)
    }

    /// Like `start`, with this stdout. Closes the reading end of a pipe as soon as the output satisfies `enough`.
    pub fn start_with(command: &mut Command, stdout: Stdio, enough: fn(&[u8]) -> bool) -> Self {
        let spawned = command.stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdin = child.stdin.take();
        let stdout = match child.stdout.take() {
            Some(pipe) => CollectedOutput::from(pipe, enough),
            None => CollectedOutput::from(io::empty(), enough),
        };
        let stderr = CollectedOutput::from(child.stderr.take().expect("stderr is piped"), |_| false);
        Self { child, stdin, stdout, stderr }
    }

    /// Writes to stdin, which stays open. The program may have exited already: tests check its output and status.
    pub fn write(&mut self, bytes: &[u8]) {
        let _ = self.stdin.as_mut().expect("stdin is open").write_all(bytes);
    }

    /// Writes to stdin on another thread, and closes it.
    pub fn feed(&mut self, bytes: &[u8]) {
        let mut stdin = self.stdin.take().expect("stdin is open");
        let bytes = bytes.to_vec();
        // The write fails if the program does not read all of it.
        thread::spawn(move || drop(stdin.write_all(&bytes)));
    }

    /// Writes to stdin repeatedly until the program exits.
    pub fn write_until_exit(&mut self, bytes: &[u8]) {
        let mut stdin = self.stdin.take().expect("stdin is open");
        wait_until("the program exits", TIMEOUT, || {
            let _ = stdin.write_all(bytes);
            !self.is_running()
        });
    }

    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until stdout satisfies `done`, and returns it.
    pub fn stdout(&self, done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        self.stdout.wait("stdout", done)
    }

    pub fn stdout_so_far(&self) -> Vec<u8> {
        self.stdout.so_far()
    }

    /// Waits until the program has closed stdout, and returns its output.
    pub fn stdout_end(&self) -> Vec<u8> {
        self.stdout.end("stdout")
    }

    /// Waits until stderr satisfies `done`, and returns it.
    pub fn stderr(&self, done: impl Fn(&str) -> bool) -> String {
        text(&self.stderr.wait("stderr", |bytes| done(&text(bytes))))
    }

    pub fn stderr_so_far(&self) -> String {
        text(&self.stderr.so_far())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the child can be waited for").is_none()
    }

    /// Waits until the program exits, without closing stdin. Kills it after `limit`, and then returns no status.
    pub fn output(&mut self, limit: Duration) -> (Option<ExitStatus>, Vec<u8>, String) {
        let mut status = None;
        let has_exited = poll_until(limit, || {
            status = self.child.try_wait().expect("the child can be waited for");
            status.is_some()
        });
        if !has_exited {
            let _ = self.child.kill();
        }
        (status, self.stdout.all(), text(&self.stderr.all()))
    }

    pub fn kill(&mut self) -> (Option<ExitStatus>, Vec<u8>, String) {
        let _ = self.child.kill();
        self.output(TIMEOUT)
    }

    /// Waits until the program exits, without closing stdin. Returns status, stdout and stderr.
    pub fn wait_exit(&mut self, limit: Duration) -> (ExitStatus, Vec<u8>, String) {
        let (status, stdout, stderr) = self.output(limit);
        (status.unwrap_or_else(|| panic!("the program does not exit within {limit:?}: {stderr}")), stdout, stderr)
    }
}

/// Runs a command with this stdin and returns its output. Panics if it takes longer than `limit`.
pub fn run(command: &mut Command, stdin: &[u8], limit: Duration) -> Output {
    let mut program = RunningProgram::start(command);
    program.feed(stdin);
    let (status, stdout, _) = program.wait_exit(limit);
    Output { status, stdout, stderr: program.stderr.all() }
}

impl Drop for RunningProgram {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Converts bytes to text, with U+FFFD for invalid UTF-8.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The output of a pipe so far.
struct CollectedOutput(Arc<(Mutex<BytesAndEnd>, Condvar)>);

/// The bytes so far, and true once the pipe has ended.
type BytesAndEnd = (Vec<u8>, bool);

impl CollectedOutput {
    fn from(mut pipe: impl Read + Send + 'static, enough: fn(&[u8]) -> bool) -> Self {
        let shared = Arc::new((Mutex::new((Vec::new(), false)), Condvar::new()));
        let thread_shared = shared.clone();
        thread::spawn(move || {
            let mut buffer = [0; 65_536];
            let (state, changed) = &*thread_shared;
            let mut is_enough = enough(&[]);
            while !is_enough {
                let n = pipe.read(&mut buffer).unwrap_or(0);
                let mut state = state.lock().expect("not poisoned");
                state.0.extend(&buffer[..n]);
                is_enough = n == 0 || enough(&state.0);
                changed.notify_all();
            }
            drop(pipe);
            state.lock().expect("not poisoned").1 = true;
            changed.notify_all();
        });
        Self(shared)
    }

    fn wait(&self, what: &str, done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let (state, changed) = &*self.0;
        let state = state.lock().expect("not poisoned");
        let waited = changed.wait_timeout_while(state, TIMEOUT, |(bytes, ended)| !done(bytes) && !*ended);
        let (state, _) = waited.expect("not poisoned");
        assert!(done(&state.0), "{what} does not have the expected content: {:?}", text(&state.0));
        state.0.clone()
    }

    fn end(&self, what: &str) -> Vec<u8> {
        let (state, changed) = &*self.0;
        let state = state.lock().expect("not poisoned");
        let (state, timeout) = changed.wait_timeout_while(state, TIMEOUT, |(_, ended)| !*ended).expect("not poisoned");
        assert!(!timeout.timed_out(), "{what} has not ended after {:?}", text(&state.0));
        state.0.clone()
    }

    fn so_far(&self) -> Vec<u8> {
        // A test that panics while waiting for the output poisons the lock, and then prints the output.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn all(&self) -> Vec<u8> {
        let (state, changed) = &*self.0;
        let state = state.lock().expect("not poisoned");
        let waited = changed.wait_timeout_while(state, TIMEOUT, |(_, ended)| !*ended);
        waited.expect("not poisoned").0.0.clone()
    }
}
