//! A SOCKS5 server that follows a script, even one that violates the protocol, and records the messages it receives.
//! Also: programs that run in the background of a test.

use std::io::{self, Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use crate::support::{TIMEOUT, message_with_addr, wait_until};

/// Selects NO AUTHENTICATION.
pub const SELECT_NO_AUTH: &[u8] = &[5, 0];
/// Selects USERNAME/PASSWORD.
pub const SELECT_PASSWORD: &[u8] = &[5, 2];
/// Accepts the login (RFC 1929).
pub const LOGIN_SUCCESS: &[u8] = &[1, 0];
/// A success reply with an unspecified BND.
pub const SUCCESS_REPLY: &[u8] = &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

/// One step of a script. After the last step the connection is closed.
pub enum Step {
    /// Reads a greeting.
    Greeting,
    /// Reads user name and password.
    Login,
    /// Reads a request.
    Request,
    /// Sends these bytes in one write.
    Send(Vec<u8>),
    /// Sends these bytes one by one.
    SendByteByByte(Vec<u8>),
    /// Resets the connection.
    Reset,
    /// Sends nothing until the client has closed.
    WaitForClose,
    /// Passes the connection to a function of the test. Must be the last step.
    WithStream(Box<dyn FnOnce(TcpStream) + Send>),
}

/// A step that sends these bytes in one write.
pub fn send(bytes: &[u8]) -> Step {
    Step::Send(bytes.to_vec())
}

/// A last step that passes the connection to `serve`.
pub fn with_stream(serve: impl FnOnce(TcpStream) + Send + 'static) -> Step {
    Step::WithStream(Box::new(serve))
}

/// Accepts a greeting without authentication and a request, and sends `reply`.
pub fn reply_with(reply: &[u8]) -> Vec<Step> {
    vec![Step::Greeting, send(SELECT_NO_AUTH), Step::Request, send(reply)]
}

/// Accepts a greeting without authentication and a request, and sends a success reply. Then `target` has the connection.
pub fn open_tunnel(target: impl FnOnce(TcpStream) + Send + 'static) -> Vec<Step> {
    reply_with(SUCCESS_REPLY).into_iter().chain([with_stream(target)]).collect()
}

/// A server that runs a script once, for its first client.
pub struct ScriptedServer {
    pub addr: SocketAddr,
    messages: Receiver<Vec<u8>>,
}

impl ScriptedServer {
    /// Listens on 127.0.0.1.
    pub fn start(script: Vec<Step>) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), script)
    }

    pub fn start_at(addr: SocketAddr, script: Vec<Step>) -> Self {
        let listener = TcpListener::bind(addr).expect("free port");
        let addr = listener.local_addr().expect("local address");
        let (sender, messages) = channel();
        thread::spawn(move || {
            let (stream, _) = listener.accept().expect("connection accepted");
            drop(listener);
            stream.set_nodelay(true).expect("option set");
            // Some tests have a client that closes before the script ends.
            let _ = run_script(stream, script, &sender);
        });
        Self { addr, messages }
    }

    /// The server's address, for `-x`.
    pub fn url(&self) -> String {
        self.addr.to_string()
    }

    /// Waits for the next message that the server receives.
    pub fn message(&self) -> Vec<u8> {
        self.messages.recv_timeout(TIMEOUT).expect("a message arrives")
    }

    /// Waits for the end of the script. Returns all messages that the server has received.
    pub fn messages(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.messages.recv_timeout(TIMEOUT).ok()).collect()
    }
}

fn run_script(mut stream: TcpStream, script: Vec<Step>, messages: &Sender<Vec<u8>>) -> io::Result<()> {
    for step in script {
        match step {
            Step::Greeting => drop(messages.send(read_greeting(&mut stream)?)),
            Step::Login => drop(messages.send(read_login(&mut stream)?)),
            Step::Request => drop(messages.send(read_request(&mut stream)?)),
            Step::Send(bytes) => stream.write_all(&bytes)?,
            Step::SendByteByByte(bytes) => {
                for byte in bytes {
                    stream.write_all(&[byte])?;
                    // Slow enough that the client reads each byte separately.
                    thread::sleep(Duration::from_millis(2));
                }
            }
            Step::Reset => {
                reset(stream);
                return Ok(());
            }
            Step::WaitForClose => drop(io::copy(&mut stream, &mut io::sink())?),
            Step::WithStream(serve) => {
                serve(stream);
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Closes the connection with an RST.
pub fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("option set");
}

fn read_more(stream: &mut TcpStream, bytes: &mut Vec<u8>, n: usize) -> io::Result<()> {
    let start = bytes.len();
    bytes.resize(start + n, 0);
    stream.read_exact(&mut bytes[start..])
}

fn read_greeting(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_more(stream, &mut bytes, 2)?;
    let methods = bytes[1].into();
    read_more(stream, &mut bytes, methods)?;
    Ok(bytes)
}

fn read_login(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_more(stream, &mut bytes, 2)?;
    let uname = usize::from(bytes[1]);
    read_more(stream, &mut bytes, uname + 1)?;
    let passwd = bytes[uname + 2].into();
    read_more(stream, &mut bytes, passwd)?;
    Ok(bytes)
}

fn read_request(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_more(stream, &mut bytes, 5)?;
    let rest = match bytes[3] {
        1 => 3,
        3 => bytes[4].into(),
        4 => 15,
        atyp => panic!("ATYP {atyp} in a request"),
    };
    read_more(stream, &mut bytes, rest + 2)?;
    Ok(bytes)
}

/// A success reply with this BND.
pub fn success_reply(bnd: SocketAddr) -> Vec<u8> {
    message_with_addr([5, 0, 0], bnd)
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
        Self::start_and_close_stdout_when(command, |_| false)
    }

    /// Like `start`, but closes the reading end of stdout as soon as the output satisfies `enough`.
    pub fn start_and_close_stdout_when(command: &mut Command, enough: fn(&[u8]) -> bool) -> Self {
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdin = child.stdin.take();
        let stdout = CollectedOutput::from(child.stdout.take().expect("stdout is piped"), enough);
        let stderr = CollectedOutput::from(child.stderr.take().expect("stderr is piped"), |_| false);
        Self { child, stdin, stdout, stderr }
    }

    /// Writes to stdin, which stays open.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().expect("stdin is open").write_all(bytes).expect("data sent");
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

    /// Waits until stderr satisfies `done`, and returns it.
    pub fn stderr(&self, done: impl Fn(&str) -> bool) -> String {
        text(&self.stderr.wait("stderr", |bytes| done(&text(bytes))))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the child can be waited for").is_none()
    }

    /// Waits until the program exits, without closing stdin. Returns status, stdout and stderr.
    pub fn wait_exit(&mut self, limit: Duration) -> (ExitStatus, Vec<u8>, String) {
        let mut status = None;
        wait_until("the program exits", limit, || {
            status = self.child.try_wait().expect("the child can be waited for");
            status.is_some()
        });
        (status.expect("the program has exited"), self.stdout.all(), text(&self.stderr.all()))
    }
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

    fn all(&self) -> Vec<u8> {
        let (state, changed) = &*self.0;
        let state = state.lock().expect("not poisoned");
        let waited = changed.wait_timeout_while(state, TIMEOUT, |(_, ended)| !*ended);
        waited.expect("not poisoned").0.0.clone()
    }
}
