//! `--via` and `--hop`: the upstream proxies, and the users and passwords for them.

use std::cell::OnceCell;
use std::path::Path;

use crate::client::{Proxy, parse_hops};
use crate::cmd::cli::exit::{CliError, CliResult};
use crate::cmd::netcat::credentials::{assign_logins, is_stream, read_environment, read_login_file};
use crate::proto::Credentials;
use crate::server::{Chains, is_successor};

/// Name of the `--via` hop in the log.
const VIA_HOP_NAME: &str = "--via";

#[derive(Debug, Default)]
pub(super) struct HopSources {
    /// Names and proxies. The `--via` hop is the last.
    hops: Vec<(String, Chains)>,
    login_file: Option<String>,
    /// The logins of a file that can be read only once, such as stdin.
    read_once: OnceCell<Vec<Credentials>>,
    takes_passwords: bool,
}

impl HopSources {
    pub(super) fn new(
        hops: &[String],
        via: Option<&str>,
        login_file: Option<String>,
        takes_passwords: bool,
    ) -> CliResult<Self> {
        let mut sources = Self { login_file, takes_passwords, ..Self::default() };
        for text in hops {
            let (name, url) = text.split_once('=').ok_or_else(|| CliError::usage("--hop: expected NAME=URL"))?;
            // The name may be part of a URL with a password, so it is not printed.
            let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c));
            let problem = "--hop: expected NAME=URL; NAME has letters, digits, -, _ and ., and is not \"direct\"";
            CliError::usage_if(!is_name || name == "direct", problem)?;
            let is_duplicate = sources.hops.iter().any(|(other, _)| other == name);
            CliError::usage_if(is_duplicate, format!("--hop: duplicate name {name:?}"))?;
            sources.add(name, url)?;
        }
        via.map_or(Ok(()), |url| sources.add(VIA_HOP_NAME, url))?;
        let is_lost = is_successor() && sources.login_file.as_deref().is_some_and(is_stream);
        CliError::usage_if(is_lost, "--proxy-auth-file: a restart cannot read stdin or a descriptor (use a file)")?;
        Ok(sources)
    }

    fn add(&mut self, name: &str, url: &str) -> CliResult {
        let chains = url.split('|').map(parse_hops).collect::<Result<_, _>>();
        self.hops.push((name.into(), chains.map_err(|error| CliError::usage(format!("{}: {error}", option(name))))?));
        Ok(())
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.hops.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Returns an error if a proxy gets the login of the client, and `is_possible` is not set.
    pub(super) fn check_forwarding(&self, is_possible: bool) -> CliResult {
        let is_used = |chains: &Chains| chains.iter().flatten().any(|proxy| proxy.forwards_login);
        let hop = self.hops.iter().find(|(_, chains)| !is_possible && is_used(chains));
        let problem = "?user=client requires passwords of clients (use --users FILE), and password in --hop-auth";
        hop.map_or(Ok(()), |(name, _)| Err(CliError::usage(format!("{}: {problem}", option(name)))))
    }

    /// Returns the file that is read again at each reload.
    pub(super) fn file(&self) -> Option<&Path> {
        self.login_file.as_deref().filter(|file| !is_stream(file)).map(Path::new)
    }

    /// Returns the proxies of each hop. Those without a password in the URL get one as in the client modes.
    ///
    /// # Errors
    /// The file is invalid, or a user has no password.
    pub(super) fn load(&self) -> CliResult<Vec<Chains>> {
        let mut hops = self.hops.clone();
        if self.takes_passwords && !hops.is_empty() {
            let logins = self.read_logins()?;
            for (name, chains) in &mut hops {
                let named =
                    |error: CliError| CliError { message: format!("{}: {}", option(name), error.message), ..error };
                let mut chains = chains.iter_mut();
                chains.try_for_each(|chain| assign_logins(chain, &logins, None, no_password)).map_err(named)?;
            }
        }
        Ok(hops.into_iter().map(|(_, chains)| chains).collect())
    }

    fn read_logins(&self) -> CliResult<Vec<Credentials>> {
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
}

/// Returns the option that defines a hop, for messages.
fn option(name: &str) -> String {
    if name == VIA_HOP_NAME { name.into() } else { format!("--hop {name}") }
}

fn no_password(proxy: &Proxy, uname: &[u8]) -> CliResult<Vec<u8>> {
    let user = String::from_utf8_lossy(uname);
    Err(CliError::usage(format!("proxy {proxy}: no password for {user} (use --proxy-auth-file or S5_PROXY_AUTH)")))
}
