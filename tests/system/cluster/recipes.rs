//! The commands of src/dist/README.md, which run unchanged on the host of the operator. `ssh` and `systemctl` are
//! scripts there: they run a command on a node of the lab, and send signals to s5.

use super::clients::{login_tunnel_from, run_load, tunnel_from};
use super::*;
use crate::support::realm::{self, REALM, Realm};

const PAGE: &str = include_str!("../../../src/dist/README.md");
/// Runs a command in the network and with the files of a node. `LAB` is the directory of the lab.
const SSH: &str = "#!/bin/sh\nexport NODE=$1\nshift\nexec nsenter --net=/run/netns/$NODE unshare --mount \\\n\
                   sh -c \"mount --bind LAB/$NODE /etc/s5 && $*\"\n";
const SYSTEMCTL: &str = "#!/bin/sh\ncase \"$*\" in 'reload s5') signal=HUP ;; 'stop s5') signal=TERM ;; \
                         'kill --kill-whom=main --signal=USR2 s5') signal=USR2 ;; *) exit 1 ;; esac\nexec kill -s $signal \"$(cat LAB/$NODE.pid)\"\n";

/// Returns the block of commands that starts with this text.
fn block(start: &str) -> &'static str {
    let mut blocks = PAGE.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.find(|block| block.starts_with(start)).expect("a block of the page")
}

/// Options of each node, as on the page.
fn options() -> String {
    let command = block("s5 serve --listen").replace("10.2.0.21", "10.2.0.NODE");
    command.trim_end().strip_prefix("s5 serve").expect("a command of s5").to_owned()
}

/// A shell of the operator, in a directory with the programs `ssh` and `systemctl`.
struct Operator(TempDir);

impl Operator {
    fn new(lab: &Lab) -> Self {
        let dir = temp_dir();
        for (name, script) in [("ssh", SSH), ("systemctl", SYSTEMCTL)] {
            let script = script.replace("LAB", lab.dir.path().to_str().expect("UTF-8 path"));
            let path = write_file(dir.path(), name, &script);
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("mode set");
        }
        Self(dir)
    }

    fn write(&self, name: &str, text: &str) {
        write_file(self.0.path(), name, text);
    }

    /// A command that runs these lines of the page.
    fn shell(&self, lines: &str) -> Command {
        let s5 = Path::new(env!("CARGO_BIN_EXE_s5")).parent().expect("a directory").display();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("sh");
        command.args(["-c", lines]).current_dir(self.0.path());
        command.env("PATH", format!("{}:{s5}:{path}:/usr/sbin:/sbin", self.0.path().display()));
        command
    }
}

/// A command that sends stdin through HAProxy to the target.
fn connect(user: &str) -> Command {
    let mut command = s5();
    command.args(["connect", "-x", &format!("socks5h://{user}proxy.test"), TARGET[0]]);
    command
}

/// Fails if a reload ends sessions that are still allowed, or if a node misses a change.
#[test]
#[ignore = "make test-system"]
fn files_are_distributed_while_sessions_run() {
    let mut lab = lab!();
    let alice = user_line("alice", "secret");
    for node in NODES {
        write_file(&lab.etc(node), "users", &alice);
        write_file(&lab.etc(node), "rules", "allow user=*\n");
    }
    lab.start(&NODES, &options());
    let operator = Operator::new(&lab);
    let mut tunnels: Vec<_> = (0..6).map(|_| login_tunnel_from("client2", "alice")).collect();
    operator.write("users", &(alice + &user_line("bob", "secret")));
    operator.write("rules", "deny from=10.1.0.13\nallow user=*\n");
    let commands = block("s5 serve --users");
    stdout(&mut operator.shell(commands), b"");
    for node in lab.nodes.values() {
        node.wait_log(|log| log.contains("] reload: "));
    }
    tunnels.iter_mut().for_each(|tunnel| ping(tunnel, b"after the reload"));
    // HAProxy selects each node once.
    for _ in NODES {
        on("client1", || assert_echoes(&mut connect("bob:secret@"), b"a line\n"));
        let output = on("client3", || run(&mut connect("alice:secret@"), b"", TIMEOUT));
        assert!(!output.status.success());
    }
    operator.write("rules", "alow user=*\n");
    let output = run(&mut operator.shell(commands), b"", TIMEOUT);
    assert!(text(&output.stderr).contains("rules: line 1: "), "{}", text(&output.stderr));
    assert_eq!(fs::read_to_string(lab.etc("node1").join("rules")).expect("a file").lines().count(), 2);
}

/// Fails if HAProxy passes new sessions to a node that drains, or if the node ends its tunnels.
#[test]
#[ignore = "make test-system"]
fn drained_node_loses_nothing() {
    let mut lab = open_lab!(&NODES, "--drain-timeout 1m");
    let operator = Operator::new(&lab);
    let mut tunnels: Vec<TcpStream> = (0..3).map(|_| tunnel_from("client2")).collect();
    let errors = run_load(|load| {
        load.wait(100);
        stdout(&mut operator.shell(block("echo 'set server")), b"");
        // /readyz has the status 503.
        wait_until("the node is not ready", CHECK_LIMIT, || lab.stat("node1", "check_status") == "L7STS");
        load.wait(300);
    });
    assert!(errors.is_empty(), "{errors:#?}");
    tunnels.iter_mut().for_each(|tunnel| ping(tunnel, b"still open"));
    drop(tunnels);
    let mut node = lab.nodes.remove("node1").expect("a node");
    assert!(node.wait(TIMEOUT).success(), "{}", node.log());
}

/// Fails if a restart refuses or resets connections, or if HAProxy stops using a node meanwhile.
#[test]
#[ignore = "make test-system"]
fn rolling_restart_under_load_loses_nothing() {
    let lab = open_lab!(&NODES, "--drain-timeout 1m");
    let operator = Operator::new(&lab);
    let mut tunnels: Vec<TcpStream> = (0..3).map(|_| tunnel_from("client2")).collect();
    let mut successors = Vec::new();
    let errors = run_load(|load| {
        load.wait(200);
        stdout(&mut operator.shell(block("for node")), b"");
        successors.extend(lab.nodes.values().map(Successor::after_signal));
        load.wait(600);
    });
    assert!(errors.is_empty(), "{errors:#?}");
    for node in NODES {
        assert_eq!(lab.stat(node, "chkdown"), "0", "{node}");
    }
    tunnels.iter_mut().for_each(|tunnel| ping(tunnel, b"still open"));
    assert!(successors.iter().all(Successor::is_running));
}

/// Fails if the nodes need different keys, or if the name of HAProxy is not enough to find them.
#[test]
#[ignore = "make test-system"]
fn kerberos_needs_one_key_for_all_nodes() {
    if !realm::can_start() || !has_all(&["kvno"]) {
        return;
    }
    let mut lab = lab!();
    let realm = Realm::start();
    let mut config = fs::OpenOptions::new().append(true).open(realm.file("krb5.conf")).expect("a file");
    writeln!(config, "[domain_realm]\n    .test = {REALM}").expect("file written");
    let commands = block("kadmin.local").replace("proxy.example.org", "proxy.test");
    stdout(realm.env(&mut Operator::new(&lab).shell(&commands)), b"");
    let (_, options) = PAGE.split_once("The nodes run with `").expect("options");
    let options = options.split('`').next().expect("the end of the options").replace("EXAMPLE.ORG", REALM);
    // The KDC is not in the network of the clients, so the ticket for the service comes first.
    stdout(realm.env(Command::new("kvno").arg("rcmd/proxy.test")), b"");
    lab.realm = Some(realm);
    lab.start(&NODES, &format!("{BEHIND_HAPROXY} {options}"));
    let realm = lab.realm.as_ref().expect("the realm");
    for _ in NODES {
        on("client1", || assert_echoes(realm.env(connect("").args(["--auth", "gssapi"])), b"a line\n"));
    }
    for node in lab.nodes.values() {
        node.wait_log(|log| session_lines(log).iter().any(|line| line.contains(&format!("user=\"alice@{REALM}\""))));
    }
}

/// Fails if the rules of the page admit other hosts, or stop the checks of HAProxy.
#[test]
#[ignore = "make test-system"]
fn firewall_restricts_metrics_to_the_balancer() {
    if !is_installed("nft") {
        return;
    }
    let lab = open_lab!(&NODES, "");
    let rules = PAGE.split("```nft\n").nth(1).and_then(|rest| rest.split("```").next()).expect("rules");
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    on("node1", || stdout(Command::new("nft").args(["-f", "-"]).env("PATH", path), rules.as_bytes()));
    let limit = Duration::from_millis(500);
    let reaches = |host: &str| on(host, || TcpStream::connect_timeout(&addr("10.2.0.21:9080"), limit).is_ok());
    assert_eq!(["balancer", "node1", "node2", "client1"].map(reaches), [true, true, false, false]);
    // Each node gets a session.
    (0..3).for_each(|_| drop(tunnel_from("client1")));
    lab.node("node1").wait_log(|log| ended_sessions(log) > 0);
    assert_eq!(lab.stat("node1", "chkdown"), "0");
}
