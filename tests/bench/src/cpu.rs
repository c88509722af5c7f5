//! Resources of a process and its descendants: CPU time, memory, descriptors, threads.

use std::collections::HashMap;

use nix::sys::time::TimeValLike as _;
use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::*;

/// Returns the fields of /proc/PID/stat from the third on. The second field is a name that may contain spaces.
fn stat(pid: i32) -> Option<Vec<String>> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = line.get(line.rfind(')')? + 2..)?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// Returns the process and all its descendants.
pub fn descendants(root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else { return vec![root] };
    for pid in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        if let Some(parent) = stat(pid).and_then(|fields| fields.get(1)?.parse().ok()) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        found.extend(children.remove(&found[at]).unwrap_or_default());
        at += 1;
    }
    found
}

/// The roots of process trees whose resources are added up.
#[derive(Clone, Debug, Default)]
pub struct Tree(pub Vec<i32>);

impl Tree {
    fn pids(&self) -> impl Iterator<Item = i32> {
        self.0.iter().flat_map(|root| descendants(*root))
    }

    /// Returns user and system time so far, in seconds.
    ///
    /// The clock of a process counts nanoseconds, and includes threads that have ended. The time of child processes
    /// that have ended is in the stat file of the parent, in clock ticks.
    pub fn cpu(&self) -> f64 {
        let cpu_of = |pid| {
            let running = clock_getcpuclockid(Pid::from_raw(pid)).and_then(|clock| clock.now());
            let running = running.map_or(0.0, |time| time.num_nanoseconds() as f64 / 1e9);
            let fields = stat(pid).unwrap_or_default();
            let ended: f64 = [13, 14].iter().filter_map(|at| fields.get(*at)?.parse::<f64>().ok()).sum();
            running + ended / ticks_per_second()
        };
        self.pids().map(cpu_of).sum()
    }

    /// Returns the bytes of private memory that have been written.
    pub fn private_dirty(&self) -> u64 {
        self.pids().map(|pid| bytes(&format!("/proc/{pid}/smaps_rollup"), "Private_Dirty:")).sum()
    }

    /// Returns the resident bytes, including shared memory.
    pub fn resident(&self) -> u64 {
        self.pids().map(|pid| bytes(&format!("/proc/{pid}/status"), "VmRSS:")).sum()
    }

    pub fn descriptors(&self) -> u64 {
        self.count("fd")
    }

    pub fn threads(&self) -> u64 {
        self.count("task")
    }

    fn count(&self, dir: &str) -> u64 {
        self.pids().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/{dir}")).ok()).map(|d| d.count() as u64).sum()
    }
}

/// Returns the CPU time of all processes of the machine, in seconds.
pub fn machine_time() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let fields: Vec<f64> = fields.filter_map(|field| field.parse().ok()).collect();
    // Fields 4 and 5 are idle time. The fields after the eighth are included in the first two.
    let busy: f64 =
        fields.iter().take(8).enumerate().filter(|(at, _)| ![3, 4].contains(at)).map(|(_, ticks)| ticks).sum();
    busy / ticks_per_second()
}

fn ticks_per_second() -> f64 {
    sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64
}

/// Returns a value of a /proc file in bytes. The file has it in KiB.
fn bytes(path: &str, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0) * 1024
}
