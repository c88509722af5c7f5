//! How fast a session may be: token buckets, and a stream that keeps to them.
//!
//! Each way of a stream reserves a slice, waits until that is paid for, and moves it in as many reads or writes as it
//! takes; so there is a timer for each slice and not for each read, and whoever shares a bucket gets his turn. A bucket
//! that is not used fills up, so that what is lost by waking late is not lost.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_lite::{AsyncRead, AsyncWrite};

use crate::conn::Conn;
use crate::reactor::Alarm;
use crate::relay::Stream;

/// What is reserved at once, in time, where there is no more.
const SLICE: Duration = Duration::from_millis(25);
/// What an unused bucket holds, in time.
const BURST: Duration = Duration::from_millis(250);
/// What a bucket holds at least, in octets: a datagram must fit in.
const MIN_BURST: f64 = 65_536.0;
/// The longest that is waited for at once.
const LONGEST: f64 = 3600.0;

/// Octets that may move, as many a second.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: f64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Below 0 when more has been reserved than there is.
    tokens: f64,
    since: Instant,
}

impl Bucket {
    /// `rate` is in octets a second, and not 0.
    pub(super) fn new(rate: u64, now: Instant) -> Self {
        let rate = rate as f64;
        Self { rate, state: Mutex::new(State { tokens: rate * SLICE.as_secs_f64(), since: now }) }
    }

    /// With what has come in since.
    fn state(&self, now: Instant) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let most = (self.rate * BURST.as_secs_f64()).max(MIN_BURST);
        let passed = now.saturating_duration_since(state.since).as_secs_f64();
        state.tokens = most.min(state.tokens + passed * self.rate);
        state.since = state.since.max(now);
        state
    }

    /// What is wanted, if it is there; or else what is, or a slice.
    fn offer(&self, wanted: usize, now: Instant) -> f64 {
        let tokens = self.state(now).tokens;
        let wanted = wanted as f64;
        if tokens >= wanted { wanted } else { tokens.max(self.rate * SLICE.as_secs_f64()).max(1.0) }
    }

    /// Takes so many octets, which need not be there yet: how long it is until they are.
    fn reserve(&self, octets: usize, now: Instant) -> Duration {
        let mut state = self.state(now);
        state.tokens -= octets as f64;
        Duration::from_secs_f64(((-state.tokens).max(0.0) / self.rate).min(LONGEST))
    }

    fn give_back(&self, octets: usize, now: Instant) {
        self.state(now).tokens += octets as f64;
    }
}

/// The buckets of a session: its own, and that of its user.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    pub(super) session: Arc<Bucket>,
    pub(super) user: Option<Arc<Bucket>>,
}

impl Pace {
    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        [Some(&self.session), self.user.as_ref()].into_iter().flatten().map(|bucket| &**bucket)
    }

    /// How many octets may move, and how long it is until they may. Where there is enough, no more than is wanted, so
    /// that others find some.
    fn reserve(&self, wanted: usize, now: Instant) -> (usize, Duration) {
        let octets = self.buckets().map(|bucket| bucket.offer(wanted, now)).fold(f64::MAX, f64::min) as usize;
        let wait = self.buckets().map(|bucket| bucket.reserve(octets, now)).max();
        (octets, wait.unwrap_or_default())
    }

    fn give_back(&self, octets: usize) {
        let now = Instant::now();
        self.buckets().for_each(|bucket| bucket.give_back(octets, now));
    }

    /// Whether a datagram of that size may pass; it counts if so.
    pub(super) fn lets_pass(&self, octets: usize, now: Instant) -> bool {
        let may_pass = self.buckets().all(|bucket| bucket.state(now).tokens > 0.0);
        if may_pass {
            for bucket in self.buckets() {
                bucket.reserve(octets, now);
            }
        }
        may_pass
    }
}

/// What one way of a stream has reserved.
#[derive(Default)]
struct Reserved {
    octets: usize,
    /// Until when it has to wait for them.
    due: Option<Instant>,
    alarm: Alarm,
}

impl Reserved {
    /// Ready when so many octets may move.
    fn poll(&mut self, wanted: usize, pace: &Pace, cx: &mut Context<'_>) -> Poll<usize> {
        if self.octets == 0 {
            let now = Instant::now();
            let (octets, wait) = pace.reserve(wanted, now);
            self.octets = octets;
            self.due = (!wait.is_zero()).then(|| now + wait);
        }
        while let Some(due) = self.due {
            if Instant::now() >= due {
                self.due = None;
            } else {
                ready!(self.alarm.poll(cx, due));
            }
        }
        Poll::Ready(self.octets)
    }

    /// Pays for what has moved. Whoever can't move anything now gives back what others may have use for.
    fn pay(&mut self, moved: Poll<io::Result<usize>>, pace: &Pace) -> Poll<io::Result<usize>> {
        match moved {
            Poll::Ready(Ok(n)) => self.octets = self.octets.saturating_sub(n),
            Poll::Ready(Err(_)) | Poll::Pending => pace.give_back(std::mem::take(&mut self.octets)),
        }
        moved
    }
}

/// A client's connection that is read from and written to at a pace.
pub(super) struct Paced<'a> {
    conn: &'a mut Conn,
    pace: &'a Pace,
    read: Reserved,
    write: Reserved,
}

impl<'a> Paced<'a> {
    pub(super) fn new(conn: &'a mut Conn, pace: &'a Pace) -> Self {
        Self { conn, pace, read: Reserved::default(), write: Reserved::default() }
    }
}

impl Drop for Paced<'_> {
    fn drop(&mut self) {
        self.pace.give_back(self.read.octets + self.write.octets);
    }
}

impl AsyncRead for Paced<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { conn, pace, read, .. } = self.get_mut();
        let most = ready!(read.poll(buf.len(), pace, cx)).min(buf.len());
        let moved = Pin::new(&mut **conn).poll_read(cx, buf.get_mut(..most).unwrap_or_default());
        read.pay(moved, pace)
    }
}

impl AsyncWrite for Paced<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { conn, pace, write, .. } = self.get_mut();
        let most = ready!(write.poll(buf.len(), pace, cx)).min(buf.len());
        let moved = Pin::new(&mut **conn).poll_write(cx, buf.get(..most).unwrap_or_default());
        write.pay(moved, pace)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().conn).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().conn).poll_close(cx)
    }
}

impl Stream for Paced<'_> {
    fn abort(&self) {
        self.conn.abort();
    }

    fn has_unsent(&self) -> bool {
        self.conn.has_unsent()
    }

    fn is_reset(&self) -> bool {
        self.conn.is_reset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(rate: u64, start: Instant) -> Pace {
        Pace { session: Arc::new(Bucket::new(rate, start)), user: None }
    }

    /// What moves in `time` when each wait is as much too long as said.
    fn moved(rate: u64, late: Duration, time: Duration) -> usize {
        let start = Instant::now();
        let pace = pace(rate, start);
        let (mut now, mut moved) = (start, 0);
        while now < start + time {
            let (octets, wait) = pace.reserve(65_536, now);
            now += if wait.is_zero() { wait } else { wait + late };
            moved += octets;
        }
        moved
    }

    #[test]
    fn a_pace_is_kept_and_made_use_of_even_by_those_who_wake_late() {
        for rate in [10_000, 1_000_000, 1_000_000_000] {
            for late in [0, 1, 20, 100] {
                let moved = moved(rate, Duration::from_millis(late), Duration::from_secs(10)) as f64;
                let share = moved / (10.0 * rate as f64);
                assert!((0.98..1.05).contains(&share), "{rate} a second, {late} ms late: {share}");
            }
        }
    }

    #[test]
    fn those_who_share_a_bucket_take_turns() {
        let start = Instant::now();
        let pace = pace(1_000_000, start);
        let mut waits = [(); 4].map(|()| pace.reserve(65_536, start).1.as_millis());
        waits.sort_unstable();
        assert_eq!(waits, [0, 25, 50, 75]);
    }

    #[test]
    fn an_idle_bucket_holds_a_quarter_of_a_second_and_what_is_given_back_is_there_again() {
        let start = Instant::now();
        let later = start + Duration::from_secs(60);
        let bucket = Bucket::new(4_000_000, start);
        assert_eq!(bucket.offer(2_000_000, later), 1_000_000.0);
        assert_eq!(bucket.offer(1000, later), 1000.0);
        assert_eq!(bucket.reserve(1_100_000, later), Duration::from_millis(25));
        bucket.give_back(1_100_000, later);
        assert_eq!(bucket.offer(2_000_000, later), 1_000_000.0);
        assert_eq!(bucket.offer(1000, later), 1000.0);
    }

    #[test]
    fn datagrams_pass_as_long_as_there_is_something_left() {
        let start = Instant::now();
        let pace = pace(1_000_000, start);
        assert!(pace.lets_pass(60_000, start));
        assert!(!pace.lets_pass(1, start));
        assert!(pace.lets_pass(1, start + Duration::from_millis(40)));
    }
}
