//! The threads of the server. Each has its own event loop and executor, and runs jobs that other threads send to it.
//!
//! A task stays on its thread, because a move costs more than most sessions. There are two exceptions: a new connection
//! if one worker has far more sockets than another, and a tunnel with bulk data. The pool selects the new thread.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_lite::FutureExt as _;
use futures_lite::future::yield_now;
use smol::channel::{self, Receiver, Sender};
use smol::{LocalExecutor, Task};

use crate::counters;
use crate::net::reactor;

/// A worker passes a new connection on if it has over twice the sockets of the least loaded worker plus this many.
const SOCKET_SURPLUS: usize = 64;

/// Minimum time for the tasks of each priority but the highest, before the events of tunnels are looked for again.
const MIN_TURN: Duration = Duration::from_micros(40);

thread_local! {
    /// Index and tasks of the worker of this thread. Weak: `Worker::run` owns the tasks.
    static THIS: RefCell<(usize, Weak<Tasks>)> = RefCell::default();
    /// Set when the remaining tasks of this thread are being dropped.
    static IS_ENDING: Cell<bool> = const { Cell::new(false) };
}

type Job = Box<dyn FnOnce() + Send>;

/// When a task runs.
#[derive(Clone, Copy)]
pub(super) enum Priority {
    /// A tunnel: before all others, so that many new sessions do not slow it.
    High,
    /// Accepting, and sessions before their tunnels.
    Normal,
    /// Sessions of a client that has many: they do not delay the first ones of another client.
    Low,
}

/// The tasks of a worker, by their priority.
#[derive(Default)]
struct Tasks {
    high: LocalExecutor<'static>,
    normal: LocalExecutor<'static>,
    low: LocalExecutor<'static>,
}

/// Spawns a task on the worker of this thread.
pub(super) fn spawn(priority: Priority, task: impl Future<Output = ()> + 'static) {
    // Dropped only when the worker ends.
    if let Some(tasks) = THIS.with_borrow(|(_, tasks)| tasks.upgrade()) {
        tasks.of(priority).spawn(task).detach();
    }
}

/// For tasks that are rare: each type of a task takes 2 KB of code, and boxed ones have the same type.
pub(super) type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

/// Like [`spawn`], for tasks that are rare.
pub(super) fn spawn_boxed(priority: Priority, task: impl Future<Output = ()> + 'static) {
    spawn(priority, Box::pin(task) as BoxedTask);
}

impl Tasks {
    fn of(&self, priority: Priority) -> &LocalExecutor<'static> {
        match priority {
            Priority::High => &self.high,
            Priority::Normal => &self.normal,
            Priority::Low => &self.low,
        }
    }

    /// Runs the tasks until `last` ends. Passes its panic on, so that the worker reports it.
    async fn run_until(&self, last: Task<()>) {
        while !last.is_finished() {
            self.high.tick().or(self.normal.tick()).or(self.low.tick()).await;
            if !self.run_turn() {
                // Events of tunnels come first.
                yield_now().await;
            }
        }
        last.await;
    }

    /// Runs the tunnels, and then those of each other priority for as long as the tunnels took, but at least for
    /// [`MIN_TURN`]. Returns false if some are left.
    fn run_turn(&self) -> bool {
        let began = Instant::now();
        while self.high.try_tick() {}
        let time = MIN_TURN.max(began.elapsed());
        run_for(&self.normal, time) & run_for(&self.low, time)
    }
}

/// Runs tasks for this time. Returns false if some are left.
fn run_for(tasks: &LocalExecutor<'_>, time: Duration) -> bool {
    let began = Instant::now();
    while tasks.try_tick() {
        if began.elapsed() > time {
            return false;
        }
    }
    true
}

/// Returns true in a task that is dropped before its end, because the worker of this thread ends.
pub(super) fn is_ending() -> bool {
    IS_ENDING.get()
}

/// A report to the main thread.
pub(super) enum WorkerReport {
    /// A worker runs, or accepts connections.
    Started,
    /// A worker or an accept loop has ended because of an error or a panic.
    Failed(io::Error),
    /// All accept loops and sessions have ended.
    AllEnded,
}

/// All workers. The accept loops and the sessions hold references to it; dropping it ends the threads.
pub(super) struct WorkerPool {
    workers: Vec<WorkerHandle>,
    /// Closes when the workers have to stop accepting.
    accepting: Sender<Infallible>,
    stop_accepting: Receiver<Infallible>,
    reports: Sender<WorkerReport>,
}

/// The part of a worker that the other threads use.
pub(super) struct WorkerHandle {
    /// Unbounded, but holds at most one job for each session and one for a new policy. Closes when the worker has to
    /// end.
    inbox: Sender<Job>,
    socket_count: Arc<AtomicUsize>,
    bulk: BulkGuard,
}

/// Counts a bulk tunnel against a worker until it is dropped. The number of references is the count.
pub(super) type BulkGuard = Arc<()>;

/// A worker before its thread starts.
pub(super) struct Worker {
    index: usize,
    inbox: Receiver<Job>,
    socket_count: Arc<AtomicUsize>,
    reports: Sender<WorkerReport>,
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.report(WorkerReport::AllEnded);
    }
}

impl WorkerPool {
    pub(super) fn new(count: u16) -> (Self, Vec<Worker>, Receiver<WorkerReport>) {
        let (accepting, stop_accepting) = channel::bounded(1);
        let (reports, received_reports) = channel::unbounded();
        let new_worker = |index| {
            let ((sender, inbox), socket_count) = (channel::unbounded(), Arc::<AtomicUsize>::default());
            let handle = WorkerHandle { inbox: sender, socket_count: socket_count.clone(), bulk: Arc::default() };
            (handle, Worker { index, inbox, socket_count, reports: reports.clone() })
        };
        let (handles, workers) = (0..usize::from(count)).map(new_worker).unzip();
        (Self { workers: handles, accepting, stop_accepting, reports }, workers, received_reports)
    }

    /// Returns the worker of this thread.
    pub(super) fn this(&self) -> Option<&WorkerHandle> {
        self.workers.get(THIS.with_borrow(|(index, _)| *index))
    }

    /// Returns the worker that should take a new connection instead of this one.
    pub(super) fn less_loaded(&self) -> Option<&WorkerHandle> {
        let sockets = |worker: &WorkerHandle| worker.socket_count.load(Ordering::Relaxed);
        let least = self.workers.iter().min_by_key(|worker| sockets(worker))?;
        (sockets(self.this()?) > 2 * sockets(least) + SOCKET_SURPLUS).then_some(least)
    }

    /// Returns the worker with the fewest bulk tunnels, if it has fewer than this one.
    pub(super) fn fewest_bulk(&self) -> Option<&WorkerHandle> {
        let bulk = |worker: &WorkerHandle| Arc::strong_count(&worker.bulk);
        let least = self.workers.iter().min_by_key(|worker| bulk(worker))?;
        (bulk(least) < bulk(self.this()?)).then_some(least)
    }

    /// Wakes all tasks that wait for sockets. Returns when all of them have been polled.
    pub(super) async fn wake_all(&self) {
        self.run_on_all(reactor::wake_all, &[Priority::High, Priority::Normal, Priority::Low]).await;
    }

    /// Returns when each worker has run a task.
    pub(super) async fn wait_for_all(&self) {
        self.run_on_all(|| {}, &[Priority::High, Priority::Normal]).await;
    }

    /// Runs `call` on each worker. Returns when all tasks of these priorities have run that were woken by then.
    async fn run_on_all(&self, call: fn(), priorities: &'static [Priority]) {
        let (done, all_done) = channel::bounded::<Infallible>(1);
        for worker in &self.workers {
            let done = done.clone();
            worker.send(move || {
                call();
                // The tasks of a priority run in the order of their wake-ups, so these end last.
                for priority in priorities {
                    let done = done.clone();
                    spawn_boxed(*priority, async move { drop(done) });
                }
            });
        }
        drop(done);
        let _ = all_done.recv().await;
    }

    pub(super) fn report(&self, report: WorkerReport) {
        let _ = self.reports.try_send(report);
    }

    /// Runs `start` on each worker, which reports its result.
    pub(super) fn start_on_all(&self, start: impl Fn() -> io::Result<()> + Clone + Send + 'static) {
        for worker in &self.workers {
            let (start, reports) = (start.clone(), self.reports.clone());
            worker.send(move || {
                let _ = reports.try_send(start().map_or_else(WorkerReport::Failed, |()| WorkerReport::Started));
            });
        }
    }

    /// Begins the shutdown: no more connections are accepted.
    pub(super) fn stop_accepting(&self) {
        self.accepting.close();
    }

    /// Returns whether the shutdown has not begun.
    pub(super) fn is_accepting(&self) -> bool {
        !self.accepting.is_closed()
    }

    /// Waits until the shutdown begins.
    pub(super) async fn wait_stop_accepting(&self) {
        let _ = self.stop_accepting.recv().await;
    }

    /// Ends the workers and all sessions.
    pub(super) fn stop(&self) {
        for worker in &self.workers {
            worker.inbox.close();
        }
    }
}

impl WorkerHandle {
    /// Runs a job on the thread of this worker.
    pub(super) fn send(&self, job: impl FnOnce() + Send + 'static) {
        // Fails only if the worker has ended, and then the server ends.
        let _ = self.inbox.try_send(Box::new(job));
    }

    pub(super) fn bulk_guard(&self) -> BulkGuard {
        self.bulk.clone()
    }
}

impl Worker {
    /// Starts the thread, which runs until its inbox closes. Its errors and panics are reported.
    pub(super) fn spawn(self) -> io::Result<JoinHandle<()>> {
        let reports = self.reports.clone();
        std::thread::Builder::new().name("s5-worker".into()).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| self.run()));
            if let Err(error) = result.unwrap_or_else(|_| Err(panic_error())) {
                let _ = reports.try_send(WorkerReport::Failed(error));
            }
        })
    }

    fn run(self) -> io::Result<()> {
        reactor::run(async {
            // Dropped at the end, which closes the remaining sessions.
            let tasks = Rc::new(Tasks::default());
            THIS.set((self.index, Rc::downgrade(&tasks)));
            counters::set_worker(self.index);
            reactor::publish_socket_count(self.socket_count);
            let _ = self.reports.try_send(WorkerReport::Started);
            let jobs = tasks.of(Priority::Normal).spawn(async move {
                while let Ok(job) = self.inbox.recv().await {
                    job();
                }
            });
            // A panic ends only its own session: the executor catches it, and the panic hook has logged it.
            tasks.run_until(jobs).await;
            IS_ENDING.set(true);
            Ok(())
        })?
    }
}

/// Error for a panic of a thread or a task that the server depends on.
pub(super) fn panic_error() -> io::Error {
    io::Error::other("a thread panicked; please report it")
}
