//! `s5 bind`: requests a listener on the proxy, prints its address, and relays the accepted peer to stdin and stdout.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::cli::exit::{CliError, CliResult, ExitStatus};
use super::netcat::connector::Connector;
use super::netcat::descriptor;
use super::netcat::options::ClientArgs;
use super::netcat::report::{JsonOutput, SessionReport};
use super::netcat::target::expected_peer;
use super::netcat::tunnel;
use crate::client::{Client, Phase};
use crate::conn::Conn;
use crate::net::sleep;
use crate::proto::{Addr, Command, Host};
use crate::server::output_file;

/// Time limit for writing the bound address to a named pipe that has no reader yet. `-w` can shorten it.
const FIFO_WRITE_TIMEOUT: Duration = Duration::from_secs(60);
const FIFO_RETRY_PAUSE: Duration = Duration::from_millis(50);

enum AddrOutput {
    File(PathBuf),
    Descriptor(File),
}

impl AddrOutput {
    /// Takes the descriptor. A file of an earlier run is removed, because its address is no longer valid.
    fn open(text: &str) -> io::Result<Self> {
        if let Some(number) = descriptor::fd_number(text) {
            return descriptor::take_fd(number).map(Self::Descriptor);
        }
        if text == "-" {
            return Err(io::Error::other("stdout is for data (use fd:3, with 3>&1 in a shell)"));
        }
        let path = output_file::resolve_links(Path::new(text))?;
        if is_regular(&path) == Some(true) {
            fs::remove_file(&path)?;
        }
        Ok(Self::File(path))
    }

    /// Writes the line atomically: a reader sees all of it or nothing. Closes the file or the descriptor.
    fn write(&mut self, line: &str) -> io::Result<()> {
        match self {
            Self::Descriptor(file) => file.write_all(line.as_bytes()),
            // A named pipe or a device.
            Self::File(path) if is_regular(path) == Some(false) => {
                output_file::open(path, File::options().append(true))?.write_all(line.as_bytes())
            }
            Self::File(path) => output_file::replace(path, 0o666, |file| file.write_all(line.as_bytes())),
        }
    }
}

/// Returns whether a path leads to a regular file; `None` if there is no file.
fn is_regular(path: &Path) -> Option<bool> {
    path.symlink_metadata().ok().map(|metadata| metadata.is_file())
}

pub(super) fn run(args: ClientArgs, json: JsonOutput) -> CliResult {
    let program = tunnel::check_args(&args)?;
    let peer = expected_peer(&args)?;
    let output = args.address_file.as_deref().map(|text| {
        AddrOutput::open(text)
            .map_err(|error| CliError::new(ExitStatus::USAGE, format!("--address-file {text}: {error}")))
    });
    let output = output.transpose()?;
    let connector = Connector::new(Command::Bind, args, json, Some(peer.unwrap_or(Addr::UNSPECIFIED)))?;
    let transfer = async |(mut tunnel, bnd): (Conn, Addr), client: &Client, report: &mut SessionReport<'_>| {
        let bound = client.resolve_unspecified_bnd(bnd, &tunnel);
        report.bnd = Some(bound.clone());
        report.peer = Some(accept_peer(&connector, client, &mut tunnel, &bound, output).await?);
        Box::pin(tunnel::run(&connector, program.as_ref(), tunnel, &bound, report)).await
    };
    let request = async |client: &Client| client.request(Command::Bind).await;
    connector.run(Box::pin(connector.run_reported(request, transfer)))
}

async fn accept_peer(
    connector: &Connector,
    client: &Client,
    tunnel: &mut Conn,
    bound: &Addr,
    output: Option<AddrOutput>,
) -> CliResult<Addr> {
    client.enter_phase(Phase::Accept);
    connector.print_line(&format!("bound {bound}"));
    let has_deadline = connector.args.connect_timeout().is_some();
    if let Some(mut output) = output {
        let name = connector.args.address_file.as_deref().unwrap_or_default();
        let fail = |status, reason: &str| Err(CliError::new(status, format!("--address-file {name}: {reason}")));
        let default = (Instant::now() + FIFO_WRITE_TIMEOUT, FIFO_WRITE_TIMEOUT);
        let (deadline, limit) = client.deadline.filter(|_| has_deadline).map_or(default, |given| given.min(default));
        while let Err(cause) = output.write(&format!("{bound}\n")) {
            match cause.raw_os_error() == Some(Errno::NXIO.raw_os_error()) {
                false => return fail(ExitStatus::WRITE_STDOUT, &cause.to_string()),
                true if Instant::now() < deadline => sleep(FIFO_RETRY_PAUSE).await,
                _ => return fail(ExitStatus::TIMED_OUT, &format!("no reader has opened the pipe within {limit:?}")),
            }
        }
    }
    let is_any = |dst: &&Addr| matches!(dst.host, Host::Ip(ip) if ip.is_unspecified());
    let expected = connector.dst().filter(|dst| !is_any(dst)).map_or("any peer".into(), ToString::to_string);
    connector.print_verbose(&format!("waiting for a connection from {expected}"));
    let peer = client.wait_for_peer(tunnel, has_deadline).await?;
    connector.print_line(&format!("accepted {peer}"));
    Ok(peer)
}
