//! Listening sockets that s5 gets from systemd (see sd_listen_fds(3)), or from the process that it replaces.

use std::env::VarError;
use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use socket2::{Domain, Socket, Type};

use crate::net::{MAX_DESCRIPTORS, receive_descriptors, take_descriptor};

/// The first descriptor of LISTEN_FDS.
const FIRST_DESCRIPTOR: RawFd = 3;
/// Set for a process that replaces another one, to which its stdin is connected.
pub(super) const SUCCESSOR: &str = "S5_RESTART";

/// A listening socket that another process has opened.
#[derive(Debug)]
pub struct InheritedSocket {
    pub(super) socket: Socket,
    /// Name in LISTEN_FDNAMES, for the log. Empty if the variable is not set.
    pub(super) name: String,
    /// Set if s5 has created the file of a Unix socket, and has to remove it.
    pub(super) owns_file: bool,
}

/// Returns true if this process replaces another one.
pub fn is_successor() -> bool {
    std::env::var_os(SUCCESSOR).is_some()
}

impl InheritedSocket {
    /// Takes the sockets of the process that this one replaces, or those of systemd. `has_listen`: the command line has
    /// addresses to listen on.
    ///
    /// # Errors
    /// A variable is invalid, or a descriptor is not a listening TCP or Unix socket. The message names it.
    pub fn take_all(has_listen: bool) -> Result<Vec<Self>, String> {
        if !is_successor() {
            let mut sockets = Self::from_systemd()?;
            if has_listen && !sockets.is_empty() {
                log::warn!("the sockets of LISTEN_FDS are not used, because --listen is given");
                sockets.clear();
            }
            return Ok(sockets);
        }
        let mut sockets = Self::from_predecessor(has_listen)?;
        if let Ok(names) = names(sockets.len()).map(|names| names.into_iter().filter(|_| !has_listen)) {
            sockets.iter_mut().zip(names).for_each(|(socket, name)| socket.name = name);
        }
        Ok(sockets)
    }

    /// Takes the next message of the process that this one replaces: first its listeners, then those for metrics.
    pub(super) fn from_predecessor(owns_file: bool) -> Result<Vec<Self>, String> {
        let error = |error| format!("{SUCCESSOR}: {error} (only s5 itself sets this variable)");
        let sockets = receive_descriptors(std::io::stdin()).map_err(error)?;
        let new = |socket| Self { socket: Socket::from(socket), name: String::new(), owns_file };
        Ok(sockets.into_iter().map(new).collect())
    }

    /// Takes the sockets of LISTEN_FDS. Logs a warning and takes none if they are for another process.
    fn from_systemd() -> Result<Vec<Self>, String> {
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
        let names = names(count)?;
        let own = |(number, name)| Self::take(number, name).map_err(|error| format!("LISTEN_FDS: {error}"));
        (FIRST_DESCRIPTOR..).zip(names).map(own).collect()
    }

    fn take(number: RawFd, name: String) -> Result<Self, String> {
        let socket = take_descriptor(number).map(Socket::from);
        let socket = socket.map_err(|error| format!("descriptor {number}: {error}"))?;
        let is_stream = |domain| matches!(domain, Domain::IPV4 | Domain::IPV6 | Domain::UNIX);
        let is_listener = socket.domain().is_ok_and(is_stream)
            && socket.r#type().is_ok_and(|kind| kind == Type::STREAM)
            && socket.is_listener().unwrap_or_default();
        let remedy = "(in the socket unit, set ListenStream=, and not Accept=yes)";
        match is_listener {
            true => Ok(Self { socket, name, owns_file: false }),
            false => Err(format!("descriptor {number} is not a listening TCP or Unix socket {remedy}")),
        }
    }
}

/// Returns the name of each socket.
fn names(count: usize) -> Result<Vec<String>, String> {
    let Some(names) = variable("LISTEN_FDNAMES")? else { return Ok(vec![String::new(); count]) };
    let names: Vec<String> = names.split(':').map(Into::into).collect();
    match names.len() {
        found if found == count => Ok(names),
        found => Err(format!("LISTEN_FDNAMES: expected {count} names, as in LISTEN_FDS, found {found}")),
    }
}

/// Returns the value of an environment variable.
pub(super) fn number<T: FromStr<Err: fmt::Display>>(name: &str) -> Result<Option<T>, String> {
    let parse = |text: String| text.parse().map_err(|_| format!("{name}: expected a number, found {text:?}"));
    variable(name)?.map(parse).transpose()
}

fn variable(name: &str) -> Result<Option<String>, String> {
    match std::env::var(name) {
        Ok(text) => Ok(Some(text)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(format!("{name}: not UTF-8")),
    }
}
