//! Sources of the proxy and of user name and password: options, files and variables. Prompts are tested in prompts.rs.

use crate::*;

/// A proxy that accepts any login and echoes the data.
pub fn accepting_proxy() -> ScriptedServer {
    ScriptedServer::start_at("127.0.0.1:0", &format!("{LOGIN} > {{request}}; {SUCCESS}"), |mut stream| {
        let mut other = stream.try_clone().expect("cloned");
        let _ = std::io::copy(&mut stream, &mut other);
    })
}

/// Fails unless the proxy receives this login.
pub fn assert_login(proxy: &ScriptedServer, uname: &str, passwd: &[u8]) {
    assert_eq!(text(&proxy.messages()[1]), text(&login_message(uname.as_bytes(), passwd)));
}

/// Another program in the environment of [`s5`], with the path of s5 in `$S5`.
pub fn as_s5(program: &str) -> Command {
    let mut command = Command::new(program);
    let s5 = s5();
    for (name, _) in s5.get_envs().filter(|(_, value)| value.is_none()) {
        command.env_remove(name);
    }
    command.env("S5", s5.get_program());
    command
}

/// Fails unless a client with these options and variables sends this login. `userinfo` is put before the proxy's
/// address.
fn assert_sends(userinfo: &str, options: &[&str], variables: &[(&str, &str)], uname: &str, passwd: &[u8]) {
    let proxy = accepting_proxy();
    let mut command = command(&format!("connect -z -x {userinfo}{} {TARGET}", proxy.addr));
    command.args(options).envs(variables.iter().copied());
    let (status, _, stderr) = outcome_of(&mut command, b"");
    assert_eq!(status, Some(0), "{userinfo} {options:?} {variables:?}: {stderr}");
    assert_login(&proxy, uname, passwd);
}

#[test]
fn no_proxy_targets_bypass_the_proxy_of_the_environment() {
    let hosts = "127.0.0.1 localhost target.example www.target.example mytarget.example\n";
    enter_namespace!(hosts, "");
    let (closed, port) = (closed_port().to_string(), echo_server().port());
    let status = |host: &str, options: &[&str], variables: &[(&str, &str)]| {
        let mut command = command(&format!("connect -z {host} {port}"));
        outcome_of(command.args(options).envs(variables.iter().copied()), b"").0
    };
    let table = [
        ("target.example", "www.target.example", true),
        (".target.example", "www.target.example", true),
        ("target.example", "target.example", true),
        ("target.example", "mytarget.example", false),
        ("other.example, target.example", "target.example", true),
        ("*", "target.example", true),
        ("*", "127.0.0.1", true),
        ("127.0.0.1", "127.0.0.1", true),
        ("127.0.0.0/8", "127.0.0.1", true),
        ("10.0.0.0/8", "127.0.0.1", false),
        // The proxy looks up names, so a CIDR does not match them.
        ("127.0.0.0/8", "target.example", false),
        ("", "target.example", false),
    ];
    for (list, host, is_direct) in table {
        let expected = Some(if is_direct { 0 } else { 7 });
        for name in ["no_proxy", "NO_PROXY"] {
            assert_eq!(status(host, &[], &[("ALL_PROXY", &closed), (name, list)]), expected, "{name}={list} {host}");
        }
        let both = [("ALL_PROXY", closed.as_str()), ("no_proxy", list), ("NO_PROXY", "other.example")];
        assert_eq!(status(host, &[], &both), expected, "no_proxy={list} {host}");
    }
    let upper_case_ignored = [("ALL_PROXY", closed.as_str()), ("no_proxy", "other.example"), ("NO_PROXY", "*")];
    assert_eq!(status("target.example", &[], &upper_case_ignored), Some(7));
    let everything = [("S5_PROXY", closed.as_str()), ("no_proxy", "*"), ("NO_PROXY", "*")];
    assert_eq!(status("target.example", &["-x", &closed], &everything), Some(7), "no_proxy must not apply to -x");
    assert_eq!(
        status("target.example", &[], &everything[1..]),
        Some(7),
        "no_proxy must not apply to the default proxy"
    );
}

#[test]
fn empty_password_of_every_source_is_sent() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "t:\n");
    assert_sends("t:@", &[], &[], "t", b"");
    assert_sends("", &["-P", "t:"], &[], "t", b"");
    assert_sends("", &["--proxy-auth-file", &file], &[], "t", b"");
    for variables in [
        &[("S5_PROXY_AUTH", "t:")][..],
        &[("NCAT_PROXY_AUTH", "t:")],
        &[("SOCKS5_USER", "t"), ("SOCKS5_PASSWORD", "")],
        &[("SOCKS5_USER", "t"), ("SOCKS5_PASSWD", "")],
        &[("SOCKS_USERNAME", "t"), ("SOCKS_PASSWORD", "")],
    ] {
        assert_sends("", &[], variables, "t", b"");
    }
    // A password that is set has precedence over an empty variable.
    assert_sends("", &[], &[("SOCKS5_USER", "t"), ("SOCKS5_PASSWORD", ""), ("SOCKS5_PASSWD", "p")], "t", b"p");
}

#[test]
fn server_sends_an_empty_password_to_its_upstream_and_refuses_one_from_clients() {
    let upstream = accepting_proxy();
    let server = Server::start(&["--via", &format!("token:@{}", upstream.addr)]);
    assert_eq!(outcome(&format!("connect -x {} {TARGET}", server.addr()), b"hello"), success("hello"));
    assert_login(&upstream, "token", b"");
    let (_dir, users) = users_file(&[("alice", "topsecret")]);
    let server = Server::start(&["--users", &users]);
    let refused = outcome(&format!("connect -x alice:@{} {TARGET}", server.addr()), b"");
    assert_line_in(refused, 67, &["user name or password refused"]);
}

#[test]
fn login_sources_have_documented_precedence() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "file:3\n");
    type Source<'a> = (&'a str, &'a str, &'a [&'a str], &'a [(&'a str, &'a str)]);
    let sources: [Source<'_>; 9] = [
        ("url", "1", &[], &[]),
        ("option", "2", &["-P", "option:2"], &[]),
        ("file", "3", &["--proxy-auth-file", &file], &[]),
        ("ours", "4", &[], &[("S5_PROXY_AUTH", "ours:4")]),
        ("ncat", "5", &[], &[("NCAT_PROXY_AUTH", "ncat:5")]),
        ("five", "6", &[], &[("SOCKS5_USER", "five"), ("SOCKS5_PASSWORD", "6")]),
        ("five", "7", &[], &[("SOCKS5_USER", "five"), ("SOCKS5_PASSWD", "7")]),
        ("any", "8", &[], &[("SOCKS_USERNAME", "any"), ("SOCKS_PASSWORD", "8")]),
        // An empty variable is ignored.
        ("any", "8", &[], &[("S5_PROXY_AUTH", ""), ("SOCKS_USERNAME", "any"), ("SOCKS_PASSWORD", "8")]),
    ];
    for (first, (uname, passwd, ..)) in sources.iter().enumerate() {
        let options: Vec<&str> = sources[first..].iter().flat_map(|source| source.2).copied().collect();
        // If a variable is set twice, the last value is used.
        let variables: Vec<_> = sources[first..].iter().rev().flat_map(|source| source.3).copied().collect();
        let userinfo = if first == 0 { "url:1@" } else { "" };
        assert_sends(userinfo, &options, &variables, uname, passwd.as_bytes());
    }
}

#[test]
fn user_in_url_gets_only_the_password_of_that_user() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "alice:hers\r\n\nbob:his\nalice:late\n");
    let options = ["--proxy-auth-file", &file];
    let variables = [
        ("S5_PROXY_AUTH", "carol:third"),
        ("NCAT_PROXY_AUTH", "bob:late"),
        ("SOCKS5_USER", "dave"),
        ("SOCKS5_PASSWD", "fourth"),
        ("SOCKS_USERNAME", "erin"),
        ("SOCKS_PASSWORD", "fifth"),
        ("CI", "true"),
    ];
    let table = [
        ("", "alice", "hers"),
        ("alice@", "alice", "hers"),
        ("bob@", "bob", "his"),
        ("carol@", "carol", "third"),
        ("dave@", "dave", "fourth"),
        ("erin@", "erin", "fifth"),
        ("b%6Fb@", "bob", "his"),
    ];
    for (userinfo, uname, passwd) in table {
        assert_sends(userinfo, &options, &variables, uname, passwd.as_bytes());
        // The user of -P is used for URLs without a user.
        let with_user = [&options[..], &["-P", "bob"]].concat();
        let (uname, passwd) = if userinfo.is_empty() { ("bob", "his") } else { (uname, passwd) };
        assert_sends(userinfo, &with_user, &variables, uname, passwd.as_bytes());
    }
    // Nothing listens at this address: status 67 shows that the client has not connected.
    let closed = closed_port().to_string();
    let mallory = format!("mallory@{closed}");
    for options in [&["-x", &mallory][..], &["-x", &closed, "-P", "mallory"], &["-x", &mallory, "-P", "alice"]] {
        let args = ["connect", TARGET, "--proxy-auth-file", &file];
        let expected = format!("proxy {closed}: login: --proxy-auth-file {file}: no password for mallory\n");
        assert_line_of(s5().args(args).args(options).envs(variables), 67, &[&expected]);
    }
}

#[test]
fn each_proxy_of_a_chain_gets_the_password_of_its_user() {
    let proxy = ScriptedServer::start(&format!("{LOGIN} > {{request}}; {SUCCESS}").repeat(3));
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "alice:hers\nbob:his\n");
    let chain = format!("bob@{},carol:own@second.example,third.example", proxy.addr);
    let args = format!("connect -z -x {chain} --proxy-auth-file {file} {TARGET}");
    assert_eq!(outcome(&args, b""), success(""));
    let messages = proxy.messages();
    let logins = [("bob", "his"), ("carol", "own"), ("alice", "hers")];
    let logins = logins.map(|(uname, passwd)| login_message(uname.as_bytes(), passwd.as_bytes()));
    assert_eq!([&messages[1], &messages[4], &messages[7]], logins.each_ref());
}

#[test]
fn only_passwords_in_urls_are_percent_decoded() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "alice:p:a@b%41, /\n");
    let pair = "alice:p:a@b%41, /";
    let passwd = b"p:a@b%41, /";
    assert_sends("alice:p%3Aa%40b%2541%2C%20%2F@", &[], &[], "alice", passwd);
    assert_sends("unix:secret@", &[], &[], "unix", b"secret");
    assert_sends("", &["--proxy-auth-file", &file], &[], "alice", passwd);
    assert_sends("", &["-P", pair], &[], "alice", passwd);
    assert_sends("", &[], &[("S5_PROXY_AUTH", pair)], "alice", passwd);
    assert_sends("", &[], &[("SOCKS_USERNAME", "alice"), ("SOCKS_PASSWORD", &pair[6..])], "alice", passwd);
    // Bytes that are not UTF-8.
    let file = dir.path().join("bytes");
    std::fs::write(&file, b"alice:\xff\x00\xfe\r\n").expect("file written");
    let file = file.to_str().expect("UTF-8 path");
    assert_sends("", &["--proxy-auth-file", file], &[], "alice", b"\xff\x00\xfe");
}

#[test]
fn auth_file_may_have_a_byte_order_mark_comments_and_blank_lines() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "auth", "\u{feff}alice:secret\r\n \t\r\n# alice:new\n  #\n\nbob:other\r\n");
    assert_sends("", &["--proxy-auth-file", &file], &[], "alice", b"secret");
    assert_sends("bob@", &["--proxy-auth-file", &file], &[], "bob", b"other");
    // The longest login is read from stdin completely.
    let (uname, passwd) = ("u".repeat(255), "p".repeat(255));
    let file = write_file(dir.path(), "longest", &format!("\u{feff}{uname}:{passwd}\r\n"));
    let stdin = std::fs::File::open(&file).expect("file opened");
    let proxy = accepting_proxy();
    let args = ["connect", "-z", "-x", &proxy.addr.to_string(), "--proxy-auth-file", "-", TARGET];
    let output = s5().args(args).stdin(stdin).output();
    assert_eq!(output.expect("s5 runs").status.code(), Some(0));
    assert_login(&proxy, &uname, passwd.as_bytes());
}

#[test]
fn auth_file_on_stdin_is_the_first_line_and_later_data_goes_to_the_target() {
    let dir = temp_dir();
    let payload: Vec<u8> = (0..=255).cycle().skip(10).take(100_000).collect();
    let with_login = [b"alice:se:cret\r\n", payload.as_slice()].concat();
    let file = dir.path().join("both");
    std::fs::write(&file, &with_login).expect("file written");
    write_file(dir.path(), "login", "alice:se:cret\nnot a pair\n");
    let table = [
        ("-", "", with_login.as_slice()),
        ("-", "<both", b"not read"),
        ("fd:3", "3<&0", &with_login),
        ("fd:3", "3<login", &payload),
        ("fd:9", "9<login", &payload),
        // Two descriptors that share a file offset.
        ("fd:3", "<both 3<&0", b"not read"),
    ];
    for (name, redirection, stdin) in table {
        let proxy = accepting_proxy();
        let script = format!("exec \"$S5\" connect -x {} --proxy-auth-file {name} {TARGET} {redirection}", proxy.addr);
        let output = run(as_s5("sh").current_dir(dir.path()).args(["-c", &script]), stdin, TIMEOUT);
        assert_eq!(output.status.code(), Some(0), "{script}: {}", text(&output.stderr));
        assert_login(&proxy, "alice", b"se:cret");
        assert!(output.stdout == payload, "{script}: {} bytes were returned", output.stdout.len());
    }
}

#[test]
fn password_line_on_stdin_is_not_sent_to_the_target() {
    let ((_server, proxy), target) = (serve(), echo_server());
    let with_password = format!("bob:own@{proxy}");
    // The line is consumed even if the password is not used.
    for options in [&proxy, &with_password, "", &format!("{proxy} --auth none")] {
        let args = format!("connect --proxy-auth-file - {target} -x {options}");
        assert_eq!(outcome(&args, b"alice:topsecret\npayload"), success("payload"), "{options:?}");
    }
}

#[test]
fn invalid_login_source_is_a_usage_error_that_names_the_source() {
    let dir = temp_dir();
    let file = |name: &str, bytes: &str| write_file(dir.path(), name, bytes);
    let long = format!("alice:topsecret{}\n", "x".repeat(250));
    let files = [
        (file("pair", "alice topsecret\n"), "pair: line 1: expected user:password"),
        (file("third", "alice:secret\n\ntopsecret"), "third: line 3: expected user:password"),
        (file("empty", "\n\n"), "empty: no user:password found"),
        (file("long", &long), "the password has 259 bytes"),
        (file("no_user", ":topsecret\n"), "the user name has 0 bytes"),
        ("/nonexistent/auth".into(), "/nonexistent/auth: "),
        (dir.path().display().to_string(), "--proxy-auth-file "),
        ("-".into(), "--proxy-auth-file -: line 1: "),
        ("fd:0".into(), "--proxy-auth-file fd:0: "),
        ("fd:2".into(), "--proxy-auth-file fd:2: "),
        ("fd:99".into(), "--proxy-auth-file fd:99: "),
        ("fd:-3".into(), "--proxy-auth-file fd:-3: "),
        ("fd:".into(), "--proxy-auth-file fd:: "),
    ];
    let closed = closed_port().to_string();
    for mode in ["connect", "bind", "udp"] {
        for (file, what) in &files {
            let args = [mode, "-x", &closed, "--proxy-auth-file", file, TARGET];
            assert_line_in(outcome_of(s5().args(args), b"topsecret\n"), 2, &[what]);
        }
    }
    for (name, value, what) in [
        ("S5_PROXY_AUTH", "topsecret", "S5_PROXY_AUTH: "),
        ("NCAT_PROXY_AUTH", "topsecret", "NCAT_PROXY_AUTH: "),
        ("S5_PROXY_AUTH", ":secret", "the user name has 0 bytes"),
        ("S5_PROXY_AUTH", &long, "the password has "),
    ] {
        assert_line_of(s5().args(["connect", "-x", &closed, TARGET]).env(name, value), 2, &[what]);
    }
}

#[test]
fn password_method_is_offered_only_if_a_password_is_given() {
    let known = ("S5_PROXY_AUTH", "alice:secret");
    type Row<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], &'a [u8]);
    let table: [Row<'_>; 10] = [
        ("", &[], &[("USER", "alice"), ("LOGNAME", "alice")], &[0]),
        ("", &[], &[("SOCKS5_USER", "alice"), ("SOCKS_PASSWORD", "secret")], &[0]),
        ("", &[], &[known], &[0, 2]),
        ("", &["-P", "alice:secret"], &[], &[0, 2]),
        ("alice:secret@", &[], &[], &[0, 2]),
        ("alice@", &[], &[known], &[0, 2]),
        ("", &["--auth", "none"], &[known], &[0]),
        ("alice:secret@", &["--auth", "none"], &[], &[0]),
        // Without a login the password is not required.
        ("alice@", &["--auth", "none"], &[("CI", "true")], &[0]),
        ("", &["--auth", "password,none"], &[known], &[2, 0]),
    ];
    for (userinfo, options, variables, methods) in table {
        let proxy = ScriptedServer::start(&format!("{NO_AUTH} {SUCCESS}"));
        let mut command = command(&format!("connect -z -x {userinfo}{} {TARGET}", proxy.addr));
        let (status, _, stderr) = outcome_of(command.args(options).envs(variables.iter().copied()), b"");
        assert_eq!(status, Some(0), "{stderr}");
        let greeting = [&[5, u8::try_from(methods.len()).expect("at most 255")], methods].concat();
        assert_eq!(proxy.message(), greeting, "{userinfo} {options:?} {variables:?}");
    }
}
