//! The floor: a SOCKS5 CONNECT proxy that does as little as possible, for comparison with s5. One thread, one
//! edge-triggered epoll, IPv4 targets only. It checks, limits and logs nothing, so it is not for use outside of the
//! benchmark.

use std::io::{Read, Write};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::sys::epoll::EpollTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
use nix::unistd::pipe2;

use crate::*;

/// First argument of this program when it runs as the floor. The port follows, then `splice` for bulk without copies.
pub const FLOOR: &str = "floor";
/// Bytes of a read.
const CHUNK: usize = 64 * 1024;
/// Bytes of a pipe.
const PIPE_SIZE: usize = 1 << 20;
/// epoll data of the listener.
const LISTENER: u64 = u64::MAX;

enum Stage {
    Greeting,
    Request,
    Connecting(TcpStream),
    Relay(TcpStream),
}

struct Tunnel {
    client: TcpStream,
    stage: Stage,
    up: Direction,
    down: Direction,
}

/// One direction of a tunnel, with the bytes that the sink has not accepted yet, in memory or in a pipe.
#[derive(Default)]
struct Direction {
    pending: Vec<u8>,
    pipe: Option<(OwnedFd, OwnedFd)>,
    in_pipe: usize,
    is_done: bool,
}

pub fn main(args: &[String]) -> Result<(), BenchError> {
    let port: u16 = args.first().and_then(|port| port.parse().ok()).ok_or_else(|| failed("floor requires a port"))?;
    let splices = args.get(1).is_some_and(|word| word == "splice");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut tunnels: Vec<Option<Box<Tunnel>>> = Vec::new();
    let mut free = Vec::new();
    let mut buffer = vec![0; CHUNK];
    let mut events = [EpollEvent::empty(); 256];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            if event.data() == LISTENER {
                let Ok((client, _)) = listener.accept() else { continue };
                client.set_nonblocking(true)?;
                let key = free.pop().unwrap_or_else(|| {
                    tunnels.push(None);
                    tunnels.len() - 1
                });
                epoll.add(&client, interest(key))?;
                let (up, down) = (Direction::default(), Direction::default());
                tunnels[key] = Some(Box::new(Tunnel { client, stage: Stage::Greeting, up, down }));
                continue;
            }
            let key = event.data() as usize;
            let Some(tunnel) = &mut tunnels[key] else { continue };
            if !tunnel.step(&epoll, key, event.events(), &mut buffer, splices).unwrap_or(false) {
                tunnels[key] = None;
                free.push(key);
            }
        }
    }
}

fn interest(key: usize) -> EpollEvent {
    EpollEvent::new(
        EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET,
        key as u64,
    )
}

impl Tunnel {
    /// Handles an event of the client or the target. Returns false when the tunnel has ended.
    fn step(
        &mut self,
        epoll: &Epoll,
        key: usize,
        events: EpollFlags,
        buffer: &mut [u8],
        splices: bool,
    ) -> io::Result<bool> {
        match &mut self.stage {
            Stage::Greeting => match self.client.read(&mut buffer[..257]) {
                Ok(0) => return Ok(false),
                Ok(_) => {
                    self.client.write_all(&[5, 0])?;
                    self.stage = Stage::Request;
                }
                Err(error) => return ok_if_would_block(error),
            },
            Stage::Request => match self.client.read(&mut buffer[..262]) {
                Ok(10) => {
                    let [.., a, b, c, d, high, low] = buffer[..10] else { return Ok(false) };
                    let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC);
                    let target = socket(family, SockType::Stream, flags, None)?;
                    match connect(target.as_raw_fd(), &SockaddrIn::new(a, b, c, d, u16::from_be_bytes([high, low]))) {
                        Ok(()) | Err(Errno::EINPROGRESS) => {}
                        Err(error) => return Err(error.into()),
                    }
                    let target = TcpStream::from(target);
                    epoll.add(&target, interest(key))?;
                    self.stage = Stage::Connecting(target);
                }
                Ok(_) => return Ok(false),
                Err(error) => return ok_if_would_block(error),
            },
            Stage::Connecting(target) if events.contains(EpollFlags::EPOLLOUT) => {
                let target = target.try_clone()?;
                self.client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
                self.stage = Stage::Relay(target);
            }
            Stage::Connecting(_) => {}
            Stage::Relay(target) => {
                self.up.pump(&mut self.client, target, buffer, splices)?;
                self.down.pump(target, &mut self.client, buffer, splices)?;
            }
        }
        Ok(!(self.up.is_done && self.down.is_done))
    }
}

fn ok_if_would_block(error: io::Error) -> io::Result<bool> {
    if error.kind() == ErrorKind::WouldBlock { Ok(true) } else { Err(error) }
}

impl Direction {
    /// Relays until a socket would block.
    fn pump(
        &mut self,
        source: &mut TcpStream,
        sink: &mut TcpStream,
        buffer: &mut [u8],
        splices: bool,
    ) -> io::Result<()> {
        let result = if splices { self.splice(source, sink) } else { self.copy(source, sink, buffer) };
        result.or_else(|error| ok_if_would_block(error).map(|_| ()))
    }

    fn copy(&mut self, source: &mut TcpStream, sink: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
        while !self.is_done {
            while !self.pending.is_empty() {
                let n = sink.write(&self.pending)?;
                self.pending.drain(..n);
            }
            let n = source.read(buffer)?;
            if n == 0 {
                self.is_done = true;
                return sink.shutdown(Shutdown::Write);
            }
            let sent = sink.write(&buffer[..n]).or_else(|error| ok_if_would_block(error).map(|_| 0))?;
            self.pending.extend_from_slice(&buffer[sent..n]);
        }
        Ok(())
    }

    fn splice(&mut self, source: &TcpStream, sink: &TcpStream) -> io::Result<()> {
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        if self.pipe.is_none() {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
            fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE as i32))?;
            self.pipe = Some((reader, writer));
        }
        let Some((reader, writer)) = &self.pipe else { return Ok(()) };
        while !self.is_done {
            while self.in_pipe > 0 {
                self.in_pipe -= splice(reader, None, sink, None, self.in_pipe, flags)?;
            }
            self.in_pipe = splice(source, None, writer, None, PIPE_SIZE, flags)?;
            if self.in_pipe == 0 {
                self.is_done = true;
                return sink.shutdown(Shutdown::Write);
            }
        }
        Ok(())
    }
}
