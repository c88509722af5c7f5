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

use super::{Interest, Way};

/// How many events are taken from the kernel at once.
const EVENTS: usize = 256;
/// How long one wait is at the most: older kernels know no more than 24 days.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// When letting others run has taken longer than this, somebody needs the core for himself, and it is not done for
/// the next `PATIENCE` turns: it would cost us his whole slice each time.
const YIELD: Duration = Duration::from_micros(200);
const PATIENCE: u32 = 256;
/// What epoll says for the waker of the loop, which is no slot.
const WAKER: u64 = u64::MAX;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

/// The reactor of this thread, when it is inside of [`run`].
pub(super) fn current() -> Option<Rc<Reactor>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Sets the reactor of the thread for as long as it lives.
struct Entered;

impl Entered {
    fn new(reactor: Rc<Reactor>) -> Self {
        CURRENT.set(Some(reactor));
        Self
    }
}

impl Drop for Entered {
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
    let alert = Arc::new(Alert::new()?);
    let events = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&reactor.epoll, &alert.eventfd, epoll::EventData::new_u64(WAKER), events)?;
    let _entered = Entered::new(reactor.clone());
    let waker = Waker::from(alert.clone());
    let mut cx = Context::from_waker(&waker);
    let mut batch = Batch { events: Vec::with_capacity(EVENTS), wakers: Vec::new() };
    loop {
        alert.rests();
        if future.as_mut().poll(&mut cx).is_ready() {
            return Ok(());
        }
        reactor.turn(&alert, &mut batch)?;
    }
}

pub(super) fn wake_later(cx: &Context<'_>) -> bool {
    let reactor = current();
    if let Some(reactor) = &reactor {
        reactor.later.borrow_mut().push(cx.waker().clone());
    }
    reactor.is_some()
}

/// The waker of the loop, from this thread or another. An eventfd that is edge-triggered need never be read.
struct Alert {
    eventfd: OwnedFd,
    state: AtomicU8,
}

/// Runs tasks, or handles events; looks at the state before it waits.
const AWAKE: u8 = 0;
/// There is something to be polled.
const WOKEN: u8 = 1;
/// Waits in the kernel, and has to be alerted.
const ASLEEP: u8 = 2;

impl Alert {
    fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, state: AtomicU8::new(AWAKE) })
    }

    /// Forgets that it was woken, since the future is about to be polled.
    fn rests(&self) {
        self.state.swap(AWAKE, Ordering::SeqCst);
    }

    /// Whether the loop may wait in the kernel: not when it was woken meanwhile.
    fn may_sleep(&self) -> bool {
        self.state.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The wait is over, whatever for.
    fn awakes(&self) {
        let _ = self.state.compare_exchange(ASLEEP, AWAKE, Ordering::SeqCst, Ordering::SeqCst);
    }
}

impl Wake for Alert {
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
    slots: RefCell<Slab<Slot>>,
    timers: RefCell<BTreeMap<Due, Waker>>,
    started: Instant,
    /// Who could go on, and lets the others have their turn.
    later: RefCell<Vec<Waker>>,
    generations: Cell<u32>,
    /// For how many turns others are not let run first.
    patience: Cell<u32>,
    /// Where others see how many sockets there are.
    shown: RefCell<Arc<AtomicUsize>>,
}

/// What is known of one socket.
#[derive(Debug, Default)]
struct Slot {
    /// Tells the socket from earlier ones in the same slot.
    generation: u32,
    /// There is an event as long as there is something to read, not only when something comes.
    is_level: bool,
    to_read: Readiness,
    to_write: Readiness,
    /// Whether there is an end, an error or an urgent octet, maybe behind something to be read. If so, only `WouldBlock`
    /// says that all was read.
    mark: Readiness,
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

impl Slot {
    fn readiness(&mut self, way: Way) -> &mut Readiness {
        match way {
            Way::Read => &mut self.to_read,
            Way::Write => &mut self.to_write,
        }
    }
}

/// When a timer fires, in nanoseconds since the reactor began; the next one that is free, so that each has its own.
type Due = u64;

/// 292 years, which leaves room behind it.
const FAR: Due = Due::MAX / 2;

impl Reactor {
    fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots: RefCell::default(),
            timers: RefCell::default(),
            started: Instant::now(),
            later: RefCell::default(),
            generations: Cell::default(),
            patience: Cell::default(),
            shown: RefCell::default(),
        })
    }

    /// Shows how many sockets there are, from now on.
    pub(super) fn show(&self, sockets: Arc<AtomicUsize>) {
        self.shown.replace(sockets);
    }

    /// Wakes every task that waits for a socket.
    pub(super) fn wake_all(&self) {
        let wakers: Vec<Waker> = self.slots.borrow().iter().filter_map(|(_, slot)| slot.waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) fn register<T: AsFd>(self: Rc<Self>, socket: T, interest: Interest) -> io::Result<Source<T>> {
        use epoll::EventFlags;
        let events = match interest {
            Interest::Both => EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::PRI | EventFlags::ET,
            Interest::Read => EventFlags::IN,
            Interest::Shared => EventFlags::IN | EventFlags::EXCLUSIVE | EventFlags::ET,
        };
        let is_level = !events.contains(EventFlags::ET);
        let generation = self.generations.get().wrapping_add(1);
        self.generations.set(generation);
        let slot = Slot { generation, is_level, ..Slot::default() };
        let key = u32::try_from(self.slots.borrow_mut().insert(slot)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let source = Source { reactor: self, socket, key };
        let data = epoll::EventData::new_u64(u64::from(generation) << 32 | u64::from(key));
        epoll::add(&source.reactor.epoll, &source.socket, data, events)?;
        Ok(source)
    }

    /// Waits for events and timers, and wakes who waits for them; does not wait when there is something to be polled.
    fn turn(&self, alert: &Alert, batch: &mut Batch) -> io::Result<()> {
        batch.wakers.append(&mut self.later.borrow_mut());
        self.shown.borrow().store(self.slots.borrow().len(), Ordering::Relaxed);
        if batch.wakers.is_empty() && batch.events.len() > 1 {
            self.let_others_run();
        }
        let timeout = if batch.wakers.is_empty() && alert.may_sleep() { self.until_timer() } else { Some(NOW) };
        batch.events.clear();
        let waited = epoll::wait(&self.epoll, spare_capacity(&mut batch.events), timeout.as_ref());
        alert.awakes();
        match waited {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Those that could go on without any event come last.
        let later = batch.wakers.len();
        for event in &batch.events {
            self.note(event, &mut batch.wakers);
        }
        self.fire(&mut batch.wakers);
        batch.wakers.rotate_left(later);
        // Nothing is borrowed here: a waker may be the last to hold a task, and the task a socket.
        batch.wakers.drain(..).for_each(Waker::wake);
        Ok(())
    }

    /// Whoever is ready to run on this core goes first, and has more for us then: where there is much to do, a turn for
    /// several events costs less than falling asleep and being woken for each.
    fn let_others_run(&self) {
        match self.patience.get() {
            0 => {
                let began = Instant::now();
                thread::yield_now();
                if began.elapsed() > YIELD {
                    self.patience.set(PATIENCE);
                }
            }
            left => self.patience.set(left - 1),
        }
    }

    fn note(&self, event: &epoll::Event, wakers: &mut Vec<Waker>) {
        use epoll::EventFlags;
        let (flags, key) = (event.flags, event.data.u64());
        let mut slots = self.slots.borrow_mut();
        let (generation, key) = ((key >> 32) as u32, key as u32 as usize);
        // A socket that is closed here may be open elsewhere, and still have events.
        let Some(slot) = slots.get_mut(key).filter(|slot| slot.generation == generation) else { return };
        let ended = EventFlags::HUP | EventFlags::ERR;
        let mut is_awaited = false;
        let marks = ended | EventFlags::RDHUP | EventFlags::PRI;
        for (readiness, signs) in [
            (&mut slot.mark, marks),
            (&mut slot.to_read, marks | EventFlags::IN),
            (&mut slot.to_write, ended | EventFlags::OUT),
        ] {
            if flags.intersects(signs) {
                is_awaited |= std::mem::replace(readiness, Readiness::Maybe) == Readiness::Awaited;
            }
        }
        if is_awaited {
            wakers.extend(slot.waker.take());
        }
    }

    fn since(&self, time: Instant) -> Due {
        Due::try_from(time.saturating_duration_since(self.started).as_nanos()).unwrap_or(FAR).min(FAR)
    }

    fn now(&self) -> Due {
        self.since(Instant::now())
    }

    /// How long it is to the first timer.
    fn until_timer(&self) -> Option<Timespec> {
        let timers = self.timers.borrow();
        let (due, _) = timers.first_key_value()?;
        let time = Duration::from_nanos(due.saturating_sub(self.now()));
        Timespec::try_from(time.min(LONGEST)).ok()
    }

    fn fire(&self, wakers: &mut Vec<Waker>) {
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
        let due = (self.since(due)..).find(|due| !timers.contains_key(due)).unwrap_or(FAR);
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
        self.due > self.reactor.since(due)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let waker = self.reactor.timers.borrow_mut().remove(&self.due);
        // Outside of the borrow, since it may be the last to hold a task.
        drop(waker);
    }
}

/// A socket and its slot.
#[derive(Debug)]
pub(super) struct Source<T> {
    reactor: Rc<Reactor>,
    socket: T,
    key: u32,
}

impl<T> Drop for Source<T> {
    fn drop(&mut self) {
        // Closing the socket, which comes next, ends its registration with epoll; of a listener, the last one to close.
        let slot = self.reactor.slots.borrow_mut().try_remove(self.key as usize);
        drop(slot);
    }
}

impl<T> Source<T> {
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
    pub(super) fn poll_mark(&self, cx: &Context<'_>) -> Poll<()> {
        self.poll_slot(cx, |slot| &mut slot.mark)
    }

    pub(super) fn poll_ready(&self, cx: &Context<'_>, way: Way) -> Poll<()> {
        self.poll_slot(cx, |slot| slot.readiness(way))
    }

    fn poll_slot(&self, cx: &Context<'_>, readiness: impl FnOnce(&mut Slot) -> &mut Readiness) -> Poll<()> {
        let mut slots = self.reactor.slots.borrow_mut();
        let Some(slot) = slots.get_mut(self.key as usize) else { return Poll::Ready(()) };
        let readiness = readiness(slot);
        if *readiness == Readiness::Maybe {
            return Poll::Ready(());
        }
        *readiness = Readiness::Awaited;
        let old = match &slot.waker {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => slot.waker.replace(cx.waker().clone()),
        };
        drop(slots);
        drop(old);
        Poll::Pending
    }

    /// An operation has said `WouldBlock`.
    pub(super) fn exhausted(&self, way: Way) {
        self.with_slot(|slot| *slot.readiness(way) = Readiness::No);
    }

    /// An operation has moved less than it could have.
    pub(super) fn drained(&self, way: Way) {
        self.with_slot(|slot| {
            if way == Way::Write || slot.is_level || slot.mark != Readiness::Maybe {
                *slot.readiness(way) = Readiness::No;
            }
        });
    }

    fn with_slot(&self, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.reactor.slots.borrow_mut().get_mut(self.key as usize) {
            change(slot);
        }
    }
}
