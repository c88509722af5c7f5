//! Timers of the event loop.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;

use super::reactor::{Due, Reactor, current};

/// A timer for a deadline that is often postponed, such as an idle timeout. A later deadline does not re-arm it, so
/// relaying costs no timer operation; it fires early instead. One task at a time may poll it, inside
/// [`run`](super::reactor::run).
#[derive(Debug, Default)]
pub struct IdleTimer(Option<ArmedTimer>);

/// A timer that is set; cleared when dropped. Small, since each idle tunnel has one.
#[derive(Debug)]
struct ArmedTimer {
    due: Due,
    reactor: Rc<Reactor>,
}

impl IdleTimer {
    /// Returns false before the first call of [`IdleTimer::poll`], and after it was ready.
    pub fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// Ready at `due`, or at an earlier deadline from a previous call, so check the clock and poll again.
    pub fn poll(&mut self, cx: &Context<'_>, due: Instant) -> Poll<()> {
        let timer = match &self.0 {
            Some(timer) if timer.due <= timer.reactor.due_at(due) => timer,
            _ => {
                let reactor = current();
                self.0.insert(ArmedTimer { due: reactor.arm_timer(cx, due), reactor })
            }
        };
        if timer.due > timer.reactor.now() {
            return Poll::Pending;
        }
        self.0 = None;
        Poll::Ready(())
    }
}

impl Drop for ArmedTimer {
    fn drop(&mut self) {
        self.reactor.clear_timer(self.due);
    }
}

/// Returns at `due`.
pub async fn sleep_until(due: Instant) {
    let mut timer = IdleTimer::default();
    poll_fn(|cx| timer.poll(cx, due)).await;
}

/// Returns after `time`.
pub async fn sleep(time: Duration) {
    // A time that `Instant` cannot represent is never reached.
    match Instant::now().checked_add(time) {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Runs `future` until `deadline`. Returns `None` if it does not complete in time.
pub fn timeout_at<T>(deadline: Instant, future: impl Future<Output = T>) -> impl Future<Output = Option<T>> {
    Timeout { future, timeout: sleep_until(deadline) }
}

pin_project! {
    /// A struct, because an async block would have `future` twice: as its argument, and where it polls it.
    struct Timeout<F, S> {
        #[pin]
        future: F,
        #[pin]
        timeout: S,
    }
}

impl<F: Future, S: Future<Output = ()>> Future for Timeout<F, S> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match this.future.poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => this.timeout.poll(cx).map(|()| None),
        }
    }
}
