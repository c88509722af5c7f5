//! Other clients through the same behaviours of a proxy: a table for the README, made from runs. Not a test of ours, and
//! so only run when it is asked for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::behaviour_table::{Behaviour, Ends, Outcome, behaviours};
use crate::common::{is_installed, s5};
use crate::scripted::text;

/// After how long a client counts as hanging that was told to wait for half a second, or for nothing.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between these lines of the README the table stands.
const BEGIN: &str = "<!-- make compare-clients: begin -->\n";
const END: &str = "<!-- make compare-clients: end -->\n";

/// A client, and how it is told to do what a row wants, as far as it can be.
struct Client {
    name: &'static str,
    program: &'static str,
    command: fn(&Behaviour, &str, u16) -> Option<Command>,
}

fn user_and_password(row: &Behaviour) -> Option<(String, String)> {
    let (user, password) = row.userinfo.strip_suffix('@')?.split_once(':')?;
    let decode = |text: &str| text.replace("%40", "@").replace("%3A", ":").replace("%25", "%");
    Some((decode(user), decode(password)))
}

fn host_and_port(row: &Behaviour) -> (String, String) {
    let target = row.target.replace(' ', ":");
    let (host, port) = target.rsplit_once(':').expect("a port");
    (host.trim_matches(['[', ']']).into(), port.into())
}

fn ours(row: &Behaviour, host: &str, port: u16) -> Option<Command> {
    let mut command = s5();
    command.env("CI", "true").args(["connect", "-w", "500ms", "-x", &format!("{}{host}:{port}", row.userinfo)]);
    if row.is_idle {
        command.args(["-i", "500ms"]);
    }
    command.args(row.target.split(' '));
    Some(command)
}

fn nc(row: &Behaviour, host: &str, port: u16) -> Option<Command> {
    // It can't log in.
    if !row.userinfo.is_empty() {
        return None;
    }
    let (target, target_port) = host_and_port(row);
    let mut command = Command::new("nc.openbsd");
    command.args(["-N", "-w", "1", "-X", "5", "-x", &format!("{host}:{port}"), &target, &target_port]);
    Some(command)
}

fn ncat(row: &Behaviour, host: &str, port: u16) -> Option<Command> {
    let (target, target_port) = host_and_port(row);
    let mut command = Command::new("ncat");
    command.env_remove("NCAT_PROXY_AUTH");
    if let Some((user, password)) = user_and_password(row) {
        command.env("NCAT_PROXY_AUTH", format!("{user}:{password}"));
    } else if !row.userinfo.is_empty() {
        return None;
    }
    if row.is_idle {
        command.args(["-i", "500ms"]);
    }
    let proxy = format!("{host}:{port}");
    command.args(["-w", "500ms", "--proxy-type", "socks5", "--proxy", &proxy, &target, &target_port]);
    Some(command)
}

fn connect_proxy(row: &Behaviour, host: &str, port: u16) -> Option<Command> {
    // It has no limit for silence on a tunnel.
    if row.is_idle {
        return None;
    }
    let (target, target_port) = host_and_port(row);
    let mut command = Command::new("connect-proxy");
    for variable in ["SOCKS5_USER", "SOCKS5_PASSWD", "SOCKS5_PASSWORD", "DISPLAY"] {
        command.env_remove(variable);
    }
    let mut server = format!("{host}:{port}");
    if let Some((user, password)) = user_and_password(row) {
        command.env("SOCKS5_PASSWORD", password);
        server = format!("{user}@{server}");
    } else if !row.userinfo.is_empty() {
        return None;
    }
    command.args(["-R", "remote", "-w", "1", "-S", &server, &target, &target_port]);
    Some(command)
}

fn curl(row: &Behaviour, host: &str, port: u16) -> Option<Command> {
    if row.userinfo == "alice@" {
        return None;
    }
    let (target, target_port) = host_and_port(row);
    let target = if target.contains(':') { format!("[{target}]") } else { target };
    let mut command = Command::new("curl");
    command.args(["-q", "-sS", "-N", "--connect-timeout", "0.5"]);
    if row.is_idle {
        command.args(["--speed-time", "1", "--speed-limit", "1"]);
    }
    command.args(["-x", &format!("socks5h://{}{host}:{port}", row.userinfo)]);
    command.arg(format!("telnet://{target}:{target_port}"));
    Some(command)
}

const CLIENTS: [Client; 5] = [
    Client { name: "s5", program: "sh", command: ours },
    Client { name: "nc", program: "nc.openbsd", command: nc },
    Client { name: "ncat", program: "ncat", command: ncat },
    Client { name: "connect-proxy", program: "connect-proxy", command: connect_proxy },
    Client { name: "curl", program: "curl", command: curl },
];

/// A cell: the status, and what is wrong with it.
fn judged(row: &Behaviour, outcome: &Outcome) -> String {
    let Some(status) = outcome.status else { return "**hangs**".into() };
    let should_succeed = row.status == 0;
    let has_data = outcome.stdout == row.data;
    let has_asked = row.asked.as_ref().is_none_or(|asked| outcome.messages.last() == Some(asked));
    match (should_succeed, status == 0) {
        (true, true) if has_data && !has_asked => "**asks for another thing**".into(),
        (true, true) if has_data => "ok".into(),
        (true, true) => "**0, data lost**".into(),
        (true, false) => format!("**{status}**"),
        (false, true) => "**0**".into(),
        (false, false) if outcome.stderr.trim().is_empty() && row.ends != Ends::ClosedStdout => {
            format!("{status}, silent")
        }
        (false, false) => status.to_string(),
    }
}

fn version(command: &mut Command) -> String {
    let output = command.output().expect("it runs");
    let said = text(&output.stdout) + &text(&output.stderr);
    said.lines().next().unwrap_or_default().to_owned()
}

fn debian(package: &str) -> String {
    version(Command::new("dpkg-query").args(["-W", "-f", "${Version}\n", package]))
}

#[test]
#[ignore = "a comparison, which make compare-clients runs"]
fn the_table_of_the_readme_is_made_anew() {
    if !CLIENTS.iter().all(|client| is_installed(client.program)) {
        return;
    }
    let rows = behaviours();
    let jobs: Vec<(usize, usize)> =
        (0..rows.len()).flat_map(|row| (0..CLIENTS.len()).map(move |of| (row, of))).collect();
    let next = AtomicUsize::new(0);
    let cells = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some((of_row, of)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (row, client) = (&rows[*of_row], &CLIENTS[*of]);
                    let (host, port) = ("127.0.0.1", 1);
                    let cell = match (client.command)(row, host, port) {
                        None => "-".into(),
                        Some(_) => judged(
                            row,
                            &row.play(PATIENCE, |row, host, port| {
                                (client.command)(row, host, port).expect("it does not depend on the port")
                            }),
                        ),
                    };
                    cells.lock().expect("no panic holds it").insert((*of_row, *of), cell);
                }
            });
        }
    });
    let cells = cells.into_inner().expect("no panic held it");
    let mut table = format!(
        "nc: netcat-openbsd {}, ncat {}, connect-proxy {}, curl {}, all of Debian.\n\n",
        debian("netcat-openbsd"),
        debian("ncat"),
        debian("connect-proxy"),
        debian("curl")
    );
    let names: Vec<&str> = CLIENTS.iter().map(|client| client.name).collect();
    let _ = writeln!(table, "| the proxy | {} |\n| --- |{}", names.join(" | "), " --- |".repeat(names.len()));
    for (i, row) in rows.iter().enumerate() {
        let cells: Vec<&str> = (0..CLIENTS.len()).map(|of| cells[&(i, of)].as_str()).collect();
        let _ = writeln!(table, "| {} | {} |", row.name, cells.join(" | "));
    }
    println!("{table}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(&path).expect("README.md");
    let (before, rest) = readme.split_once(BEGIN).expect("the table's beginning");
    let (_, after) = rest.split_once(END).expect("the table's end");
    fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).expect("README.md can be written");
}
