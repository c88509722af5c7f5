//! The client's half of the handshake, blocking and not.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect as connect_socket, socket};

use crate::measure::{Fault, PATIENCE, Via, failed, wrong};

const GREETING: [u8; 3] = [5, 1, 0];
pub const CONNECT: u8 = 1;
const ASSOCIATE: u8 = 3;

pub fn request(command: u8, to: SocketAddrV4) -> [u8; 10] {
    let mut request = [5, command, 0, 1, 0, 0, 0, 0, 0, 0];
    request[4..8].copy_from_slice(&to.ip().octets());
    request[8..].copy_from_slice(&to.port().to_be_bytes());
    request
}

/// A blocking stream to `to`, which gives up when nothing happens on it.
pub fn connect(via: Via, to: SocketAddrV4) -> Result<TcpStream, Fault> {
    let Via::Socks(proxy) = via else { return plain(to) };
    let mut stream = plain(proxy)?;
    ask(&mut stream, CONNECT, to)?;
    Ok(stream)
}

pub fn plain(to: SocketAddrV4) -> Result<TcpStream, Fault> {
    let stream = TcpStream::connect_timeout(&SocketAddr::V4(to), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// An association: the stream that keeps it, and where the relay takes datagrams.
pub fn associate(proxy: SocketAddrV4) -> Result<(TcpStream, SocketAddrV4), Fault> {
    let mut stream = plain(proxy)?;
    let mut relay = ask(&mut stream, ASSOCIATE, SocketAddrV4::new([0, 0, 0, 0].into(), 0))?;
    if relay.ip().is_unspecified() {
        relay.set_ip(*proxy.ip());
    }
    Ok((stream, relay))
}

fn ask(stream: &mut TcpStream, command: u8, to: SocketAddrV4) -> Result<SocketAddrV4, Fault> {
    let mut answer = [0; 10];
    stream.write_all(&GREETING)?;
    stream.read_exact(&mut answer[..2])?;
    if answer[..2] != [5, 0] {
        return Err(wrong(format!("method {answer:?}")));
    }
    stream.write_all(&request(command, to))?;
    stream.read_exact(&mut answer)?;
    match answer {
        [5, 0, 0, 1, a, b, c, d, high, low] => {
            Ok(SocketAddrV4::new([a, b, c, d].into(), u16::from_be_bytes([high, low])))
        }
        [5, 7, ..] => Err(Fault::None),
        _ => Err(failed(format!("reply {answer:?}"))),
    }
}

/// Whether a greeting is answered, be it that a login is needed; in one attempt.
pub fn greets(proxy: SocketAddrV4) -> io::Result<bool> {
    let mut stream = TcpStream::connect(proxy)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = [0; 2];
    stream.write_all(&GREETING)?;
    stream.read_exact(&mut answer)?;
    Ok(matches!(answer, [5, 0 | 255]))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Connecting,
    Greeted,
    Asked,
    Open,
}

/// A stream to the target that is being opened and never blocks.
pub struct Dial {
    pub stream: TcpStream,
    via: Via,
    to: SocketAddrV4,
    stage: Stage,
    answer: [u8; 10],
    have: usize,
}

impl Dial {
    pub fn begin(via: Via, to: SocketAddrV4) -> Result<Self, Fault> {
        let first = match via {
            Via::Direct => to,
            Via::Socks(proxy) => proxy,
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        match connect_socket(fd.as_raw_fd(), &SockaddrIn::from(first)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Self { stream: fd.into(), via, to, stage: Stage::Connecting, answer: [0; 10], have: 0 })
    }

    /// Goes on as far as it gets; whether the tunnel is open.
    pub fn turn(&mut self) -> Result<bool, Fault> {
        loop {
            let done = match self.stage {
                Stage::Connecting => self.connected()?,
                Stage::Greeted => self.answered(2)? && self.asked()?,
                Stage::Asked => self.answered(10)? && self.opened()?,
                Stage::Open => return Ok(true),
            };
            if !done {
                return Ok(false);
            }
        }
    }

    fn connected(&mut self) -> Result<bool, Fault> {
        if let Via::Socks(_) = self.via {
            return self.write(&GREETING, Stage::Greeted);
        }
        if let Some(error) = self.stream.take_error()? {
            return Err(error.into());
        }
        let there = self.stream.peer_addr().is_ok();
        if there {
            self.stage = Stage::Open;
        }
        Ok(there)
    }

    fn write(&mut self, message: &[u8], then: Stage) -> Result<bool, Fault> {
        match self.stream.write(message) {
            Ok(wrote) if wrote == message.len() => {
                (self.stage, self.have) = (then, 0);
                Ok(true)
            }
            Ok(_) => Err(failed("a message of the handshake did not fit")),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn answered(&mut self, length: usize) -> Result<bool, Fault> {
        if self.have == length {
            return Ok(true);
        }
        match self.stream.read(&mut self.answer[self.have..length]) {
            Ok(0) => Err(failed("closed in the handshake")),
            Ok(got) => {
                self.have += got;
                Ok(self.have == length)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn asked(&mut self) -> Result<bool, Fault> {
        match self.answer[..2] {
            [5, 0] => self.write(&request(CONNECT, self.to), Stage::Asked),
            _ => Err(failed(format!("method {:?}", &self.answer[..2]))),
        }
    }

    fn opened(&mut self) -> Result<bool, Fault> {
        match self.answer[..4] {
            [5, 0, 0, 1] => self.stage = Stage::Open,
            _ => return Err(failed(format!("reply {:?}", &self.answer[..10]))),
        }
        Ok(true)
    }
}
