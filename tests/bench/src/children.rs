//! Child processes that do not outlive the benchmark, however it ends, and the folder for their files.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cpu;

/// The first argument of this program when it is only to become another one.
pub const BECOME: &str = "become";

static ROOTS: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// A process with all of its descendants; gone when dropped.
pub struct Process(Child);

impl Process {
    /// Starts a program by way of this one, which makes it end when this one does.
    ///
    /// Only for the main thread: the kernel looks at the thread that started the child.
    pub fn start(command: &Command) -> io::Result<Self> {
        let mut wrapped = Self::wrap(command)?;
        wrapped.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self::start_as_it_is(wrapped)
    }

    /// The same, with pipes to and from it.
    pub fn start_with_pipes(command: &Command) -> io::Result<Self> {
        let mut wrapped = Self::wrap(command)?;
        wrapped.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self::start_as_it_is(wrapped)
    }

    fn wrap(command: &Command) -> io::Result<Command> {
        let mut wrapped = Command::new(std::env::current_exe()?);
        wrapped.arg(BECOME).arg(command.get_program()).args(command.get_args());
        wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Ok(wrapped)
    }

    /// Without that way, for whoever measures how long the start takes.
    pub fn start_as_it_is(mut command: Command) -> io::Result<Self> {
        let child = command.process_group(0).spawn()?;
        ROOTS.lock().expect("no panic holds it").push(child.id() as i32);
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

impl Drop for Process {
    fn drop(&mut self) {
        let pid = self.pid();
        if !self.has_ended() {
            kill_tree(pid);
            let _ = self.0.wait();
        }
        ROOTS.lock().expect("no panic holds it").retain(|root| *root != pid);
    }
}

/// Some daemons put children into sessions of their own, so a process group is not enough.
fn kill_tree(root: i32) {
    for pid in cpu::descendants(root) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The child's half of `Process::start`.
pub fn become_program(mut args: impl Iterator<Item = std::ffi::OsString>) -> io::Error {
    let Some(program) = args.next() else { return io::ErrorKind::InvalidInput.into() };
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return error.into();
    }
    Command::new(program).args(args).exec()
}

/// The descriptors that this process and its children may have, which is all that the system grants.
pub fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

/// A folder of this run alone.
pub fn folder() -> PathBuf {
    std::env::temp_dir().join(format!("s5-bench-{}", std::process::id()))
}

/// Removes the folder when the run is over.
pub struct Folder;

impl Folder {
    pub fn make() -> io::Result<Self> {
        fs::DirBuilder::new().mode(0o700).create(folder())?;
        Ok(Self)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(folder());
    }
}

/// Ends children and folder when the run is interrupted.
pub fn clean_up_on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let roots = ROOTS.lock().map(|roots| roots.clone()).unwrap_or_default();
            roots.into_iter().for_each(kill_tree);
            let _ = fs::remove_dir_all(folder());
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
