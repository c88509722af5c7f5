//! Credentials for each proxy: from the command line, a file and the environment, in this order. If a user name has no
//! password, s5 runs an askpass program or prompts the user.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::process::{Command, Stdio};

use super::descriptor;
use super::options::ClientArgs;
use super::proxies::env_var;
use crate::client::{Proxy, check_credentials};
use crate::cmd::cli::argv::with_typed_names;
use crate::cmd::cli::exit::{CliError, CliResult, ExitStatus, eprint_line, escape};
use crate::cmd::cli::{secrets, text_file};
use crate::proto::{Credentials, MAX_CREDENTIAL_LEN, Method};

const MAX_FILE_SIZE: u64 = 1 << 20;

/// Adds credentials to hops whose URL has no password.
///
/// A hop whose URL has a user name gets the password of that user. Other hops get the first user name and password.
pub(super) fn add_credentials(hops: &mut [Proxy], args: &ClientArgs) -> CliResult {
    let forwards_login = hops.iter().any(|hop| hop.forwards_login);
    CliError::usage_if(forwards_login, "?user=client in the URL of a proxy is only for s5 serve")?;
    let option = args.proxy_user.as_deref();
    let has_no_name = option.is_some_and(|user| user.is_empty() || user.starts_with(':'));
    CliError::usage_if(has_no_name, "--proxy-user: the user name is empty")?;
    let login = option.and_then(|user| parse_login(user.as_bytes()));
    if login.is_some() && !args.quiet && !args.prints_only_json() {
        let warning = "s5: --proxy-user: other users may see the password (use --proxy-auth-file or S5_PROXY_AUTH)";
        eprint_line(&with_typed_names(warning));
    }
    let user = option.filter(|_| login.is_none()).map(str::as_bytes);
    let mut logins: Vec<Credentials> = login.into_iter().collect();
    if let Some(file) = &args.proxy_auth_file {
        logins.extend(read_login_file(file)?);
    }
    // This check follows the read, so that a line from stdin or a descriptor never reaches the tunnel.
    if args.auth.as_ref().is_some_and(|methods| !methods.contains(&Method::PASSWORD)) {
        return Ok(());
    }
    logins.extend(read_environment()?);
    assign_logins(hops, &logins, user, |hop, uname| prompt_password(hop, uname, args))
}

/// Gives each hop without a password the first login of its user, or of `user`, or the first one of all.
/// `missing_password` returns the password of a user who has none.
pub(crate) fn assign_logins(
    hops: &mut [Proxy],
    logins: &[Credentials],
    user: Option<&[u8]>,
    missing_password: impl Fn(&Proxy, &[u8]) -> CliResult<Vec<u8>>,
) -> CliResult {
    for hop in hops.iter_mut().filter(|hop| hop.credentials.is_none() && !hop.forwards_login) {
        let uname = hop.uname.as_deref().or(user);
        let found = logins.iter().find(|login| uname.is_none_or(|uname| uname == login.uname));
        let login = match (found, uname) {
            (Some(login), _) => login.clone(),
            (None, Some(uname)) => Credentials { uname: uname.into(), passwd: missing_password(hop, uname)? },
            (None, None) => continue,
        };
        check_credentials(&login).map_err(|error| CliError::usage(format!("proxy {hop}: {error}")))?;
        hop.credentials = Some(login);
    }
    Ok(())
}

/// Reads the file of `--proxy-auth-file`.
pub(crate) fn read_login_file(file: &str) -> CliResult<Vec<Credentials>> {
    read_file(file).map_err(|error| {
        let is_missing = error.kind() == io::ErrorKind::NotFound;
        let remedy = if is_missing { " (create it with one user:password per line)" } else { "" };
        CliError::new(ExitStatus::USAGE, format!("{}: {error}{remedy}", auth_file_label(file)))
    })
}

/// Returns true if the file of `--proxy-auth-file` is stdin or a descriptor, which can be read only once.
pub(crate) fn is_stream(file: &str) -> bool {
    file == "-" || descriptor::fd_number(file).is_some()
}

/// Returns the option with its value. The value may be a password, given by mistake: then it is not shown.
fn auth_file_label(file: &str) -> String {
    let shown = if file.contains(':') && descriptor::fd_number(file).is_none() { "…" } else { file };
    format!("--proxy-auth-file {shown}")
}

/// Reads all lines of a file, but only the first line of stdin or a descriptor: later data may belong to the tunnel.
fn read_file(name: &str) -> io::Result<Vec<Credentials>> {
    let mut text = Vec::new();
    match (name, descriptor::fd_number(name)) {
        ("-", _) => read_first_line(File::from(io::stdin().as_fd().try_clone_to_owned()?), &mut text)?,
        (_, Some(number)) => read_first_line(descriptor::take_fd(number)?, &mut text)?,
        (path, None) => text = text_file::read(File::open(path)?, MAX_FILE_SIZE)?,
    }
    text_file::skip_bom(&mut text);
    let lines = text.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut logins = Vec::new();
    let is_ignored = |line: &[u8]| line.is_empty() || line.starts_with(b"#");
    for (i, line) in lines.enumerate().filter(|(_, line)| !is_ignored(line.trim_ascii())) {
        let malformed = || io::Error::other(format!("line {}: expected user:password", i + 1));
        logins.push(parse_login(line).ok_or_else(malformed)?);
    }
    if logins.is_empty() { Err(io::Error::other("no user:password found")) } else { Ok(logins) }
}

/// Reads a line byte by byte, so that nothing after it is consumed.
fn read_first_line(mut file: impl Read, line: &mut Vec<u8>) -> io::Result<()> {
    let mut byte = [0];
    // The longest login has a byte order mark, a colon and a carriage return. One more byte shows a longer line.
    while line.len() <= 2 * MAX_CREDENTIAL_LEN + 5 && file.read(&mut byte)? == 1 && byte != *b"\n" {
        line.extend(byte);
    }
    Ok(())
}

/// Returns the logins of the environment, in the order of precedence.
pub(crate) fn read_environment() -> CliResult<Vec<Credentials>> {
    // As bytes: a password need not be UTF-8.
    let variable = |name: &str| env::var_os(name).map(OsString::into_vec).filter(|value| !value.is_empty());
    let mut logins = Vec::new();
    for name in ["S5_PROXY_AUTH", "NCAT_PROXY_AUTH"] {
        if let Some(pair) = variable(name) {
            logins.push(parse_login(&pair).ok_or_else(|| CliError::usage(format!("{name}: expected user:password")))?);
        }
    }
    for (user, passwords) in
        [("SOCKS5_USER", &["SOCKS5_PASSWORD", "SOCKS5_PASSWD"][..]), ("SOCKS_USERNAME", &["SOCKS_PASSWORD"])]
    {
        // An empty password counts if no other is set: the user name may be a token.
        let has_empty = || passwords.iter().any(|name| env::var_os(name).is_some()).then(Vec::new);
        let passwd = passwords.iter().copied().find_map(variable).or_else(has_empty);
        logins.extend(variable(user).zip(passwd).map(|(uname, passwd)| Credentials { uname, passwd }));
    }
    Ok(logins)
}

/// Splits `user:password` at the first colon.
fn parse_login(pair: &[u8]) -> Option<Credentials> {
    let colon = pair.iter().position(|byte| *byte == b':')?;
    let (uname, passwd) = pair.split_at(colon);
    Some(Credentials { uname: uname.into(), passwd: passwd.get(1..)?.into() })
}

/// Returns the password from the askpass program or the user. Fails if neither is available, and in CI.
fn prompt_password(hop: &Proxy, uname: &[u8], args: &ClientArgs) -> CliResult<Vec<u8>> {
    let user = String::from_utf8_lossy(uname);
    let login_error =
        |problem: String| CliError::new(ExitStatus::LOGIN_FAILED, format!("proxy {hop}: login: {problem}"));
    if env_var("CI").is_none_or(|ci| ci == "false") {
        let prompt = escape(&format!("Password for {user} at {hop}: "));
        if let Some(program) = askpass_program() {
            return run_askpass(&program, &prompt).map_err(|error| login_error(format!("{program}: {error}")));
        }
        let has_program = args.exec.is_some() || args.sh_exec.is_some();
        let is_stdin_unused = args.zero_io || args.recv_only || args.pass_fd || args.listen.is_some() || has_program;
        // If stdin is the terminal, its input belongs to the tunnel.
        if (is_stdin_unused || !io::stdin().is_terminal())
            && let Ok(passwd) = secrets::prompt_password(&prompt)
        {
            return Ok(passwd.into_bytes());
        }
    }
    Err(login_error(match &args.proxy_auth_file {
        Some(file) => format!("{}: no password for {user}", auth_file_label(file)),
        None => format!("no password for {user} (use --proxy-auth-file or S5_PROXY_AUTH)"),
    }))
}

/// Returns the program to ask for passwords, by the rules of ssh(1) for SSH_ASKPASS.
fn askpass_program() -> Option<String> {
    let program = env_var("SSH_ASKPASS")?;
    let is_enabled = match env_var("SSH_ASKPASS_REQUIRE").as_deref() {
        Some("never") => false,
        Some("force" | "prefer") => true,
        _ => env_var("DISPLAY").or(env_var("WAYLAND_DISPLAY")).is_some(),
    };
    is_enabled.then_some(program)
}

fn run_askpass(program: &str, prompt: &str) -> io::Result<Vec<u8>> {
    let output = Command::new(program).arg(prompt).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(output.status.to_string()));
    }
    match output.stdout.split(|byte| *byte == b'\n').next().unwrap_or_default() {
        b"" => Err(io::Error::other("the program printed no password")),
        line => Ok(line.strip_suffix(b"\r").unwrap_or(line).to_vec()),
    }
}
