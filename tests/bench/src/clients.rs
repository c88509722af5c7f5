//! CPU time of a connection test: `s5 connect -z` and `nc -z -X 5` in turn, through one server on loopback. Also the
//! size of the binary.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;

use crate::*;

/// Runs of each program.
const PAIRS: usize = 50;
/// Maximum CPU time of s5, as a factor of the CPU time of nc.
const MAX_RATIO: f64 = 1.0;
/// Maximum size of the binary, in MiB.
const MAX_SIZE: f64 = 2.0;
const MIB: f64 = (1 << 20) as f64;

/// Measures and writes the report. Returns true if the goals are met.
pub fn run(s5: &Proxy, target: &Target, out: &Path) -> Result<bool, BenchError> {
    let running = s5.start()?;
    let Via::Socks(proxy) = running.via else { return Err(failed("s5 is not a SOCKS proxy")) };
    let cpu_of = |program: &Path, args: &[&str]| {
        let mut command = Command::new(program);
        cpu_of_run(command.args(args).args(["-x", &proxy.to_string()]), target.echo)
    };
    let nc = Path::new("nc.openbsd");
    let pair = |_| Ok((cpu_of(&s5.path, &["connect", "-z"])?, cpu_of(nc, &["-z", "-X", "5"])?));
    // The first runs load both programs into memory.
    let pairs = (0..=PAIRS).map(pair).collect::<Result<Vec<_>, BenchError>>()?.split_off(1);
    let median_of = |value: fn(&(f64, f64)) -> f64| median(&pairs.iter().map(value).collect::<Vec<_>>());
    let ratio = median_of(|(s5, nc)| s5 / nc);
    let is_met = ratio <= MAX_RATIO;
    let size = fs::metadata(&s5.path)?.len();
    let text = format!(
        "| CPU of a connection test, median of {PAIRS} pairs | s5 | nc | ratio | at most {MAX_RATIO:.2} |\n\
         | --- | --: | --: | --: | --- |\n| us | {:.0} | {:.0} | {ratio:.2} | {} |\n\n\
         The binary has {:.3} MiB (goal: less than {MAX_SIZE:.1}): {}.\n",
        median_of(|pair| pair.0),
        median_of(|pair| pair.1),
        if is_met { "met" } else { "**missed**" },
        size as f64 / MIB,
        if (size as f64) < MAX_SIZE * MIB { "met" } else { "**missed**" }
    );
    fs::write(out.join("clients.md"), &text)?;
    println!("{text}");
    Ok(is_met && (size as f64) < MAX_SIZE * MIB)
}

/// Returns the CPU time in microseconds of one client that connects to `target`.
fn cpu_of_run(command: &mut Command, target: SocketAddrV4) -> Result<f64, BenchError> {
    let before = cpu_of_children()?;
    command.args([target.ip().to_string(), target.port().to_string()]);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if !status.success() {
        return Err(failed(format!("{command:?}: {status}")));
    }
    Ok(cpu_of_children()? - before)
}

fn cpu_of_children() -> Result<f64, BenchError> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64)
}
