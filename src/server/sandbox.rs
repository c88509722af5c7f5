//! What the process gives up once its listeners are bound: its user, its capabilities, inherited descriptors, files
//! (Landlock) and system calls (seccomp).
//!
//! Most of this applies to the calling thread and to the threads that it starts later, so [`enter`] precedes all
//! others.

mod files;
mod syscalls;

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities};
use rustix::thread::{clear_ambient_capability_set, remove_capability_from_bounding_set};

use super::args::ServeArgs;
use super::options::Options;
use super::run_as::RunAs;
use crate::net::bind_outbound;

/// O_CLOEXEC in the octal flags of proc_pid_fdinfo(5).
const CLOEXEC_FLAG: u32 = 0o2_000_000;

/// Closes inherited descriptors, except 0 to 2. Call it after the files of the command line were read, which may be
/// `/dev/fd/N`, and before libraries open files of their own.
// Not close_range(2): s5 and its libraries set FD_CLOEXEC, so a descriptor without it was inherited.
pub fn close_inherited_descriptors() {
    let is_inherited = |fd: &i32| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).is_some_and(|flags| flags & CLOEXEC_FLAG == 0)
    };
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let open: Vec<i32> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2).filter(is_inherited) {
        let _ = nix::unistd::close(fd);
    }
}

/// Returns an error if the server will not have the capability for the ports of BIND and UDP.
pub(super) fn check_ports(options: &Options) -> Option<String> {
    let first_free = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").ok();
    let first_free: u16 = first_free.and_then(|port| port.trim().parse().ok()).unwrap_or(1024);
    let keeps_capabilities = options.no_sandbox && options.run_as.as_ref().is_none_or(RunAs::is_root);
    let is_allowed = keeps_capabilities
        && capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_BIND_SERVICE));
    let ports = [("--bind-ports", &options.bind_ports), ("--udp-ports", &options.udp_ports)];
    let mut low =
        ports.into_iter().filter(|(_, ports)| ports.as_ref().is_some_and(|ports| *ports.0.start() < first_free));
    let (option, _) = low.next().filter(|_| !is_allowed)?;
    Some(format!(
        "{option}: the server may not use ports below {first_free} (choose others, or lower the sysctl \
         net.ipv4.ip_unprivileged_port_start; root can set --no-sandbox without --run-as)"
    ))
}

/// Returns the fewest capabilities with which sockets can have the options for outbound traffic: Linux requires CAP_NET_RAW
/// for the mark, before version 5.17 CAP_NET_ADMIN, and none or CAP_NET_RAW for the interface.
pub(super) fn outbound_capabilities(options: &Options) -> Result<CapabilitySet, String> {
    let (none, raw, admin) = (CapabilitySet::empty(), CapabilitySet::NET_RAW, CapabilitySet::NET_ADMIN);
    let ServeArgs { outbound_interface: interface, mark, .. } = &options.args;
    if interface.is_none() && mark.is_none() {
        return Ok(none);
    }
    // The kernel takes an empty name for none, and only the start of a longer one (IFNAMSIZ).
    if let Some(name) = interface.as_deref().filter(|name| !(1..16).contains(&name.len())) {
        return Err(format!("--outbound-interface {name:?}: expected 1 to 15 bytes (ip link shows the names)"));
    }
    let sets = capabilities(None).map_err(|error| error.to_string())?;
    let bind = |effective| {
        let _ = set_capabilities(None, CapabilitySets { effective, ..sets });
        bind_outbound((Ipv4Addr::UNSPECIFIED, 0).into()).map(|_| effective)
    };
    let is_denied = |bound: &io::Result<_>| bound.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
    let sufficient = [none, raw, admin].into_iter().map(bind).find(|bound| !is_denied(bound));
    let _ = set_capabilities(None, sets);
    let hint = "start s5 as root, or with CAP_NET_RAW; before Linux 5.17, with CAP_NET_ADMIN";
    let option = if mark.is_some() { "--mark" } else { "--outbound-interface" };
    let bound = sufficient.ok_or_else(|| format!("{option}: permission denied ({hint})"))?;
    bound.map_err(|error| format!("{error} (ip link shows those of this host)"))
}

/// Switches to the user of `--run-as`, and restricts this process unless `--no-sandbox` is set. Returns a function that
/// logs what is in force. If the kernel lacks a part, the other parts are in force. The capabilities in `kept` stay.
/// `has_passwords`: other processes must not read the memory of this one.
///
/// # Errors
/// The process cannot become the user.
pub(super) fn enter(options: &Options, kept: CapabilitySet, has_passwords: bool) -> io::Result<impl FnOnce() + use<>> {
    let (mut in_force, mut missing, mut refusals) = (Vec::new(), Vec::new(), None);
    // Before the switch: removing from the bounding set and opening the files needs root.
    let landlock = (!options.no_sandbox).then(|| files::ruleset(options));
    if !options.no_sandbox {
        drop_bounding_set();
    }
    if let Some(to) = &options.run_as {
        // The kernel drops all capabilities when root becomes another user.
        set_keep_capabilities(!kept.is_empty())?;
        to.switch()?;
        if !kept.is_empty() && !to.is_root() {
            limit_capabilities(kept)?;
        }
        in_force.push(format!("user {to}"));
    }
    let mut add = |name: String, result: Result<(), String>| match result {
        Ok(()) => in_force.push(name),
        Err(error) => missing.push(format!("{name}: {error}")),
    };
    if let Some(landlock) = landlock {
        let text = |error: rustix::io::Errno| error.to_string();
        let names = kept.iter_names().map(|(name, _)| format!("only CAP_{name}")).collect::<Vec<_>>().join(" and ");
        let name = if kept.is_empty() { "no capabilities".into() } else { names };
        add(name, limit_capabilities(kept).map_err(text));
        add("no_new_privs".into(), rustix::thread::set_no_new_privs(true).map_err(text));
        if has_passwords {
            add("not dumpable".into(), set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(text));
        }
        match landlock.and_then(files::restrict) {
            Ok(version) => add(format!("Landlock ABI {version}"), Ok(())),
            Err(error) => add("Landlock".into(), Err(error)),
        }
        let restricted = syscalls::restrict(options.uses_kerberos_tickets());
        add("seccomp".into(), restricted.map(|pipe| refusals = Some(pipe)));
    } else {
        add("off".into(), Ok(()));
    }
    let reload_files = options.reload_files.clone();
    Ok(move || {
        let in_force = in_force.join(", ");
        match missing.as_slice() {
            [] => log::info!("sandbox: {in_force}"),
            missing => log::warn!("sandbox: {in_force}; not in force: {}", missing.join(", ")),
        }
        warn_unreadable(&reload_files);
        if let Some(refusals) = refusals {
            syscalls::log_refusals(refusals);
        }
    })
}

/// Logs which of these files this process may not open any more. A reload checks the system's files as well: Landlock
/// allows root the files at the start, and not those that have replaced them since.
pub(super) fn warn_unreadable(files: &[PathBuf]) {
    for file in denied(files).map(|file| file.display()) {
        log::warn!("sandbox: {file} cannot be read again: permission denied (see SANDBOX in the manual)");
    }
}

/// Returns the regular files among these that this process may not open.
fn denied(files: &[PathBuf]) -> impl Iterator<Item = &Path> {
    let is_regular = |file: &&Path| fs::metadata(file).is_ok_and(|metadata| metadata.is_file());
    let is_denied = |file: &&Path| File::open(file).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    files.iter().map(PathBuf::as_path).filter(is_regular).filter(is_denied)
}

/// Returns the remedy for a failed reload if Landlock is the reason: access(2) ignores Landlock.
pub(super) fn reload_remedy(files: &[PathBuf]) -> String {
    let file = denied(files).find(|file| access(*file, Access::READ_OK).is_ok());
    let remedy = "is not in the directory that it was in at the start: restart the server, see SANDBOX in the manual";
    file.map(|file| format!(" ({} {remedy})", file.display())).unwrap_or_default()
}

/// Logs which files of name resolution cannot be read any more.
pub(super) fn warn_unreadable_system_files() {
    warn_unreadable(&files::NAME_FILES.map(|name| Path::new("/etc").join(name)));
}

/// Fails silently without CAP_SETPCAP: then no_new_privs alone keeps exec from adding capabilities.
fn drop_bounding_set() {
    for bit in 0..u64::BITS {
        let _ = remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit));
    }
}

/// Drops the effective and permitted capabilities except `kept`, and all inheritable and ambient ones. User 0 without
/// capabilities opens files as any other user.
fn limit_capabilities(kept: CapabilitySet) -> rustix::io::Result<()> {
    // Fails on kernels without ambient capabilities. The next call empties the set too.
    let _ = clear_ambient_capability_set();
    let set = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    // The sandbox of a service manager may deny the call to a process that has no capabilities anyway.
    set_capabilities(None, set).or_else(|error| if capabilities(None)? == set { Ok(()) } else { Err(error) })
}
