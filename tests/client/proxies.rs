//! Choice of the proxy, and connecting to it: option, variables, names, Unix sockets and chains.

use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::thread;

use crate::support::scripted::{SUCCESS_REPLY, ScriptedServer, reply_with, send, text};
use crate::support::{Server, TIMEOUT, closed_port, echo_server, in_namespace, run, s5, temp_dir};

const TARGET: &str = "target.example:80";

/// Runs `s5 connect` with this option and these variables. Returns status and stderr.
fn run_client(option: Option<&str>, variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = s5();
    command.args(["connect", TARGET]).envs(variables.iter().copied());
    if let Some(option) = option {
        command.args(["-x", option]);
    }
    let output = run(&mut command, b"", TIMEOUT);
    (output.status.code(), text(&output.stderr))
}

#[test]
fn proxy_option_precedes_variables_in_their_order() {
    let proxies: Vec<String> = (0..4).map(|_| closed_port().to_string()).collect();
    let [option, first, second, third] = [0, 1, 2, 3].map(|i| proxies[i].as_str());
    let all = [("S5_PROXY", first), ("all_proxy", second), ("ALL_PROXY", third)];
    let assert_used = |(status, stderr): (Option<i32>, String), proxy: &str| {
        assert_eq!(status, Some(7), "{stderr}");
        assert!(stderr.starts_with(&format!("s5: proxy {proxy}: ")), "{stderr} is not about {proxy}");
    };
    assert_used(run_client(Some(option), &all), option);
    assert_used(run_client(None, &all), first);
    assert_used(run_client(None, &all[1..]), second);
    assert_used(run_client(None, &all[2..]), third);
    assert_used(run_client(None, &[("S5_PROXY", ""), ("all_proxy", ""), ("ALL_PROXY", third)]), third);
}

#[test]
fn default_proxy_is_loopback_port_1080() {
    if !in_namespace("proxies::default_proxy_is_loopback_port_1080", "127.0.0.1 localhost\n", "") {
        return;
    }
    let at = SocketAddr::from(([127, 0, 0, 1], 1080));
    for option in [None, Some("127.0.0.1"), Some("socks5h://127.0.0.1/"), Some("localhost")] {
        let proxy = ScriptedServer::start_at(at, reply_with(&[5, 2, 0, 1, 0, 0, 0, 0, 0, 0]));
        assert_eq!(run_client(option, &[]).0, Some(102));
        assert_eq!(proxy.messages().len(), 2);
    }
}

#[test]
fn proxy_variable_may_contain_a_chain() {
    let second = closed_port();
    let first = ScriptedServer::start(reply_with(&[5, 5, 0, 1, 0, 0, 0, 0, 0, 0]));
    let chain = format!("socks5h://{}, socks5://u:p@{second}", first.addr);
    let (status, stderr) = run_client(None, &[("ALL_PROXY", &chain)]);
    assert_eq!(status, Some(7), "{stderr}");
    assert!(stderr.contains(&format!("request, for {second}: ")), "{stderr}");
}

#[test]
fn unsupported_proxy_scheme_is_a_usage_error() {
    for (variable, value, scheme) in [
        ("ALL_PROXY", "http://alice:topsecret@127.0.0.1:3128", "http"),
        ("all_proxy", "https://alice:topsecret@127.0.0.1:3128", "https"),
        ("S5_PROXY", "socks4a://alice:topsecret@127.0.0.1:3128", "socks4a"),
    ] {
        let (status, stderr) = run_client(None, &[(variable, value)]);
        assert_eq!(status, Some(2), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.starts_with(&format!("s5: {variable}: ")) && stderr.contains(scheme), "{stderr}");
        assert!(!stderr.contains("topsecret"), "{stderr}");
    }
}

#[test]
fn invalid_proxy_is_a_usage_error_that_names_its_source() {
    for proxy in ["host:port", "host:65536", "[::1", "::1]:1", "unix:", "a,unix:/b", "a,,b", "127.0.0.1,", " "] {
        let (status, stderr) = run_client(Some(proxy), &[]);
        assert_eq!(status, Some(2), "{proxy:?}: {stderr}");
        assert!(stderr.starts_with("s5: --proxy: ") && stderr.lines().count() == 1, "{proxy:?}: {stderr}");
    }
    let (status, stderr) = run_client(None, &[("all_proxy", "host:port")]);
    assert_eq!(status, Some(2), "{stderr}");
    assert!(stderr.starts_with("s5: all_proxy: "), "{stderr}");
}

#[test]
fn user_without_password_fails_before_connecting() {
    // Fails before it connects, so no listener is needed.
    let (status, stderr) = run_client(Some("alice@127.0.0.1:1"), &[("CI", "true")]);
    assert_eq!(status, Some(67), "{stderr}");
    assert!(stderr.starts_with("s5: proxy 127.0.0.1:1: login: no password for alice"), "{stderr}");
}

#[test]
fn error_about_a_proxy_url_does_not_contain_the_password() {
    for proxy in [
        "alice:topsecret@host:port",
        "alice:topsecret@[::1",
        "alice:topsecret@",
        "http://alice:topsecret@host",
        "socks5h://alice:topsecret@host:99999",
        "host,alice:topsecret@unix:",
        // Characters that should be percent-encoded, a frequent mistake.
        "alice:a,topsecret@[::1",
        "alice:topsecret,a@[::1",
        "alice:topsecret://a@[::1",
    ] {
        for option in [Some(proxy), None] {
            let variables = if option.is_none() { &[("ALL_PROXY", proxy)][..] } else { &[] };
            let (status, stderr) = run_client(option, variables);
            assert_eq!(status, Some(2), "{stderr}");
            assert!(!stderr.contains("topsecret"), "{stderr}");
        }
    }
}

#[test]
fn ipv6_proxy_is_accepted_with_and_without_a_scheme() {
    for scheme in ["", "socks5://", "socks5h://"] {
        let at = "[::1]:0".parse().expect("valid address");
        let proxy = ScriptedServer::start_at(at, reply_with(&[5, 2, 0, 1, 0, 0, 0, 0, 0, 0]));
        assert_eq!(run_client(Some(&format!("{scheme}{}", proxy.addr)), &[]).0, Some(102));
    }
}

#[test]
fn all_addresses_of_the_proxy_are_tried() {
    let hosts = "::1 proxy.example\n127.0.0.2 proxy.example\n127.0.0.1 proxy.example\n";
    if !in_namespace("proxies::all_addresses_of_the_proxy_are_tried", hosts, "") {
        return;
    }
    let proxy = ScriptedServer::start(reply_with(SUCCESS_REPLY).into_iter().chain([send(b"hello")]).collect());
    let url = format!("proxy.example:{}", proxy.addr.port());
    let output = run(s5().args(["connect", "-x", &url, TARGET]), b"", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{}", text(&output.stderr));
}

#[test]
fn client_connects_to_a_proxy_on_a_unix_socket() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let listen = format!("unix:{}", path.display());
    let _server = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    let target = echo_server().to_string();
    for url in [listen.clone(), format!("socks5h://{listen}")] {
        let output = run(s5().args(["connect", "-x", &url, &target]), b"by path", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "by path".into()));
    }
}

#[test]
fn login_failure_at_a_unix_socket_proxy_names_its_path() {
    let dir = temp_dir();
    let path = dir.path().join("proxy.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let (mut stream, _) = listener.accept().expect("connection accepted");
        stream.read_exact(&mut [0; 4]).expect("greeting received");
        stream.write_all(&[5, 2]).expect("data sent");
        stream.read_exact(&mut [0; 14]).expect("login received");
        stream.write_all(&[1, 1]).expect("data sent");
    });
    let url = format!("alice:secret@unix:{}", path.display());
    let (status, stderr) = run_client(Some(&url), &[]);
    let line = format!("s5: proxy unix:{}: login, for {TARGET}: user name or password refused\n", path.display());
    assert_eq!((status, stderr), (Some(67), line));
}

#[test]
fn unix_socket_proxy_can_only_be_the_first_of_a_chain() {
    let dir = temp_dir();
    let listen = format!("unix:{}", dir.path().join("s5.sock").display());
    let _first = Server::start_with(s5().args(["serve", "--listen", &listen]), 1);
    let second = Server::start(&[]);
    let chain = format!("{listen},{}", second.addr());
    let output = run(s5().args(["connect", "-x", &chain, &echo_server().to_string()]), b"hello", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()));
    let unix_socket_second = format!("{},{listen}", second.addr());
    let (status, stderr) = run_client(Some(&unix_socket_second), &[]);
    assert!(status != Some(0) && stderr.contains("a Unix socket can only be the first hop"), "{stderr}");
}

#[test]
fn client_logs_in_at_each_server_of_a_chain() {
    let dir = temp_dir();
    let server = |name: &str, passwd: &str| {
        // The lowest cost of bcrypt, for speed.
        let hash = bcrypt::hash(passwd, 4).expect("password hashed");
        let users = crate::support::write_file(dir.path(), name, &format!("{name}:{hash}\n"));
        Server::start(&["--users", &users])
    };
    let servers = [server("one", "first"), server("two", "second"), server("three", "third")];
    let chain =
        format!("one:first@{},two:second@{},three:third@{}", servers[0].addr(), servers[1].addr(), servers[2].addr());
    let target = echo_server().to_string();
    let output = run(s5().args(["connect", "-x", &chain, &target]), b"hello", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{}", text(&output.stderr));
    let next = [servers[1].addr().to_string(), servers[2].addr().to_string(), target];
    for ((server, user), next) in servers.iter().zip(["one", "two", "three"]).zip(next) {
        let log = server.wait_log(|log| log.contains("dst="));
        assert!(log.contains(&next) && log.contains(user), "{log}");
    }
    let wrong = chain.replace("second", "wrong");
    let (status, stderr) = run_client(Some(&wrong), &[]);
    assert_eq!(status, Some(67), "{stderr}");
    assert!(stderr.starts_with(&format!("s5: proxy {}: login", servers[1].addr())), "{stderr}");
}
