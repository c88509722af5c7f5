//! The options of the three client modes, which share most of them. An option that a mode does not support is not in its
//! help and is refused with a reason.

pub(super) mod child;
pub(super) mod connector;
pub(super) mod credentials;
pub(super) mod descriptor;
pub(super) mod forward;
pub(super) mod proxies;
pub(super) mod report;
pub(super) mod stdio;
pub(super) mod tunnel;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, CommandInfoWithArgs, FlagInfo, FlagInfoKind, FromArgs, PositionalInfo};

use super::secrets::without_userinfo;
use super::udp::MAX_PEERS;
use super::{CliError, parse_duration, parse_positive, parse_timeout};
use crate::client::{self as socks};
use crate::policy::rules::parse_level;
use crate::proto::{Addr, Method, ProtectionLevel};

/// A client mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientMode {
    /// `s5 connect`
    Connect,
    /// `s5 bind`
    Bind,
    /// `s5 udp`
    Udp,
}

const STREAM_MODES: &[ClientMode] = &[ClientMode::Connect, ClientMode::Bind];

/// Options that only some modes support, those modes, and the reason that the other modes refuse them with.
const RESTRICTED_OPTIONS: [(&[&str], &[ClientMode], &str); 10] = [
    (&["-l", "--listen"], &[ClientMode::Connect, ClientMode::Udp], "with bind, the proxy listens"),
    (&["-k", "--keep-open"], &[ClientMode::Connect], "only connect -l uses it; udp -l always serves several peers"),
    (&["--direct", "--no-proxy"], &[ClientMode::Connect, ClientMode::Udp], "bind requires a proxy"),
    (&["--bound-to"], &[ClientMode::Bind], "only bind uses it"),
    (&["-N", "--shutdown", "--no-shutdown"], STREAM_MODES, "datagrams have no end of stream"),
    (&["-C", "--crlf"], STREAM_MODES, "line ends are not part of a datagram"),
    (&["-F", "--pass-fd"], STREAM_MODES, "a UDP association ends with its TCP connection, which s5 must keep open"),
    (&["-e", "--exec", "-c", "--sh-exec"], STREAM_MODES, "a program needs a stream, not datagrams"),
    (&["--progress"], STREAM_MODES, "it shows the progress of a stream, not of datagrams"),
    (&["-n", "--count", "--raw", "--hex", "--length-prefixed", "--max-peers"], &[ClientMode::Udp], "only udp uses it"),
];

/// Returns the reason that `mode` refuses `option` with, if another mode supports it.
pub(super) fn unsupported_reason(mode: &str, option: &str) -> Option<&'static str> {
    [ClientMode::Connect, ClientMode::Bind, ClientMode::Udp]
        .into_iter()
        .find(|known| known.name() == mode)?
        .unsupported_reason(option)
}

impl ClientMode {
    fn unsupported_reason(self, option: &str) -> Option<&'static str> {
        let row = RESTRICTED_OPTIONS.iter().find(|(options, ..)| options.contains(&option))?;
        (!row.1.contains(&self)).then_some(row.2)
    }
}

/// The options of the client modes.
#[derive(FromArgs, ArgsInfo, Debug)]
pub struct Args {
    /// the proxy: host:port, socks5h://user:pass@host:port or unix:/path; with commas, or repeated, a chain, nearest
    /// first; '' for none
    #[argh(option, short = 'x', arg_name = "url")]
    pub(super) proxy: Vec<String>,

    /// the protocol of the proxy, as nc and ncat name it: 5 or socks5, since there is no other
    #[argh(option, short = 'X', arg_name = "5", from_str_fn(parse_proxy_type))]
    #[allow(dead_code, reason = "it is taken, and there is nothing to choose")]
    pub(super) proxy_type: Option<()>,

    /// use no proxy (also --no-proxy)
    #[argh(switch)]
    pub(super) direct: bool,

    /// the user name for proxies whose URL has none; with :password, which others may see
    #[argh(option, short = 'P', arg_name = "user")]
    pub(super) proxy_user: Option<String>,

    /// where the password is: a line user:password for each user of FILE; or the first line of stdin (-) or of a
    /// descriptor (fd:N)
    #[argh(option, arg_name = "file")]
    pub(super) proxy_auth_file: Option<String>,

    /// the methods that are offered to the proxy: none, password, gssapi (none, and what there is something to log in
    /// with)
    #[argh(option, arg_name = "method,…", from_str_fn(parse_methods))]
    pub(super) auth: Option<Vec<Method>>,

    /// the proxy's Kerberos service: a name, or a principal such as rcmd/host@REALM (rcmd)
    #[argh(option, arg_name = "name")]
    pub(super) gssapi_service: Option<String>,

    /// the proxy's name as Kerberos knows it (the one it is reached by)
    #[argh(option, arg_name = "host")]
    pub(super) gssapi_host: Option<String>,

    /// what is asked for with gssapi: none, integrity or confidentiality (confidentiality)
    #[argh(option, arg_name = "level", from_str_fn(parse_level))]
    pub(super) gssapi_protection: Option<ProtectionLevel>,

    /// the least that is taken (integrity)
    #[argh(option, arg_name = "level", from_str_fn(parse_level))]
    pub(super) gssapi_min: Option<ProtectionLevel>,

    /// say the level as NEC's servers want it
    #[argh(switch)]
    pub(super) gssapi_nec: bool,

    /// where the Kerberos tickets are (what the environment or the system says)
    #[argh(option, arg_name = "file")]
    pub(super) ccache: Option<PathBuf>,

    /// who looks up the target's name: remote, which is the last proxy, or local (remote)
    #[argh(option, short = 'R', arg_name = "side", from_str_fn(parse_dns_side), default = "false")]
    pub(super) proxy_dns: bool,

    /// use IPv4 alone
    #[argh(switch, short = '4')]
    pub(super) ipv4: bool,

    /// use IPv6 alone
    #[argh(switch, short = '6')]
    pub(super) ipv6: bool,

    /// the address of this machine to come from
    #[argh(option, short = 's', arg_name = "ip")]
    pub(super) source: Option<IpAddr>,

    /// the port to come from
    #[argh(option, short = 'p', arg_name = "port", from_str_fn(parse_source_port))]
    pub(super) source_port: Option<u16>,

    /// how long it may take until the target has accepted or, with bind, the peer has come: seconds, or with ms, s, m, h
    /// (60; for bind's peer, what the proxy allows). With udp, to associate (60) and then, behind the end of stdin, to
    /// wait for answers (2)
    #[argh(option, short = 'w', arg_name = "time", from_str_fn(parse_duration))]
    pub(super) timeout: Option<Duration>,

    /// try again for so long, unless it would fail the same way again
    #[argh(option, arg_name = "time", from_str_fn(parse_duration))]
    pub(super) wait: Option<Duration>,

    /// end, with status 28, after so long without an octet either way; with udp -l, end a peer's association (60)
    #[argh(option, short = 'i', arg_name = "time", from_str_fn(parse_timeout))]
    pub(super) idle_timeout: Option<Duration>,

    /// only establish what was asked for, quietly: the exit status is the answer. Without a target, ask the proxy for
    /// nothing but to let us in
    #[argh(switch, short = 'z')]
    pub(super) zero_io: bool,

    /// read nothing from stdin
    #[argh(switch, short = 'd')]
    pub(super) recv_only: bool,

    /// write nothing to stdout, and end 5 s behind stdin at the latest
    #[argh(switch)]
    pub(super) send_only: bool,

    /// end so long after stdin, whatever is still to come (never)
    #[argh(option, short = 'q', arg_name = "time", from_str_fn(parse_duration))]
    pub(super) quit_after: Option<Duration>,

    /// pass on the end of stdin, which is done anyway
    #[argh(switch, short = 'N')]
    #[allow(dead_code, reason = "it is taken, and is what happens anyway")]
    pub(super) shutdown: bool,

    /// do not pass on the end of stdin
    #[argh(switch)]
    pub(super) no_shutdown: bool,

    /// send the ends of lines as CR LF
    #[argh(switch, short = 'C')]
    pub(super) crlf: bool,

    /// hand the connected socket over stdout and end, for ssh's ProxyUseFdpass
    #[argh(switch, short = 'F')]
    pub(super) pass_fd: bool,

    /// run a program, with arguments after blanks, with the tunnel as its stdin and stdout
    #[argh(option, short = 'e', arg_name = "program")]
    pub(super) exec: Option<String>,

    /// the same with a command for the shell
    #[argh(option, short = 'c', arg_name = "command")]
    pub(super) sh_exec: Option<String>,

    /// listen here, on 127.0.0.1 unless told otherwise, and give what comes its own way to the target
    #[argh(option, short = 'l', arg_name = "[addr:]port")]
    pub(super) listen: Option<String>,

    /// with -l, serve any number of connections, and not just one
    #[argh(switch, short = 'k')]
    pub(super) keep_open: bool,

    /// write the address that is bound, and nothing else, to a file or a descriptor (fd:N)
    #[argh(option, arg_name = "file")]
    pub(super) bound_to: Option<String>,

    /// end after so many answers; fewer in their time are a failure
    #[argh(option, short = 'n', arg_name = "n")]
    pub(super) count: Option<u64>,

    /// take what one read gives as a datagram, and write answers as they are
    #[argh(switch)]
    pub(super) raw: bool,

    /// take each line as the hexadecimal digits of a datagram, and write answers so
    #[argh(switch)]
    pub(super) hex: bool,

    /// two octets before each datagram, and each answer, are its length, the higher one first
    #[argh(switch)]
    pub(super) length_prefixed: bool,

    /// with -l, how many peers may have an association at once (256)
    #[argh(option, arg_name = "n", from_str_fn(parse_positive), default = "MAX_PEERS")]
    pub(super) max_peers: usize,

    /// say on stderr what happens; twice, also in the handshake
    #[argh(switch, short = 'v')]
    pub(super) verbose: u8,

    /// say nothing on stderr, not even what went wrong
    #[argh(switch)]
    pub(super) quiet: bool,

    /// say at the end what happened as a JSON object, one line on stderr
    #[argh(switch)]
    pub(super) json: bool,

    /// show octets, rate and time on stderr, when that is a terminal
    #[argh(switch)]
    pub(super) progress: bool,

    /// host:port, or host and port
    #[argh(positional)]
    pub(super) target: Vec<String>,
}

fn parse_proxy_type(text: &str) -> Result<(), String> {
    match text {
        "5" | "socks5" | "socks5h" => Ok(()),
        _ => Err("only SOCKS5 is supported".into()),
    }
}

fn parse_dns_side(text: &str) -> Result<bool, String> {
    match text {
        "remote" => Ok(false),
        "local" => Ok(true),
        _ => Err("expected local or remote".into()),
    }
}

fn parse_source_port(text: &str) -> Result<u16, String> {
    socks::parse_port(text).and_then(|port| if port == 0 { Err("must not be 0".into()) } else { Ok(port) })
}

/// Parses a comma-separated list of methods.
pub(super) fn parse_methods(text: &str) -> Result<Vec<Method>, String> {
    parse_subset(text, &[Method::NONE, Method::PASSWORD, Method::GSSAPI])
}

/// Parses a comma-separated list of protection levels.
pub(super) fn parse_levels(text: &str) -> Result<Vec<ProtectionLevel>, String> {
    parse_subset(text, &ProtectionLevel::ALL)
}

/// Parses a comma-separated list of members of `all`, each at most once.
fn parse_subset<T: Copy + PartialEq + ToString>(text: &str, all: &[T]) -> Result<Vec<T>, String> {
    let mut found = Vec::new();
    for word in text.split(',') {
        match all.iter().find(|known| known.to_string() == word) {
            Some(known) if !found.contains(known) => found.push(*known),
            _ => {
                let all: Vec<String> = all.iter().map(ToString::to_string).collect();
                return Err(format!(
                    "{word:?}: expected a comma-separated list of {}, each at most once",
                    all.join(", ")
                ));
            }
        }
    }
    Ok(found)
}

impl ClientMode {
    /// The name of the mode on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Bind => "bind",
            Self::Udp => "udp",
        }
    }

    /// Returns what help and manual print: the options that the mode supports.
    pub(super) fn info(
        self,
        description: &'static str,
        examples: &'static [&'static str],
        positional: &'static [PositionalInfo<'static>],
    ) -> CommandInfoWithArgs {
        let all = Args::get_args_info();
        let takes = |flag: &&FlagInfo<'static>| self.unsupported_reason(flag.long).is_none();
        let flags: Vec<FlagInfo<'static>> = all.flags.iter().filter(takes).map(copy_flag).collect();
        let notes = &[PROXY_NOTE];
        // Called once or twice in a process.
        let flags = Box::leak(flags.into_boxed_slice());
        CommandInfoWithArgs {
            name: self.name(),
            description,
            examples,
            flags,
            notes,
            positionals: positional,
            ..CommandInfoWithArgs::default()
        }
    }
}

/// What all modes say of the proxy.
const PROXY_NOTE: &str = "The proxy is --proxy, else S5_PROXY, all_proxy, ALL_PROXY, SOCKS5_SERVER or SOCKS_SERVER, unless no_proxy \
                    or NO_PROXY names the target; else 127.0.0.1:1080.\n\n\
                    User and password are those of the URL, else of --proxy-user, --proxy-auth-file, S5_PROXY_AUTH or \
                    NCAT_PROXY_AUTH (user:password), SOCKS5_USER and SOCKS5_PASSWORD, SOCKS_USERNAME and SOCKS_PASSWORD. \
                    For a user without a password SSH_ASKPASS is run, or the terminal asked, where that is not also \
                    stdin.";

/// Copies what the help prints of an option, since argh's type is not `Clone`.
fn copy_flag(flag: &FlagInfo<'static>) -> FlagInfo<'static> {
    let kind = match flag.kind {
        FlagInfoKind::Switch => FlagInfoKind::Switch,
        FlagInfoKind::Option { arg_name } => FlagInfoKind::Option { arg_name },
    };
    let FlagInfo { long, short, description, hidden, .. } = *flag;
    FlagInfo { kind, long, short, description, hidden, ..FlagInfo::default() }
}

/// Defines a client mode for argh: the shared options under the mode's name.
macro_rules! client_mode {
    ($mode:ident, $name:literal, $description:literal, $example:expr, [$($positional:ident $what:literal)?]) => {
        #[doc = $description]
        #[derive(Debug)]
        pub struct Args(pub(super) crate::cmd::client::Args);

        impl argh::FromArgs for Args {
            fn from_args(name: &[&str], args: &[&str]) -> Result<Self, argh::EarlyExit> {
                argh::FromArgs::from_args(name, args).map(Self)
            }
        }

        impl argh::SubCommand for Args {
            const COMMAND: &'static argh::CommandInfo =
                &argh::CommandInfo { name: $name, short: &'\0', description: $description };
        }

        impl argh::ArgsInfo for Args {
            fn get_args_info() -> argh::CommandInfoWithArgs {
                crate::cmd::client::ClientMode::$mode.info($description, &[$example], &[$(argh::PositionalInfo {
                    name: stringify!($positional),
                    description: $what,
                    optionality: argh::Optionality::Optional,
                    hidden: false,
                })?])
            }
        }
    };
}
pub(super) use client_mode;

/// Parses a target given as `host:port` or as `host port`.
pub(super) fn parse_target(words: &[String]) -> Result<Addr, CliError> {
    let parsed = match words {
        [both] => socks::parse_addr(both, None),
        [host, port] => socks::parse_host(host).and_then(|host| Ok(Addr { host, port: socks::parse_port(port)? })),
        _ => Err("expected host:port, or host and port".into()),
    };
    match parsed {
        Ok(addr) if addr.port == 0 => Err(CliError::usage("target: the port must not be 0")),
        // The target may be a proxy's URL with a password, given without -x.
        parsed => parsed.map_err(|error| CliError::usage(format!("target: {}", without_userinfo(&error)))),
    }
}
