//! `--via` and `--hop`: the upstream proxies, and the users and passwords for them.

use std::cell::OnceCell;
use std::path::Path;

use crate::client::{Proxy, check_credentials, parse_hops};
use crate::cmd::cli::exit::CliError;
use crate::cmd::netcat::credentials::{find_login, is_stream, read_environment, read_login_file};
use crate::proto::Credentials;

/// Name of the `--via` hop in the log.
const VIA_HOP_NAME: &str = "--via";

/// The hops and the source of their passwords.
#[derive(Debug, Default)]
pub(super) struct HopSources {
    /// The `--via` hop is the last.
    hops: Vec<HopOption>,
    login_file: Option<String>,
    /// The logins of a file that can be read only once, such as stdin.
    read_once: OnceCell<Vec<Credentials>>,
    /// Whether `--hop-auth` permits passwords.
    takes_passwords: bool,
}

#[derive(Debug)]
struct HopOption {
    name: String,
    proxies: Vec<Proxy>,
}

impl HopSources {
    /// Parses the values of `--hop`, `--via` and `--proxy-auth-file`.
    pub(super) fn new(
        hops: &[String],
        via: Option<&str>,
        login_file: Option<String>,
        takes_passwords: bool,
    ) -> Result<Self, CliError> {
        let mut sources = Self { login_file, takes_passwords, ..Self::default() };
        for text in hops {
            let (name, url) = text.split_once('=').ok_or_else(|| CliError::usage("--hop: expected NAME=URL"))?;
            // The name may be part of a URL with a password, so it is not printed.
            let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c));
            if !is_name || name == "direct" {
                let hint = "a name consists of letters, digits, \"-\", \"_\" and \".\", and is not \"direct\"";
                return Err(CliError::usage(format!("--hop: expected NAME=URL; {hint}")));
            }
            if sources.hops.iter().any(|hop| hop.name == name) {
                return Err(CliError::usage(format!("--hop: duplicate name {name:?}")));
            }
            let proxies = parse_hops(url).map_err(|error| CliError::usage(format!("--hop {name}: {error}")))?;
            sources.hops.push(HopOption { name: name.into(), proxies });
        }
        if let Some(url) = via {
            let proxies = parse_hops(url).map_err(|error| CliError::usage(format!("--via: {error}")))?;
            sources.hops.push(HopOption { name: VIA_HOP_NAME.into(), proxies });
        }
        if sources.login_file.is_some() && sources.hops.is_empty() {
            return Err(CliError::usage("--proxy-auth-file requires --via or --hop"));
        }
        Ok(sources)
    }

    /// Returns the names of the hops.
    pub(super) fn names(&self) -> Vec<String> {
        self.hops.iter().map(|hop| hop.name.clone()).collect()
    }

    /// Returns the file that is read again at each reload.
    pub(super) fn file(&self) -> Option<&Path> {
        self.login_file.as_deref().filter(|file| !is_stream(file)).map(Path::new)
    }

    /// Returns the proxies of each hop. Those without a password in the URL get one as in the client modes.
    ///
    /// # Errors
    /// The file is invalid, or a user has no password.
    pub(super) fn load(&self) -> Result<Vec<Vec<Proxy>>, CliError> {
        let logins = if self.hops.is_empty() || !self.takes_passwords { Vec::new() } else { self.read_logins()? };
        self.hops.iter().map(|hop| self.with_logins(hop, &logins)).collect()
    }

    fn read_logins(&self) -> Result<Vec<Credentials>, CliError> {
        let mut logins = match (&self.login_file, self.read_once.get()) {
            (_, Some(logins)) => logins.clone(),
            (Some(file), None) => read_login_file(file)?,
            (None, None) => Vec::new(),
        };
        if self.login_file.as_deref().is_some_and(is_stream) {
            let _ = self.read_once.set(logins.clone());
        }
        logins.extend(read_environment()?);
        Ok(logins)
    }

    fn with_logins(&self, hop: &HopOption, logins: &[Credentials]) -> Result<Vec<Proxy>, CliError> {
        let option = if hop.name == VIA_HOP_NAME { VIA_HOP_NAME.into() } else { format!("--hop {}", hop.name) };
        let mut proxies = hop.proxies.clone();
        for proxy in proxies.iter_mut().filter(|proxy| self.takes_passwords && proxy.credentials.is_none()) {
            let error = |problem: String| CliError::usage(format!("{option}: proxy {proxy}: {problem}"));
            let login = find_login(logins, proxy.uname.as_deref());
            if let (None, Some(uname)) = (login, &proxy.uname) {
                let user = String::from_utf8_lossy(uname);
                return Err(error(format!("no password for {user} (use --proxy-auth-file or S5_PROXY_AUTH)")));
            }
            login.map_or(Ok(()), check_credentials).map_err(error)?;
            proxy.credentials = login.cloned();
        }
        Ok(proxies)
    }
}
