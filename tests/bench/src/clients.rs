//! What it costs to ask one question: `s5 connect -z` beside `nc -z -X 5`, in pairs, through one server on loopback; and how
//! large the program is.

use std::fs;
use std::net::SocketAddrV4;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;

use crate::measure::{Fault, Via, failed, median};
use crate::proxies::Proxy;
use crate::target::Target;

/// How many pairs there are.
const PAIRS: usize = 50;
/// How much of nc's CPU s5 may use.
const GOAL: f64 = 1.0;
/// How large the program may be, in MiB.
const MOST: f64 = 1.5;
const MIB: f64 = (1 << 20) as f64;

/// Measures and writes it down; true when the goal is met.
pub fn run(s5: &Proxy, target: &Target, out: &Path) -> Result<bool, Fault> {
    let running = s5.start()?;
    let Via::Socks(proxy) = running.via else { return Err(failed("s5 is no proxy")) };
    let ours = || {
        let mut command = Command::new(&s5.path);
        command.args(["connect", "-z", "-x", &proxy.to_string()]);
        command
    };
    let nc = || {
        let mut command = Command::new("nc.openbsd");
        command.args(["-z", "-X", "5", "-x", &proxy.to_string()]);
        command
    };
    // The first ones bring both programs into memory.
    let _ = (cpu(ours(), target.echo)?, cpu(nc(), target.echo)?);
    let pairs = (0..PAIRS).map(|_| Ok((cpu(ours(), target.echo)?, cpu(nc(), target.echo)?)));
    let pairs = pairs.collect::<Result<Vec<_>, Fault>>()?;
    let of = |pick: fn(&(f64, f64)) -> f64| median(&pairs.iter().map(pick).collect::<Vec<_>>());
    let ratio = of(|(ours, nc)| ours / nc);
    let is_met = ratio <= GOAL;
    let size = fs::metadata(&s5.path)?.len();
    let text = format!(
        "| CPU to ask whether a target is reached, median of {PAIRS} pairs | s5 | nc | ratio | at most {GOAL:.2} |\n\
         | --- | --: | --: | --: | --- |\n| us | {:.0} | {:.0} | {ratio:.2} | {} |\n\n\
         The program has {:.3} MiB, of which fewer than {MOST:.1} are aimed at: {}.\n",
        of(|pair| pair.0),
        of(|pair| pair.1),
        if is_met { "met" } else { "**missed**" },
        size as f64 / MIB,
        if (size as f64) < MOST * MIB { "met" } else { "**missed**" }
    );
    fs::write(out.join("clients.md"), &text)?;
    println!("{text}");
    Ok(is_met && (size as f64) < MOST * MIB)
}

/// Microseconds of CPU that a client used to reach `target`.
fn cpu(mut command: Command, target: SocketAddrV4) -> Result<f64, Fault> {
    let before = of_children()?;
    command.args([target.ip().to_string(), target.port().to_string()]);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if !status.success() {
        return Err(failed(format!("{command:?}: {status}")));
    }
    Ok(of_children()? - before)
}

fn of_children() -> Result<f64, Fault> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64)
}
