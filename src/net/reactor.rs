//! A thread's reactor: epoll (edge-triggered except for `Io::read_only`), timers, and the loop of the main future.
//!
//! Each thread has its own instance. A socket is registered once for its lifetime. Waiting for it costs no system call,
//! and it is read or written only when it may be ready. Other threads use only its waker and its number of sockets.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use slab::Slab;

use super::loop_waker::LoopWaker;

const MAX_EVENTS: usize = 256;
/// Maximum duration of one epoll_wait(2). Older kernels cannot wait longer than 24 days.
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);
/// If sched_yield(2) takes longer than this, another process needs the core, and each yield would cost a whole time
/// slice. Then the next [`YIELDS_TO_SKIP`] yields are skipped.
const MAX_YIELD_TIME: Duration = Duration::from_micros(200);
const YIELDS_TO_SKIP: u32 = 256;
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// Key of the loop's eventfd in epoll events. It has no entry in `sockets`.
const WAKER_KEY: u64 = u64::MAX;

thread_local! {
    static CURRENT: Rc<Reactor> = Rc::default();
}

pub(super) fn current() -> Rc<Reactor> {
    CURRENT.with(Rc::clone)
}

/// Runs `future` to completion on this thread. Sockets and timers of this thread wake tasks only during the call.
pub fn run<F: Future>(future: F) -> io::Result<F::Output> {
    let mut output = None;
    run_loop(pin!(async { output = Some(future.await) }))?;
    // Always set at this point.
    output.ok_or_else(|| io::ErrorKind::Other.into())
}

/// Not generic, so that the loop is compiled once.
fn run_loop(mut future: Pin<&mut dyn Future<Output = ()>>) -> io::Result<()> {
    let reactor = current();
    let loop_waker = Arc::new(LoopWaker::new()?);
    let events = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(reactor.epoll()?, &loop_waker.eventfd, epoll::EventData::new_u64(WAKER_KEY), events)?;
    let waker = Waker::from(loop_waker.clone());
    let mut cx = Context::from_waker(&waker);
    let mut batch = Batch { events: Vec::with_capacity(MAX_EVENTS), wakers: Vec::new() };
    loop {
        loop_waker.clear();
        if future.as_mut().poll(&mut cx).is_ready() {
            return Ok(());
        }
        reactor.run_once(&loop_waker, &mut batch)?;
    }
}

/// Wakes the task when the other tasks of this thread have run. For a task that has more work but must take turns.
pub fn wake_later(cx: &Context<'_>) {
    CURRENT.with(|reactor| reactor.deferred.borrow_mut().push(cx.waker().clone()));
}

/// Lets the other tasks of this thread run once.
pub async fn yield_now() {
    let mut has_yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut has_yielded, true) {
            return Poll::Ready(());
        }
        wake_later(cx);
        Poll::Pending
    })
    .await;
}

/// Makes this thread's reactor store its number of sockets in `count` whenever it waits.
pub fn publish_socket_count(count: Arc<AtomicUsize>) {
    CURRENT.with(|reactor| reactor.socket_count.replace(count));
}

/// Wakes every task of this thread that waits for a socket, so that it notices another change, such as a reload.
pub fn wake_all() {
    let wakers: Vec<Waker> =
        CURRENT.with(|reactor| reactor.sockets.borrow().iter().filter_map(|(_, state)| state.waker.clone()).collect());
    wakers.into_iter().for_each(Waker::wake);
}

/// Readiness that a future waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Data, a connection to accept, or the end of the stream.
    Read,
    /// Buffer space, or the end of a connect.
    Write,
    /// FIN, reset, error or urgent data, possibly with unread data before it.
    Hangup,
}

/// Events and wakers of one pass of the loop; reused, so that a pass does not allocate.
struct Batch {
    events: Vec<epoll::Event>,
    wakers: Vec<Waker>,
}

#[derive(Debug, Default)]
pub(super) struct Reactor {
    /// Opened at the first use.
    pub(super) epoll: OnceCell<OwnedFd>,
    sockets: RefCell<Slab<SocketState>>,
    timers: RefCell<BTreeMap<Due, Waker>>,
    /// Bytes that are read before those of the socket. Not in `SocketState`, because few sockets have any.
    pub(super) put_back: RefCell<BTreeMap<SocketKey, VecDeque<u8>>>,
    /// Time of the first call of `due_at`.
    started: OnceCell<Instant>,
    /// Tasks that yielded; woken after those that have events.
    deferred: RefCell<Vec<Waker>>,
    last_generation: Cell<u32>,
    yields_to_skip: Cell<u32>,
    /// Number of sockets, readable by other threads.
    socket_count: RefCell<Arc<AtomicUsize>>,
}

#[derive(Debug, Default)]
struct SocketState {
    /// Distinguishes this socket from earlier ones in the same slab entry.
    generation: u32,
    /// Level-triggered: epoll reports the socket as readable as long as there is unread data.
    is_level_triggered: bool,
    to_read: Readiness,
    to_write: Readiness,
    /// FIN, reset, error or urgent data, possibly with unread data before it. After such an event, only `WouldBlock`
    /// means that the socket is empty; a short read does not.
    hangup: Readiness,
    /// The task that waits for any of the three.
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Readiness {
    /// There has been no event since the last `WouldBlock`, short read or short write.
    #[default]
    No,
    /// As `No`, and a task waits for an event.
    Awaited,
    Maybe,
}

impl SocketState {
    fn readiness(&mut self, interest: Interest) -> &mut Readiness {
        match interest {
            Interest::Read => &mut self.to_read,
            Interest::Write => &mut self.to_write,
            Interest::Hangup => &mut self.hangup,
        }
    }
}

/// Index of a socket in the reactor. 32 bits, because every connection stores it.
pub(super) type SocketKey = u32;

/// Time at which a timer fires, in nanoseconds since `Reactor::started`. Incremented until it is unique.
pub(super) type Due = u64;

/// 292 years. Leaves room for increments.
const MAX_DUE: Due = Due::MAX / 2;

impl Reactor {
    fn epoll(&self) -> io::Result<&OwnedFd> {
        if let Some(epoll) = self.epoll.get() {
            return Ok(epoll);
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(self.epoll.get_or_init(|| epoll))
    }

    pub(super) fn register(&self, socket: impl AsFd, flags: epoll::EventFlags) -> io::Result<SocketKey> {
        let generation = self.last_generation.get().wrapping_add(1);
        self.last_generation.set(generation);
        let is_level_triggered = !flags.contains(epoll::EventFlags::ET);
        let state = SocketState { generation, is_level_triggered, ..SocketState::default() };
        let key = self.sockets.borrow_mut().insert(state);
        let add = || {
            let key = SocketKey::try_from(key).map_err(|_| io::ErrorKind::OutOfMemory)?;
            let data = epoll::EventData::new_u64(u64::from(generation) << 32 | u64::from(key));
            epoll::add(self.epoll()?, socket, data, flags)?;
            Ok(key)
        };
        add().inspect_err(|_| drop(self.sockets.borrow_mut().try_remove(key)))
    }

    pub(super) fn forget(&self, key: SocketKey) {
        self.put_back.borrow_mut().remove(&key);
        let state = self.sockets.borrow_mut().try_remove(key as usize);
        // Dropping the waker can drop its task, which needs `sockets` when it drops a socket.
        drop(state);
    }

    /// Waits for events and timers and wakes their tasks. Does not wait if a task or the main future is already woken.
    fn run_once(&self, loop_waker: &LoopWaker, batch: &mut Batch) -> io::Result<()> {
        batch.wakers.append(&mut self.deferred.borrow_mut());
        self.socket_count.borrow().store(self.sockets.borrow().len(), Ordering::Relaxed);
        if batch.wakers.is_empty() && batch.events.len() > 1 && !loop_waker.is_woken() {
            self.yield_core();
        }
        let timeout =
            if batch.wakers.is_empty() && loop_waker.try_sleep() { self.time_to_next_timer() } else { Some(NOW) };
        batch.events.clear();
        let waited = epoll::wait(self.epoll()?, spare_capacity(&mut batch.events), timeout.as_ref());
        loop_waker.end_sleep();
        match waited {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Tasks that yielded are woken last.
        let deferred = batch.wakers.len();
        for event in &batch.events {
            self.record_event(event, &mut batch.wakers);
        }
        self.take_expired(&mut batch.wakers);
        batch.wakers.rotate_left(deferred);
        // Nothing is borrowed here: dropping a waker may drop its task, and with it a socket.
        batch.wakers.drain(..).for_each(Waker::wake);
        Ok(())
    }

    /// Lets other processes on this core run first: under load, one pass then handles several events at less cost.
    fn yield_core(&self) {
        match self.yields_to_skip.get() {
            0 => {
                let began = Instant::now();
                thread::yield_now();
                if began.elapsed() > MAX_YIELD_TIME {
                    self.yields_to_skip.set(YIELDS_TO_SKIP);
                }
            }
            count => self.yields_to_skip.set(count - 1),
        }
    }

    fn record_event(&self, event: &epoll::Event, wakers: &mut Vec<Waker>) {
        use epoll::EventFlags;
        let (flags, data) = (event.flags, event.data.u64());
        let mut sockets = self.sockets.borrow_mut();
        let (generation, key) = ((data >> 32) as u32, data as u32 as usize);
        // A socket that was closed here can be open under another descriptor, and then still has events.
        let Some(state) = sockets.get_mut(key).filter(|state| state.generation == generation) else { return };
        let closed = EventFlags::HUP | EventFlags::ERR;
        let mut is_awaited = false;
        let hangup = closed | EventFlags::RDHUP | EventFlags::PRI;
        for (readiness, mask) in [
            (&mut state.hangup, hangup),
            (&mut state.to_read, hangup | EventFlags::IN),
            (&mut state.to_write, closed | EventFlags::OUT),
        ] {
            if flags.intersects(mask) {
                is_awaited |= std::mem::replace(readiness, Readiness::Maybe) == Readiness::Awaited;
            }
        }
        if is_awaited {
            wakers.extend(state.waker.take());
        }
    }

    pub(super) fn due_at(&self, time: Instant) -> Due {
        let started = *self.started.get_or_init(Instant::now);
        Due::try_from(time.saturating_duration_since(started).as_nanos()).unwrap_or(MAX_DUE).min(MAX_DUE)
    }

    pub(super) fn now(&self) -> Due {
        self.due_at(Instant::now())
    }

    fn time_to_next_timer(&self) -> Option<Timespec> {
        let timers = self.timers.borrow();
        let (due, _) = timers.first_key_value()?;
        let time = Duration::from_nanos(due.saturating_sub(self.now()));
        Timespec::try_from(time.min(MAX_WAIT)).ok()
    }

    fn take_expired(&self, wakers: &mut Vec<Waker>) {
        let mut timers = self.timers.borrow_mut();
        if timers.is_empty() {
            return;
        }
        let now = self.now();
        while let Some(first) = timers.first_entry().filter(|first| *first.key() <= now) {
            wakers.push(first.remove());
        }
    }

    pub(super) fn arm_timer(&self, cx: &Context<'_>, due: Instant) -> Due {
        let mut timers = self.timers.borrow_mut();
        let due = (self.due_at(due)..).find(|due| !timers.contains_key(due)).unwrap_or(MAX_DUE);
        timers.insert(due, cx.waker().clone());
        due
    }

    pub(super) fn clear_timer(&self, due: Due) {
        let waker = self.timers.borrow_mut().remove(&due);
        // Dropping the waker can drop its task, which needs `timers` when it drops a timer.
        drop(waker);
    }

    pub(super) fn poll_ready(&self, key: SocketKey, cx: &Context<'_>, interest: Interest) -> Poll<()> {
        let mut sockets = self.sockets.borrow_mut();
        let Some(state) = sockets.get_mut(key as usize) else { return Poll::Ready(()) };
        let readiness = state.readiness(interest);
        if *readiness == Readiness::Maybe {
            return Poll::Ready(());
        }
        *readiness = Readiness::Awaited;
        let old = match &state.waker {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => state.waker.replace(cx.waker().clone()),
        };
        drop(sockets);
        drop(old);
        Poll::Pending
    }

    /// Records that the socket is not ready. After a hang-up, only `WouldBlock` shows that for edge-triggered reads.
    pub(super) fn mark_not_ready(&self, key: SocketKey, interest: Interest, would_block: bool) {
        if let Some(state) = self.sockets.borrow_mut().get_mut(key as usize)
            && (would_block
                || interest == Interest::Write
                || state.is_level_triggered
                || state.hangup != Readiness::Maybe)
        {
            *state.readiness(interest) = Readiness::No;
        }
    }
}
