//! Child processes, which end with the benchmark even if it is killed, and the directory of their files.

use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::*;

/// First argument of this program when it executes another program.
pub const EXEC_HELPER: &str = "exec";

static PROCESS_ROOTS: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// A process. Dropping it kills the process and all its descendants.
pub struct Process(Child);

impl Process {
    /// Starts a program through [`exec_program`], so that the kernel kills it when this process ends.
    ///
    /// Call this on the main thread only: the kernel kills the child when the thread that started it ends.
    pub fn start(command: &Command) -> io::Result<Self> {
        let mut wrapped = Self::wrap(command)?;
        wrapped.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self::spawn_directly(wrapped)
    }

    /// Like [`Process::start`], with pipes for stdin and stdout.
    pub fn start_with_pipes(command: &Command) -> io::Result<Self> {
        let mut wrapped = Self::wrap(command)?;
        wrapped.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self::spawn_directly(wrapped)
    }

    fn wrap(command: &Command) -> io::Result<Command> {
        let mut wrapped = Command::new(std::env::current_exe()?);
        wrapped.arg(EXEC_HELPER).arg(command.get_program()).args(command.get_args());
        wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Ok(wrapped)
    }

    /// Starts a program without [`exec_program`], to measure its start time.
    pub fn spawn_directly(mut command: Command) -> io::Result<Self> {
        let child = command.process_group(0).spawn()?;
        PROCESS_ROOTS.lock().expect("not poisoned").push(child.id() as i32);
        Ok(Self(child))
    }

    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    pub fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

/// Waits until `is_ready` returns true, with pauses between the calls. Fails if a process ends or after `IDLE_TIMEOUT`.
pub fn wait_until(
    processes: &mut [Process],
    pause: Duration,
    mut is_ready: impl FnMut() -> bool,
) -> Result<(), BenchError> {
    let started = Instant::now();
    while !is_ready() {
        if started.elapsed() > IDLE_TIMEOUT || processes.iter_mut().any(Process::has_ended) {
            return Err(failed("a process did not start"));
        }
        if !pause.is_zero() {
            sleep(pause);
        }
    }
    Ok(())
}

/// Waits until a process accepts connections at this port.
pub fn wait_until_it_listens(process: &mut Process, port: u16) -> Result<(), BenchError> {
    let is_ready = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
    wait_until(std::slice::from_mut(process), Duration::from_millis(5), is_ready)
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = self.pid();
        if !self.has_ended() {
            kill_tree(pid);
            let _ = self.0.wait();
        }
        PROCESS_ROOTS.lock().expect("not poisoned").retain(|root| *root != pid);
    }
}

/// Kills a process and its descendants. Some daemons start new sessions, so killing a process group is not enough.
fn kill_tree(root: i32) {
    for pid in cpu::descendants(root) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Runs in the child of [`Process::start`]: requests SIGKILL at the end of the parent, and executes the program.
pub fn exec_program(mut args: impl Iterator<Item = std::ffi::OsString>) -> io::Error {
    let Some(program) = args.next() else { return io::ErrorKind::InvalidInput.into() };
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return error.into();
    }
    Command::new(program).args(args).exec()
}

/// Raises the descriptor limit to the hard limit. Returns the limit.
pub fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

/// Returns the directory of this run.
pub fn dir() -> PathBuf {
    std::env::temp_dir().join(format!("s5-bench-{}", std::process::id()))
}

/// Removes the directory when dropped.
pub struct TempDir;

impl TempDir {
    pub fn create() -> io::Result<Self> {
        fs::DirBuilder::new().mode(0o700).create(dir())?;
        Ok(Self)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(dir());
    }
}

/// Kills the children and removes the directory on SIGINT, SIGTERM and SIGHUP.
pub fn clean_up_on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let roots = PROCESS_ROOTS.lock().map(|roots| roots.clone()).unwrap_or_default();
            roots.into_iter().for_each(kill_tree);
            let _ = fs::remove_dir_all(dir());
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
