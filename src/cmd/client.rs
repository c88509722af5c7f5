//! What the three client modes have in common: their options, and the client that comes of them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{Failure, hops};
use crate::client::{Auth, Client};
use crate::gssapi::Initiator;
use crate::proto::{Addr, Level, Method};

/// The argument struct of a client mode: the common options, and its own. argh can't share fields between structs.
macro_rules! client_args {
    ($(#[$attr:meta])* pub struct Args { $($own:tt)* }) => {
        $(#[$attr])*
        pub struct Args {
            /// the proxy: host:port, socks5h://user:pass@host:port or unix:/path; a comma list is a chain, nearest first
            #[argh(option, short = 'x', long = "proxy", arg_name = "url")]
            proxy: Option<String>,

            /// the methods that are offered to the proxy: none, password, gssapi (none, and what there is something to
            /// log in with)
            #[argh(option, arg_name = "method,…", from_str_fn($crate::cmd::client::methods))]
            auth: Option<Vec<$crate::proto::Method>>,

            /// the proxy's Kerberos service: a name, or a principal such as rcmd/host@REALM (rcmd)
            #[argh(option, arg_name = "name")]
            gssapi_service: Option<String>,

            /// the proxy's name as Kerberos knows it (the one it is reached by)
            #[argh(option, arg_name = "host")]
            gssapi_host: Option<String>,

            /// what is asked for with gssapi: none, integrity or confidentiality (confidentiality)
            #[argh(option, arg_name = "level", from_str_fn($crate::policy::rules::level))]
            gssapi_protection: Option<$crate::proto::Level>,

            /// the least that is taken (integrity)
            #[argh(option, arg_name = "level", from_str_fn($crate::policy::rules::level))]
            gssapi_min: Option<$crate::proto::Level>,

            /// say the level as NEC's servers want it
            #[argh(switch)]
            gssapi_nec: bool,

            /// where the Kerberos tickets are (what the environment or the system says)
            #[argh(option, arg_name = "file")]
            ccache: Option<std::path::PathBuf>,

            /// say on stderr what happens
            #[argh(switch, short = 'v')]
            verbose: bool,

            $($own)*
        }

        impl Args {
            fn client(
                &mut self,
                dst: $crate::proto::Addr,
                wait: std::time::Duration,
            ) -> Result<$crate::client::Client, $crate::cmd::Failure> {
                $crate::cmd::client::Common {
                    proxy: self.proxy.take(),
                    auth: self.auth.take(),
                    service: self.gssapi_service.take(),
                    host: self.gssapi_host.take(),
                    protection: self.gssapi_protection,
                    min: self.gssapi_min,
                    nec: self.gssapi_nec,
                    ccache: self.ccache.take(),
                }
                .client(dst, wait)
            }
        }
    };
}
pub(super) use client_args;

/// The common options.
pub(super) struct Common {
    pub(super) proxy: Option<String>,
    pub(super) auth: Option<Vec<Method>>,
    pub(super) service: Option<String>,
    pub(super) host: Option<String>,
    pub(super) protection: Option<Level>,
    pub(super) min: Option<Level>,
    pub(super) nec: bool,
    pub(super) ccache: Option<PathBuf>,
}

impl Common {
    pub(super) fn client(self, dst: Addr, wait: Duration) -> Result<Client, Failure> {
        let hops = hops(self.proxy.as_deref())?;
        let is_named = self.ccache.is_some() || self.service.is_some() || self.host.is_some();
        let is_demanded = self.protection.is_some() || self.min.is_some() || self.nec;
        let methods = match self.auth {
            Some(methods) if (is_named || is_demanded) && !methods.contains(&Method::GSSAPI) => {
                return Err(Failure::usage("--gssapi-* and --ccache are of no use without gssapi in --auth"));
            }
            // Who wants protection does not want to be talked out of it.
            None if is_demanded => Some(vec![Method::GSSAPI]),
            methods => methods,
        };
        let is_offered = match &methods {
            Some(methods) => methods.contains(&Method::GSSAPI),
            None => is_named || Initiator::may_have_tickets(),
        };
        let is_one_host = self.host.is_some() || self.service.as_ref().is_some_and(|name| name.contains(['/', '@']));
        if hops.len() > 1 && is_one_host {
            return Err(Failure::usage(
                "--gssapi-host, or a principal as --gssapi-service, is of one proxy, not of a chain",
            ));
        }
        let default = Initiator::default();
        let wanted = self.protection.unwrap_or(default.wanted);
        // What NEC's servers say of the level can be changed on the way.
        let usual = if self.nec { wanted } else { default.least.min(wanted) };
        let least = self.min.unwrap_or(usual);
        if least > wanted {
            return Err(Failure::usage(format!("--gssapi-min {least} is more than --gssapi-protection {wanted}")));
        }
        let gssapi = Initiator {
            ccache: self.ccache,
            service: self.service.unwrap_or(default.service.clone()),
            host: self.host,
            wanted,
            least,
            nec: self.nec,
            ..default
        };
        let auth = Auth { methods, gssapi: is_offered.then_some(gssapi) };
        Ok(Client::new(hops, dst, Some(wait)).with_auth(Arc::new(auth)))
    }
}

/// A comma list of methods.
pub(super) fn methods(text: &str) -> Result<Vec<Method>, String> {
    some_of(text, &[Method::NONE, Method::PASSWORD, Method::GSSAPI])
}

/// A comma list of levels.
pub(super) fn levels(text: &str) -> Result<Vec<Level>, String> {
    some_of(text, &Level::ALL)
}

/// A comma list of some of `all`, each once.
fn some_of<T: Copy + PartialEq + ToString>(text: &str, all: &[T]) -> Result<Vec<T>, String> {
    let mut found = Vec::new();
    for word in text.split(',') {
        match all.iter().find(|known| known.to_string() == word) {
            Some(known) if !found.contains(known) => found.push(*known),
            _ => {
                let all: Vec<String> = all.iter().map(ToString::to_string).collect();
                return Err(format!("{word:?}: write some of {}, with commas, each once", all.join(", ")));
            }
        }
    }
    Ok(found)
}
