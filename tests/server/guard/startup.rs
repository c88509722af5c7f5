//! Before the server starts: --show-rules, --explain, errors in rules, and the refusal to be an open relay.

use std::process::{Command, Output};

use super::tools::{Setup, alice_and_bob, user_line};
use crate::support::{Server, TIMEOUT, dns, in_namespace, run, s5, temp_dir, write_file};

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
    let args = ["--listen", "127.0.0.1:1080", "--listen", "*:1081", "--rules", &file];
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
    // Without an allow that has from=, the default is to allow.
    let output = serve(&["--show-rules"]);
    assert!(text(&output.stdout).contains("\nallow  "), "{}", text(&output.stdout));
}

#[test]
fn explain_names_deciding_rule() {
    let hosts = "127.0.0.2 pair.test\n127.0.0.3 pair.test\n127.0.0.3 bad.test\n";
    if !in_namespace("guard::startup::explain_names_deciding_rule", hosts, dns::RESOLV) {
        return;
    }
    let queries = dns::start();
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let rules = "deny to=127.0.0.3\ndeny to=.denied.test\ndeny user=alice port=25\n";
    let rules = write_file(dir.path(), "rules", rules);
    let at = |line: u8, rule: &str| format!("{rules} line {line} ({rule})");
    let rows: [(&[&str], &str, i32, Vec<String>); 16] = [
        (&[], "to=127.0.0.1:80", 0, vec!["allow 127.0.0.1: ".into(), "allow".into()]),
        (&[], "to=127.0.0.3:80", 1, vec![format!("deny 127.0.0.3: {}", at(1, "deny to=127.0.0.3")), "deny".into()]),
        (&[], "to=[::ffff:127.0.0.3]:80", 1, vec!["deny 127.0.0.3: ".into(), "deny".into()]),
        (&[], "to=[64:ff9b::7f00:3]:80", 1, vec!["deny 64:ff9b::7f00:3: ".into(), "deny".into()]),
        (&[], "to=127.0.0.1:1080", 1, vec!["deny 127.0.0.1: built in (".into(), "deny".into()]),
        (&[], "from=192.0.2.1 to=127.0.0.1:80", 1, vec!["deny 127.0.0.1: built in (".into(), "deny".into()]),
        (
            &[],
            "to=x.denied.test:80",
            1,
            vec![format!("deny x.denied.test: {}", at(2, "deny to=.denied.test")), "deny".into()],
        ),
        (
            &[],
            "to=pair.test:80",
            0,
            vec![
                "resolve pair.test (its addresses decide): ".into(),
                "allow 127.0.0.2: ".into(),
                format!("deny 127.0.0.3: {}", at(1, "deny to=127.0.0.3")),
                "allow".into(),
            ],
        ),
        (&[], "to=bad.test:80", 1, vec!["resolve ".into(), "deny 127.0.0.3: ".into(), "deny".into()]),
        (&["--users"], "user=alice to=127.0.0.1:25", 1, vec!["deny 127.0.0.1: ".into(), "deny".into()]),
        (&["--users"], "user=alice to=127.0.0.1:80", 0, vec!["allow 127.0.0.1: ".into(), "allow".into()]),
        (&["--users"], "to=127.0.0.1:80", 1, vec!["deny at the greeting".into(), "deny".into()]),
        (&["--users"], "user=eve to=127.0.0.1:80", 1, vec!["deny at the login".into(), "deny".into()]),
        (&["--users"], "user=alice method=none to=127.0.0.1:80", 1, vec!["deny at the login".into(), "deny".into()]),
        (&[], "to=127.0.0.1:80 command=udp", 0, vec!["allow 127.0.0.1: ".into(), "allow".into()]),
        (&[], "to=nx.test:80", 2, vec!["resolve nx.test".into()]),
    ];
    for (more, request, status, expected) in rows {
        let users: &[&str] = if more.is_empty() { &[] } else { &["--users", &users] };
        let output = serve(&[&["--rules", &rules, "--explain", request], users].concat());
        let shown = text(&output.stdout);
        let lines: Vec<&str> = shown.lines().filter(|line| !line.starts_with("request from=")).collect();
        assert_eq!(lines.len(), expected.len(), "{request}: {shown}");
        // The order of addresses depends on the resolver.
        for expected in &expected {
            assert!(lines.iter().any(|line| line.starts_with(expected)), "{request}: {expected} is not in\n{shown}");
        }
        assert_eq!(lines.last().copied().unwrap_or_default().contains(' '), status == 2);
        assert_eq!(output.status.code(), Some(status), "{request}: {shown}{}", text(&output.stderr));
    }
    assert!(
        !queries.lock().expect("not poisoned").iter().any(|name| name.contains("denied")),
        "a denied name was resolved"
    );
    assert!(
        queries.lock().expect("not poisoned").iter().any(|name| name == "nx.test"),
        "an undecided name was not resolved"
    );
    for bad in ["", "to=a.test:80 colour=red", "to=a.test:80 to=b.test:80", "from=10.0.0.0/8", "to=", "port=x"] {
        let output = serve(&["--deny", "port=1", "--explain", bad]);
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {}{}", text(&output.stdout), text(&output.stderr));
        assert!(text(&output.stderr).contains("--explain: "), "{bad:?}: {}", text(&output.stderr));
    }
}

#[test]
fn explain_names_the_missing_part_of_the_request() {
    let table = [
        ("to=127.0.0.1", "to=127.0.0.1 has no port (write to=HOST:PORT)"),
        ("to=[2001:db8::1]", "to=[2001:db8::1] has no port (write to=HOST:PORT)"),
        ("to=localhost", "to=localhost has no port (write to=HOST:PORT)"),
        ("from=10.0.0.1", "the request has no target address (write to=HOST:PORT)"),
        ("a.test:80", "expected key=value, such as to=example.org:80, found \"a.test:80\" (see s5 serve --help)"),
    ];
    for (request, expected) in table {
        let output = serve(&["--deny", "port=1", "--explain", request]);
        let expected = format!("s5: --explain: {expected}\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(2), expected), "{request}");
    }
}

#[test]
fn explain_names_first_rule_that_needs_resolving() {
    let output = serve(&["--deny", "to=127.0.0.9", "--explain", "to=localhost:80"]);
    let expected = "resolve localhost (its addresses decide): --deny (deny to=127.0.0.9)\n";
    assert!(text(&output.stdout).contains(expected), "{}", text(&output.stdout));
}

#[test]
fn explain_names_hop() {
    let args = ["--hop", "far=192.0.2.1:1080", "--allow", "to=.far.test via=far", "--explain"];
    let output = serve(&[&args[..], &["to=x.far.test:80"]].concat());
    assert!(text(&output.stdout).contains("\nallow x.far.test via far: --allow ("), "{}", text(&output.stdout));
    let output = serve(&["--via", "alice:sesame@192.0.2.1:1080", "--explain", "to=a.test:80"]);
    assert!(text(&output.stdout).contains("\nallow a.test via --via: built in ("), "{}", text(&output.stdout));
}

#[test]
fn invalid_rule_error_names_file_line_and_word() {
    let dir = temp_dir();
    let bad = [
        ("deny colour=red", "colour"),
        ("permit port=80", "permit"),
        ("DENY port=80", "DENY"),
        ("allow port", "port"),
        ("deny to=10.0.0.0/33", "10.0.0.0/33"),
        ("deny to=10.0.0.1/8", "10.0.0.1/8"),
        ("deny from=10.0.0", "10.0.0"),
        ("deny from=example.org", "example.org"),
        ("deny to=::ffff:10.0.0.0/104", "::ffff:10.0.0.0/104"),
        ("deny to=fe80::/129", "fe80::/129"),
        ("deny to=", "to="),
        ("deny to=10.0.0.1,", "10.0.0.1,"),
        ("deny to=,10.0.0.1", ",10.0.0.1"),
        ("deny user=", "user="),
        ("deny user=al*", "al*"),
        ("deny to=*.example.org", "*.example.org"),
        ("deny to=127.1", "127.1"),
        ("deny to=0x7f000001", "0x7f000001"),
        ("deny to=a..b", "a..b"),
        ("deny port=0", "0"),
        ("deny port=70000", "70000"),
        ("deny port=20-10", "20-10"),
        ("deny port=http", "http"),
        ("deny command=udp,fly", "fly"),
        ("deny method=kerberos", "kerberos"),
        ("deny port=1 port=2", "port"),
        ("allow via=nowhere", "nowhere"),
        ("deny via=direct", "via="),
        ("deny to=10.0.0.1 10.0.0.2", "10.0.0.2"),
        ("deny all", "is not a condition"),
        ("deny user=\"alice\"", "remove the quotes"),
        ("deny user=%zz", "invalid escape in \"%zz\""),
        ("deny user=bob#x", "requires a space before its #"),
        ("deny to=exämple.org", "xn--"),
        ("deny from=10.1.1.1:5555", "has a port (write from=10.1.1.1)"),
    ];
    for (rule, word) in bad {
        let file = write_file(dir.path(), "rules", &format!("# fine\nallow port=80\n{rule}\ndeny\n"));
        let output = serve(&["--listen", "127.0.0.1:0", "--rules", &file]);
        let shown = text(&output.stderr);
        let is_named = shown.contains(&format!("{file}: line 3: ")) && shown.contains(word);
        assert!(is_named && shown.lines().count() == 1, "{rule}: {shown}");
        assert_eq!(output.status.code(), Some(2), "{rule}: {shown}");
        let (action, conditions) = rule.split_once(' ').expect("two words");
        let option = format!("--{action}");
        let is_action = ["allow", "deny"].contains(&action);
        for (option, value) in [("--rule", rule), (&option, conditions)].into_iter().take(1 + usize::from(is_action)) {
            let output = serve(&["--listen", "127.0.0.1:0", option, value]);
            let shown = text(&output.stderr);
            assert!(shown.contains(option) && shown.contains(word), "{rule}: {shown}");
            assert_eq!(output.status.code(), Some(2), "{rule}: {shown}");
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
    let rules = "allow user=alice,bob@corp,*,*@corp\ndeny user=eve%20x,alice\n\ndeny user=*@lost port=1\n";
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
fn reload_warns_about_users_that_cannot_log_in() {
    let setup = Setup::start(alice_and_bob(), "deny user=bob@corp port=1\n", &[]);
    assert!(!setup.server.log().contains("never matches"));
    setup.reload_users(alice_and_bob().split_inclusive('\n').next().expect("alice's line"));
    let expected = format!("{} line 1: user=bob@corp never matches: no such user in {}", setup.rules, setup.users);
    assert!(setup.server.log().contains(&expected), "{}", setup.server.log());
}

#[test]
fn open_relay_requires_its_option() {
    if !in_namespace("guard::startup::open_relay_requires_its_option", "", "") {
        return;
    }
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &user_line("alice", "secret"));
    let from = write_file(dir.path(), "from", "allow from=10.0.0.0/8\n");
    let deny = write_file(dir.path(), "deny", "deny from=10.0.0.0/8\ndeny from=192.0.2.0/24 port=25\n");
    let open_relays: [&[&str]; 7] = [
        &[],
        &["--deny", "from=10.0.0.0/8"],
        &["--rules", &deny],
        &["--deny", "port=25"],
        &["--allow", "port=80"],
        &["--deny", "user=*"],
        // The second rule admits clients that from= does not match.
        &["--allow", "from=10.0.0.0/8", "--allow", "command=connect"],
    ];
    for args in open_relays {
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
    let allowed: [&[&str]; 6] = [
        &["--users", &users],
        &["--rules", &from],
        &["--allow", "from=10.0.0.0/8"],
        &["--allow-open-relay"],
        &["--deny", "from=10.0.0.0/8", "--allow-open-relay"],
        &["--deny", "method=none"],
    ];
    for args in allowed {
        let server = Server::start_with(s5().args(["serve", "--listen", "*:0"]).args(args), 2);
        drop(server);
    }
    // Loopback and Unix sockets need no rule.
    drop(Server::start_with(s5().args(["serve", "--listen", "0"]), 2));
    let unix = format!("unix:{}", dir.path().join("socket").display());
    drop(Server::start_with(s5().args(["serve", "--listen", &unix]), 1));
}
