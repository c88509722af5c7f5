//! Reads passwords from the terminal. Removes them from messages, and from the arguments and the environment of the
//! process. Before that, ps(1) shows the arguments.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::os::unix::thread::JoinHandleExt as _;
use std::thread::Builder;

use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SigSet, Signal, raise};
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcgetpgrp, tcsetattr};

use crate::server::is_ignored;

const FILLER: u8 = b'x';
/// Fields arg_start and env_start of proc_pid_stat(5). The end of the memory is the next field.
const ARG_START_FIELD: usize = 48;
const ENV_START_FIELD: usize = 50;

/// Reads a password from the terminal without echo. If a signal ends s5, the echo is restored first.
pub(crate) fn prompt_password(prompt: &str) -> io::Result<String> {
    let tty = File::open("/dev/tty")?;
    // Stops s5 in the background, where the settings are those of the shell, while signals still end it.
    tcdrain(&tty)?;
    let settings = tcgetattr(&tty)?;
    let ending = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter();
    // SIGURG ends only the thread below.
    let signals: SigSet = ending.filter(|signal| !is_ignored(*signal as i32)).chain([Signal::SIGURG]).collect();
    // rpassword itself raises the SIGINT of Ctrl-C, which then ends s5 after the prompt.
    signals.thread_block()?;
    let watcher = Builder::new().spawn(move || {
        let signal = signals.wait()?;
        // In the background, this would stop s5.
        if tcgetpgrp(&tty) == Ok(getpgrp()) {
            let _ = tcsetattr(&tty, OptionalActions::Now, &settings);
        }
        signals.thread_unblock().and_then(|()| raise(signal))
    });
    if watcher.is_err() {
        signals.thread_unblock()?;
    }
    let passwd = rpassword::prompt_password(prompt);
    let _ = watcher.map(|watcher| pthread_kill(watcher.as_pthread_t(), Signal::SIGURG).map(|()| watcher.join()));
    signals.thread_unblock()?;
    passwd
}

/// Returns `arg` with `…` instead of the text before its last `@`. A scheme and a quote are kept.
pub(crate) fn without_userinfo(arg: &str) -> String {
    let quote = if arg.starts_with('\'') { "'" } else { "" };
    match arg.rsplit_once('@') {
        Some((before, host)) => match before.split_once("://") {
            Some((scheme, _)) => format!("{scheme}://…@{host}"),
            None => format!("{quote}…@{host}"),
        },
        None => arg.into(),
    }
}

/// Overwrites passwords in the command line of this process: in URLs, and in `user`, the `user:password` value of an
/// option. `args` is a copy of the command line.
pub(crate) fn redact(args: &[String], user: Option<&str>) {
    let spans = |arg: &str| [password_in_url(arg), user.and_then(|user| password_in_option(arg, user))];
    if args.iter().any(|arg| spans(arg).iter().any(Option::is_some)) {
        edit_strings("command line", ARG_START_FIELD, |arg| {
            let spans = str::from_utf8(arg).map(spans).unwrap_or_default();
            spans.into_iter().flatten().for_each(|span| arg.get_mut(span).unwrap_or_default().fill(FILLER));
        });
    }
}

/// Empties a variable in the environment of this process. Later reads return an empty value, in its children too.
pub(crate) fn empty_variable(name: &str) {
    edit_strings("environment", ENV_START_FIELD, |entry| {
        if let Some((entry_name, value)) = entry.split_at_mut_checked(name.len() + 1)
            && entry_name == format!("{name}=").as_bytes()
        {
            value.fill(0);
        }
    });
}

/// Returns the range of the password in a URL. In a list of URLs, it extends from the first password to the last one.
pub fn password_in_url(arg: &str) -> Option<Range<usize>> {
    let (before, _) = arg.rsplit_once('@')?;
    let colon = before.find(':')?;
    let start = match before.get(colon..)?.strip_prefix("://") {
        Some(userinfo) => colon + 3 + userinfo.find(':')? + 1,
        None => colon + 1,
    };
    Some(start..before.len())
}

/// Returns the range of the password in an argument that ends with `value`, which is `user:password`.
pub fn password_in_option(arg: &str, value: &str) -> Option<Range<usize>> {
    let (_, password) = value.split_once(':')?;
    arg.ends_with(value).then(|| arg.len() - password.len()..arg.len())
}

/// Edits the strings of this process in memory, whose start and end are fields of proc_pid_stat(5). A failure is only
/// logged.
fn edit_strings(what: &str, start_field: usize, edit: impl Fn(&mut [u8])) {
    let edit_all = || {
        let stat = fs::read_to_string("/proc/self/stat")?;
        // Field 3 follows the name, which is in parentheses.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_ascii_whitespace();
        let mut addrs = fields.skip(start_field - 3).filter_map(|field| field.parse::<u64>().ok());
        let (start, end) = addrs.next().zip(addrs.next()).ok_or(io::ErrorKind::Unsupported)?;
        let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
        let mut bytes = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or_default()];
        memory.read_exact_at(&mut bytes, start)?;
        bytes.split_mut(|byte| *byte == 0).for_each(edit);
        memory.write_all_at(&bytes, start)
    };
    if let Err(error) = edit_all() {
        log::debug!("cannot overwrite a password in the {what}: {error}");
    }
}
