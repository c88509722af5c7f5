//! Threads for calls that block, or that compute for long. They start when calls arrive, and end when they are idle.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::setpriority_process;

/// Time without a call after which a thread ends. A new thread costs a call some 50 µs.
const IDLE_TIME: Duration = Duration::from_millis(200);

/// Lower priority than that of the event loops (nice(1)): otherwise, many calls for one client slow the tunnels of all.
const NICENESS: i32 = 10;

/// Threads for calls of the system that block. The callers limit their number: lookups, and calls of GSSAPI.
static BLOCKING_CALLS: ThreadPool<()> = ThreadPool::new("s5-blocking", 512, true);

/// Runs a call that blocks on another thread. See [`ThreadPool::run`].
pub fn unblock<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = Option<T>> {
    BLOCKING_CALLS.run(move |()| call())
}

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A limited number of threads and their queue. Each has a state of type `S` until it ends, which its calls reuse.
pub struct ThreadPool<S: 'static> {
    name: &'static str,
    max_threads: usize,
    has_low_priority: bool,
    queue: Mutex<Queue<S>>,
    has_job: Condvar,
}

struct Queue<S: 'static> {
    jobs: VecDeque<Job<S>>,
    /// Number of threads, with the idle ones.
    threads: usize,
    idle: usize,
}

impl<S: Default> ThreadPool<S> {
    /// `name` is the name of the threads, at most 15 bytes.
    pub const fn new(name: &'static str, max_threads: usize, has_low_priority: bool) -> Self {
        let queue = Queue { jobs: VecDeque::new(), threads: 0, idle: 0 };
        Self { name, max_threads, has_low_priority, queue: Mutex::new(queue), has_job: Condvar::new() }
    }

    /// Returns the result of `call`, which runs on one of the threads; `None` if no thread can be started, or if `call`
    /// panics. If the caller stops waiting before it is the turn of `call`, that does not run.
    pub async fn run<T: Send + 'static>(&'static self, call: impl FnOnce(&mut S) -> T + Send + 'static) -> Option<T> {
        // The channel has no result: each type of a channel takes 3 KB of code.
        let (sender, receiver) = smol::channel::bounded::<Infallible>(1);
        let result = Arc::new(Mutex::new(None));
        let shared = result.clone();
        self.push(Box::new(move |state| {
            if !sender.is_closed() {
                let called = Some(call(state));
                *shared.lock().unwrap_or_else(PoisonError::into_inner) = called;
            }
        }));
        let _ = receiver.recv().await;
        result.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn push(&'static self, job: Job<S>) {
        let mut queue = self.queue();
        queue.jobs.push_back(job);
        self.has_job.notify_one();
        if queue.jobs.len() <= queue.idle || queue.threads >= self.max_threads {
            return;
        }
        match thread::Builder::new().name(self.name.into()).spawn(|| self.work()) {
            Ok(_) => queue.threads += 1,
            // Without any thread, nothing would ever take the jobs. Their callers get `None`.
            Err(error) if queue.threads == 0 => {
                queue.jobs.clear();
                log::error!("start a thread {}: {error}", self.name);
            }
            Err(_) => {}
        }
    }

    fn work(&self) {
        // Applies to this thread alone. A failure is harmless.
        let _ = self.has_low_priority.then(|| setpriority_process(None, NICENESS));
        let mut state = S::default();
        while let Some(job) = self.next() {
            // A panic drops the sender of the job: its caller gets `None`.
            let _ = catch_unwind(AssertUnwindSafe(|| job(&mut state)));
        }
    }

    /// Waits for a job. Returns `None` after [`IDLE_TIME`] without one: the thread must end.
    fn next(&self) -> Option<Job<S>> {
        let mut queue = self.queue();
        queue.idle += 1;
        let is_empty = |queue: &mut Queue<S>| queue.jobs.is_empty();
        let waited = self.has_job.wait_timeout_while(queue, IDLE_TIME, is_empty);
        (queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        queue.idle -= 1;
        let job = queue.jobs.pop_front();
        queue.threads -= usize::from(job.is_none());
        job
    }

    fn queue(&self) -> MutexGuard<'_, Queue<S>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
