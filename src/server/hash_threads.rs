//! Threads that hash passwords. Each has the memory of one hash, and reuses it. Threads start when logins arrive, and end
//! when they are idle, which frees their memory.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::policy::users::HashMemory;

/// Maximum number of threads, also with more cores: with the hashes of `--add-user`, they take 152 MiB.
const MAX_THREADS: usize = 8;
/// Time without a hash after which a thread ends. A new thread and its memory cost a login a few milliseconds.
const IDLE_TIME: Duration = Duration::from_millis(200);

type Job = Box<dyn FnOnce(&mut HashMemory) + Send>;

/// At most one thread per core, and their queue. Each session has at most one job in it.
pub(super) struct HashThreads {
    max_threads: usize,
    queue: Mutex<Queue>,
    has_job: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Number of threads, with the idle ones.
    threads: usize,
    idle: usize,
}

impl Default for HashThreads {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self { max_threads: cores.min(MAX_THREADS), queue: Mutex::default(), has_job: Condvar::new() }
    }
}

impl HashThreads {
    /// Returns the result of `hash`, which runs on one of the threads; `None` if no thread can be started. If the caller
    /// stops waiting before it is the turn of `hash`, that does not run.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        hash: impl FnOnce(&mut HashMemory) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = smol::channel::bounded(1);
        self.push(Box::new(move |memory| {
            if !sender.is_closed() {
                let _ = sender.try_send(hash(memory));
            }
        }));
        receiver.recv().await.ok()
    }

    fn push(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue();
        queue.jobs.push_back(job);
        self.has_job.notify_one();
        if queue.jobs.len() <= queue.idle || queue.threads >= self.max_threads {
            return;
        }
        let this = self.clone();
        match thread::Builder::new().name("s5-hash".into()).spawn(move || this.work()) {
            Ok(_) => queue.threads += 1,
            // Without any thread, nothing would ever take the jobs. Their callers get `None`.
            Err(error) if queue.threads == 0 => {
                queue.jobs.clear();
                log::error!("start a thread to hash passwords: {error}");
            }
            Err(_) => {}
        }
    }

    fn work(&self) {
        let mut memory = HashMemory::default();
        while let Some(job) = self.next() {
            // A panic drops the sender of the job: its caller gets `None`.
            let _ = catch_unwind(AssertUnwindSafe(|| job(&mut memory)));
        }
    }

    /// Waits for a job. Returns `None` after [`IDLE_TIME`] without one: the thread must end.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        queue.idle += 1;
        let is_empty = |queue: &mut Queue| queue.jobs.is_empty();
        let waited = self.has_job.wait_timeout_while(queue, IDLE_TIME, is_empty);
        (queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        queue.idle -= 1;
        let job = queue.jobs.pop_front();
        queue.threads -= usize::from(job.is_none());
        job
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
