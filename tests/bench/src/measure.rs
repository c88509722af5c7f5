//! What every measurement shares: how it can fail, what a distribution of times says, and the client's way to a target.

use std::fmt;
use std::io;
use std::net::SocketAddrV4;
use std::time::Duration;

/// A wait in which nothing at all happens for this long is given up.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no figure.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The program does not offer this, or there is nothing to measure.
    None,
    /// What came back is not what was sent.
    Wrong(String),
    /// It could not be started, refused, or stopped answering.
    Failed(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Wrong(why) => write!(f, "wrong: {why}"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<nix::Error> for Fault {
    fn from(error: nix::Error) -> Self {
        io::Error::from(error).into()
    }
}

pub fn failed(why: impl Into<String>) -> Fault {
    Fault::Failed(why.into())
}

pub fn wrong(why: impl Into<String>) -> Fault {
    Fault::Wrong(why.into())
}

/// How the client reaches the target.
#[derive(Clone, Copy, Debug)]
pub enum Via {
    Direct,
    Socks(SocketAddrV4),
}

/// Times of one kind of event, in nanoseconds.
#[derive(Default)]
pub struct Times(Vec<u32>);

impl Times {
    pub fn add(&mut self, time: Duration) {
        self.0.push(u32::try_from(time.as_nanos()).unwrap_or(u32::MAX));
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn merge(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    /// In microseconds; not a number when there were no events.
    pub fn quantile(&mut self, q: f64) -> f64 {
        if self.0.is_empty() {
            return f64::NAN;
        }
        let at = ((self.0.len() - 1) as f64 * q).round() as usize;
        f64::from(*self.0.select_nth_unstable(at).1) / 1000.0
    }
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}
