//! The lab: three clients, HAProxy, three nodes and a target, each with its own network namespace. The namespace of the
//! test is the router between the networks of the clients, of the servers and of the targets.

use crate::in_network;
use crate::support::bytes::poll_until;
use crate::support::realm::Realm;
use crate::support::*;

/// /etc/hosts of all hosts. The names in haproxy.cfg are resolved with it.
pub const HOSTS: &str = "127.0.0.1 localhost\n10.2.0.10 proxy.test\n10.2.0.21 node1\n10.2.0.22 node2\n10.2.0.23 node3\n\
                         10.3.0.31 target\n";
/// The addresses of the target, which sends all data back.
pub const TARGET: [&str; 2] = ["10.3.0.31:7", "[fd00:3::31]:7"];
pub const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// The address of the target that the rules in kubernetes.yaml allow.
pub const PUBLIC_TARGET: &str = "203.0.113.31:7";
/// This port of the target sends zeros until the client disconnects.
pub const SOURCE: &str = "10.3.0.31:19";
/// Options of each node behind HAProxy, and behind the NAT of the router. `NODE` is the last byte of its addresses.
pub const BEHIND_HAPROXY: &str = "--listen '*:1080' --proxy-protocol-from 10.2.0.10 --metrics 10.2.0.NODE:9080 \
                                  --allow-remote-metrics --advertise 198.51.100.NODE --advertise 2001:db8::NODE";
/// Time limit for HAProxy to notice a change: two checks, one second apart, on a loaded machine.
pub const CHECK_LIMIT: Duration = Duration::from_secs(10);
/// All names stand for the only user of the namespace: HAProxy can switch to its user, and files can belong to s5.
const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nhaproxy:x:0:0::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nhaproxy:x:0:\ns5:x:0:\n";

/// Runs the rest of the test in a lab. Returns from the test outside of it, and if a program is missing.
macro_rules! lab {
    () => {{
        if !has_all(&["haproxy", "ip", "nft", "unshare"]) {
            return;
        }
        enter_namespace!(HOSTS, "");
        Lab::build()
    }};
}
pub(super) use lab;

/// Builds a lab with nodes that require no login.
macro_rules! open_lab {
    ($nodes:expr, $options:expr) => {{
        let mut lab = lab!();
        lab.start($nodes, &format!("{BEHIND_HAPROXY} --allow-open-relay {}", $options));
        lab
    }};
}
pub(super) use open_lab;

/// Runs `work` on a thread in the network of a host.
pub fn on<T: Send>(host: &str, work: impl FnOnce() -> T + Send) -> T {
    in_network(&format!("/run/netns/{host}"), work)
}

/// Number of the last byte of the addresses of a node.
fn number(node: &str) -> u8 {
    20 + node.trim_start_matches("node").parse::<u8>().expect("node1, node2 or node3")
}

/// The networks, HAProxy, and the nodes that run.
pub struct Lab {
    haproxy: Option<RunningProgram>,
    pub nodes: BTreeMap<&'static str, Server>,
    pub dir: TempDir,
    /// Options of all nodes, for a shell. `NODE` is the last byte of the addresses of the node.
    options: String,
    /// Commands for a shell that runs before each node, followed by `&&`.
    pub setup: &'static str,
    /// Kerberos, if the nodes use it.
    pub realm: Option<Realm>,
}

impl Lab {
    /// Builds the networks and starts the target.
    pub fn build() -> Self {
        let dir = temp_dir();
        for name in ["etc/s5", "node1", "node2", "node3"] {
            fs::create_dir_all(dir.path().join(name)).expect("directory created");
        }
        write_file(dir.path(), "etc/passwd", PASSWD);
        write_file(dir.path(), "etc/group", GROUP);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system/cluster/network.sh");
        stdout(Command::new("sh").arg(script).arg(dir.path()), b"");
        start_target();
        Self { haproxy: None, nodes: BTreeMap::new(), dir, options: String::new(), setup: "", realm: None }
    }

    /// Starts these nodes with these options, without HAProxy.
    pub fn start_nodes(&mut self, nodes: &[&'static str], options: &str) {
        self.options = options.to_owned();
        nodes.iter().for_each(|node| self.start_node(node));
    }

    /// Starts these nodes with these options, and HAProxy. Waits until it has checked the nodes.
    pub fn start(&mut self, nodes: &[&'static str], options: &str) {
        self.start_nodes(nodes, options);
        self.haproxy = Some(start_haproxy());
        // A node counts as up before its first check.
        let is_checked = |node: &&str| self.stat(node, "check_status") == "L7OK";
        wait_until("HAProxy has checked the nodes", CHECK_LIMIT, || nodes.iter().all(is_checked));
    }

    /// Starts a node, and does not wait for HAProxy.
    pub fn start_node(&mut self, name: &'static str) {
        let options = self.options.replace("NODE", &number(name).to_string());
        let script = format!("mount --bind \"$0\" /etc/s5 && {} exec \"$1\" serve {options}", self.setup);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", &script]).arg(self.etc(name)).arg(env!("CARGO_BIN_EXE_s5"));
        if let Some(realm) = &self.realm {
            realm.env(&mut command);
        }
        let server = on(name, || Server::start_with(&mut command, 2));
        write_file(self.dir.path(), &format!("{name}.pid"), &server.pid().to_string());
        self.nodes.insert(name, server);
    }

    /// The directory that is /etc/s5 on a node.
    pub fn etc(&self, node: &str) -> PathBuf {
        self.dir.path().join(node)
    }

    pub fn node(&self, name: &str) -> &Server {
        &self.nodes[name]
    }

    /// Sends a command to HAProxy's socket, and returns the answer.
    pub fn haproxy(&self, command: &str) -> String {
        let mut socket = UnixStream::connect("/run/haproxy/admin.sock").expect("HAProxy runs");
        socket.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
        socket.write_all(format!("{command}\n").as_bytes()).expect("command sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("HAProxy answers");
        answer
    }

    /// A field of a node in the statistics of HAProxy (`show stat`).
    pub fn stat(&self, node: &str, field: &str) -> String {
        let stats = self.haproxy("show stat");
        let mut lines = stats.lines().map(|line| line.trim_start_matches("# ").split(',').collect::<Vec<_>>());
        let names = lines.next().expect("the names of the fields");
        let at = names.iter().position(|name| *name == field).expect("a field of the statistics");
        let values = lines.find(|values| values.get(1) == Some(&node)).expect("a node of haproxy.cfg");
        values[at].to_owned()
    }

    /// The process of HAProxy that accepts connections.
    pub fn haproxy_worker(&self) -> u32 {
        let info = self.haproxy("show info");
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid: ")).expect("a process id");
        pid.parse().expect("a number")
    }

    /// Reloads HAProxy as systemd does, and waits until another process accepts connections.
    pub fn reload_haproxy(&self) {
        let (before, pid) = (self.haproxy_worker(), self.haproxy.as_ref().expect("HAProxy runs").pid());
        stdout(Command::new("kill").args(["-s", "USR2", &pid.to_string()]), b"");
        wait_until("HAProxy reloads", TIMEOUT, || self.haproxy_worker() != before);
    }

    /// Waits until HAProxy sees a node in this state, such as `UP`, `DOWN` or `DRAIN`.
    pub fn wait_state(&self, node: &str, state: &str) {
        wait_until(&format!("{node} is {state}"), CHECK_LIMIT, || self.stat(node, "status") == state);
    }

    /// Number of connections that HAProxy has passed to each node, in the order of their names.
    pub fn total_sessions(&self) -> Vec<u32> {
        self.nodes.keys().map(|node| self.stat(node, "stot").parse().expect("a number")).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let Some(haproxy) = &mut self.haproxy else { return };
        // Unlike SIGKILL, this ends the workers of HAProxy too.
        let _ = Command::new("kill").args(["-s", "TERM", &haproxy.pid().to_string()]).status();
        poll_until(TIMEOUT, || !haproxy.is_running());
        if thread::panicking() {
            eprintln!("the log of HAProxy:\n{}", haproxy.stderr_so_far());
        }
    }
}

/// Starts the servers of the target: TCP and UDP echo, and a source of data.
fn start_target() {
    on("target", || {
        for addr in TARGET.into_iter().chain([PUBLIC_TARGET]).map(addr) {
            serve(addr, echo);
            udp_echo(UdpSocket::bind(addr).expect("free port"));
        }
        serve(addr(SOURCE), |mut stream| while stream.write_all(&[0; 1 << 16]).is_ok() {});
    });
}

fn serve(addr: SocketAddr, serve: fn(&TcpStream)) {
    let listener = TcpListener::bind(addr).expect("free port");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(&stream));
        }
    });
}

fn echo(mut stream: &TcpStream) {
    let _ = io::copy(&mut { stream }, &mut stream);
    let _ = stream.shutdown(Shutdown::Write);
}

/// Connects a host to its network (`up`), or disconnects it (`down`). It keeps its addresses.
pub fn set_link(host: &str, state: &str) {
    stdout(Command::new("ip").args(["link", "set", host, state]), b"");
}

fn start_haproxy() -> RunningProgram {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new("haproxy");
    command.args(["-W", "-f", concat!(env!("CARGO_MANIFEST_DIR"), "/src/dist/haproxy.cfg")]).env("PATH", path);
    let haproxy = on("balancer", || RunningProgram::start(&mut command));
    let socket = Path::new("/run/haproxy/admin.sock");
    wait_until("HAProxy runs", TIMEOUT, || UnixStream::connect(socket).is_ok());
    haproxy
}
