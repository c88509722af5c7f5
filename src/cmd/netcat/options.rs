//! The options that the client modes share. A mode omits unsupported ones from its help and refuses them with a reason.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use crate::cmd::cli::syntax::{OPTIONAL_VALUE, Syntax};
use crate::net::DialError;
use crate::proto::{Addr, Host, HostName, Method, ProtectionLevel};
use crate::server::ListenAddr;
use crate::values::{
    parse_choice, parse_duration, parse_nonzero, parse_positive, parse_set, parse_timeout, parse_udp_relay,
};

/// Default of `--max-peers`: local peers of `udp -l` that have an association at the same time.
const DEFAULT_MAX_PEERS: usize = 256;

const STREAM: &[&str] = &["connect", "bind"];
const LISTEN: &[&str] = &["connect", "udp"];

/// Options that only some modes support, these modes, and the reason that the other modes report.
const RESTRICTED_OPTIONS: [(&[&str], &[&str], &str); 10] = [
    (&["--listen"], LISTEN, "with bind, the proxy listens"),
    (&["--keep-open"], &["connect"], "only connect -l uses it; udp -l always serves several peers"),
    (&["--direct"], LISTEN, "bind requires a proxy"),
    (&["--address-file"], &["bind"], "only bind uses it"),
    (&["--no-shutdown", "--linger"], STREAM, "datagrams have no end of stream"),
    (&["--crlf"], STREAM, "line ends are not part of a datagram"),
    (&["--pass-fd"], STREAM, "a UDP association ends with its TCP connection, which s5 must keep open"),
    (&["--exec", "--sh-exec"], STREAM, "a program needs a stream, not datagrams"),
    (&["--progress"], STREAM, "it shows the progress of a stream, not of datagrams"),
    (&["--count", "--raw", "--hex", "--length-prefixed", "--max-peers", "--udp-relay"], &["udp"], "only udp uses it"),
];

pub(crate) fn syntax(name: &'static str, description: &'static str, argument: &'static str) -> Syntax {
    let refused = RESTRICTED_OPTIONS.iter().filter(|(_, modes, _)| !modes.contains(&name));
    let refusals = refused.map(|(options, _, reason)| (*options, *reason)).collect();
    Syntax { description, argument: Some(argument), refusals, ..Syntax::of::<ClientArgs>(name) }
}

/// The options of the client modes.
#[derive(FromArgs, ArgsInfo, Debug)]
pub struct ClientArgs {
    /// proxy or comma-separated chain (repeatable) [default: S5_PROXY, ALL_PROXY or 127.0.0.1:1080]. URL is
    /// \[socks5h://\]\[USER\[:PASSWORD\]@\]HOST\[:PORT\], \[USER\[:PASSWORD\]@\]unix:/PATH or socks5h://localhost/PATH.
    /// socks5:// and socks:// are the same as socks5h://. Percent-encoding in user, password and PATH is decoded (%2C is a
    /// comma). A chain begins with the nearest proxy. The empty string is the same as --direct. See PROXY AND CREDENTIALS.
    #[argh(option, short = 'x', arg_name = "URL")]
    pub(crate) proxy: Vec<String>,

    /// accepted for compatibility with nc and ncat. The value must be 5, socks5 or socks5h.
    #[argh(option, short = 'X', arg_name = "5", from_str_fn(parse_proxy_type))]
    #[allow(dead_code, reason = "accepted for compatibility; SOCKS5 is the only protocol")]
    pub(crate) proxy_type: Option<()>,

    /// use no proxy
    #[argh(switch)]
    pub(crate) direct: bool,

    /// user name for proxies whose URL has none. USER can be user:password, but then other users of this machine may
    /// see the password.
    #[argh(option, short = 'P', arg_name = "USER")]
    pub(crate) proxy_user: Option<String>,

    /// read user:password from FILE, - (stdin) or fd:N. FILE has one user:password per line. Blank lines, and lines that
    /// begin with #, are ignored. From stdin or descriptor N, s5 reads only the first line; the bytes after that line are
    /// data to send.
    #[argh(option, arg_name = "FILE")]
    pub(crate) proxy_auth_file: Option<String>,

    /// login methods to offer [default: automatic]. A comma-separated list of none, password and gssapi. The default is
    /// none, plus password and gssapi if there are credentials for them.
    #[argh(option, arg_name = "METHODS", from_str_fn(parse_set))]
    pub(crate) auth: Option<Vec<Method>>,

    /// service name for Kerberos [default: rcmd]. NAME is a service name, or a principal such as rcmd/HOST@REALM.
    #[argh(option, arg_name = "NAME")]
    pub(crate) gssapi_service: Option<String>,

    /// host name for Kerberos [default: from the URL]. It is required if the URL has an IP address, and not valid with
    /// a chain.
    #[argh(option, arg_name = "HOST")]
    pub(crate) gssapi_host: Option<String>,

    /// protection to request [default: confidentiality]. One of none, integrity and confidentiality. With this option,
    /// --gssapi-min or --gssapi-nec, the default of --auth is gssapi.
    #[argh(option, arg_name = "LEVEL")]
    pub(crate) gssapi_protection: Option<ProtectionLevel>,

    /// weakest protection to accept [default: integrity]. With --gssapi-nec the default is the requested level, because
    /// an attacker can change the level in that exchange.
    #[argh(option, arg_name = "LEVEL")]
    pub(crate) gssapi_min: Option<ProtectionLevel>,

    /// use NEC's variant of the protection exchange
    #[argh(switch)]
    pub(crate) gssapi_nec: bool,

    /// file with Kerberos tickets [default: the system's]. The default is KRB5CCNAME or the default of the Kerberos
    /// library.
    #[argh(option, arg_name = "FILE")]
    pub(crate) ccache: Option<PathBuf>,

    /// resolve target: remote or local [default: remote]. With local, s5 resolves the target's name and tries its
    /// addresses in turn. With remote, the last proxy resolves it. An address with a zone, such as fe80::1%eth0, is
    /// always sent to the proxy as it is: the zone is an interface of the proxy's host.
    #[argh(option, long = "proxy-dns", short = 'R', arg_name = "SIDE", from_str_fn(parse_dns_side), default = "false")]
    pub(crate) resolves_target: bool,

    /// UDP relay: reply or proxy [default: reply]. With reply, it is the address in the reply of the proxy. With
    /// proxy, it is the address of the proxy itself, with the port in the reply. A proxy behind NAT, or in a container,
    /// may reply with an address that only its own network has. In a chain this applies to each proxy.
    #[argh(option, arg_name = "ADDR", from_str_fn(parse_udp_relay), default = "false")]
    pub(crate) udp_relay: bool,

    /// reach the proxy by IPv4 (-R local: the target too). Without -R local, the proxy chooses the family of the
    /// connection to the target. Without a proxy, s5 reaches the target by IPv4.
    #[argh(switch, short = '4')]
    pub(crate) ipv4: bool,

    /// reach the proxy by IPv6 (-R local: the target too). The note on -4 applies.
    #[argh(switch, short = '6')]
    pub(crate) ipv6: bool,

    /// source address
    #[argh(option, short = 's', arg_name = "IP")]
    pub(crate) source: Option<IpAddr>,

    /// source port. With udp, it is the source port of the datagrams.
    #[argh(option, short = 'p', arg_name = "PORT", from_str_fn(parse_nonzero))]
    pub(crate) source_port: Option<u16>,

    /// set --connect-timeout and --idle-timeout, as in nc. These options override it. With udp, -w is an idle timeout
    /// only until stdin ends; then it is the default of -q.
    #[argh(option, short = 'w', arg_name = "TIME", from_str_fn(parse_duration))]
    pub(crate) timeout: Option<Duration>,

    /// time limit to establish the tunnel [default: 60s]. It covers name resolution, TCP, the handshakes and the reply.
    /// With bind, it also limits the wait for the peer if it is given. The exit status is 28.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_timeout))]
    connect_timeout: Option<Duration>,

    /// time limit of the whole run [default: never]. It covers all attempts and the transfer, as in curl. The exit
    /// status is 28.
    #[argh(option, short = 'm', arg_name = "TIME", from_str_fn(parse_timeout))]
    pub(crate) max_time: Option<Duration>,

    /// retry failed attempts for this long. The pause between attempts grows to 2s. Each attempt has the time limit of
    /// --connect-timeout. s5 does not retry after a refused login, a server that is not SOCKS5, an unavailable local
    /// address, or REP 2, 7 and 8. It retries if the proxy only closes the connection.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_duration))]
    pub(crate) retry: Option<Duration>,

    /// exit 28 if idle this long [default: never]. With udp -l, it closes the association of an idle peer (default:
    /// 5m).
    #[argh(option, short = 'i', arg_name = "TIME", from_str_fn(parse_timeout))]
    pub(crate) idle_timeout: Option<Duration>,

    /// limit the wait for stdin after the remote end. When the remote side has ended the stream, s5 reads stdin to
    /// its end, unless stdin is a terminal. With --linger, it exits when stdin has been silent for this long. Without
    /// it, s5 exits when the peer is gone, which TCP keepalive detects within 75s. With -l, this applies to the local
    /// connection, and with -e and -c to the output of the program.
    #[argh(option, arg_name = "TIME", from_str_fn(parse_duration))]
    pub(crate) linger: Option<Duration>,

    /// exit this long after stdin ends [default: never]. Data that the next hop has not accepted by then may be lost.
    /// With udp, the default is the time that -w sets, or 2s.
    #[argh(option, short = 'q', arg_name = "TIME", from_str_fn(parse_duration))]
    pub(crate) quit_after: Option<Duration>,

    /// exit after N answers. If fewer answers arrive in time, the exit status is 28.
    #[argh(option, short = 'n', arg_name = "N", from_str_fn(parse_count))]
    pub(crate) count: Option<u64>,

    /// connect, transfer nothing, and exit 0 on success. Without a target, connect only logs in to the proxy, and udp
    /// opens an association. s5 prints an error message only with -v or --retry.
    #[argh(switch, short = 'z')]
    pub(crate) zero_io: bool,

    /// do not read stdin
    #[argh(switch, short = 'd')]
    pub(crate) recv_only: bool,

    /// do not write to stdout. s5 exits at most 5s after stdin has ended, but waits longer while the next hop accepts
    /// data. If the next hop stops accepting data, the exit status is 55.
    #[argh(switch)]
    pub(crate) send_only: bool,

    /// do not half-close after stdin ends. -N and --shutdown, as in nc and ncat, select the default.
    #[argh(switch)]
    pub(crate) no_shutdown: bool,

    /// send line ends as CR LF
    #[argh(switch, short = 'C')]
    pub(crate) crlf: bool,

    /// pass the socket over stdout (ssh ProxyUseFdpass). s5 sends the connected socket with SCM_RIGHTS and exits, so no
    /// process has to copy the data. It is not possible if GSSAPI protects the tunnel.
    #[argh(switch, short = 'F')]
    pub(crate) pass_fd: bool,

    /// run PROGRAM with the tunnel as stdin and stdout. PROGRAM can have arguments, separated by spaces. s5 sets
    /// S5_TARGET, S5_BND and S5_PROXY_ADDR, and exits with the status of PROGRAM.
    #[argh(option, short = 'e', arg_name = "PROGRAM")]
    pub(crate) exec: Option<String>,

    /// run /bin/sh -c COMMAND in the same way
    #[argh(option, short = 'c', arg_name = "COMMAND")]
    pub(crate) sh_exec: Option<String>,

    /// one datagram per read; answers without delimiters. The output does not show where an answer ends.
    #[argh(switch)]
    pub(crate) raw: bool,

    /// one datagram per line of hexadecimal digits. Answers are written in the same form.
    #[argh(switch)]
    pub(crate) hex: bool,

    /// read a 2-byte length before each datagram. The length is big-endian. Answers are written in the same form.
    #[argh(switch)]
    pub(crate) length_prefixed: bool,

    /// listen here and forward to the target. ADDR is an IP address, or * for all IPv4 addresses; the default is
    /// 127.0.0.1. A link-local address has a zone, as in \[fe80::1%eth0\]:8080. Each TCP connection has its own tunnel,
    /// and each UDP peer its own association. s5 prints "listening on ADDR:PORT" on stderr.
    #[argh(option, short = 'l', arg_name = "[ADDR:]PORT", from_str_fn(parse_listen))]
    pub(crate) listen: Option<SocketAddr>,

    /// with -l, accept any number of connections. By default, s5 serves one connection and exits.
    #[argh(switch, short = 'k')]
    pub(crate) keep_open: bool,

    /// with -l, limit concurrent peers [default: 256]. A new peer replaces one that was idle for over 2s. If there is
    /// none, its datagrams are dropped. If N is 5 or more, an IP address (IPv6: a /64) has at most about 4/5 of N.
    #[argh(option, arg_name = "N", from_str_fn(parse_positive), default = "DEFAULT_MAX_PEERS")]
    pub(crate) max_peers: usize,

    /// write the bound address to FILE or fd:N. s5 removes an existing file at its start, and writes the new file
    /// atomically. FILE may be a named pipe. Its reader must open it within the time of -w, at most 60s. s5 closes a
    /// descriptor after the write.
    #[argh(option, arg_name = "FILE")]
    pub(crate) address_file: Option<String>,

    /// print details on stderr; twice for more. With -vv, s5 prints each step of the handshake.
    #[argh(switch, short = 'v')]
    pub(crate) verbose: u8,

    /// print nothing on stderr except usage errors
    #[argh(switch)]
    pub(crate) quiet: bool,

    /// print a JSON summary on stderr or write it to FILE. FILE can be fd:N. On stderr, it replaces all other lines
    /// except those of -v. With -l, there is one for each tunnel or association. See JSON.
    #[argh(option, arg_name = "FILE")]
    pub(crate) json: Option<String>,

    /// show bytes, rate and time if stderr is a terminal
    #[argh(switch)]
    pub(crate) progress: bool,

    /// host:port, or host and port
    #[argh(positional)]
    pub(crate) target: Vec<String>,
}

fn parse_proxy_type(text: &str) -> Result<(), String> {
    match text {
        "5" | "socks5" | "socks5h" => Ok(()),
        _ => Err("only SOCKS5 is supported (use 5, socks5 or socks5h)".into()),
    }
}

fn parse_dns_side(text: &str) -> Result<bool, String> {
    parse_choice(text, [("local", true), ("remote", false)])
}

fn parse_count(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0) => Err("must be greater than 0".into()),
        count => count.map_err(|_| "expected a number of answers (without a number, -n is not necessary)".into()),
    }
}

/// Parses the address of `-l`: without an IP address, it is 127.0.0.1.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let is_other = |name: &HostName| name.as_str() != "localhost" && !name.is_zoned_address();
    let hint = match text.parse() {
        _ if text.starts_with("unix:") => None,
        Ok(ListenAddr::Host(Addr { host: Host::Name(name), .. })) if is_other(&name) => None,
        Ok(listen) => {
            // If there are addresses of both families, the IPv4 address.
            let addr = listen.resolve().ok().and_then(|addrs| addrs.into_iter().min_by_key(SocketAddr::is_ipv6));
            return addr.ok_or_else(|| DialError::NoInterface.to_string());
        }
        Err(_) if matches!(text.parse(), Ok(Host::Name(name)) if is_other(&name)) => None,
        Err(error) => error.find(" (").and_then(|start| error.get(start..).map(str::to_owned)),
    };
    let hint = hint.as_deref().unwrap_or(" (-l takes a value: write other options before it)");
    Err(format!("expected [ADDR:]PORT{hint}"))
}

impl ClientArgs {
    pub(crate) fn connect_timeout(&self) -> Option<Duration> {
        self.connect_timeout.or(self.timeout).filter(|time| !time.is_zero())
    }

    /// Returns whether the objects of `--json` are all that may be printed on stderr.
    pub(crate) fn prints_only_json(&self) -> bool {
        self.verbose == 0 && self.json.as_deref() == Some(OPTIONAL_VALUE.1)
    }

    /// Returns the idle timeout of a tunnel, given by `-i` or `-w`.
    pub(crate) fn max_idle_time(&self) -> Option<Duration> {
        self.idle_timeout.or(self.timeout).filter(|time| !time.is_zero())
    }
}
