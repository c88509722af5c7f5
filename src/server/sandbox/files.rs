//! The files that the server may still open, enforced by Landlock.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, Scope, make_bitflags,
};

use crate::server::listen::ListenAddr;
use crate::server::options::Options;
use crate::server::output_file::resolve_links;
use crate::server::run_as::RunAs;

/// Highest version whose access rights are restricted. The crate leaves out those that the kernel does not know.
const LANDLOCK_ABI: ABI = ABI::V7;

/// Files in /etc that name resolution reads.
pub(super) const NAME_FILES: [&str; 6] = ["hosts", "resolv.conf", "nsswitch.conf", "host.conf", "gai.conf", "services"];
/// Files that glibc, Rust's standard library and the server itself read, and the directories of libraries.
const SYSTEM_FILES: [&str; 15] = [
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/libexec",
    "/proc/self",
    "/proc/sys/vm/overcommit_memory",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
    "/dev/null",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
];
/// Configuration of Kerberos, with the parts that distributions include.
const KERBEROS_FILES: [&str; 7] = [
    "/etc/krb5.conf",
    "/etc/krb5.conf.d",
    "/etc/krb5.keytab",
    "/etc/gss",
    "/etc/crypto-policies",
    "/usr/share/crypto-policies",
    "/var/lib/sss/pubconf",
];
/// Variables with files of Kerberos.
const KERBEROS_VARIABLES: [&str; 5] =
    ["KRB5_CONFIG", "KRB5_KTNAME", "KRB5_CLIENT_KTNAME", "GSS_MECH_CONFIG", "S5_GSSAPI_LIBRARY"];
/// Directory of the replay cache of a server, unless a variable names another one.
const REPLAY_CACHE_DIR: &str = "/var/tmp";
/// Directories that hold secrets of other programs too.
const SHARED_DIRS: [&str; 2] = ["/", "/etc"];

/// Returns the rules for a server with these options. An error says why there are none.
pub(super) fn ruleset(options: &Options) -> Result<RulesetCreated, String> {
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK_ABI));
    let ruleset = ruleset.and_then(|ruleset| ruleset.scope(Scope::from_all(LANDLOCK_ABI)));
    let mut ruleset = ruleset.and_then(Ruleset::create).map_err(|error| error.to_string())?;
    for (path, access) in allowed(options) {
        // A path that does not exist needs no rule.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        let access = if metadata.is_dir() { access } else { access & AccessFs::from_file(LANDLOCK_ABI) };
        let Ok(fd) = PathFd::new(&path) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|error| error.to_string())?;
    }
    Ok(ruleset)
}

/// Restricts this thread. Returns the version of Landlock in the kernel.
pub(super) fn restrict(ruleset: RulesetCreated) -> Result<i32, String> {
    let RestrictionStatus { landlock, .. } = ruleset.restrict_self().map_err(|error| error.to_string())?;
    match landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => Ok(kernel_abi.unwrap_or(effective_abi as i32)),
        LandlockStatus::NotEnabled => Err("not enabled in this kernel (see the boot parameter lsm=)".into()),
        LandlockStatus::NotImplemented => Err("requires Linux 5.13".into()),
    }
}

fn allowed(options: &Options) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let write = make_bitflags!(AccessFs::{WriteFile | Truncate});
    let mut all = Vec::new();
    let etc_files = NAME_FILES.map(|name| Path::new("/etc").join(name));
    // A new /etc/resolv.conf is another file, and only a rule for the directory allows it. Root could read /etc/shadow
    // there.
    let is_root = options.run_as.as_ref().map_or(rustix::process::geteuid().is_root(), RunAs::is_root);
    if !is_root {
        all.push((PathBuf::from("/etc"), read));
    }
    // Most are links to a file in a directory of the program that replaces it.
    let linked = etc_files.iter().filter_map(|file| fs::canonicalize(file).ok()).filter_map(|file| dir_of(&file));
    all.extend(linked.filter(|dir| !is_shared(dir)).map(|dir| (dir, read)));
    all.extend(etc_files.into_iter().chain(SYSTEM_FILES.map(PathBuf::from)).map(|path| (path, read)));
    all.push(("/dev/null".into(), write));
    all.extend(options.reload_files.iter().flat_map(|file| readable_dirs(file)).map(|dir| (dir, read)));
    let sockets = options.listen.iter().chain(&options.metrics).filter_map(|listen| match listen {
        ListenAddr::Unix(path) => dir_of(path),
        _ => None,
    });
    // The files of the sockets are removed at the end.
    all.extend(sockets.map(|dir| (dir, AccessFs::RemoveFile.into())));
    if let Some(path) = &options.access_log {
        match (fs::canonicalize(path), fs::metadata(path)) {
            // A device or a pipe, which is not created again.
            (Ok(file), Ok(metadata)) if !metadata.is_file() => all.push((file, write)),
            // A pipe without a path, such as /dev/stdout. Landlock does not restrict it.
            (Err(_), Ok(_)) => {}
            // No rule can name a new file. After a rotation, it may replace a link.
            (_, _) => {
                let files = resolve_links(path).into_iter().chain([path.clone()]);
                let dirs = files.filter_map(|file| dir_of(&file));
                all.extend(dirs.map(|dir| (dir, write | AccessFs::MakeReg)));
            }
        }
    }
    if options.uses_kerberos() {
        all.extend(KERBEROS_FILES.map(|path| (path.into(), read)));
        all.extend(variables(&KERBEROS_VARIABLES).iter().filter_map(|file| dir_of(file)).map(|dir| (dir, read)));
    }
    if options.gssapi_acceptor.is_some() {
        let named = variables(&["KRB5RCACHENAME"]).iter().filter_map(|file| dir_of(file)).collect();
        let dirs = [named, variables(&["KRB5RCACHEDIR", "TMPDIR"]), vec![REPLAY_CACHE_DIR.into()]].concat();
        all.extend(dirs.into_iter().map(|dir| (dir, read | write | AccessFs::MakeReg)));
    }
    if options.uses_kerberos_tickets() {
        let default_cache = PathBuf::from(format!("/tmp/krb5cc_{}", rustix::process::geteuid().as_raw()));
        for cache in variables(&["KRB5CCNAME"]).into_iter().chain([default_cache]).filter(|cache| cache.exists()) {
            // kinit replaces the file, and the library adds tickets to it.
            all.extend(dir_of(&cache).map(|dir| (dir, read)));
            all.push((cache, write));
        }
    }
    all
}

/// Returns the directory of a file, and that of the file that it is a link to: a reload opens files by name.
fn readable_dirs(file: &Path) -> Vec<PathBuf> {
    let dirs: Vec<PathBuf> =
        fs::canonicalize(file).iter().map(PathBuf::as_path).chain([file]).filter_map(dir_of).collect();
    if let Some(dir) = dirs.iter().find(|dir| is_shared(dir)) {
        let (file, dir) = (file.display(), dir.display());
        log::warn!("sandbox: all of {dir} is readable, to reload {file} (move the file to its own directory)");
    }
    dirs
}

fn is_shared(dir: &Path) -> bool {
    SHARED_DIRS.iter().any(|shared| dir == Path::new(shared))
}

fn dir_of(file: &Path) -> Option<PathBuf> {
    let dir = file.parent()?;
    Some(if dir.as_os_str().is_empty() { ".".into() } else { dir.into() })
}

/// Returns the paths in these variables: `/a:/b`, or with a type, such as `FILE:/a`.
fn variables(names: &[&str]) -> Vec<PathBuf> {
    let values = names.iter().filter_map(|name| env::var(name).ok());
    values
        .flat_map(|value| value.split(':').filter(|path| path.starts_with('/')).map(PathBuf::from).collect::<Vec<_>>())
        .collect()
}
