//! Choice of the proxy, and connecting to it: option, variables, names, Unix sockets and chains.

use crate::*;

/// Runs `s5 connect` with this option and these variables. Returns status and stderr.
fn run_client(option: Option<&str>, variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = s5();
    command.args(["connect", TARGET]).envs(variables.iter().copied());
    if let Some(option) = option {
        command.args(["-x", option]);
    }
    let (status, _, stderr) = outcome_of(&mut command, b"");
    (status, stderr)
}

#[test]
fn proxy_sources_have_documented_precedence() {
    let names = ["S5_PROXY", "all_proxy", "ALL_PROXY", "SOCKS5_SERVER", "SOCKS_SERVER"];
    let option = closed_port().to_string();
    let proxies = names.map(|name| (name, closed_port().to_string()));
    let proxies = proxies.each_ref().map(|(name, proxy)| (*name, proxy.as_str()));
    let assert_used = |(status, stderr): (Option<i32>, String), proxy: &str| {
        assert!(status == Some(7) && stderr.starts_with(&format!("s5: proxy {proxy}: ")), "{proxy}: {stderr}");
    };
    for first in 0..proxies.len() {
        assert_used(run_client(None, &proxies[first..]), proxies[first].1);
        assert_used(run_client(Some(&option), &proxies[first..]), &option);
    }
    // An empty variable is ignored.
    assert_used(run_client(None, &[("S5_PROXY", ""), ("all_proxy", ""), proxies[2]]), proxies[2].1);
}

#[test]
fn default_proxy_is_loopback_port_1080() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    for option in [None, Some("127.0.0.1"), Some("socks5h://127.0.0.1/"), Some("localhost")] {
        let proxy = ScriptedServer::start_at("127.0.0.1:1080", &reply("05 02 00 01 00*6"), drop);
        assert_eq!(run_client(option, &[]).0, Some(102));
        assert_eq!(proxy.messages().len(), 2);
    }
}

#[test]
fn every_socks_scheme_selects_socks5_with_remote_resolution() {
    let denied = || ScriptedServer::start(&reply("05 02 00 01 00*6"));
    for name in ["S5_PROXY", "all_proxy", "ALL_PROXY", "SOCKS5_SERVER", "SOCKS_SERVER"] {
        let proxy = denied();
        let url = format!("socks://{}/", proxy.addr);
        assert_eq!(run_client(None, &[(name, &url)]).0, Some(102), "{name}");
        assert!(proxy.messages()[1].ends_with(b"target.example\0\x50"), "{name}: the name is not in the request");
    }
    for scheme in ["socks", "SOCKS", "socks5", "socks5h"] {
        let proxy = denied();
        assert_eq!(run_client(Some(&format!("{scheme}://{}", proxy.addr)), &[]).0, Some(102), "{scheme}");
    }
    let (upstream, target) = (Server::start(&[]), echo_server());
    let url = format!("socks://{}", upstream.addr());
    for args in [&["--via", &url][..], &["--hop", &format!("h={url}"), "--allow", "via=h"]] {
        let server = Server::start(args);
        assert_eq!(outcome(&format!("connect -x {} {target}", server.addr()), b"hello"), success("hello"));
    }
    for scheme in ["socks4", "socks4a", "http"] {
        let (status, stderr) = run_client(Some(&format!("{scheme}://127.0.0.1:1")), &[]);
        assert!(status == Some(2) && stderr.contains(&format!("{scheme}:// is not supported")), "{stderr}");
    }
}

#[test]
fn proxy_variable_may_contain_a_chain() {
    let second = closed_port();
    let first = ScriptedServer::start(&reply("05 05 00 01 00*6"));
    let chain = format!("socks5h://{}, socks5://u:p@{second}", first.addr);
    let (status, stderr) = run_client(None, &[("ALL_PROXY", &chain)]);
    assert!(status == Some(7) && stderr.contains(&format!("request, for {second}: ")), "{stderr}");
}

#[test]
fn chain_is_a_list_or_a_repeated_option() {
    let chains = ["-x ADDR,second.example:2,third.example:3", "-x ADDR,second.example:2 -x third.example:3"];
    for chain in chains.into_iter().chain(["-x ADDR -x second.example:2 -x third.example:3"]) {
        let proxy = ScriptedServer::start(&format!("{NO_AUTH} {SUCCESS}").repeat(3));
        let args = chain.replace("ADDR", &proxy.url());
        assert_eq!(outcome(&format!("connect -z {TARGET} {args}"), b""), success(""), "{chain}");
        let messages = proxy.messages();
        for (request, host) in [(1, "second.example"), (3, "third.example"), (5, "target.example")] {
            assert!(messages[request].windows(host.len()).any(|part| part == host.as_bytes()), "{chain}: {messages:?}");
        }
    }
}

#[test]
fn direct_option_ignores_proxy_variables() {
    let (closed, target) = (closed_port().to_string(), echo_server());
    for option in ["-x ", "--proxy=", "--direct", "--no-proxy"] {
        let mut command = command(&format!("connect {target} {option}"));
        assert_eq!(outcome_of(command.env("S5_PROXY", &closed), b"direct"), success("direct"), "{option}");
    }
}

#[test]
fn unsupported_or_invalid_proxy_is_a_usage_error_that_names_its_source_without_the_password() {
    let invalid = ["host:port", "host:65536", "[::1", "::1]:1", "unix:", "a,unix:/b", "a,,b", "127.0.0.1,", " "];
    let with_password = [
        "alice:topsecret@host:port",
        "alice:topsecret@[::1",
        "alice:topsecret@",
        "http://alice:topsecret@host",
        "https://alice:topsecret@127.0.0.1:3128",
        "socks4a://alice:topsecret@127.0.0.1:3128",
        "socks5h://alice:topsecret@host:99999",
        "host,alice:topsecret@unix:",
        // Characters that should be percent-encoded, a frequent mistake.
        "alice:a,topsecret@[::1",
        "alice:topsecret,a@[::1",
        "alice:topsecret://a@[::1",
    ];
    for proxy in invalid.into_iter().chain(with_password) {
        for (source, option, variable) in [("--proxy", Some(proxy), ""), ("all_proxy", None, proxy)] {
            let (status, stderr) = run_client(option, &[("all_proxy", variable)]);
            assert_eq!((status, stderr.lines().count()), (Some(2), 1), "{proxy:?}: {stderr}");
            assert!(stderr.starts_with(&format!("s5: {source}: ")), "{proxy:?}: {stderr}");
            let scheme = proxy.split_once("://").map_or("", |(scheme, _)| scheme);
            assert!(scheme.contains("topsecret") || stderr.contains(scheme), "{proxy:?}: {stderr}");
            assert!(!stderr.contains("topsecret"), "{stderr}");
        }
    }
}

#[test]
fn ipv6_proxy_is_accepted_with_and_without_a_scheme() {
    for scheme in ["", "socks5://", "socks5h://"] {
        let proxy = ScriptedServer::start_at("[::1]:0", &reply("05 02 00 01 00*6"), drop);
        assert_eq!(run_client(Some(&format!("{scheme}{}", proxy.addr)), &[]).0, Some(102));
    }
}

#[test]
fn all_addresses_of_the_proxy_are_tried() {
    let hosts = "::1 proxy.example\n127.0.0.2 proxy.example\n127.0.0.1 proxy.example\n";
    enter_namespace!(hosts, "");
    let proxy = ScriptedServer::start(&format!("{NO_AUTH} {SUCCESS} < \"hello\""));
    let args = format!("connect -x proxy.example:{} {TARGET}", proxy.addr.port());
    assert_eq!(outcome(&args, b""), success("hello"));
}

/// Starts a server on a Unix socket. Returns it, the directory and the path of the socket, which has an `@`.
fn serve_on_unix_socket() -> (Server, tempfile::TempDir, String) {
    let dir = temp_dir();
    fs::create_dir(dir.path().join("s5:x@work")).expect("directory created");
    let path = dir.path().join("s5:x@work/s5@localhost:1").display().to_string();
    (crate::support::serve(&format!("unix:{path}"), 1, &[]), dir, path)
}

#[test]
fn client_connects_to_a_proxy_on_a_unix_socket() {
    let ((_server, _dir, path), target) = (serve_on_unix_socket(), echo_server());
    for url in [format!("unix:{path}"), format!("socks5h://unix:{path}"), format!("socks5h://localhost{path}")] {
        assert_eq!(outcome(&format!("connect -x {url} {target}"), b"by path"), success("by path"));
        let mut with_variable = command(&format!("connect {target}"));
        assert_eq!(outcome_of(with_variable.env("ALL_PROXY", &url), b"by path"), success("by path"));
    }
}

#[test]
fn at_sign_in_the_path_of_a_proxy_is_no_login() {
    let ((_server, dir, path), target) = (serve_on_unix_socket(), echo_server());
    let (link, encoded) = (dir.path().join("a,b|?%"), format!("{}/a%2Cb%7C%3F%25", dir.path().display()));
    std::os::unix::fs::symlink(&path, link).expect("link created");
    for url in [format!("u:p@unix:{path}"), format!("u:p@localhost{path}"), format!("unix:{encoded}")] {
        assert_eq!(outcome(&format!("connect -x {url} {target}"), b"by path"), success("by path"), "{url}");
        let via = Server::start(&["--via", &url]);
        assert_eq!(outcome(&format!("connect -x {} {target}", via.addr()), b"via"), success("via"), "{url}");
    }
    let slash = ["127.0.0.1:1/topsecret@localhost:1", "socks5h://u:topsecret/x@localhost", "localhost:1/topsecret@h"];
    for url in slash.into_iter().chain(["unix:topsecret/x@h", "socks5h://unix:topsecret/x@h"]) {
        let (status, stderr) = run_client(Some(url), &[]);
        assert!(status == Some(2) && stderr.contains("a proxy URL has no path"), "{url}: {stderr}");
        assert!(!stderr.contains("topsecret"), "{url}: {stderr}");
    }
    let closed = closed_port();
    for userinfo in ["unix:topsecret", "socks5h://unix:topsecret", "u:p@unix:topsecret", "unix:.topsecret"] {
        let (status, stderr) = run_client(Some(&format!("{userinfo}@{closed}")), &[]);
        assert!(status == Some(7) && stderr.starts_with(&format!("s5: proxy {closed}: ")), "{userinfo}: {stderr}");
        assert!(!stderr.contains("topsecret"), "{userinfo}: {stderr}");
    }
}

#[test]
fn login_failure_at_a_unix_socket_proxy_names_its_path() {
    let dir = temp_dir();
    let path = dir.path().join("proxy.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("connection accepted");
        for (length, answer) in [(4, [5, 2]), (14, [1, 1])] {
            stream.read_exact(&mut vec![0; length]).expect("message received");
            stream.write_all(&answer).expect("data sent");
        }
    });
    let line = format!("s5: proxy unix:{}: login, for {TARGET}: user name or password refused\n", path.display());
    let args = format!("connect -x alice:secret@unix:{} {TARGET}", path.display());
    assert_eq!(outcome(&args, b""), failure(67, &line));
}

#[test]
fn unix_socket_proxy_can_only_be_the_first_of_a_chain() {
    let ((_first, _dir, path), (_second, second)) = (serve_on_unix_socket(), serve());
    let target = echo_server();
    assert_eq!(outcome(&format!("connect -x unix:{path},{second} {target}"), b"hello"), success("hello"));
    let args = format!("connect -x {second},unix:{path} {target}");
    assert_line(&args, 2, &["a Unix socket can only be the first hop"]);
}

#[test]
fn client_logs_in_at_each_server_of_a_chain() {
    let users = [("one", "first"), ("two", "second"), ("three", "third")];
    let files = users.map(|user| users_file(&[user]));
    let servers = files.each_ref().map(|(_, users)| Server::start(&["--users", users]));
    let [one, two, three] = servers.each_ref().map(|server| server.addr().to_string());
    let (chain, target) = (format!("one:first@{one},two:second@{two},three:third@{three}"), echo_server().to_string());
    assert_eq!(outcome(&format!("connect -x {chain} {target}"), b"hello"), success("hello"));
    for ((server, (user, _)), next) in servers.iter().zip(users).zip([&two, &three, &target]) {
        let log = server.wait_log(|log| log.contains("to="));
        assert!(log.contains(next) && log.contains(user), "{log}");
    }
    let wrong = chain.replace("second", "wrong");
    assert_line(&format!("connect -x {wrong} {target}"), 67, &[&format!("s5: proxy {two}: login")]);
}
