//! The SOCKS handshake of a client.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect as connect_socket, socket};

use crate::*;

const GREETING: [u8; 3] = [5, 1, 0];
pub const CONNECT: u8 = 1;
const ASSOCIATE: u8 = 3;

pub fn request(command: u8, to: SocketAddrV4) -> [u8; 10] {
    let mut request = [5, command, 0, 1, 0, 0, 0, 0, 0, 0];
    request[4..8].copy_from_slice(&to.ip().octets());
    request[8..].copy_from_slice(&to.port().to_be_bytes());
    request
}

/// Connects to `to`. The stream is blocking and has timeouts.
pub fn connect(via: Via, to: SocketAddrV4) -> Result<TcpStream, BenchError> {
    Ok(PendingTunnel::begin(via, CONNECT, to)?.finish()?.0)
}

/// Opens an association. Returns its control connection and BND.
pub fn associate(proxy: SocketAddrV4) -> Result<(TcpStream, SocketAddrV4), BenchError> {
    let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    let (stream, mut relay) = PendingTunnel::begin(Via::Socks(proxy), ASSOCIATE, any)?.finish()?;
    if relay.ip().is_unspecified() {
        relay.set_ip(*proxy.ip());
    }
    Ok((stream, relay))
}

/// Returns true if the proxy answers a greeting, even if it requires a login.
pub fn answers_greeting(proxy: SocketAddrV4) -> io::Result<bool> {
    let mut stream = TcpStream::connect(proxy)?;
    stream.set_read_timeout(Some(IDLE_TIMEOUT))?;
    let mut answer = [0; 2];
    stream.write_all(&GREETING)?;
    stream.read_exact(&mut answer)?;
    Ok(matches!(answer, [5, 0 | 255]))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Connecting,
    Greeted,
    Requested,
    Open,
}

/// A tunnel on a non-blocking stream, during its handshake.
pub struct PendingTunnel {
    pub stream: TcpStream,
    via: Via,
    request: [u8; 10],
    stage: Stage,
    answer: [u8; 10],
    received: usize,
}

impl PendingTunnel {
    pub fn begin(via: Via, command: u8, to: SocketAddrV4) -> Result<Self, BenchError> {
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
        let request = request(command, to);
        Ok(Self { stream: fd.into(), via, request, stage: Stage::Connecting, answer: [0; 10], received: 0 })
    }

    /// Waits until the tunnel is open. Returns its stream, which is then blocking and has timeouts, and BND.
    fn finish(mut self) -> Result<(TcpStream, SocketAddrV4), BenchError> {
        let mut events = Events::new()?;
        events.add(&self.stream, 0, edge_triggered())?;
        while !self.advance()? {
            events.wait_any()?;
        }
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(Some(IDLE_TIMEOUT))?;
        self.stream.set_write_timeout(Some(IDLE_TIMEOUT))?;
        self.stream.set_nodelay(true)?;
        let [.., a, b, c, d, high, low] = self.answer;
        Ok((self.stream, SocketAddrV4::new([a, b, c, d].into(), u16::from_be_bytes([high, low]))))
    }

    /// Continues the handshake as far as possible. Returns true if the tunnel is open.
    pub fn advance(&mut self) -> Result<bool, BenchError> {
        loop {
            let has_advanced = match self.stage {
                Stage::Connecting => self.on_connected()?,
                Stage::Greeted => self.has_answer(2)? && self.send_request()?,
                Stage::Requested => self.has_answer(10)? && self.on_reply()?,
                Stage::Open => return Ok(true),
            };
            if !has_advanced {
                return Ok(false);
            }
        }
    }

    fn on_connected(&mut self) -> Result<bool, BenchError> {
        if let Via::Socks(_) = self.via {
            return self.write(&GREETING, Stage::Greeted);
        }
        if let Some(error) = self.stream.take_error()? {
            return Err(error.into());
        }
        let is_connected = self.stream.peer_addr().is_ok();
        if is_connected {
            self.stage = Stage::Open;
        }
        Ok(is_connected)
    }

    fn write(&mut self, message: &[u8], then: Stage) -> Result<bool, BenchError> {
        match self.stream.write(message) {
            Ok(wrote) if wrote == message.len() => {
                (self.stage, self.received) = (then, 0);
                Ok(true)
            }
            Ok(_) => Err(failed("partial write during the handshake")),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn has_answer(&mut self, length: usize) -> Result<bool, BenchError> {
        if self.received == length {
            return Ok(true);
        }
        match self.stream.read(&mut self.answer[self.received..length]) {
            Ok(0) => Err(failed("connection closed during the handshake")),
            Ok(got) => {
                self.received += got;
                Ok(self.received == length)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn send_request(&mut self) -> Result<bool, BenchError> {
        match self.answer[..2] {
            [5, 0] => self.write(&self.request.clone(), Stage::Requested),
            _ => Err(failed(format!("method {:?}", &self.answer[..2]))),
        }
    }

    fn on_reply(&mut self) -> Result<bool, BenchError> {
        match self.answer[..4] {
            [5, 0, 0, 1] => self.stage = Stage::Open,
            [5, 7, ..] => return Err(BenchError::Unsupported),
            _ => return Err(failed(format!("reply {:?}", &self.answer[..10]))),
        }
        Ok(true)
    }
}
