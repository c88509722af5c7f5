//! Plays the client's side of a transcript against `s5 serve`.

use std::collections::HashMap;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;

use argon2::password_hash::PasswordHasher as _;
use argon2::{Algorithm, Argon2, Params, Version};
use socket2::{SockRef, Socket};

use super::fixtures::{addr_of, bound, fixtures};
use crate::support::bytes::{GAP, LIMIT, Placeholders, expect_end, poll_until, wait_port_free};
use crate::support::transcript::{Endpoint, Step, Transcript, User};
use crate::support::{Server, retry, s5, write_file};

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
            assert!(
                is_released,
                "{key}: {} descriptors, {before} after the start\n{}",
                server.descriptors(),
                server.log()
            );
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
    let at = |line: usize, what: String| format!("tests/wire/{}:{line} ({chunking:?}): {what}", transcript.name);
    let mut player = Player::new(transcript, server, chunking).map_err(|error| at(1, error))?;
    for (line, step) in &transcript.steps {
        player.step(step).map_err(|error| at(*line, error))?;
    }
    let client = player.client;
    player.end().map_err(|error| at(0, format!("after the last line: {error}")))?;
    let logs = transcript.steps.iter().filter_map(|(line, step)| match step {
        Step::Log(text) => Some((line, text)),
        _ => None,
    });
    for (line, text) in logs {
        let is_match = |log: &str| log.contains(&format!("client={client} ")) && log.contains(text.as_str());
        if !poll_until(LIMIT, || server.log().lines().any(is_match)) {
            return Err(at(*line, format!("no log line of client {client} has this text\n{}", server.log())));
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
    fn new(transcript: &Transcript, server: &Server, chunking: Chunking) -> Result<Self, String> {
        let text = |error: std::io::Error| error.to_string();
        let listener = server
            .addrs
            .iter()
            .find(|addr| addr.ip() == transcript.proxy_ip)
            .ok_or("the server does not listen on this address")?;
        let ip = unused_ip(transcript.proxy_ip);
        let socket = bound(SocketAddr::new(ip, 0));
        socket.connect(&(*listener).into()).map_err(text)?;
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).map_err(text)?;
        stream.set_read_timeout(Some(LIMIT)).map_err(text)?;
        let socket = || UdpSocket::bind((ip, 0)).map_err(text);
        let (client_udp, other_udp) = (socket()?, socket()?);
        client_udp.set_read_timeout(Some(LIMIT)).map_err(text)?;
        let peer_ip: IpAddr = match transcript.steps.iter().any(|(_, step)| format!("{step:?}").contains("peer6")) {
            true => Ipv6Addr::LOCALHOST.into(),
            false => Ipv4Addr::LOCALHOST.into(),
        };
        let unconnected_peer = bound(SocketAddr::new(peer_ip, 0));
        let mut placeholders = Placeholders { named: fixtures().named.clone(), bnd: None };
        let peer = addr_of(&unconnected_peer);
        placeholders.named.extend([
            ("client-udp", client_udp.local_addr().map_err(text)?),
            ("peer", peer),
            ("peer6", peer),
        ]);
        placeholders.named.extend(["listener", "listener6"].into_iter().zip(server.addrs.iter().copied()));
        // Placeholders of replies have no value yet. No request uses them.
        let mut bytes = Vec::new();
        for (_, step) in &transcript.steps {
            if let Step::ToServer(items) = step {
                bytes.extend(placeholders.bytes(items)?);
            }
        }
        let client = stream.local_addr().map_err(text)?;
        let unconnected_peer = Some(unconnected_peer);
        let (sent, line_end, is_closed, peer) = (0, 0, false, None);
        Ok(Self {
            chunking,
            stream,
            client,
            bytes,
            sent,
            line_end,
            placeholders,
            is_closed,
            client_udp,
            other_udp,
            unconnected_peer,
            peer,
        })
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        match step {
            Step::ToServer(items) => {
                self.line_end += self.placeholders.bytes(items)?.len();
                self.send();
                Ok(())
            }
            Step::ToClient(items) => self.placeholders.expect(&mut self.stream, items).map(drop),
            Step::UdpToServer(endpoint, items) => {
                let bytes = self.placeholders.bytes(items)?;
                let sent = match endpoint {
                    Endpoint::Expected => self.client_udp.send_to(&bytes, self.bnd()?),
                    Endpoint::OtherPort => self.other_udp.send_to(&bytes, self.bnd()?),
                    Endpoint::OtherIp => UdpSocket::bind("127.0.0.2:0").and_then(|s| s.send_to(&bytes, self.bnd_io()?)),
                };
                sent.map(drop).map_err(text)
            }
            Step::UdpToClient(_, items) => {
                let mut buffer = vec![0; 65_536];
                let (n, from) = retry(|| self.client_udp.recv_from(&mut buffer))
                    .map_err(|error| format!("expected a datagram: {error}"))?;
                if from != self.bnd()? {
                    return Err(format!("received a datagram from {from}, which is not BND"));
                }
                self.placeholders.compare(items, &buffer[..n])
            }
            Step::Connects(Endpoint::Expected) => {
                let socket = self.unconnected_peer.take().ok_or("the peer has connected already")?;
                socket.connect(&self.bnd()?.into()).map_err(text)?;
                let peer = TcpStream::from(socket);
                peer.set_read_timeout(Some(LIMIT)).map_err(text)?;
                self.peer = Some(peer);
                Ok(())
            }
            Step::Connects(endpoint) => {
                let ip =
                    if *endpoint == Endpoint::OtherIp { Ipv4Addr::new(127, 0, 0, 2).into() } else { self.bnd()?.ip() };
                let socket = bound(SocketAddr::new(ip, 0));
                socket.connect(&self.bnd()?.into()).map_err(text)?;
                let mut stream = TcpStream::from(socket);
                stream.set_read_timeout(Some(LIMIT)).map_err(text)?;
                expect_end(&mut stream, true)
            }
            Step::PeerSends(items) => {
                let bytes = self.placeholders.bytes(items)?;
                self.peer()?.write_all(&bytes).map_err(text)
            }
            Step::PeerReceives(items) => {
                let peer = self.peer.as_mut().ok_or("the peer has not connected")?;
                self.placeholders.expect(peer, items).map(drop)
            }
            Step::PeerFin => self.peer()?.shutdown(Shutdown::Write).map_err(text),
            Step::PeerEof => expect_end(self.peer()?, false),
            Step::Fin => self.stream.shutdown(Shutdown::Write).map_err(text),
            Step::Reset => {
                SockRef::from(&self.stream).set_linger(Some(std::time::Duration::ZERO)).map_err(text)?;
                // Replacing the stream closes it, which sends the RST.
                self.stream = TcpStream::connect(self.client_of()?).map_err(text)?;
                self.is_closed = true;
                Ok(())
            }
            Step::Eof | Step::Close => {
                self.is_closed = true;
                expect_end(&mut self.stream, matches!(step, Step::Close))
            }
            Step::PortFree(is_tcp) => {
                let bnd = self.bnd()?;
                if wait_port_free(bnd, *is_tcp) { Ok(()) } else { Err(format!("{bnd} is still in use")) }
            }
            Step::Log(_) => Ok(()),
            Step::SlowlyToClient(_) | Step::Pause(_) | Step::Quiet(_) => Err("not valid with role: server".into()),
        }
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
    fn end(mut self) -> Result<(), String> {
        drop(self.peer.take());
        let datagrams =
            [&self.client_udp, &self.other_udp].map(|s| s.set_nonblocking(true).and_then(|()| s.recv(&mut [0; 64])));
        if let Some(n) = datagrams.iter().flatten().next() {
            return Err(format!("unexpected datagram of {n} bytes"));
        }
        if self.is_closed {
            return Ok(());
        }
        let _ = self.stream.shutdown(Shutdown::Write);
        expect_end(&mut self.stream, true)
    }

    fn client_of(&self) -> Result<SocketAddr, String> {
        self.stream.peer_addr().map_err(|error| error.to_string())
    }

    fn bnd(&self) -> Result<SocketAddr, String> {
        self.placeholders.bnd.ok_or_else(|| "no reply with {bnd} so far".into())
    }

    fn bnd_io(&self) -> std::io::Result<SocketAddr> {
        self.bnd().map_err(std::io::Error::other)
    }

    fn peer(&mut self) -> Result<&mut TcpStream, String> {
        self.peer.as_mut().ok_or_else(|| "the peer has not connected".into())
    }
}
