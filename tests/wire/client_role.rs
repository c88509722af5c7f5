//! Plays the proxy's side of a transcript against one of the s5 clients.

use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::SockRef;

use super::bytes::{GAP, LIMIT, Placeholders, expect_end, hex, poll_until};
use super::transcript::{Endpoint, Role, Step, Transcript};
use crate::support::{retry, s5};

/// Plays a transcript, with one write per line or per byte. Errors name the file and line.
pub fn play(transcript: &Transcript, byte_by_byte: bool) -> Result<(), String> {
    let chunking = if byte_by_byte { "byte by byte" } else { "line by line" };
    let at = |line: usize, what: String| format!("tests/wire/{}:{line} ({chunking}): {what}", transcript.name);
    let mut player = Player::new(transcript, byte_by_byte).map_err(|error| at(1, error))?;
    for (line, step) in &transcript.steps {
        if let Err(error) = player.step(step) {
            let status = player.client.child.try_wait();
            let _ = player.client.child.kill();
            let (_, _, stderr) = player.client.output();
            return Err(at(*line, format!("{error}\nthe client ({status:?}) wrote: {stderr}")));
        }
    }
    player.end(transcript).map_err(|error| at(0, format!("after the last line: {error}")))
}

/// The client as a child process; killed when dropped.
struct Client {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl Client {
    fn start(args: &[String], stdin: &[u8], is_stdin_left_open: bool) -> std::io::Result<Self> {
        let mut command = s5();
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (stdout, stderr) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
        let mut input = child.stdin.take().expect("stdin is piped");
        // Fails if the client exits early without reading stdin.
        let _ = input.write_all(stdin);
        if is_stdin_left_open {
            child.stdin = Some(input);
        }
        Ok(Self { child, stdout, stderr })
    }

    /// Waits until the client exits. Returns exit status, stdout and stderr.
    fn output(&mut self) -> (Option<i32>, Vec<u8>, String) {
        let mut status = None;
        let ended = poll_until(LIMIT, || {
            status = self.child.try_wait().expect("the child can be waited for");
            status.is_some()
        });
        if !ended {
            let _ = self.child.kill();
        }
        let [stdout, stderr] = [&mut self.stdout, &mut self.stderr].map(|reader| {
            reader.take().map(|reader| reader.join().expect("the thread does not panic")).unwrap_or_default()
        });
        (status.and_then(|status| status.code()), stdout, String::from_utf8_lossy(&stderr).into_owned())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).map(|_| all).unwrap_or_default()
    })
}

struct Player {
    byte_by_byte: bool,
    client: Client,
    listener: TcpListener,
    stream: Option<TcpStream>,
    /// Set if the client has closed the connection or the test has reset it.
    is_closed: bool,
    relay: UdpSocket,
    /// Source address of the client's last datagram.
    client_udp_addr: Option<SocketAddr>,
    placeholders: Placeholders,
}

impl Player {
    fn new(transcript: &Transcript, byte_by_byte: bool) -> Result<Self, String> {
        let text = |error: std::io::Error| error.to_string();
        let Role::Client(args) = &transcript.role else { return Err("this transcript has role: server".into()) };
        // No other test uses this address.
        let ip = if transcript.proxy_ip.is_ipv4() { Ipv4Addr::new(127, 0, 0, 7).into() } else { transcript.proxy_ip };
        let listener = TcpListener::bind((ip, 0)).map_err(text)?;
        listener.set_nonblocking(true).map_err(text)?;
        let proxy = listener.local_addr().map_err(text)?;
        let relay = UdpSocket::bind((ip, 0)).map_err(text)?;
        relay.set_read_timeout(Some(LIMIT)).map_err(text)?;
        let relay_addr = relay.local_addr().map_err(text)?;
        let mut placeholders = Placeholders::default();
        placeholders.per_session.extend([
            ("relay", relay_addr),
            ("proxy", proxy),
            ("any-relay", SocketAddr::new([0, 0, 0, 0].into(), relay_addr.port())),
        ]);
        let args: Vec<String> = args.iter().map(|arg| arg.replace("{proxy}", &proxy.to_string())).collect();
        let client = Client::start(&args, &transcript.stdin, transcript.is_stdin_left_open).map_err(text)?;
        Ok(Self {
            byte_by_byte,
            client,
            listener,
            stream: None,
            is_closed: false,
            relay,
            client_udp_addr: None,
            placeholders,
        })
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        match step {
            Step::ToServer(items) => {
                self.accept()?;
                let stream = self.stream.as_mut().ok_or("no connection")?;
                self.placeholders.expect(stream, items)
            }
            Step::ToClient(items) => {
                let bytes = self.placeholders.bytes(items)?;
                let pieces = bytes.chunks(if self.byte_by_byte { 1 } else { bytes.len().max(1) });
                for piece in pieces {
                    // The client may have closed already. `end` checks its exit status.
                    let _ = self.accept()?.write_all(piece);
                    thread::sleep(GAP);
                }
                Ok(())
            }
            Step::UdpToServer(_, items) => {
                let mut buffer = vec![0; 65_536];
                let (n, from) = retry(|| self.relay.recv_from(&mut buffer))
                    .map_err(|error| format!("expected a datagram: {error}"))?;
                self.client_udp_addr = Some(from);
                self.placeholders.compare(items, &buffer[..n])
            }
            Step::UdpToClient(endpoint, items) => {
                let bytes = self.placeholders.bytes(items)?;
                let to = self.client_udp_addr.ok_or("no datagram from the client so far")?;
                let sent = match endpoint {
                    Endpoint::Expected => self.relay.send_to(&bytes, to),
                    _ => UdpSocket::bind("127.0.0.2:0").and_then(|socket| socket.send_to(&bytes, to)),
                };
                sent.map(drop).map_err(text)
            }
            Step::Fin => self.accept()?.shutdown(Shutdown::Write).map_err(text),
            Step::Reset => {
                SockRef::from(&*self.accept()?).set_linger(Some(Duration::ZERO)).map_err(text)?;
                self.is_closed = true;
                self.stream = None;
                Ok(())
            }
            Step::Eof | Step::Close => {
                self.is_closed = matches!(step, Step::Close);
                let is_closed = self.is_closed;
                expect_end(self.accept()?, is_closed)
            }
            _ => Err("this step is only valid with role: server".into()),
        }
    }

    /// Returns the client's connection. Accepts it at the first call.
    fn accept(&mut self) -> Result<&mut TcpStream, String> {
        if self.stream.is_none() {
            let mut accepted = None;
            poll_until(LIMIT, || {
                accepted = self.listener.accept().ok();
                accepted.is_some()
            });
            let (stream, _) = accepted.ok_or("the client did not connect")?;
            let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(LIMIT)));
            ready.and_then(|()| stream.set_nodelay(true)).map_err(|error| error.to_string())?;
            self.stream = Some(stream);
        }
        self.stream.as_mut().ok_or_else(|| "no connection".into())
    }

    /// Closes the connection, expects no more bytes, and checks the client's exit status and output.
    fn end(mut self, transcript: &Transcript) -> Result<(), String> {
        if let (Some(stream), false) = (&mut self.stream, self.is_closed) {
            let _ = stream.shutdown(Shutdown::Write);
            expect_end(stream, true)?;
        }
        drop(self.stream.take());
        let (status, stdout, stderr) = self.client.output();
        let output = format!("the client wrote: {stderr}");
        if self.listener.accept().is_ok() {
            return Err(format!("unexpected connection; {output}"));
        }
        if status != Some(transcript.status) {
            return Err(format!("expected exit status {}, got {status:?}; {output}", transcript.status));
        }
        if stdout != transcript.stdout {
            return Err(format!("unexpected stdout {}; {output}", hex(&stdout)));
        }
        if let Some(missing) = transcript.stderr.iter().find(|text| !stderr.contains(text.as_str())) {
            return Err(format!("{missing:?} is missing on stderr; {output}"));
        }
        let messages: Vec<&str> = stderr.lines().filter(|line| line.starts_with("s5: ")).collect();
        let is_expected = |line: &&str| transcript.stderr.iter().any(|text| line.contains(text.as_str()));
        let is_valid = if status == Some(0) { messages.iter().all(is_expected) } else { messages.len() == 1 };
        if !is_valid {
            return Err(format!(
                "expected one line after a failure, and only the lines of the transcript after success; {output}"
            ));
        }
        if stderr.contains("secret") { Err(format!("the password is on stderr; {output}")) } else { Ok(()) }
    }
}
