//! Listening sockets that s5 gets from systemd (see sd_listen_fds(3)), or from the process that it replaces.

use std::ffi::OsString;
use std::iter::repeat;
use std::os::fd::RawFd;
use std::str::FromStr;
use std::sync::atomic::Ordering;

use socket2::{Domain, Socket, Type};

use super::listen::{KEEP_SOCKET_FILES, Listener};
use crate::net::{MAX_DESCRIPTORS, receive_descriptors, set_tcp_options, take_descriptor};

/// The first descriptor of LISTEN_FDS.
const FIRST_DESCRIPTOR: RawFd = 3;
/// Set for a process that replaces another one, to which its stdin is connected.
pub(super) const SUCCESSOR: &str = "S5_RESTART";

/// Returns true if this process replaces another one.
pub fn is_successor() -> bool {
    std::env::var_os(SUCCESSOR).is_some()
}

/// Takes the sockets of the process that this one replaces, or those of systemd. `has_listen`: the command line has
/// addresses to listen on.
///
/// # Errors
/// A variable is invalid, or a descriptor is not a listening TCP or Unix socket. The message names it.
pub fn inherited_listeners(has_listen: bool) -> Result<Vec<Listener>, String> {
    if is_successor() {
        return from_predecessor(has_listen);
    }
    let mut listeners = from_systemd()?;
    if has_listen && !listeners.is_empty() {
        log::warn!("the sockets of LISTEN_FDS are not used, because --listen is given");
        listeners.clear();
    }
    Ok(listeners)
}

/// Takes the next message of the process that this one replaces: first its listeners, then those for metrics.
/// `owns_files`: s5 has created them; the others are of systemd.
pub(super) fn from_predecessor(owns_files: bool) -> Result<Vec<Listener>, String> {
    let error = |error| format!("{SUCCESSOR}: {error} (only s5 itself sets this variable)");
    KEEP_SOCKET_FILES.store(true, Ordering::Relaxed);
    let sockets = receive_descriptors(std::io::stdin()).map_err(error)?;
    let names = names(sockets.len()).ok().filter(|_| !owns_files).unwrap_or_default();
    let named = sockets.into_iter().zip(names.into_iter().chain(repeat(String::new())));
    named.map(|(socket, name)| Listener::new(socket.into(), &name, owns_files).map_err(error)).collect()
}

/// Takes the sockets of LISTEN_FDS. Logs a warning and takes none if they are for another process.
fn from_systemd() -> Result<Vec<Listener>, String> {
    let own_pid = std::process::id();
    let Some(count) = number::<usize>("LISTEN_FDS")? else { return Ok(Vec::new()) };
    let pid = number::<u32>("LISTEN_PID")?;
    if pid != Some(own_pid) {
        let pid = pid.map_or("not set".into(), |pid| pid.to_string());
        log::warn!("LISTEN_FDS is ignored: it is for another process (LISTEN_PID is {pid}, this one is {own_pid})");
        return Ok(Vec::new());
    }
    if !(1..=MAX_DESCRIPTORS).contains(&count) {
        return Err(format!("LISTEN_FDS: expected a number from 1 to {MAX_DESCRIPTORS}, found {count}"));
    }
    let numbered = (FIRST_DESCRIPTOR..).zip(names(count)?);
    numbered.map(|(number, name)| take(number, &name).map_err(|error| format!("LISTEN_FDS: {error}"))).collect()
}

fn take(number: RawFd, name: &str) -> Result<Listener, String> {
    let io_error = |error| format!("descriptor {number}: {error} (only the service manager sets this variable)");
    let socket = take_descriptor(number).map(Socket::from).map_err(io_error)?;
    let domain = socket.domain().map_err(io_error)?;
    let is_listener = [Domain::IPV4, Domain::IPV6, Domain::UNIX].contains(&domain)
        && socket.r#type().is_ok_and(|kind| kind == Type::STREAM)
        && socket.is_listener().unwrap_or_default();
    if !is_listener {
        let remedy = "(in the socket unit, set ListenStream=, and not Accept=yes)";
        return Err(format!("descriptor {number} is not a listening TCP or Unix socket {remedy}"));
    }
    if domain != Domain::UNIX {
        set_tcp_options(&socket);
    }
    socket.set_nonblocking(true).and_then(|()| Listener::new(socket, name, false)).map_err(io_error)
}

/// Returns the name of each socket.
fn names(count: usize) -> Result<Vec<String>, String> {
    let Some(names) = variable("LISTEN_FDNAMES")? else { return Ok(vec![String::new(); count]) };
    match names.split(':').count() {
        found if found == count => Ok(names.split(':').map(Into::into).collect()),
        found => Err(format!("LISTEN_FDNAMES: number of names: expected {count}, as in LISTEN_FDS, found {found}")),
    }
}

/// Returns the value of an environment variable.
pub(super) fn number<T: FromStr>(name: &str) -> Result<Option<T>, String> {
    let parse = |text: String| text.parse().map_err(|_| format!("{name}: expected a number, found {text:?}"));
    variable(name)?.map(parse).transpose()
}

fn variable(name: &str) -> Result<Option<String>, String> {
    let text = std::env::var_os(name).map(OsString::into_string).transpose();
    text.map_err(|_| format!("{name}: not UTF-8"))
}
