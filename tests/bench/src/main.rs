//! `bench` compares s5 with a direct connection and with other SOCKS servers. `bench soak` runs a mixed load for a long
//! time. `bench clients` measures the CPU time of `s5 connect -z`.
//!
//! For each row and run, a new process of each proxy is started in turn. The result is the median of the runs. Load
//! generator, target and proxy are separate processes on one machine and use loopback.

#![forbid(unsafe_code)]

mod chart;
mod children;
mod clients;
mod cpu;
mod floor;
mod gssapi;
mod load;
mod measure;
mod pattern;
mod proxies;
mod report;
mod rows;
mod soak;
mod socks;
mod target;
mod tunnels;
mod udp;

// Names that most modules use: they import them with `use crate::*`.
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, thread};

use children::*;
use cpu::*;
use floor::*;
use gssapi::*;
use load::*;
use measure::*;
use pattern::*;
use proxies::*;
use report::*;
use rows::*;
use socks::*;
use target::*;
use tunnels::*;
use udp::*;

const USAGE: &str = "usage: bench [--quick] [--runs N] [--only row,row] [--proxies name,name] [--out DIR]
       bench soak [--minutes N] [--out DIR]
       bench clients [--out DIR]

S5_BENCH_S5     the s5 to measure (target/release/s5)
S5_BENCH_ARGS   additional arguments for `s5 serve`
S5_BENCH_DANTE  directory of a Dante with GSSAPI: sbin/sockd and bin/socksify
S5_BENCH_PEERS  additional proxies, as name=path,name=path: microsocks, hev-socks5-server, 3proxy and fast-socks5 are
                started with their options, names that begin with s5 as s5, and all others as `path PORT`";

struct Options {
    quick: bool,
    soak: bool,
    clients: bool,
    runs: usize,
    minutes: f64,
    only: Vec<String>,
    proxies: Vec<String>,
    out: PathBuf,
}

fn options(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let out = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/bench").into();
    let (only, proxies) = (Vec::new(), Vec::new());
    let mut options = Options { quick: false, soak: false, clients: false, runs: 0, minutes: 30.0, only, proxies, out };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} requires a value"));
        let list = |value: String| value.split(',').map(|name| name.trim().to_lowercase()).collect();
        match arg.as_str() {
            "soak" => options.soak = true,
            "clients" => options.clients = true,
            "--quick" => options.quick = true,
            "--runs" => options.runs = value()?.parse().map_err(|_| "--runs requires a number")?,
            "--minutes" => options.minutes = value()?.parse().map_err(|_| "--minutes requires a number")?,
            "--only" => options.only = list(value()?),
            "--proxies" => options.proxies = list(value()?),
            "--out" => options.out = value()?.into(),
            _ => return Err(format!("unknown argument {arg}")),
        }
    }
    let known = |name: &String| ROWS.iter().any(|row| row.name == name || row.group == name);
    if let Some(name) = options.only.iter().find(|name| !known(name)) {
        let names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        return Err(format!("unknown row {name} (known rows: {})", names.join(" ")));
    }
    if options.runs == 0 {
        options.runs = if options.quick { 1 } else { 5 };
    }
    Ok(options)
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let first = args.next();
    let error = match first.as_deref().and_then(|arg| arg.to_str()) {
        Some(children::EXEC_HELPER) => children::exec_program(args).to_string(),
        Some(target::TARGET) => return target::run().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS),
        Some(floor::FLOOR) => match floor::main(&std::env::args().skip(2).collect::<Vec<_>>()) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => error.to_string(),
        },
        Some(gssapi::GSSAPI) => return gssapi::main(&std::env::args().skip(2).collect::<Vec<_>>()),
        Some("--help" | "help" | "-h") => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => match options(std::env::args().skip(1)) {
            Ok(options) => match run(&options) {
                Ok(true) => return ExitCode::SUCCESS,
                Ok(false) => return ExitCode::FAILURE,
                Err(error) => error.to_string(),
            },
            Err(error) => format!("{error}\n{USAGE}"),
        },
    };
    eprintln!("bench: {error}");
    ExitCode::from(2)
}

/// Runs a benchmark or the soak. Returns false if the soak or `bench clients` misses a goal.
fn run(options: &Options) -> Result<bool, BenchError> {
    let descriptors = children::raise_descriptor_limit();
    children::clean_up_on_signals()?;
    let _dir = children::TempDir::create()?;
    fs::create_dir_all(&options.out)?;
    let (found, missing) = proxies::find();
    let target = target::Target::start()?;
    if options.soak || options.clients {
        let s5 = found.iter().find(|proxy| proxy.name == "s5").ok_or_else(|| failed(missing.join("; ")))?;
        if options.clients {
            return clients::run(s5, &target, &options.out);
        }
        return soak::run(s5, &target, Duration::from_secs_f64(options.minutes * 60.0), &options.out);
    }
    let is_wanted = |name: &str| {
        let name = name.to_lowercase();
        options.proxies.is_empty()
            || options.proxies.iter().any(|want| name == *want || name.split([' ', ',']).next() == Some(want))
    };
    let found = found.into_iter().filter(|proxy| is_wanted(&proxy.name)).collect();
    let mut missing: Vec<_> = missing
        .into_iter()
        .chain(gssapi::missing())
        .filter(|line| is_wanted(line.split(':').next().unwrap_or_default()))
        .collect();
    let mut bench = Bench { target, quick: options.quick, descriptors, realm: None };
    missing.push(format!("100 000 idle tunnels: need 200 000 descriptors, the limit is {descriptors}"));
    let mut environment = report::environment();
    let mut results = Results::new(found, missing);
    for proxy in results.proxies.iter().filter(|proxy| bench.idle_tunnels(proxy) < bench.max_idle_tunnels()) {
        let (count, each) = (bench.idle_tunnels(proxy), proxy.descriptors_per_tunnel());
        results.missing.push(format!("{}: only {count} idle tunnels, of {each} descriptors each", proxy.name));
    }
    let (started, others) = (Instant::now(), cpu_of_other_processes());
    measure_all(&mut bench, &mut results, options);
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let others = 100.0 * (cpu_of_other_processes() - others) / started.elapsed().as_secs_f64() / cores;
    environment += &format!("- {others:.0} % of the CPU was used by other processes\n");
    write_report(&bench, &results, options, &environment)?;
    Ok(true)
}

/// Returns the CPU time of all processes that this one has not started, in seconds.
fn cpu_of_other_processes() -> f64 {
    cpu::machine_time() - cpu::Tree(vec![std::process::id() as i32]).cpu()
}

fn measure_all(bench: &mut Bench, results: &mut Results, options: &Options) {
    let is_wanted = |row: &&rows::Row| {
        let is_selected = options.only.iter().any(|name| row.name == name || row.group == name);
        is_selected || options.only.is_empty() && row.group != rows::THREADS
    };
    let bulk = ROWS.iter().filter(is_wanted).any(|row| row.group == "bulk");
    let compare = |proxy| if bulk { bench.compare(proxy) } else { Ok(()) };
    let compared: Vec<_> = results.proxies.iter().map(compare).collect();
    for row in ROWS.iter().filter(is_wanted) {
        for run in 1..=options.runs {
            eprintln!("{} {run}/{}", row.name, options.runs);
            for (at, compared) in compared.iter().enumerate() {
                // A proxy that corrupts streams has no rate.
                let figures = match compared {
                    Err(error) if row.group == "bulk" => Err(error.clone()),
                    _ => row.measure(bench, &results.proxies[at]),
                };
                for (i, figure) in row.figures.iter().enumerate() {
                    let value = figures.as_ref().map(|figures| figures[i]).map_err(BenchError::clone);
                    results.cell_mut(at, figure.id).add(value);
                }
            }
        }
    }
}

fn write_report(bench: &Bench, results: &Results, options: &Options, environment: &str) -> Result<(), BenchError> {
    let mut charts = String::new();
    let mut groups: Vec<_> = ROWS.iter().map(|row| row.group).collect();
    groups.dedup();
    for group in groups {
        if let Some(svg) = chart::bars(results, group) {
            fs::write(options.out.join(format!("{group}.svg")), svg)?;
            charts += &format!("![{group}]({group}.svg)\n");
        }
    }
    let text = format!(
        "# s5 and other SOCKS servers, side by side\n\n{environment}- median of {} interleaved runs, lowest..highest\n\n\
         {}\n## Figures\n\n{}\n## Goals\n\n{}\n## Not run or failed\n\n{}\n{charts}",
        options.runs,
        notes(bench),
        results.table(),
        results.goals(),
        results.remarks(),
    );
    fs::write(options.out.join("bench.md"), &text)?;
    println!("{text}");
    eprintln!("report written to {}", options.out.display());
    Ok(())
}

fn notes(bench: &Bench) -> String {
    format!(
        "Load generator, target and proxy share the machine and its loopback: compare the columns, not figures of \
         different machines. Each row starts a new process of each proxy in turn. CPU is user and system time of \
         all processes of the proxy (for `ssh -D`, of ssh and sshd). A transfer is compared byte by byte before the \
         bulk rows; while measured, streams are verified by counts, block numbers and samples, and echoes and \
         datagrams completely. Bulk streams are written and read 256 KiB at a time. Short tunnels are closed by the \
         target first. Idle tunnels are {}, or as many as the descriptor limit allows. UDP rows keep one datagram in \
         flight on each association, or 16. The one-way rows raise the rate in steps on one association, and show the \
         highest rate at which all datagrams arrived in one of up to three attempts. Memory is private dirty memory. \
         GSSAPI: the column `direct` is the library alone, with one thread that wraps pieces of 16 KiB and one that \
         unwraps them; its logins run on as many threads as the clients of the other columns.\n",
        bench.max_idle_tunnels()
    )
}
