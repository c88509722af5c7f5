//! Runs s5 and other clients against every row of the behaviour table, and writes the results to `README.md` in this
//! directory. Ignored by default: `make compare-clients` runs it.

use crate::table::{self, Behaviour, Outcome};
use crate::*;

/// A client that runs longer than this counts as hanging. Each client has a timeout of 0.5 s or 1 s.
const HANG_TIMEOUT: Duration = Duration::from_secs(4);
// Lines before and after the table.
const BEGIN: &str = "<!-- make compare-clients: begin -->\n";
const END: &str = "<!-- make compare-clients: end -->\n";

/// A client. `command` returns its command for a row and the proxy's host and port, or `None` if it lacks an option.
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
    let (host, port) = target.rsplit_once(':').expect("a target with a port");
    (host.trim_matches(['[', ']']).into(), port.into())
}

fn nc(row: &Behaviour, host: &str, port: u16) -> Option<Command> {
    // nc cannot log in.
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
    if row.has("idle") {
        command.args(["-i", "500ms"]);
    }
    let proxy = format!("{host}:{port}");
    command.args(["-w", "500ms", "--proxy-type", "socks5", "--proxy", &proxy, &target, &target_port]);
    Some(command)
}

fn connect_proxy(row: &Behaviour, host: &str, port: u16) -> Option<Command> {
    // connect-proxy has no idle timeout.
    if row.has("idle") {
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
    if row.has("idle") {
        command.args(["--speed-time", "1", "--speed-limit", "1"]);
    }
    command.args(["-x", &format!("socks5h://{}{host}:{port}", row.userinfo)]);
    command.arg(format!("telnet://{target}:{target_port}"));
    Some(command)
}

const CLIENTS: [Client; 5] = [
    Client { name: "s5", program: "sh", command: |row, host, port| Some(behaviours::client(row, host, port)) },
    Client { name: "nc", program: "nc.openbsd", command: nc },
    Client { name: "ncat", program: "ncat", command: ncat },
    Client { name: "connect-proxy", program: "connect-proxy", command: connect_proxy },
    Client { name: "curl", program: "curl", command: curl },
];

/// The table cell for an outcome: the status and the fault, if there is one.
fn cell(row: &Behaviour, outcome: &Outcome) -> String {
    let Some(status) = outcome.status else { return "**hangs**".into() };
    let should_succeed = row.status == 0;
    let has_data = outcome.stdout == row.stdout.as_bytes();
    let has_request = row.request.as_ref().is_none_or(|request| outcome.messages.last() == Some(request));
    match (should_succeed, status == 0) {
        // The last message is the data on stdin.
        (true, true) if has_data && !has_request && row.has("late") => "**0, data lost**".into(),
        (true, true) if has_data && !has_request => "**wrong request**".into(),
        (true, true) if has_data => "ok".into(),
        (true, true) => "**0, data lost**".into(),
        (true, false) => format!("**{status}**"),
        (false, true) => "**0**".into(),
        (false, false) if outcome.stderr.trim().is_empty() && !row.has("closed") => {
            format!("{status}, no message")
        }
        (false, false) => status.to_string(),
    }
}

fn package_version(package: &str) -> String {
    outcome_of(Command::new("dpkg-query").args(["-W", "-f", "${Version}", package]), b"").1
}

#[test]
#[ignore = "rewrites a file; run by make compare-clients"]
fn compare_clients_and_rewrite_the_readme_table() {
    if !CLIENTS.iter().all(|client| is_installed(client.program)) {
        return;
    }
    let rows = table::behaviours();
    let jobs: Vec<(usize, usize)> =
        (0..rows.len()).flat_map(|row| (0..CLIENTS.len()).map(move |client| (row, client))).collect();
    let cells = Mutex::new(BTreeMap::new());
    run_all(jobs, |job| {
        let (row, client) = (&rows[job.0], &CLIENTS[job.1]);
        let command = |row: &Behaviour, host: &str, port| (client.command)(row, host, port);
        let text = match command(row, "127.0.0.1", 1) {
            None => "-".into(),
            Some(_) => {
                cell(row, &row.run(HANG_TIMEOUT, |row, host, port| command(row, host, port).expect("a command")))
            }
        };
        cells.lock().expect("not poisoned").insert(job, text);
    });
    let cells = cells.into_inner().expect("not poisoned");
    let versions = ["netcat-openbsd", "ncat", "connect-proxy", "curl"].map(package_version);
    let [nc, ncat, connect_proxy, curl] = versions;
    let mut table = format!(
        "nc: netcat-openbsd {nc}, ncat {ncat}, connect-proxy {connect_proxy}, curl {curl}, all from Debian.\n\n"
    );
    let names: Vec<&str> = CLIENTS.iter().map(|client| client.name).collect();
    let _ = writeln!(table, "| behaviour | {} |\n| --- |{}", names.join(" | "), " --- |".repeat(names.len()));
    for (i, row) in rows.iter().enumerate() {
        let cells: Vec<&str> = (0..CLIENTS.len()).map(|client| cells[&(i, client)].as_str()).collect();
        let _ = writeln!(table, "| {} | {} |", row.name, cells.join(" | "));
    }
    println!("{table}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/client/README.md");
    let page = fs::read_to_string(&path).expect("file read");
    let (before, from_table) = page.split_once(BEGIN).expect("the line before the table");
    let (_, after) = from_table.split_once(END).expect("the line after the table");
    fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).expect("the page can be written");
}
