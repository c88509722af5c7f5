//! `s5 serve`: evaluates its options, and runs the server or another action.

mod explain;
mod hops;
mod load;
mod request;
mod users;

use std::net::IpAddr;

use log::LevelFilter;

use super::cli::exit::{CliError, CliResult, ExitStatus, eprint_line};
use super::cli::logger::Logger;
use crate::client::ClientOptions;
use crate::gssapi::Initiator;
use crate::net::LocalAddr;
use crate::policy::Policy;
use crate::policy::rules::{self, Route};
use crate::proto::{DEFAULT_PORT, Method};
use crate::server::{self, Hop, ListenAddr, Options, RuleOption, ServeArgs};
use hops::HopSources;
use load::PolicySources;

/// Prints the result of an action, unless `--quiet` is set.
fn report(is_quiet: bool, text: String) -> CliResult {
    if !is_quiet {
        eprint_line(&format!("s5: {}", CliError::new(ExitStatus::FAILURE, text)));
    }
    Ok(())
}

pub(super) fn logger(args: &ServeArgs) -> Logger {
    let level = match args.verbose {
        verbose if args.quiet || (args.check && verbose == 0) => LevelFilter::Warn,
        0 => LevelFilter::Info,
        1 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    Logger::new(level, args.log_format, args.access_log.is_some())
}

/// `command_line` starts a process with these arguments.
pub(super) fn run(args: ServeArgs, command_line: Vec<String>) -> CliResult {
    let actions =
        [args.add_user.is_some(), args.remove_user.is_some(), args.explain.is_some(), args.show_rules, args.check];
    let has_several = actions.into_iter().filter(|is_set| *is_set).count() > 1;
    CliError::usage_if(
        has_several,
        "--add-user, --remove-user, --explain, --show-rules and --check exclude each other",
    )?;
    match (&args.users, &args.add_user, &args.remove_user) {
        (Some(file), Some(name), _) => return report(args.quiet, users::add_user(file, name)?),
        (Some(file), _, Some(name)) => return report(args.quiet, users::remove_user(file, name)?),
        (None, Some(_), _) => return Err(CliError::usage("--add-user requires --users FILE")),
        (None, _, Some(_)) => return Err(CliError::usage("--remove-user requires --users FILE")),
        (_, None, None) => {}
    }
    let sources = policy_sources(&args)?;
    let inherited = server::inherited_listeners(!args.listen.is_empty()).map_err(CliError::usage)?;
    let (policy, proxies) = sources.load()?;
    if !args.no_sandbox {
        server::close_inherited_descriptors();
    }
    let hops = sources.hops.names().into_iter().zip(proxies).map(|(name, proxies)| Hop::new(name, proxies).into());
    let options = Options { inherited, command_line, hops: hops.collect(), ..options(args, &sources, &policy)? };
    if options.show_rules {
        return explain::show(policy, &options);
    }
    if let Some(request) = &options.explain {
        return explain::explain(policy, &options, request);
    }
    if options.check {
        let is_quiet = options.quiet;
        server::check(options, policy)?;
        return report(is_quiet, "check passed: the options and files are valid".into());
    }
    Ok(server::run(options, policy, &|| sources.reload().map_err(|error| error.message))?)
}

fn policy_sources(args: &ServeArgs) -> CliResult<PolicySources> {
    let user_entry = users::entry_in_environment(args.users.is_some())?;
    let methods = accepted_methods(args, args.users.is_some() || user_entry.is_some())?;
    let has_user_limits = args.max_per_user.is_some() || args.rate_per_user.is_some();
    let problem = "--max-per-user and --rate-per-user require logins (use --users FILE or --keytab FILE)";
    CliError::usage_if(has_user_limits && methods == [Method::NONE], problem)?;
    let has_hop_options = args.proxy_auth_file.is_some() || args.hop_auth.is_some() || args.hop_udp_relay;
    let problem = "--proxy-auth-file, --hop-auth and --hop-udp-relay require --via or --hop";
    CliError::usage_if(has_hop_options && args.hop.is_empty() && args.via.is_none(), problem)?;
    let mut rule_options = Vec::new();
    for rule in [&args.rule, &args.allow, &args.deny].into_iter().flatten() {
        // They are few, and a sort takes 4 KB of code.
        rule_options
            .insert(rule_options.partition_point(|other: &RuleOption| other.position < rule.position), rule.clone());
    }
    // The --via hop follows the others.
    let via = args.via.as_ref().map(|_| args.hop.len());
    let takes_passwords = args.hop_auth.as_ref().is_none_or(|methods| methods.contains(&Method::PASSWORD));
    // Without a server, no password is needed.
    let needs_passwords = takes_passwords && args.explain.is_none() && !args.show_rules;
    let hops = HopSources::new(&args.hop, args.via.as_deref(), args.proxy_auth_file.clone(), needs_passwords)?;
    hops.check_forwarding(takes_passwords && methods.contains(&Method::PASSWORD))?;
    Ok(PolicySources {
        users: args.users.clone(),
        user_entry,
        rules: args.rules.clone(),
        keytab: args.keytab.clone(),
        rule_options,
        methods,
        hops,
        default_route: Route { hop: via, outbound: None },
    })
}

/// Returns the settings of a server that listens on the addresses of the options, without hops.
fn options(mut args: ServeArgs, sources: &PolicySources, policy: &Policy) -> CliResult<Options> {
    let one_per_family = |option: &str, ips: &[IpAddr]| {
        rules::one_per_family(ips).map_err(|error| CliError::usage(format!("{option}: {error}")))
    };
    let is_unused = args.allow_remote_metrics && args.metrics.is_none();
    CliError::usage_if(is_unused, "--allow-remote-metrics requires --metrics ADDR")?;
    let is_no_file = args.access_log.as_ref().is_some_and(|path| matches!(path.to_str(), Some("" | "-")));
    CliError::usage_if(is_no_file, "--access-log: \"\" and \"-\" are not files (omit the option to log to stderr)")?;
    one_per_family("--advertise", &args.advertise)?;
    for (option, own) in [("--advertise-bind", &mut args.advertise_bind), ("--advertise-udp", &mut args.advertise_udp)]
    {
        one_per_family(option, own)?;
        let is_missing = |ip: &&IpAddr| !own.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        let missing: Vec<IpAddr> = args.advertise.iter().filter(is_missing).copied().collect();
        own.extend(missing);
    }
    let outbound = match one_per_family("--outbound", &args.outbound)? {
        [None, None] => LocalAddr::default(),
        ips => LocalAddr { ips, port: 0 },
    };
    if args.listen.is_empty() {
        args.listen.push(ListenAddr::Loopback(DEFAULT_PORT));
    }
    let offers_gssapi = match &args.hop_auth {
        Some(methods) => methods.contains(&Method::GSSAPI),
        None => Initiator::may_have_tickets(),
    };
    let hop_options = ClientOptions {
        gssapi: offers_gssapi.then(Initiator::default),
        methods: args.hop_auth.clone(),
        proxy_is_udp_relay: args.hop_udp_relay,
        ..ClientOptions::default()
    };
    let acceptor = policy.methods.contains(&Method::GSSAPI).then(|| load::gssapi_acceptor(&args));
    Ok(Options {
        inherited: Vec::new(),
        command_line: Vec::new(),
        successor_variable: sources.user_entry.clone().map(|entry| (users::ENTRY_VARIABLE, entry)),
        outbound,
        gssapi_acceptor: acceptor.transpose()?,
        hop_options: hop_options.into(),
        hops: Vec::new(),
        reload_files: sources.files().chain(args.keytab.as_deref()).map(Into::into).collect(),
        args,
    })
}

/// Returns the accepted methods, the preferred one first.
fn accepted_methods(args: &ServeArgs, has_users: bool) -> CliResult<Vec<Method>> {
    let has_gssapi = args.keytab.is_some() || args.gssapi_service.is_some() || args.gssapi_protection.is_some();
    let methods = args.auth.clone().unwrap_or_else(|| {
        let candidates = [(has_users, Method::PASSWORD), (has_gssapi, Method::GSSAPI)];
        let configured = candidates.into_iter().filter_map(|(is_set, method)| is_set.then_some(method));
        let methods: Vec<Method> = configured.collect();
        if methods.is_empty() { vec![Method::NONE] } else { methods }
    });
    let usage_error = |problem: &str| Err(CliError::usage(format!("--auth: {problem}")));
    match (methods.contains(&Method::PASSWORD), methods.contains(&Method::GSSAPI)) {
        (true, _) if !has_users => usage_error("password requires --users FILE"),
        (false, _) if has_users => usage_error("--users and S5_USER require password in this list"),
        (_, false) if has_gssapi => usage_error("--keytab and --gssapi-... require gssapi in this list"),
        _ => Ok(methods),
    }
}
