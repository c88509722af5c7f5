//! The system calls that the server may still make, enforced by seccomp. All others fail with EPERM, and the first
//! refusal of each is logged.
//!
//! The kernel reports them with SIGSYS. With a user notification, code in this process could allow its own calls.
//!
//! The kernel caches the answer for calls whose arguments are not checked (Linux 5.11): the filter does not run for
//! them.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use nix::libc;
use nix::sys::signal::{SigSet, Signal as Nix};
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{self, Eq, MaskedEq};
use seccompiler::{BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

use crate::gssapi::ffi;

macro_rules! syscalls {
    ($($name:ident)*) => { &[$(libc::$name),*] };
}

/// Calls that are allowed with any arguments. Landlock decides which files they open.
const ALLOWED: &[i64] = syscalls![
    // Sockets, pipes, events.
    SYS_socketpair SYS_bind SYS_listen SYS_accept SYS_accept4 SYS_connect SYS_shutdown SYS_getsockname SYS_getpeername
    SYS_getsockopt SYS_setsockopt SYS_sendto SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg
    SYS_pipe2 SYS_splice SYS_tee SYS_vmsplice SYS_sendfile SYS_eventfd2 SYS_signalfd4 SYS_ppoll SYS_pselect6
    SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2
    SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime
    // Files.
    SYS_openat SYS_close SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_lseek SYS_fcntl SYS_flock
    SYS_dup SYS_dup3 SYS_fstat SYS_newfstatat SYS_statx SYS_statfs SYS_fstatfs SYS_faccessat SYS_faccessat2
    SYS_readlinkat SYS_getdents64 SYS_getcwd SYS_unlinkat SYS_ftruncate SYS_fsync SYS_fdatasync SYS_umask
    // Memory.
    SYS_brk SYS_mmap SYS_munmap SYS_mremap SYS_mprotect SYS_madvise SYS_mincore
    // Threads. `clone` and `clone3` are below.
    SYS_futex SYS_set_robust_list SYS_get_robust_list SYS_rseq SYS_set_tid_address SYS_membarrier SYS_sched_yield
    SYS_sched_getaffinity SYS_setpriority SYS_getcpu SYS_gettid SYS_exit SYS_exit_group
    // Signals of this process to itself are below.
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack SYS_restart_syscall
    // Time.
    SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday SYS_times
    // Facts about this process and system.
    SYS_getpid SYS_getppid SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups
    SYS_getrusage SYS_getrandom SYS_uname SYS_sysinfo
];

/// Calls that newer architectures do not have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_ON_ARCH: &[i64] = syscalls![
    SYS_open SYS_stat SYS_lstat SYS_access SYS_readlink SYS_getdents SYS_unlink SYS_pipe SYS_dup2 SYS_poll SYS_select
    SYS_epoll_wait SYS_eventfd SYS_time SYS_arch_prctl
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_ON_ARCH: &[i64] = &[];

/// Calls of Kerberos for tickets in the kernel's keyrings.
const KEYRINGS: &[i64] = syscalls![SYS_keyctl SYS_add_key SYS_request_key];

/// PR_SET_VMA, with which glibc and the allocator name their memory.
const PR_SET_VMA: i32 = 0x5356_4d41;
/// Reads the vector with the address of the vDSO, which the crate rustix needs for its first clock.
const PR_GET_AUXV: i32 = 0x4155_5856;
/// The bits of a socket's type without SOCK_CLOEXEC and SOCK_NONBLOCK.
const SOCK_TYPE_MASK: u64 = 0xf;

/// A condition on an argument: its index, the comparison, the value.
type Condition = (u8, SeccompCmpOp, i32);

/// The numbers of the calls that were refused already. Others are not logged.
static REFUSED: [AtomicBool; 1024] = [const { AtomicBool::new(false) }; 1024];
/// Takes these numbers from the signal handler to the log. It has space for all of them.
static REFUSALS: OnceLock<PipeWriter> = OnceLock::new();

/// Installs the filter for all threads of this process. Returns the refusals for [`log_refusals`].
pub(super) fn restrict(uses_keyrings: bool) -> Result<PipeReader, String> {
    let (refusals, writer) = io::pipe().map_err(|error| error.to_string())?;
    REFUSALS.get_or_init(|| writer);
    // The parent process can have blocked the signal.
    let signal = [Nix::SIGSYS].into_iter().collect::<SigSet>().thread_unblock();
    signal.and_then(|()| ffi::fail_trapped_calls(report)).map_err(|error| error.to_string())?;
    let keyrings = if uses_keyrings { KEYRINGS } else { &[] };
    let any_args = [ALLOWED, ALLOWED_ON_ARCH, keyrings].concat().into_iter().map(|call| (call, Vec::new()));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = any_args.collect();
    for (call, conditions) in with_checked_args() {
        let conditions = conditions
            .into_iter()
            .map(|(index, op, value)| SeccompCondition::new(index, Dword, op, u64::from(value.cast_unsigned())));
        let rule = conditions.collect::<Result<Vec<_>, _>>().and_then(SeccompRule::new);
        rules.entry(call).or_default().push(rule.map_err(|error| error.to_string())?);
    }
    // glibc does not fall back to clone(2), whose flags can be checked, unless clone3(2) fails with ENOSYS.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    rules.insert(libc::SYS_clone3, Vec::new());
    // No call: strace(1) with `--inject` and other tracers replace one by this number.
    rules.insert(i64::from(u32::MAX), Vec::new());
    install(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS.cast_unsigned()))?;
    // posix_spawn(3) blocks all signals. A blocked SIGSYS would end the process.
    let spawn = SeccompCondition::new(0, Dword, MaskedEq(libc::CLONE_VFORK as u64), libc::CLONE_VFORK as u64);
    let spawn = spawn.and_then(|spawn| SeccompRule::new(vec![spawn])).map_err(|error| error.to_string())?;
    // An allowed call has the answer of the other filter.
    rules.entry(libc::SYS_clone).or_default().push(spawn.clone());
    let spawn = BTreeMap::from([(libc::SYS_clone, vec![spawn])]);
    install(spawn, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM.cast_unsigned()))?;
    install(rules, SeccompAction::Trap, SeccompAction::Allow)?;
    Ok(refusals)
}

/// Runs in a signal handler.
fn report(call: i64) {
    let refused = usize::try_from(call).ok().and_then(|call| REFUSED.get(call));
    if refused.is_some_and(|refused| !refused.swap(true, Relaxed))
        && let Some(mut refusals) = REFUSALS.get()
    {
        let _ = refusals.write(&call.to_ne_bytes());
    }
}

/// Starts a thread that logs the first refusal of each system call.
pub(super) fn log_refusals(mut refusals: PipeReader) {
    let run = move || {
        let mut call = [0; 8];
        while refusals.read_exact(&mut call).is_ok() {
            let call = i64::from_ne_bytes(call);
            log::warn!(
                "sandbox: system call {call} refused (see ausyscall(8) for its name, and SANDBOX in the manual)"
            );
        }
    };
    if let Err(error) = thread::Builder::new().name("s5-sandbox".into()).spawn(run) {
        log::warn!("sandbox: refused system calls are not logged: {error}");
    }
}

/// Returns the calls that are allowed with certain arguments. A call with several entries is allowed if one matches.
fn with_checked_args() -> Vec<(i64, Vec<Condition>)> {
    let mut calls = vec![
        // Threads, and no processes.
        (libc::SYS_clone, vec![(0, MaskedEq(libc::CLONE_THREAD as u64), libc::CLONE_THREAD)]),
        // Reading limits, and not setting them: the new limit is a null pointer.
        (libc::SYS_prlimit64, vec![(2, Eq, 0)]),
        (libc::SYS_prctl, vec![(0, Eq, libc::PR_SET_NAME)]),
        (libc::SYS_prctl, vec![(0, Eq, PR_SET_VMA)]),
        (libc::SYS_prctl, vec![(0, Eq, PR_GET_AUXV)]),
        // abort(3) and raise(3).
        (libc::SYS_tgkill, vec![(0, Eq, std::process::id().cast_signed())]),
        // getaddrinfo(3) reads the addresses of this host.
        (libc::SYS_socket, vec![(0, Eq, libc::AF_NETLINK), (2, Eq, libc::NETLINK_ROUTE)]),
        (libc::SYS_socket, vec![(0, Eq, libc::AF_UNIX)]),
    ];
    let (stream, datagram) = (libc::SOCK_STREAM, libc::SOCK_DGRAM);
    let sockets = [(stream, 0), (stream, libc::IPPROTO_TCP), (datagram, 0), (datagram, libc::IPPROTO_UDP)];
    for family in [libc::AF_INET, libc::AF_INET6] {
        calls.extend(sockets.map(|(kind, protocol)| {
            (libc::SYS_socket, vec![(0, Eq, family), (1, MaskedEq(SOCK_TYPE_MASK), kind), (2, Eq, protocol)])
        }));
    }
    // Of these, TIOCSTI would type into the terminal.
    let requests = [libc::FIONBIO, libc::FIONREAD, libc::TIOCOUTQ, libc::TCGETS, libc::SIOCGIFINDEX, libc::SIOCGIFNAME];
    calls.extend(requests.map(|request| (libc::SYS_ioctl, vec![(1, Eq, request as i32)])));
    calls
}

fn install(rules: BTreeMap<i64, Vec<SeccompRule>>, other: SeccompAction, listed: SeccompAction) -> Result<(), String> {
    let arch = TargetArch::try_from(ARCH).map_err(|error| error.to_string())?;
    let program = SeccompFilter::new(rules, other, listed, arch).and_then(BpfProgram::try_from);
    let program = program.map_err(|error| error.to_string())?;
    seccompiler::apply_filter_all_threads(&program).map_err(|error| error.to_string())
}
