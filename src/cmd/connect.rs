//! `s5 connect`: relays stdin and stdout to a target through proxies.

use super::cli::exit::{CliError, CliResult};
use super::netcat::child::Program;
use super::netcat::connector::Connector;
use super::netcat::forward;
use super::netcat::options::ClientArgs;
use super::netcat::report::{JsonOutput, SessionReport};
use super::netcat::{target, tunnel};
use crate::client::Client;
use crate::conn::Conn;
use crate::proto::{Addr, Command};

pub(super) fn run(args: ClientArgs, json: JsonOutput) -> CliResult {
    let program = tunnel::check_args(&args)?;
    // Without a target, -z tests whether the proxy accepts the login.
    let dst = target::target(&args, false)?;
    CliError::usage_if(args.keep_open && args.listen.is_none(), "-k requires -l")?;
    let problem = "-p and -k cannot be combined: a source port serves one connection only";
    CliError::usage_if(args.keep_open && args.source_port.is_some(), problem)?;
    let connector = Connector::new(Command::Connect, args, json, dst)?;
    connector.run(Box::pin(async {
        match (connector.args.listen, connector.dst()) {
            // Boxed: the future is large, and often not needed.
            (Some(addr), _) => Box::pin(forward::run(&connector, addr)).await,
            (None, Some(_)) => connect(&connector, program.as_ref()).await,
            (None, None) => probe(&connector).await,
        }
    }))
}

async fn connect(connector: &Connector, program: Option<&Program>) -> CliResult {
    let transfer = async |(tunnel, bnd): (Conn, Addr), _: &Client, report: &mut SessionReport<'_>| {
        connector.print_connected(&bnd);
        report.bnd = Some(bnd.clone());
        Box::pin(tunnel::run(connector, program, tunnel, &bnd, report)).await
    };
    connector.run_reported(async |client| client.request(Command::Connect).await, transfer).await
}

/// Performs the handshake up to the login, without a request.
async fn probe(connector: &Connector) -> CliResult {
    let succeed = async |(), client: &Client, _: &mut SessionReport<'_>| {
        let method = client.progress().method.map(|method| method.to_string()).unwrap_or_default();
        connector.print_verbose(&format!("handshake succeeded (method {method})"));
        Ok(())
    };
    connector.run_reported(async |client| client.probe().await, succeed).await
}
