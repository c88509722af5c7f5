//! The reactor of a thread: edge-triggered epoll, timers, and the loop around them (Linux).
//!
//! Nothing in here is shared with other threads but the waker of the loop.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use slab::Slab;

use super::{EventSet, Interest};

/// How many events are taken from the kernel at once.
const MAX_EVENTS: usize = 256;
/// How long one wait is at the most: older kernels know no more than 24 days.
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);
/// When letting others run has taken longer than this, somebody needs the core for himself, and it is not done for
/// the next `YIELDS_TO_SKIP` turns: it would cost us his whole slice each time.
const MAX_YIELD_TIME: Duration = Duration::from_micros(200);
const YIELDS_TO_SKIP: u32 = 256;
/// What epoll says for the waker of the loop, which is no state.
const WAKER_KEY: u64 = u64::MAX;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

/// The reactor of this thread, when it is inside of [`run`].
pub(super) fn current() -> Option<Rc<Reactor>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Sets the reactor of the thread for as long as it lives.
struct CurrentGuard;

impl CurrentGuard {
    fn new(reactor: Rc<Reactor>) -> Self {
        CURRENT.set(Some(reactor));
        Self
    }
}

impl Drop for CurrentGuard {
    fn drop(&mut self) {
        CURRENT.set(None);
    }
}

pub(super) fn run<F: Future>(future: F) -> io::Result<F::Output> {
    let mut output = None;
    run_unit(pin!(async { output = Some(future.await) }))?;
    // It has been set when that returns.
    output.ok_or_else(|| io::ErrorKind::Other.into())
}

/// One loop for all kinds of futures, which would each have a copy of it.
fn run_unit(mut future: Pin<&mut dyn Future<Output = ()>>) -> io::Result<()> {
    let reactor = Rc::new(Reactor::new()?);
    let loop_waker = Arc::new(LoopWaker::new()?);
    let events = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&reactor.epoll, &loop_waker.eventfd, epoll::EventData::new_u64(WAKER_KEY), events)?;
    let _guard = CurrentGuard::new(reactor.clone());
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

pub(super) fn wake_later(cx: &Context<'_>) -> bool {
    let reactor = current();
    if let Some(reactor) = &reactor {
        reactor.deferred.borrow_mut().push(cx.waker().clone());
    }
    reactor.is_some()
}

/// The waker of the loop, from this thread or another. An eventfd that is edge-triggered need never be read.
struct LoopWaker {
    eventfd: OwnedFd,
    state: AtomicU8,
}

/// Runs tasks, or handles events; looks at the state before it waits.
const AWAKE: u8 = 0;
/// There is something to be polled.
const WOKEN: u8 = 1;
/// Waits in the kernel, and has to be alerted.
const ASLEEP: u8 = 2;

impl LoopWaker {
    fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, state: AtomicU8::new(AWAKE) })
    }

    /// Forgets that it was woken, since the future is about to be polled.
    fn clear(&self) {
        self.state.swap(AWAKE, Ordering::SeqCst);
    }

    /// Whether the loop may wait in the kernel: not when it was woken meanwhile.
    fn try_sleep(&self) -> bool {
        self.state.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The wait is over, whatever for.
    fn end_sleep(&self) {
        let _ = self.state.compare_exchange(ASLEEP, AWAKE, Ordering::SeqCst, Ordering::SeqCst);
    }
}

impl Wake for LoopWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(WOKEN, Ordering::SeqCst) == ASLEEP {
            // Can fail only when it has been alerted 2^64 times.
            let _ = rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes());
        }
    }
}

/// What one turn takes from the kernel, and whom it wakes; kept, so that a turn allocates nothing.
struct Batch {
    events: Vec<epoll::Event>,
    wakers: Vec<Waker>,
}

#[derive(Debug)]
pub(super) struct Reactor {
    epoll: OwnedFd,
    sockets: RefCell<Slab<SocketState>>,
    timers: RefCell<BTreeMap<Due, Waker>>,
    started: Instant,
    /// Who could go on, and lets the others have their turn.
    deferred: RefCell<Vec<Waker>>,
    last_generation: Cell<u32>,
    /// For how many turns others are not let run first.
    yields_to_skip: Cell<u32>,
    /// Where others see how many sockets there are.
    socket_count: RefCell<Arc<AtomicUsize>>,
}

/// What is known of one socket.
#[derive(Debug, Default)]
struct SocketState {
    /// Tells the socket from earlier ones in the same state.
    generation: u32,
    /// There is an event as long as there is something to read, not only when something comes.
    is_level: bool,
    to_read: Readiness,
    to_write: Readiness,
    /// Whether there is an end, an error or an urgent octet, maybe behind something to be read. If so, only `WouldBlock`
    /// says that all was read.
    hangup: Readiness,
    /// The task that waits, whatever for.
    waker: Option<Waker>,
}

/// Whether an operation may succeed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Readiness {
    /// No: one has found nothing, and there has been no event since.
    #[default]
    No,
    /// No, and a task waits for it.
    Awaited,
    Maybe,
}

impl SocketState {
    fn readiness(&mut self, interest: Interest) -> &mut Readiness {
        match interest {
            Interest::Read => &mut self.to_read,
            Interest::Write => &mut self.to_write,
        }
    }
}

/// When a timer fires, in nanoseconds since the reactor began; the next one that is free, so that each has its own.
type Due = u64;

/// 292 years, which leaves room behind it.
const MAX_DUE: Due = Due::MAX / 2;

impl Reactor {
    fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            sockets: RefCell::default(),
            timers: RefCell::default(),
            started: Instant::now(),
            deferred: RefCell::default(),
            last_generation: Cell::default(),
            yields_to_skip: Cell::default(),
            socket_count: RefCell::default(),
        })
    }

    /// Shows how many sockets there are, from now on.
    pub(super) fn publish_socket_count(&self, sockets: Arc<AtomicUsize>) {
        self.socket_count.replace(sockets);
    }

    /// Wakes every task that waits for a socket.
    pub(super) fn wake_all(&self) {
        let wakers: Vec<Waker> = self.sockets.borrow().iter().filter_map(|(_, state)| state.waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) fn register<T: AsFd>(self: Rc<Self>, socket: T, events: EventSet) -> io::Result<Registration<T>> {
        use epoll::EventFlags;
        let events = match events {
            EventSet::ReadWrite => {
                EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::PRI | EventFlags::ET
            }
            EventSet::Read => EventFlags::IN,
            EventSet::SharedRead => EventFlags::IN | EventFlags::EXCLUSIVE | EventFlags::ET,
        };
        let is_level = !events.contains(EventFlags::ET);
        let generation = self.last_generation.get().wrapping_add(1);
        self.last_generation.set(generation);
        let state = SocketState { generation, is_level, ..SocketState::default() };
        let key = u32::try_from(self.sockets.borrow_mut().insert(state)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let registration = Registration { reactor: self, socket, key };
        let data = epoll::EventData::new_u64(u64::from(generation) << 32 | u64::from(key));
        epoll::add(&registration.reactor.epoll, &registration.socket, data, events)?;
        Ok(registration)
    }

    /// Waits for events and timers, and wakes who waits for them; does not wait when there is something to be polled.
    fn run_once(&self, loop_waker: &LoopWaker, batch: &mut Batch) -> io::Result<()> {
        batch.wakers.append(&mut self.deferred.borrow_mut());
        self.socket_count.borrow().store(self.sockets.borrow().len(), Ordering::Relaxed);
        if batch.wakers.is_empty() && batch.events.len() > 1 {
            self.yield_core();
        }
        let timeout =
            if batch.wakers.is_empty() && loop_waker.try_sleep() { self.time_to_next_timer() } else { Some(NOW) };
        batch.events.clear();
        let waited = epoll::wait(&self.epoll, spare_capacity(&mut batch.events), timeout.as_ref());
        loop_waker.end_sleep();
        match waited {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Those that could go on without any event come last.
        let deferred = batch.wakers.len();
        for event in &batch.events {
            self.record_event(event, &mut batch.wakers);
        }
        self.take_expired(&mut batch.wakers);
        batch.wakers.rotate_left(deferred);
        // Nothing is borrowed here: a waker may be the last to hold a task, and the task a socket.
        batch.wakers.drain(..).for_each(Waker::wake);
        Ok(())
    }

    /// Whoever is ready to run on this core goes first, and has more for us then: where there is much to do, a turn for
    /// several events costs less than falling asleep and being woken for each.
    fn yield_core(&self) {
        match self.yields_to_skip.get() {
            0 => {
                let began = Instant::now();
                thread::yield_now();
                if began.elapsed() > MAX_YIELD_TIME {
                    self.yields_to_skip.set(YIELDS_TO_SKIP);
                }
            }
            left => self.yields_to_skip.set(left - 1),
        }
    }

    fn record_event(&self, event: &epoll::Event, wakers: &mut Vec<Waker>) {
        use epoll::EventFlags;
        let (flags, key) = (event.flags, event.data.u64());
        let mut sockets = self.sockets.borrow_mut();
        let (generation, key) = ((key >> 32) as u32, key as u32 as usize);
        // A socket that is closed here may be open elsewhere, and still have events.
        let Some(state) = sockets.get_mut(key).filter(|state| state.generation == generation) else { return };
        let ended = EventFlags::HUP | EventFlags::ERR;
        let mut is_awaited = false;
        let hangup = ended | EventFlags::RDHUP | EventFlags::PRI;
        for (readiness, mask) in [
            (&mut state.hangup, hangup),
            (&mut state.to_read, hangup | EventFlags::IN),
            (&mut state.to_write, ended | EventFlags::OUT),
        ] {
            if flags.intersects(mask) {
                is_awaited |= std::mem::replace(readiness, Readiness::Maybe) == Readiness::Awaited;
            }
        }
        if is_awaited {
            wakers.extend(state.waker.take());
        }
    }

    fn due_at(&self, time: Instant) -> Due {
        Due::try_from(time.saturating_duration_since(self.started).as_nanos()).unwrap_or(MAX_DUE).min(MAX_DUE)
    }

    fn now(&self) -> Due {
        self.due_at(Instant::now())
    }

    /// How long it is to the first timer.
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

    /// A timer that wakes the task at `due`.
    pub(super) fn timer(self: Rc<Self>, cx: &Context<'_>, due: Instant) -> Timer {
        let mut timers = self.timers.borrow_mut();
        let due = (self.due_at(due)..).find(|due| !timers.contains_key(due)).unwrap_or(MAX_DUE);
        timers.insert(due, cx.waker().clone());
        drop(timers);
        Timer { due, reactor: self }
    }
}

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// A timer that is set.
#[derive(Debug)]
pub(super) struct Timer {
    due: Due,
    reactor: Rc<Reactor>,
}

impl Timer {
    pub(super) fn poll(&self) -> Poll<()> {
        if self.due <= self.reactor.now() { Poll::Ready(()) } else { Poll::Pending }
    }

    pub(super) fn is_after(&self, due: Instant) -> bool {
        self.due > self.reactor.due_at(due)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let waker = self.reactor.timers.borrow_mut().remove(&self.due);
        // Outside of the borrow, since it may be the last to hold a task.
        drop(waker);
    }
}

/// A socket and its state.
#[derive(Debug)]
pub(super) struct Registration<T> {
    reactor: Rc<Reactor>,
    socket: T,
    key: u32,
}

impl<T> Drop for Registration<T> {
    fn drop(&mut self) {
        // Closing the socket, which comes next, ends its registration with epoll; of a listener, the last one to close.
        let state = self.reactor.sockets.borrow_mut().try_remove(self.key as usize);
        drop(state);
    }
}

impl<T> Registration<T> {
    pub(super) fn get_ref(&self) -> &T {
        &self.socket
    }

    /// For a socket that stays open elsewhere.
    pub(super) fn deregister(&self)
    where
        T: AsFd,
    {
        // Fails only for what is not registered.
        let _ = epoll::delete(&self.reactor.epoll, &self.socket);
    }

    /// Ready when there is an end, an error or an urgent octet.
    pub(super) fn poll_hangup(&self, cx: &Context<'_>) -> Poll<()> {
        self.poll_state(cx, |state| &mut state.hangup)
    }

    pub(super) fn poll_ready(&self, cx: &Context<'_>, interest: Interest) -> Poll<()> {
        self.poll_state(cx, |state| state.readiness(interest))
    }

    fn poll_state(&self, cx: &Context<'_>, readiness: impl FnOnce(&mut SocketState) -> &mut Readiness) -> Poll<()> {
        let mut sockets = self.reactor.sockets.borrow_mut();
        let Some(state) = sockets.get_mut(self.key as usize) else { return Poll::Ready(()) };
        let readiness = readiness(state);
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

    /// An operation has said `WouldBlock`.
    pub(super) fn mark_would_block(&self, interest: Interest) {
        self.with_state(|state| *state.readiness(interest) = Readiness::No);
    }

    /// An operation has moved less than it could have.
    pub(super) fn mark_drained(&self, interest: Interest) {
        self.with_state(|state| {
            if interest == Interest::Write || state.is_level || state.hangup != Readiness::Maybe {
                *state.readiness(interest) = Readiness::No;
            }
        });
    }

    fn with_state(&self, change: impl FnOnce(&mut SocketState)) {
        if let Some(state) = self.reactor.sockets.borrow_mut().get_mut(self.key as usize) {
            change(state);
        }
    }
}
