//! Before the server starts: --show-rules, --explain, errors in rules, and the refusal to be an open relay.

use super::tools::{Setup, alice_and_bob, only_alice};
use crate::support;
use crate::*;

/// Runs `s5 serve` with options that make it exit without serving.
fn serve(args: &[&str]) -> Output {
    run(s5().arg("serve").args(args), b"", TIMEOUT)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn show_rules_prints_order_and_origin() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "rules", "# ours\ndeny   port=25\n\nallow from=10.0.0.0/8 # them\n");
    let args = ["--listen", "127.0.0.1:1080", "--listen", "*:1081", "--advertise", "203.0.113.5", "--rules", &file];
    let rules = ["--allow", "to=a.test", "--rule", "deny to=b.test", "--deny", "to=c.test", "--allow", "to=d.test"];
    let output = serve(&[&args[..], &rules, &["--show-rules"]].concat());
    let lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
    let expected = [
        ("allow to=a.test", "--allow"),
        ("deny to=b.test", "--rule"),
        ("deny to=c.test", "--deny"),
        ("allow to=d.test", "--allow"),
        ("deny port=25", &format!("{file} line 2")),
        ("allow from=10.0.0.0/8", &format!("{file} line 4")),
        ("deny to=127.0.0.1 port=1080", "built in, own listener"),
        ("deny to=(any address of this host) port=1081", "built in, own listener"),
        ("deny to=203.0.113.5 port=1080", "built in, own listener"),
        ("deny to=203.0.113.5 port=1081", "built in, own listener"),
        (
            "deny from=remote to=.localhost,0.0.0.0/8,127.0.0.0/8,169.254.0.0/16,224.0.0.0/4,255.255.255.255,\
             ::,::1,fd00:ec2::254,fe80::/10,ff00::/8",
            "built in",
        ),
        ("deny", "built in, because an allow rule has from="),
    ];
    assert_eq!(lines.len(), expected.len() + 1, "{lines:#?}");
    for (line, (rule, origin)) in lines.iter().zip(expected) {
        let (shown, comment) = line.split_once('#').expect("a comment");
        assert_eq!((shown.trim_end(), comment.trim()), (rule, origin));
    }
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    for (port, status) in [(1080, 1), (1081, 1), (1082, 0)] {
        let request = format!("from=10.1.0.2 to=203.0.113.5:{port}");
        assert_eq!(serve(&[&args[..], &["--explain", &request]].concat()).status.code(), Some(status), "{request}");
    }
    // Without an allow that has from=, the default is to allow, and no rule follows it.
    let shown = text(&serve(&["--show-rules"]).stdout);
    let last_rule = shown.lines().rfind(|line| !line.starts_with('#')).expect("a rule");
    assert!(last_rule.starts_with("allow  "), "{shown}");
}

#[test]
fn explain_names_deciding_rule() {
    let hosts = "127.0.0.2 pair.test\n127.0.0.3 pair.test\n127.0.0.3 bad.test\n";
    enter_namespace!(hosts, dns::RESOLV);
    let queries = dns::start();
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let rules = "deny to=127.0.0.3\ndeny to=.denied.test\ndeny user=alice port=25\n";
    let rules = write_file(dir.path(), "rules", rules);
    let at = |line: u8, rule: &str| format!("{rules} line {line} ({rule})");
    let (denied_addr, denied_name) = (at(1, "deny to=127.0.0.3"), at(2, "deny to=.denied.test"));
    let rows: [(bool, &str, i32, &[&str]); 11] = [
        (false, "to=127.0.0.1:80", 0, &["allow 127.0.0.1: ", "allow"]),
        (false, "to=127.0.0.1:1080", 1, &["deny 127.0.0.1: built in (", "deny"]),
        (false, "from=192.0.2.1 to=127.0.0.1:80", 1, &["deny 127.0.0.1: built in (", "deny"]),
        (false, "to=x.denied.test:80", 1, &[&format!("deny x.denied.test: {denied_name}"), "deny"]),
        (
            false,
            "to=pair.test:80",
            0,
            &[
                "resolve pair.test (its addresses decide): ",
                "allow 127.0.0.2: ",
                &format!("deny 127.0.0.3: {denied_addr}"),
                "allow",
            ],
        ),
        (false, "to=bad.test:80", 1, &["resolve ", "deny 127.0.0.3: ", "deny"]),
        (true, "user=alice to=127.0.0.1:25", 1, &["deny 127.0.0.1: ", "deny"]),
        (true, "user=eve to=127.0.0.1:80", 1, &["deny at the login", "deny"]),
        (true, "to=127.0.0.1:80", 1, &["deny at the greeting", "deny"]),
        (true, "user=alice method=none to=127.0.0.1:80", 1, &["deny at the login", "deny"]),
        (false, "to=nx.test:80", 2, &["resolve nx.test"]),
    ];
    for (has_users, request, status, expected) in rows {
        let args = ["--rules", &rules, "--explain", request, "--users", &users];
        let output = serve(if has_users { &args } else { &args[..4] });
        let shown = text(&output.stdout);
        let lines: Vec<&str> = shown.lines().filter(|line| !line.starts_with("request from=")).collect();
        assert_eq!(lines.len(), expected.len(), "{request}: {shown}");
        // The order of addresses depends on the resolver.
        for expected in expected {
            assert!(lines.iter().any(|line| line.starts_with(expected)), "{request}: {expected} is not in\n{shown}");
        }
        assert_eq!(lines.last().copied().unwrap_or_default().contains(' '), status == 2);
        assert_eq!(output.status.code(), Some(status), "{request}: {shown}{}", text(&output.stderr));
    }
    let queries = queries.lock().expect("not poisoned");
    assert!(!queries.iter().any(|name| name.contains("denied")), "a denied name was resolved");
    assert!(queries.iter().any(|name| name == "nx.test"), "an undecided name was not resolved");
}

#[test]
fn explain_names_the_missing_part_of_the_request() {
    let table = [
        ("to=127.0.0.1", "to=127.0.0.1 has no port (write to=HOST:PORT)"),
        ("to=[2001:db8::1]", "to=[2001:db8::1] has no port (write to=HOST:PORT)"),
        ("to=localhost", "to=localhost has no port (write to=HOST:PORT)"),
        ("from=10.0.0.1", "the request has no target address (write to=HOST:PORT)"),
        ("deny to=a.test:80", "\"deny\" begins a rule, but a request has only key=value (see s5 serve --help)"),
        ("user=%zz to=a.test:80", "invalid escape in \"%zz\" (write a % in a name as %25)"),
        ("user=\"bob to=a.test:80", "\"user=\\\"bob\": invalid escape, or no closing quote (see s5 serve --help)"),
        ("from=10.0.0.0/8", "from=10.0.0.0/8: expected one IP address, with or without a port (see s5 serve --help)"),
        ("{\"to\":\"a.test:80\",\"via\":\"a=b\"}", "a line in JSON is not supported (write its fields as key=value)"),
        ("a.test:80", "expected key=value, such as to=example.org:80, found \"a.test:80\" (see s5 serve --help)"),
    ];
    for (request, expected) in table {
        let output = serve(&["--deny", "port=1", "--explain", request]);
        let expected = format!("s5: --explain: {expected}\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(2), expected), "{request}");
    }
    for bad in ["", "to=a.test:80 colour=red", "to=a.test:80 to=b.test:80", "from=10.0.0.0/8", "to=", "port=x"] {
        let output = serve(&["--deny", "port=1", "--explain", bad]);
        let is_error = output.status.code() == Some(2) && text(&output.stderr).contains("--explain: ");
        assert!(is_error, "{bad:?}: {output:?}");
    }
}

#[test]
fn target_of_an_allow_that_embeds_an_ipv4_address_is_an_error() {
    let dir = temp_dir();
    for net in ["64:ff9b::/96", "64:ff9b::c000:201", "64:ff9b:1::/48", "2002:7f00::/24", "2001:0:1::/48"] {
        let rule = format!("to=a.test,{net},192.0.2.0/24");
        let rules = write_file(dir.path(), "rules", &format!("deny {rule}\nallow {rule}\n"));
        for (option, value, origin) in [("--allow", &rule, "--allow"), ("--rules", &rules, &format!("{rules} line 2"))]
        {
            let output = serve(&[option, value, "--show-rules"]);
            let expected =
                format!("s5: {origin}: \"to={net}\" never matches: an allow compares the IPv4 address in it ");
            assert!(output.status.code() == Some(2) && text(&output.stderr).starts_with(&expected), "{output:?}");
        }
    }
    for net in ["::/0", "2001::/16", "64:ff9b::/47", "2001:db8::/32"] {
        assert!(serve(&["--allow", &format!("to={net}"), "--show-rules"]).status.success(), "{net}");
    }
}

#[test]
fn explain_names_hop_and_first_rule_that_needs_resolving() {
    let rows: [(&[&str], &str, &str); 3] = [
        (
            &["--deny", "to=127.0.0.9"],
            "to=localhost:80",
            "resolve localhost (its addresses decide): --deny (deny to=127.0.0.9)\n",
        ),
        (
            &["--hop", "far=192.0.2.1:1080", "--allow", "to=.far.test via=far"],
            "to=x.far.test:80",
            "\nallow x.far.test via far: --allow (",
        ),
        (&["--via", "alice:sesame@192.0.2.1:1080"], "to=a.test:80", "\nallow a.test via --via: built in ("),
    ];
    for (args, request, expected) in rows {
        let shown = text(&serve(&[args, &["--explain", request]].concat()).stdout);
        assert!(shown.contains(expected), "{shown}");
    }
}

#[test]
fn invalid_rule_error_names_file_line_and_word() {
    let dir = temp_dir();
    // tests/policy has all errors.
    for (rule, word) in
        [("deny colour=red", "colour"), ("deny to=10.0.0.1/8", "10.0.0.1/8"), ("deny via=direct", "via=")]
    {
        let file = write_file(dir.path(), "rules", &format!("# fine\nallow port=80\n{rule}\ndeny\n"));
        let conditions = rule.split_once(' ').expect("two words").1;
        let line = format!("{file}: line 3: ");
        for (option, value, place) in
            [("--rules", &*file, &*line), ("--rule", rule, "--rule"), ("--deny", conditions, "--deny")]
        {
            let output = serve(&["--listen", "127.0.0.1:0", option, value]);
            let shown = text(&output.stderr);
            let is_named = shown.contains(place) && shown.contains(word);
            assert!(is_named && shown.lines().count() == 1, "{option} {rule}: {shown}");
            assert_eq!(output.status.code(), Some(2), "{option} {rule}: {shown}");
        }
    }
    // Files that cannot be read or are not UTF-8 are errors too.
    let not_utf8 = dir.path().join("not-utf8");
    std::fs::write(&not_utf8, b"deny port=1\ndeny user=\xff\n").expect("file written");
    let not_utf8 = not_utf8.to_str().expect("UTF-8 path").to_owned();
    let missing = format!("{not_utf8}-missing");
    let directory = dir.path().to_str().expect("UTF-8 path");
    for (file, what) in [(&*not_utf8, "line 2"), (&missing, "no such file"), (directory, "directory")] {
        for option in ["--rules", "--users"] {
            let output = serve(&["--listen", "127.0.0.1:0", option, file]);
            let shown = text(&output.stderr);
            assert!(shown.contains(file) && shown.contains(what), "{option} {file}: {shown}");
            assert_eq!(shown.contains(&format!("{option} {file}: ")), what != "line 2", "{shown}");
            assert_eq!(output.status.code(), Some(2), "{option} {file}: {shown}");
        }
    }
}

#[test]
fn rules_file_may_begin_with_a_byte_order_mark() {
    let dir = temp_dir();
    for (rules, expected) in [("\u{feff}deny port=25\r\n", "line 1"), ("\u{feff}# comment\ndeny port=25", "line 2")] {
        let rules = write_file(dir.path(), "rules", rules);
        let output = serve(&["--rules", &rules, "--show-rules"]);
        let shown = text(&output.stdout);
        let is_shown = shown.starts_with("deny port=25 ") && shown.contains(&format!("# {rules} {expected}\n"));
        assert!(is_shown, "{shown}{}", text(&output.stderr));
    }
    // Only the first three bytes are a byte order mark.
    let rules = write_file(dir.path(), "rules", "deny port=25\n\u{feff}deny port=26\n");
    let output = serve(&["--rules", &rules, "--show-rules"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("line 2: "), "{}", text(&output.stderr));
}

#[test]
fn user_that_cannot_log_in_is_a_warning() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let rules = "allow user=alice,bob@corp,*,*@corp\ndeny user=eve%20x,alice\n\ndeny user=*@lost port=1\n\
                 deny user=eve%20x,alice to=a.test\ndeny to=b.test user=*@lost port=1\n";
    let rules = write_file(dir.path(), "rules", rules);
    let warnings = |args: &[&str]| -> Vec<String> {
        let output = serve(&[args, &["--show-rules"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let lines = text(&output.stderr);
        lines.lines().map(|line| line.split_once("] ").map_or(line, |(_, message)| message).to_owned()).collect()
    };
    let in_file = format!("never matches: no such user in {users} (add it with --add-user, or correct the rule)");
    let expected = [("line 2", "eve x"), ("line 4", "*@lost")]
        .map(|(line, name)| format!("{rules} {line}: user={name} {in_file}"));
    assert_eq!(warnings(&["--users", &users, "--rules", &rules]), expected);
    let no_login = "never matches: no login is accepted (use --users FILE)";
    let expected = ["alice", "*"].map(|name| format!("--deny: user={name} {no_login}"));
    assert_eq!(warnings(&["--deny", "user=alice", "--deny", "user=*", "--allow", "port=1"]), expected);
    let many = (0..15).map(|i| format!("deny user=u{i}\n")).collect::<String>();
    let shown = warnings(&["--rules", &write_file(dir.path(), "many", &many)]);
    assert_eq!((shown.len(), &*shown[10]), (11, "5 more entries of user= never match"));
}

#[test]
fn option_or_rule_without_effect_is_an_error_or_a_warning() {
    let (user, hop) = ("--max-per-user and --rate-per-user require logins", "--hop-udp-relay require --via or --hop");
    let table = [("--max-per-user 5", user), ("--rate-per-user 5", user), ("--hop-auth none", hop)];
    for (args, error) in table.into_iter().chain([("--hop-udp-relay proxy", hop)]) {
        let args: Vec<&str> = args.split(' ').chain(["--check"]).collect();
        assert_fails_with(&serve(&args), 2, &[error]);
    }
    let warnings = |args: &str| {
        let args: Vec<&str> = args.split(", ").chain(["--show-rules"]).collect();
        text(&serve(&args).stderr)
    };
    let unused = "--hop a: no rule selects it (add an allow rule with via=a)\n";
    assert!(warnings("--hop, a=192.0.2.1").ends_with(unused));
    assert_eq!(warnings("--hop, a=192.0.2.1, --via, 192.0.2.2, --allow, port=80 via=a"), "");
    for condition in
        ["method=gssapi,password", "protection=integrity,confidentiality", "method=none protection=integrity"]
    {
        let log = warnings(&format!("--deny, {condition}"));
        assert!(
            log.ends_with("--deny: never matches: no login has its method= or protection= (see --auth)\n"),
            "{log}"
        );
    }
    assert_eq!(warnings("--deny, method=none,gssapi port=1, --deny, protection=none,integrity port=2"), "");
}

#[test]
fn reload_warns_about_users_that_cannot_log_in() {
    let setup = Setup::start(alice_and_bob(), "deny user=bob@corp port=1\n", &[]);
    assert!(!setup.server.log().contains("never matches"));
    setup.reload_users(only_alice());
    let expected = format!("{} line 1: user=bob@corp never matches: no such user in {}", setup.rules, setup.users);
    assert!(setup.server.log().contains(&expected), "{}", setup.server.log());
}

#[test]
fn open_relay_requires_its_option() {
    enter_namespace!("", "");
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let deny = write_file(dir.path(), "deny", "deny from=10.0.0.0/8\n");
    // The second rule admits clients that from= does not match.
    let two = ["--allow", "from=10.0.0.0/8", "--allow", "command=connect"];
    for args in [&[][..], &["--rules", &deny], &two] {
        let output = serve(&[&["--listen", "127.0.0.1:0", "--listen", "*:0"], args].concat());
        let shown = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {shown}");
        for word in ["--users", "--allow from", "--allow-open-relay"] {
            assert!(shown.contains(word), "{args:?}: {shown}");
        }
        assert!(!shown.contains("listening on"), "{args:?}: {shown}");
    }
    // --advertise does not restrict clients.
    let added = run(Command::new("ip").args(["address", "add", "192.0.2.1/32", "dev", "lo"]), b"", TIMEOUT);
    assert!(added.status.success(), "{}", text(&added.stderr));
    let output = serve(&["--listen", "192.0.2.1:0", "--advertise", "192.0.2.1"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    let allowed: [&[&str]; 4] =
        [&["--users", &users], &["--allow", "from=10.0.0.0/8"], &["--allow-open-relay"], &["--deny", "method=none"]];
    for args in allowed {
        support::serve("*:0", 2, args);
    }
    // Loopback and Unix sockets need no rule.
    support::serve("0", 2, &[]);
    support::serve(&format!("unix:{}", dir.path().join("socket").display()), 1, &[]);
}
