//! src/dist/kubernetes.yaml: its form, and three pods that run as it says, on the nodes of the lab. The volumes have the
//! links of the kubelet, and the root file system is read-only.

use super::lab::PUBLIC_TARGET;
use super::*;

const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/dist/kubernetes.yaml");
/// Writes the rules to a file. Prints the time from SIGTERM to SIGKILL in seconds, the paths of the probes, and the
/// arguments of s5.
const READ: &str = r#"
import sys, yaml
documents = {document["kind"]: document for document in yaml.safe_load_all(open(sys.argv[1]))}
pod = documents["Deployment"]["spec"]["template"]["spec"]
s5 = pod["containers"][0]
open(sys.argv[2], "w").write(documents["ConfigMap"]["data"]["rules"])
print(pod["terminationGracePeriodSeconds"] - s5["lifecycle"]["preStop"]["sleep"]["seconds"])
print(s5["readinessProbe"]["httpGet"]["path"])
print(s5["livenessProbe"]["httpGet"]["path"])
print(*s5["args"], sep="\n")
"#;

/// The directory of the Python package kubernetes-validate. `None` if it cannot be downloaded.
fn kubernetes_validate() -> Option<TempDir> {
    let dir = temp_dir();
    if !is_strict() {
        record_skip("kubernetes-validate is downloaded by make test-system only");
        return None;
    }
    let mut pip = Command::new(PYTHON);
    pip.args(["-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check", "--retries", "1"]);
    pip.args(["--timeout", "5", "--only-binary", ":all:", "--target"]).arg(dir.path()).arg("kubernetes-validate");
    let output = run(&mut pip, b"", LONG_TIMEOUT);
    if output.status.success() {
        return Some(dir);
    }
    // Skipped even if S5_TEST_STRICT=1: the network can be unavailable.
    record_skip(&format!("kubernetes-validate is not available: {}", text(&output.stderr)));
    None
}

/// Fails if the manifest has an unknown or a missing field.
#[test]
#[ignore = "make test-system"]
fn manifest_is_valid() {
    let Some(dir) = kubernetes_validate() else { return };
    for version in ["1.30.0", "1.37.0"] {
        let mut validate = Command::new(dir.path().join("bin/kubernetes-validate"));
        validate.args(["--strict", "-k", version, MANIFEST]).env("PYTHONPATH", dir.path());
        stdout(&mut validate, b"");
    }
}

/// Writes a file as the kubelet does: the name is a link to a file in a directory that is replaced as a whole.
fn write_volume(dir: &Path, name: &str, content: &str) {
    fs::create_dir_all(dir.join("..2026")).expect("directory created");
    write_file(&dir.join("..2026"), name, content);
    symlink("..2026", dir.join("..data")).expect("link created");
    symlink(format!("..data/{name}"), dir.join(name)).expect("link created");
}

/// Returns the status of a probe of the kubelet on a node.
fn probe(node: &str, path: &str) -> u16 {
    let mut stream = on(node, || TcpStream::connect((node, 9080))).expect("the node serves probes");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {node}:9080\r\nConnection: close\r\n\r\n").expect("request sent");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("a response");
    response.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status")
}

/// Fails if s5 needs more than the manifest gives it, or if Kubernetes kills it before it has drained.
#[test]
#[ignore = "make test-system"]
fn pods_of_the_manifest_serve_and_drain() {
    if !has_python_module("yaml", "python3-yaml") {
        return;
    }
    let mut lab = lab!();
    let rules = lab.dir.path().join("rules");
    let printed = text(&stdout(Command::new(PYTHON).args(["-c", READ, MANIFEST]).arg(&rules), b""));
    let lines: Vec<&str> = printed.lines().collect();
    let [time, ready, healthy, "serve", args @ ..] = &lines[..] else { panic!("{printed}") };
    for node in NODES {
        write_volume(&lab.etc(node).join("users"), "users", &user_line("alice", "secret"));
        write_volume(&lab.etc(node).join("rules"), "rules", &fs::read_to_string(&rules).expect("a file"));
    }
    lab.setup = "mount -o remount,bind,ro / && export HOME=/ &&";
    let args: String = args.iter().map(|arg| format!(" '{}'", arg.replace("$(POD_IP)", "10.2.0.NODE"))).collect();
    lab.start_nodes(&NODES, &args);
    for node in NODES {
        assert_eq!([probe(node, ready), probe(node, healthy)], [200, 200]);
        let connect = |target: &str| {
            let mut command = s5();
            command.args(["connect", "-x", &format!("socks5://alice:secret@{node}"), target]);
            command
        };
        on("client1", || assert_echoes(&mut connect(PUBLIC_TARGET), b"through a pod"));
        let output = on("client1", || run(&mut connect(TARGET[0]), b"", TIMEOUT));
        assert_fails_with(&output, 102, &["not allowed"]);
    }
    let mut pod = lab.nodes.remove("node1").expect("a node");
    let mut client = s5();
    client.args(["connect", "-x", "socks5://alice:secret@node1", PUBLIC_TARGET]);
    let mut client = on("client1", || RunningProgram::start(&mut client));
    client.write(b"before");
    client.stdout(|bytes| bytes == b"before");
    pod.signal("TERM");
    let log = pod.wait_log(|log| log.contains("draining sessions for up to "));
    let drain = log.split("for up to ").nth(1).and_then(|rest| rest.split('s').next()).expect("a time");
    assert!(drain.parse::<u32>().expect("seconds") < time.parse().expect("seconds"), "{drain} s, {time} s");
    assert_eq!([probe("node1", ready), probe("node1", healthy)], [503, 200]);
    client.write(b" after");
    client.stdout(|bytes| bytes == b"before after");
    client.close_stdin();
    assert!(pod.wait(TIMEOUT).success(), "{}", pod.log());
}
