//! What one session was: one log line at its end, however it ends.

use std::fmt;
use std::net::SocketAddr;
use std::time::Instant;

use crate::proto::{Addr, Command, Rep};
use crate::relay::Moved;

/// Filled in as the session goes on; logs itself when it is dropped.
#[derive(Debug)]
pub(super) struct Record {
    started: Instant,
    pub(super) client: Option<SocketAddr>,
    pub(super) user: Option<Box<[u8]>>,
    pub(super) command: Option<Command>,
    pub(super) dst: Option<Addr>,
    pub(super) bnd: Option<SocketAddr>,
    pub(super) rep: Option<Rep>,
    pub(super) moved: Moved,
    pub(super) error: Option<Box<str>>,
}

impl Record {
    pub(super) fn new(client: Option<SocketAddr>) -> Self {
        Self {
            started: Instant::now(),
            client,
            user: None,
            command: None,
            dst: None,
            bnd: None,
            rep: None,
            moved: Moved::default(),
            error: None,
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        log::info!("session {self}");
    }
}

/// `key=value`, `-` for what never came about. What a client can choose freely is quoted and escaped.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.client {
            Some(client) => write!(f, "client={client}")?,
            None => write!(f, "client=unix")?,
        }
        match &self.user {
            Some(user) => write!(f, " user=\"{}\"", user.escape_ascii())?,
            None => write!(f, " user=-")?,
        }
        write!(f, " command={}", or_dash(self.command))?;
        match &self.dst {
            Some(dst) => write!(f, " dst={:?}", dst.to_string())?,
            None => write!(f, " dst=-")?,
        }
        write!(f, " bnd={} rep={}", or_dash(self.bnd), or_dash(self.rep.map(|rep| rep.0)))?;
        let [up, down] = [&self.moved.up, &self.moved.down].map(|n| n.load(std::sync::atomic::Ordering::Relaxed));
        write!(f, " up={up} down={down} seconds={:.3}", self.started.elapsed().as_secs_f64())?;
        self.error.as_ref().map_or(Ok(()), |error| write!(f, " error={error:?}"))
    }
}

fn or_dash(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}
