//! Shared by all measurements: errors, distributions of times, and the route of the client.

use std::fmt;

use crate::*;

/// A measurement fails after this time without progress.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Reason for a missing figure.
#[derive(Clone, Debug)]
pub enum BenchError {
    /// The proxy does not support the measurement, or the measurement does not apply to it.
    Unsupported,
    /// Received data differs from the data sent.
    Corrupt(String),
    /// The proxy did not start, refused a request, or stopped answering.
    Failed(String),
}

impl fmt::Display for BenchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported => f.write_str("not supported"),
            Self::Corrupt(reason) => write!(f, "corrupt: {reason}"),
            Self::Failed(reason) => write!(f, "failed: {reason}"),
        }
    }
}

impl From<io::Error> for BenchError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<nix::Error> for BenchError {
    fn from(error: nix::Error) -> Self {
        io::Error::from(error).into()
    }
}

pub fn failed(reason: impl Into<String>) -> BenchError {
    BenchError::Failed(reason.into())
}

pub fn corrupt(reason: impl Into<String>) -> BenchError {
    BenchError::Corrupt(reason.into())
}

/// The route of the client to the target.
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

    /// Returns a quantile in microseconds, or NaN without events.
    pub fn quantile(&mut self, q: f64) -> f64 {
        if self.0.is_empty() {
            return f64::NAN;
        }
        let at = ((self.0.len() - 1) as f64 * q).round() as usize;
        f64::from(*self.0.select_nth_unstable(at).1) / 1000.0
    }
}

/// Runs each of these functions on a thread of its own. Returns the sum of their results.
pub fn sum_of_threads<F>(functions: impl IntoIterator<Item = F>) -> Result<u64, BenchError>
where
    F: FnOnce() -> Result<u64, BenchError> + Send,
{
    thread::scope(|scope| {
        let threads: Vec<_> = functions.into_iter().map(|function| scope.spawn(function)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(failed("panic")))).sum()
    })
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
