//! Plays the client's side of a transcript against `s5 serve`.

use std::error::Error;
use std::fmt::Display;
use std::sync::atomic::AtomicU16;

use argon2::password_hash::PasswordHasher as _;
use argon2::{Algorithm, Argon2, Params, Version};
use socket2::Socket;

use super::fixtures::{addr_of, bound, fixtures};
use crate::support::bytes::{GAP, LIMIT, Placeholders, expect_end, poll_until, wait_port_free};
use crate::support::transcript::{Endpoint, Step, Transcript, User};
use crate::*;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Division of the client's bytes into writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunking {
    /// One write per line, each after the answer to the previous one.
    PerLine,
    /// One write per byte. Each line is sent after the answer to the previous one.
    PerByte,
    /// One write for all lines.
    AllAtOnce,
    /// Two writes for all lines. The first one has this number of bytes.
    SplitAt(usize),
}

/// One server for each combination of arguments and users, with the number of its descriptors after the start.
pub struct Servers {
    dir: tempfile::TempDir,
    running: HashMap<String, (Server, usize)>,
}

impl Servers {
    pub fn start(transcripts: &[Transcript]) -> Self {
        let mut servers = Self { dir: crate::support::temp_dir(), running: HashMap::new() };
        for transcript in transcripts {
            let key = server_key(transcript);
            if !servers.running.contains_key(&key) {
                let name = format!("users{}", servers.running.len());
                let server = start(&transcript.server_args, &transcript.users, servers.dir.path(), &name);
                let descriptors = server.descriptors();
                servers.running.insert(key, (server, descriptors));
            }
        }
        servers
    }

    pub fn server_for(&self, transcript: &Transcript) -> &Server {
        &self.running[&server_key(transcript)].0
    }

    /// Fails unless each server is running, has no more descriptors than after its start, and has not panicked.
    pub fn assert_no_leaks(&self) {
        for (key, (server, before)) in &self.running {
            let is_released = poll_until(LIMIT, || server.descriptors() <= *before);
            let now = server.descriptors();
            assert!(is_released, "{key}: {now} descriptors, {before} after the start\n{}", server.log());
            assert!(!server.log().contains("panic"), "{key}:\n{}", server.log());
        }
    }
}

fn server_key(transcript: &Transcript) -> String {
    format!("{:?} {:?}", transcript.server_args, transcript.users)
}

/// Starts `s5 serve` on 127.0.0.1 and ::1, with cheap password hashes.
pub fn start(args: &[String], users: &[User], dir: &Path, name: &str) -> Server {
    let mut command = s5();
    command.args(["serve", "--listen", "127.0.0.1:0", "--listen", "[::1]:0"]).args(args);
    if !users.is_empty() {
        let lines: Vec<String> = users.iter().map(users_file_line).collect();
        command.args(["--users", &write_file(dir, name, &lines.join("\n"))]);
    }
    Server::start_with(&mut command, 2)
}

fn users_file_line(user: &User) -> String {
    let hash = if user.bcrypt {
        bcrypt::hash(&user.password, 4).expect("password hashed")
    } else {
        let params = Params::new(Params::MIN_M_COST, 1, 1, None).expect("valid parameters");
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        argon2.hash_password(&user.password).expect("password hashed").to_string()
    };
    format!("{}:{hash}", std::str::from_utf8(&user.name).expect("UTF-8"))
}

/// Plays a transcript. Errors name the file and line.
pub fn play(transcript: &Transcript, server: &Server, chunking: Chunking) -> Result<(), String> {
    let at = |line: usize, what: &dyn Display| format!("tests/wire/{}:{line} ({chunking:?}): {what}", transcript.name);
    let mut player = Player::new(transcript, server, chunking).map_err(|error| at(1, &error))?;
    for (line, step) in &transcript.steps {
        player.step(step).map_err(|error| at(*line, &error))?;
    }
    let client = format!("from={} ", player.client);
    player.end().map_err(|error| at(0, &format!("after the last line: {error}")))?;
    for (line, step) in &transcript.steps {
        let Step::Log(text) = step else { continue };
        let text = text.strip_prefix('^').map_or(text.clone(), |text| format!("{client}{text}"));
        let is_match = |log: &str| log.contains(&client) && log.contains(&text);
        if !poll_until(LIMIT, || server.log().lines().any(is_match)) {
            return Err(at(*line, &format!("no log line of {client}has this text\n{}", server.log())));
        }
    }
    Ok(())
}

/// Returns the number of bytes that the client of a transcript sends.
pub fn sent_length(transcript: &Transcript, server: &Server) -> usize {
    Player::new(transcript, server, Chunking::PerLine).expect("valid transcript").bytes.len()
}

struct Player {
    chunking: Chunking,
    stream: TcpStream,
    client: SocketAddr,
    /// All bytes that the client sends.
    bytes: Vec<u8>,
    /// Number of bytes that have been sent.
    sent: usize,
    /// Number of bytes up to the end of the current line.
    line_end: usize,
    placeholders: Placeholders,
    /// Set if the server has closed the connection or the test has reset it.
    is_closed: bool,
    client_udp: UdpSocket,
    other_udp: UdpSocket,
    /// The expected peer of BIND before it connects, bound to its address.
    unconnected_peer: Option<Socket>,
    peer: Option<TcpStream>,
}

/// Returns a loopback address that no client has used yet, because the server throttles addresses after failed logins.
/// IPv6 has only one loopback address.
fn unused_ip(family_of: IpAddr) -> IpAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    if family_of.is_ipv4() { Ipv4Addr::new(127, 1, high, low).into() } else { family_of }
}

impl Player {
    fn new(transcript: &Transcript, server: &Server, chunking: Chunking) -> Outcome<Self> {
        let proxy_ip = if transcript.is_over_ipv6 { V6 } else { V4 };
        let listener = server.addrs.iter().find(|addr| addr.ip() == proxy_ip);
        let listener = listener.ok_or("the server does not listen on this address")?;
        let ip = unused_ip(proxy_ip);
        let stream = connect(bound(SocketAddr::new(ip, 0)), *listener)?;
        let (client_udp, other_udp) = (UdpSocket::bind((ip, 0))?, UdpSocket::bind((ip, 0))?);
        client_udp.set_read_timeout(Some(LIMIT))?;
        let is_peer_ipv6 = transcript.steps.iter().any(|(_, step)| format!("{step:?}").contains("peer6"));
        let peer_ip = if is_peer_ipv6 { Ipv6Addr::LOCALHOST.into() } else { IpAddr::from(Ipv4Addr::LOCALHOST) };
        let unconnected_peer = bound(SocketAddr::new(peer_ip, 0));
        let peer = addr_of(&unconnected_peer);
        let mut placeholders = Placeholders { named: fixtures().named.clone(), bnd: None };
        let client = [("client-udp", client_udp.local_addr()?), ("peer", peer), ("peer6", peer)];
        placeholders.named.extend(client);
        placeholders.named.extend(["listener", "listener6"].into_iter().zip(server.addrs.iter().copied()));
        // Placeholders of replies have no value yet. No request uses them.
        let mut bytes = Vec::new();
        for (_, step) in &transcript.steps {
            if let Step::ToServer(items) = step {
                bytes.extend(placeholders.bytes(items)?);
            }
        }
        Ok(Self {
            chunking,
            client: stream.local_addr()?,
            stream,
            bytes,
            sent: 0,
            line_end: 0,
            placeholders,
            is_closed: false,
            client_udp,
            other_udp,
            unconnected_peer: Some(unconnected_peer),
            peer: None,
        })
    }

    fn step(&mut self, step: &Step) -> Outcome<()> {
        match step {
            Step::ToServer(items) => {
                self.line_end += self.placeholders.bytes(items)?.len();
                self.send();
            }
            Step::ToClient(items) => drop(self.placeholders.expect(&mut self.stream, items)?),
            Step::UdpToServer(endpoint, items) => {
                let (bytes, other_ip) = (self.placeholders.bytes(items)?, UdpSocket::bind("127.0.0.2:0")?);
                let socket = match endpoint {
                    Endpoint::Expected => &self.client_udp,
                    Endpoint::OtherPort => &self.other_udp,
                    Endpoint::OtherIp => &other_ip,
                };
                socket.send_to(&bytes, self.bnd()?)?;
            }
            Step::UdpToClient(_, items) => {
                let mut buffer = vec![0; 65_536];
                let (n, from) = retry(|| self.client_udp.recv_from(&mut buffer))
                    .map_err(|error| format!("expected a datagram: {error}"))?;
                if from != self.bnd()? {
                    return Err(format!("received a datagram from {from}, which is not BND").into());
                }
                self.placeholders.compare(items, &buffer[..n])?;
            }
            Step::Connects(endpoint) => {
                let bnd = self.bnd()?;
                let socket = match endpoint {
                    Endpoint::Expected => self.unconnected_peer.take().ok_or("the peer has connected already")?,
                    Endpoint::OtherPort => bound(SocketAddr::new(bnd.ip(), 0)),
                    Endpoint::OtherIp => bound(SocketAddr::from(([127, 0, 0, 2], 0))),
                };
                let mut stream = connect(socket, bnd)?;
                match endpoint {
                    Endpoint::Expected => self.peer = Some(stream),
                    _ => expect_end(&mut stream, true)?,
                }
            }
            Step::PeerSends(items) => {
                let bytes = self.placeholders.bytes(items)?;
                self.peer()?.write_all(&bytes)?;
            }
            Step::PeerReceives(items) => {
                let peer = self.peer.as_mut().ok_or("the peer has not connected")?;
                self.placeholders.expect(peer, items)?;
            }
            Step::PeerFin => self.peer()?.shutdown(Shutdown::Write)?,
            Step::PeerEof => expect_end(self.peer()?, false)?,
            Step::Fin => self.stream.shutdown(Shutdown::Write)?,
            Step::Reset => {
                SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))?;
                // Replacing the stream closes it, which sends the RST.
                self.stream = TcpStream::connect(self.stream.peer_addr()?)?;
                self.is_closed = true;
            }
            Step::Eof | Step::Close => {
                self.is_closed = true;
                expect_end(&mut self.stream, matches!(step, Step::Close))?;
            }
            Step::PortFree(is_tcp) => {
                let bnd = self.bnd()?;
                wait_port_free(bnd, *is_tcp).then_some(()).ok_or_else(|| format!("{bnd} is still in use"))?;
            }
            Step::Log(_) => {}
            Step::SlowlyToClient(_) | Step::Pause(_) | Step::Quiet(_) => {
                return Err("not valid with role: server".into());
            }
        }
        Ok(())
    }

    /// Sends the bytes up to the current line. Depending on the chunking, sends more.
    fn send(&mut self) {
        if let Chunking::SplitAt(first) = self.chunking {
            self.send_to(first);
        }
        match self.chunking {
            Chunking::AllAtOnce => self.send_to(self.bytes.len()),
            Chunking::SplitAt(first) if self.line_end > first => self.send_to(self.bytes.len()),
            Chunking::SplitAt(_) => {}
            Chunking::PerLine => self.send_to(self.line_end),
            Chunking::PerByte => (self.sent..self.line_end).for_each(|i| self.send_to(i + 1)),
        }
    }

    fn send_to(&mut self, end: usize) {
        if end <= self.sent {
            return;
        }
        // The server may have closed already. The error of the next expected answer is more useful.
        let _ = self.stream.write_all(&self.bytes[self.sent..end]);
        self.sent = end;
        if self.chunking != Chunking::PerLine {
            thread::sleep(GAP);
        }
    }

    /// Closes the open connections. Fails if there are datagrams or bytes that the transcript does not mention.
    fn end(mut self) -> Outcome<()> {
        drop(self.peer.take());
        for socket in [&self.client_udp, &self.other_udp] {
            socket.set_nonblocking(true)?;
            if let Ok(n) = socket.recv(&mut [0; 64]) {
                return Err(format!("unexpected datagram of {n} bytes").into());
            }
        }
        if !self.is_closed {
            let _ = self.stream.shutdown(Shutdown::Write);
            expect_end(&mut self.stream, true)?;
        }
        Ok(())
    }

    fn bnd(&self) -> Outcome<SocketAddr> {
        Ok(self.placeholders.bnd.ok_or("no reply with {bnd} so far")?)
    }

    fn peer(&mut self) -> Outcome<&mut TcpStream> {
        Ok(self.peer.as_mut().ok_or("the peer has not connected")?)
    }
}

fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    socket.connect(&to.into())?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}
