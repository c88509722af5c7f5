//! Reads the output of strace, and chooses the faults to inject: the errors that the kernel can return for each call.

use std::collections::{BTreeMap, BTreeSet};

/// The errors of a call: its name, a text that its arguments contain, and the errors. The first rule that matches counts.
/// A call without a rule, for example of a new library, fails with [`OTHERS`].
#[rustfmt::skip]
const RULES: &[(&str, &str, &str)] = &[
    ("accept4", "", "EMFILE ENFILE ENOBUFS ENOMEM ECONNABORTED EPROTO EPERM EINTR"),
    ("bind", "", "EADDRINUSE EADDRNOTAVAIL EACCES ENOMEM"),
    ("clone3", "", "EAGAIN ENOMEM"),
    ("connect", "AF_UNIX", "ECONNREFUSED ENOENT EACCES"),
    ("connect", "", "ECONNREFUSED ENETUNREACH EHOSTUNREACH ETIMEDOUT EACCES EADDRNOTAVAIL ENOBUFS"),
    ("dup3", "", "EMFILE"),
    ("epoll_create1", "", "EMFILE ENFILE ENOMEM"),
    ("epoll_ctl", "EPOLL_CTL_ADD", "ENOMEM ENOSPC"),
    ("epoll_ctl", "", ""),
    ("epoll_pwait", "", "EINTR"),
    ("eventfd2", "", "EMFILE ENFILE ENOMEM"),
    ("fcntl", "F_DUPFD", "EMFILE"),
    ("fcntl", "", ""),
    ("fstat", "", "EIO ENOMEM"),
    ("getpeername", "", "ENOBUFS ENOTCONN"),
    ("getsockname", "", "ENOBUFS"),
    ("getsockopt", "", "ENOBUFS"),
    ("ioctl", "", "EINVAL ENOTTY"),
    ("listen", "", "EADDRINUSE"),
    // The stack of a thread. Other calls get memory for the allocator, without which s5 ends by design.
    ("mmap", "PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_STACK", "ENOMEM"),
    ("mmap", "", ""),
    ("newfstatat", "", "EACCES ENOMEM"),
    ("openat", "", "EMFILE ENFILE EACCES ENOMEM"),
    ("pipe2", "", "EMFILE ENFILE"),
    ("poll", "", "EINTR ENOMEM"),
    ("prlimit64", "NULL, {", ""),
    ("prlimit64", "", "EPERM"),
    // The kernel never fails for an eventfd.
    ("read", "anon_inode", ""),
    ("read", "", "EIO EINTR"),
    // The numbers of signals.
    ("recvfrom", ", 4, 0, NULL", "ENOMEM"),
    ("recvfrom", "TCP", "ECONNRESET ETIMEDOUT EHOSTUNREACH ENOMEM EINTR"),
    ("recvfrom", "UNIX", "ECONNRESET ENOMEM EINTR"),
    ("recvmmsg", "", "ECONNREFUSED EHOSTUNREACH ENOMEM EINTR"),
    ("recvmsg", "", "ECONNREFUSED EHOSTUNREACH ENOMEM EINTR"),
    ("sendmmsg", "", "ENOBUFS EPERM ENETUNREACH EINTR"),
    ("sendmsg", "", "ENOBUFS EPERM ENETUNREACH ECONNREFUSED EMSGSIZE EINTR"),
    // From a signal handler.
    ("sendto", "MSG_NOSIGNAL", ""),
    ("sendto", "UDP", "ENOBUFS EPERM ENETUNREACH ECONNREFUSED EMSGSIZE EINTR"),
    ("sendto", "", "EPIPE ECONNRESET ENOBUFS EINTR"),
    ("setsockopt", "", "ENOMEM ENOPROTOOPT"),
    ("shutdown", "", "ENOTCONN"),
    ("socket", "", "EMFILE ENFILE ENOBUFS EAFNOSUPPORT EACCES"),
    ("socketpair", "", "EMFILE ENFILE"),
    ("splice", "", "EINVAL ENOMEM EINTR"),
    ("statx", "", "EACCES ENOMEM"),
    ("write", "anon_inode", ""),
    ("write", "(2<", "EPIPE EAGAIN EIO ENOSPC EINTR"),
    ("write", "", "EPIPE EIO ENOSPC EINTR"),
];

/// Calls that are not injected. The kernel does not let them fail, or only for lack of memory. A close(2) that fails has
/// closed the descriptor, but strace would skip it.
const NEVER: &str = "brk clock_gettime clock_nanosleep close exit exit_group futex getegid geteuid getgid getpid getrandom gettid \
                     getuid lseek madvise mprotect mremap munmap prctl restart_syscall rseq rt_sigaction rt_sigprocmask \
                     rt_sigreturn sched_getaffinity sched_yield set_robust_list sigaltstack tgkill timerfd_settime umask \
                     uname wait4 waitid";
const OTHERS: &str = "EPERM ENOMEM";

/// A system call in a trace.
#[derive(Debug)]
pub struct Call {
    thread: String,
    name: String,
    text: String,
    /// The injected error.
    pub injected: Option<String>,
}

impl Call {
    /// Returns the errors that the kernel can return for this call.
    fn errors(&self) -> impl Iterator<Item = &'static str> {
        let rule = RULES.iter().find(|(name, text, _)| *name == self.name && self.text.contains(text));
        let is_never = || NEVER.split(' ').any(|name| name == self.name);
        rule.map_or_else(|| if is_never() { "" } else { OTHERS }, |rule| rule.2).split_whitespace()
    }

    /// Returns whether the kernel can return the injected error. The n-th call of a later run can be another one.
    pub fn is_plausible(&self) -> bool {
        self.injected.as_deref().is_none_or(|injected| self.errors().any(|error| error == injected))
    }

    pub fn writes_to_stderr(&self) -> bool {
        self.name == "write" && self.text.contains("(2<")
    }
}

/// An error for the `nth` call of `call` in each thread.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    call: String,
    nth: usize,
    error: &'static str,
}

impl Fault {
    /// The value of strace's option -e.
    pub fn option(&self) -> String {
        format!("inject={}:error={}:when={}", self.call, self.error, self.nth)
    }
}

/// Reads the calls of all threads from the output of `strace -f -yy -o`.
pub fn parse(trace: &str) -> Vec<Call> {
    let mut calls = Vec::<Call>::new();
    for (thread, line) in trace.lines().filter_map(|line| line.split_once(' ')) {
        let line = line.trim_start();
        let error = line.strip_suffix(" (INJECTED)").and_then(|line| line.rsplit_once(" = -1 "));
        let injected = error.and_then(|(_, error)| Some(error.split(' ').next()?.to_owned()));
        if line.starts_with("<... ") {
            let begun = calls.iter_mut().rfind(|call| call.thread == thread).filter(|_| injected.is_some());
            begun.into_iter().for_each(|call| call.injected = injected.clone());
        } else if let Some((name, _)) = line.split_once('(').filter(|(name, _)| !name.contains([' ', '+', '-'])) {
            calls.push(Call { thread: thread.into(), name: name.into(), text: line.into(), injected });
        }
    }
    calls
}

/// Returns the first call that the program makes itself, and not the dynamic loader or Rust's runtime: main first handles
/// SIGUSR1. 0 if the trace begins later.
pub fn start_of_main(calls: &[Call]) -> usize {
    calls.iter().position(|call| call.text.starts_with("rt_sigaction(SIGUSR1")).unwrap_or_default()
}

/// Returns a fault for each call from `first` on and each of its errors, unless the fault would also be injected into a call
/// of another thread, or before `first`, that cannot fail so.
pub fn faults(calls: &[Call], first: usize) -> BTreeSet<Fault> {
    let mut counts = BTreeMap::<_, usize>::new();
    let mut errors_of = BTreeMap::<_, BTreeSet<&'static str>>::new();
    for (i, call) in calls.iter().enumerate() {
        let nth = counts.entry((&call.thread, &call.name)).or_default();
        *nth += 1;
        let errors: BTreeSet<_> = call.errors().filter(|_| i >= first).collect();
        errors_of.entry((&call.name, *nth)).or_insert(errors.clone()).retain(|error| errors.contains(error));
    }
    let faults = errors_of.into_iter().flat_map(|((call, nth), errors)| {
        errors.into_iter().map(move |error| Fault { call: call.clone(), nth, error })
    });
    faults.collect()
}
