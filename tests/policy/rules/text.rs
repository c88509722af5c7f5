//! Syntax of rules: the meaning of each key, and each syntax error.

use proptest::prelude::*;
use s5::policy::rules::{AccessRequest, Decision, Identity, Route, normalize_name, parse_rule, parse_rules};
use s5::proto::{Method, ProtectionLevel};

use super::{config, evaluate, hops, rules, rules_with_route, through_hop};

/// All facts of an ordinary request.
const BASE: &str = "from=192.0.2.7 method=password user=alice command=connect ip=198.51.100.1 port=80";

/// Checks that a rule with these conditions matches the requests in `yes` and not those in `no`, as `allow` and as
/// `deny`. A request has the facts of [`BASE`], replaced by its own.
fn check(conditions: &str, yes: &[&str], no: &[&str]) {
    for action in ["allow", "deny"] {
        let rules = rules(&format!("{action} {conditions}\n"));
        let by_rule = format!("{action} line 1");
        for (facts, should_match) in yes.iter().map(|facts| (facts, true)).chain(no.iter().map(|facts| (facts, false)))
        {
            let answer = evaluate(&rules, &format!("{BASE} {facts}"));
            assert_eq!(answer == by_rule, should_match, "{action} {conditions}, with {facts:?}: {answer}");
        }
    }
}

#[test]
fn rule_without_conditions_always_matches() {
    check(
        "",
        &["", "from=", "from=2001:db8::7", "method=none user=", "command=udp", "name=example.org", "port=1"],
        &[],
    );
}

#[test]
fn from_matches_address_cidr_loopback_or_remote() {
    check("from=192.0.2.7", &[""], &["from=192.0.2.6", "from=192.0.2.8", "from=::c000:207", "from="]);
    check("from=192.0.2.0/24", &["from=192.0.2.0", "from=192.0.2.255"], &["from=192.0.1.255", "from=192.0.3.0"]);
    check("from=0.0.0.0/0", &["from=0.0.0.0", "from=255.255.255.255"], &["from=::1", "from=2001:db8::7", "from="]);
    check("from=2001:db8::/32", &["from=2001:db8:ffff::"], &["from=2001:db9::", "from=2001:db7:ffff::", ""]);
    check("from=loopback", &["from=127.0.0.1", "from=127.255.255.255", "from=::1"], &["", "from=::2", "from="]);
    check("from=remote", &["", "from=126.0.0.1", "from=::2", "from=fe80::1"], &["from=127.0.0.1", "from=::1", "from="]);
}

#[test]
fn from_ignores_embedded_ipv4_address() {
    check("from=10.0.0.0/8", &["from=10.1.2.3"], &["from=2002:a01:203::1", "from=64:ff9b::a01:203"]);
    check("from=2002::/16", &["from=2002:a01:203::1"], &["from=10.1.2.3"]);
}

#[test]
fn method_and_command_match_one_of_three() {
    let (methods, commands) = (["none user=", "password", "gssapi"], ["connect", "bind", "udp"]);
    for (key, values) in [("method", methods), ("command", commands)] {
        let facts = values.map(|value| format!("{key}={value}"));
        for (i, fact) in facts.iter().enumerate() {
            let others: Vec<&str> = facts.iter().filter(|other| *other != fact).map(String::as_str).collect();
            check(facts[i].trim_end_matches(" user="), &[fact], &others);
        }
    }
}

#[test]
fn list_matches_any_entry_and_rule_requires_all_conditions() {
    check("from=127.0.0.1,192.0.2.0/24,::1", &["", "from=127.0.0.1", "from=::1"], &["from=127.0.0.2", "from=::2"]);
    check("method=none,gssapi", &["method=none user=", "method=gssapi"], &[""]);
    check("command=udp,bind", &["command=bind", "command=udp"], &[""]);
    check("user=alice,bob", &["", "user=bob"], &["user=carol", "method=none user="]);
    check("to=198.51.100.1,.example.org", &["", "ip=203.0.113.1 name=www.example.org"], &["ip=203.0.113.1"]);
    check("port=22,80-81", &["port=22", "port=81"], &["port=23", "port=82"]);
    check(
        "port=80 user=alice to=198.51.100.0/24 command=connect method=password from=remote",
        &["", "ip=198.51.100.255"],
        &["port=81", "user=bob", "ip=198.51.101.0", "command=udp", "method=gssapi", "from=127.0.0.1"],
    );
}

/// Returns true if `user=` matches a client with this user name, or a client without login if `name` is `None`.
fn user_matches(user: &str, name: Option<&[u8]>) -> bool {
    let rules = rules(&format!("deny user={user}"));
    let method = if name.is_some() { Method::PASSWORD } else { Method::NONE };
    let request = AccessRequest {
        identity: Some(Identity { method, user: name, level: ProtectionLevel::None }),
        ..AccessRequest::default()
    };
    matches!(rules.evaluate(&request, &|_| false), Decision::Deny(_))
}

#[test]
fn user_matches_name_realm_or_any_login() {
    type Names<'a> = &'a [&'a [u8]];
    let table: [(&str, Names<'_>, Names<'_>); 15] = [
        ("alice", &[b"alice"], &[b"Alice", b"alic", b"alicea", b"", b"*", b"alice\0", b"alice@example.org"]),
        ("*", &[b"alice", b"", b"*", b"\xff"], &[]),
        ("%2A", &[b"*"], &[b"alice", b"%2A"]),
        (
            "*@example.org",
            &[b"a@example.org", b"a@b@example.org"],
            &[b"a@example.orgs", b"example.org", b"a@Example.org"],
        ),
        ("*@ex%61mple.org", &[b"a@example.org"], &[b"a@ex%61mple.org"]),
        ("*@a%2Ab", &[b"x@a*b"], &[b"x@axb"]),
        ("alice@example.org", &[b"alice@example.org"], &[b"bob@example.org", b"alice"]),
        ("al%20ice", &[b"al ice"], &[b"alice", b"al%20ice"]),
        ("a%2Cb", &[b"a,b"], &[b"a", b"b"]),
        ("a,b", &[b"a", b"b"], &[b"a,b"]),
        ("%ff%FE", &[b"\xff\xfe"], &["ÿþ".as_bytes()]),
        ("zo%C3%AB,%23x", &["zoë".as_bytes(), b"#x"], &[b"zo\xeb", b"x"]),
        ("zoë", &["zoë".as_bytes()], &["zoe".as_bytes(), "ZOË".as_bytes()]),
        ("a=b", &[b"a=b"], &[b"a", b"b"]),
        ("o'brien", &[b"o'brien"], &[b"obrien"]),
    ];
    for (user, yes, no) in table {
        for name in yes {
            assert!(user_matches(user, Some(name)), "{user} for {}", name.escape_ascii());
        }
        for name in no {
            assert!(!user_matches(user, Some(name)), "{user} for {}", name.escape_ascii());
        }
        assert!(!user_matches(user, None), "{user} without a login");
    }
}

#[test]
fn to_matches_address_or_cidr() {
    check("to=198.51.100.1", &["", "name=example.org"], &["ip=198.51.100.2", "ip=::c633:6401"]);
    check("to=198.51.100.0/31", &["", "ip=198.51.100.0"], &["ip=198.51.100.2", "ip=198.51.99.255"]);
    check("to=0.0.0.0/0", &["", "ip=255.255.255.255", "ip=2002:a01:203::1"], &["ip=::1", "ip=2001:db8::1"]);
    check("to=::/0", &["ip=::1", "ip=2001:db8::1"], &[""]);
    check("to=2001:db8::1", &["ip=2001:db8::1"], &["ip=2001:db8::2"]);
    check("to=[2001:db8::1]", &["ip=2001:db8::1"], &["ip=2001:db8::2"]);
    check("to=2001:DB8:0:0::/33", &["ip=2001:db8:7fff::1"], &["ip=2001:db8:8000::", "ip=2001:db7::"]);
    check("to=fe80::/10,[::1]", &["ip=fe80::1", "ip=febf:ffff::1", "ip=::1"], &["ip=fec0::1", "ip=::2"]);
}

#[test]
fn to_matches_name_or_suffix() {
    let spellings = ["name=example.org", "name=EXAMPLE.org", "name=example.org.", "name=Example.Org."];
    let others = ["", "name=example.orgs", "name=notexample.org", "name=example.org.evil.net", "name=org"];
    let below = ["name=www.example.org", "name=a.b.example.org", "name=WWW.EXAMPLE.ORG."];
    for name in ["example.org", "EXAMPLE.org", "example.org.", "eXaMPLE.oRG."] {
        check(&format!("to={name}"), &spellings, &[&others[..], &below].concat());
        check(&format!("to=.{name}"), &[&spellings[..], &below].concat(), &others);
    }
    check("to=.org", &["name=org", "name=example.org", "name=www.example.org"], &["name=xorg", "name=example.com"]);
    check("to=localhost", &["name=localhost", "name=LocalHost."], &["name=a.localhost"]);
    check("to=_a-b.x1,1.x", &["name=_a-b.x1", "name=1.x"], &["name=a-b.x1"]);
    check("to=xn--BCHER-kva.example", &["name=xn--bcher-kva.EXAMPLE"], &["name=bücher.example"]);
    check("to=kelvin.example", &["name=\u{212a}elvin.example"], &["name=elvin.example"]);
    check("to=0x.1a", &["name=0x.1a"], &["name=0x.1b"]);
}

#[test]
fn normalize_name_lowers_case_and_drops_final_dot() {
    assert_eq!(
        ["Example.ORG.", "example.org", "a..", "Ü", "."].map(normalize_name),
        ["example.org", "example.org", "a.", "ü", ""]
    );
}

#[test]
fn port_matches_number_or_inclusive_range() {
    check("port=80", &["port=80"], &["port=79", "port=81", "port=0"]);
    check("port=80-82", &["port=80", "port=81", "port=82"], &["port=79", "port=83"]);
    check("port=80-80", &["port=80"], &["port=79", "port=81"]);
    check("port=1-65535", &["port=1", "port=65535"], &["port=0"]);
    check("port=1,65535", &["port=1", "port=65535"], &["port=2", "port=65534"]);
}

#[test]
fn via_selects_route() {
    for (default, route) in [(Route::default(), ""), (through_hop(0), " a"), (through_hop(1), " b")] {
        for (via, expected) in [("", route), ("via=direct", ""), ("via=a", " a"), ("via=b", " b")] {
            let answer = evaluate(&rules_with_route(default, &format!("allow {via}")), BASE);
            assert_eq!(answer, format!("allow line 1{expected}"), "{via:?} with {default:?}");
        }
        assert_eq!(evaluate(&rules_with_route(default, ""), BASE), format!("allow default-allow{route}"));
    }
}

#[test]
fn keys_are_accepted_in_any_order_and_first_match_decides() {
    for line in ["deny port=80 command=connect", "deny command=connect port=80", "  deny\tport=80 \t command=connect  "]
    {
        let rules = rules(line);
        assert_eq!(evaluate(&rules, BASE), "deny line 1", "{line:?}");
        assert_eq!(rules.user_rules()[0].to_string(), line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    let rules = rules("allow port=1\nallow port=2\ndeny port=80\nallow port=80\n");
    assert_eq!(evaluate(&rules, BASE), "deny line 3", "the first match must decide");
}

#[test]
fn comments_blanks_and_crlf_are_ignored() {
    for line in ["", " \t", "#", "# allow", "  # deny to=x", "#deny", "#port=0"] {
        assert!(parse_rule(line, "", &[]).expect("valid").is_none(), "{line:?}");
    }
    let text = "# first\r\n\r\n  allow port=80 # why\r\n\t#deny\ndeny to=a#b # c\ndeny port=1 #port=0";
    let wrong = parse_rules(text, "f", &[]).expect_err("a#b is invalid");
    assert_eq!((wrong.line, wrong.message.contains("a#b")), (5, true), "{wrong}");
    let found = parse_rules(text.replace("a#b", "b"), "f", &[]).expect("valid rules");
    let shown: Vec<_> = found.iter().map(|rule| (rule.origin(), rule.to_string())).collect();
    let expected = [("f line 3", "allow port=80"), ("f line 5", "deny to=b"), ("f line 6", "deny port=1")];
    assert_eq!(shown, expected.map(|(origin, text)| (origin.to_owned(), text.to_owned())));
}

#[test]
fn parse_rule_keeps_origin_and_text() {
    let rule = parse_rule("deny # all", "--deny", &[]).expect("valid").expect("not a comment");
    assert_eq!((&*rule.origin(), &*rule.to_string()), ("--deny", "deny"));
}

/// Invalid rules, each with words that the error message must contain.
const INVALID_RULES: [(&str, &[&str]); 65] = [
    ("allow via=", &["via=", "empty"]),
    ("permit", &["\"permit\"", "allow", "deny"]),
    ("Allow", &["\"Allow\""]),
    ("DENY port=80", &["\"DENY\""]),
    ("allow, port=80", &["\"allow,\""]),
    ("port=80 deny", &["\"port=80\""]),
    ("allow#", &["\"allow#\""]),
    ("deny all", &["\"all\" is not a condition (a rule that matches everything is \"deny\" alone)"]),
    ("allow any", &["\"any\" is not a condition", "\"allow\" alone"]),
    ("deny *", &["\"*\" is not a condition"]),
    ("deny port=80#x", &["\"port=80#x\": a comment requires a space before its #"]),
    ("deny user=bob#x", &["\"user=bob#x\"", "%23"]),
    ("deny user=\"alice\"", &["user=\\\"alice\\\"", "remove the quotes", "%22"]),
    ("deny user=bob,'alice'", &["\"user=bob,'alice'\": remove the quotes"]),
    ("deny to=\"example.org\"", &["remove the quotes"]),
    ("deny from='10.0.0.1'", &["remove the quotes"]),
    ("deny user=“alice”", &["\"user=“alice”\": remove the quotes"]),
    ("deny to=a.test, b.test", &["\"to=a.test,\": empty value (values and lists have no spaces)"]),
    ("deny to=http://a.test/", &["expected a name, a .suffix, an address or a CIDR", "found \"http://a.test/\""]),
    ("deny from=10.0.0.0/255.0.0.0", &["expected an address, a CIDR such as 192.0.2.0/24, loopback or remote"]),
    ("deny user=%zz", &["line 4: user=: invalid escape in \"%zz\" (write a % in a name as %25)"]),
    ("deny user=a%2", &["invalid escape in \"a%2\""]),
    ("deny user=100%", &["invalid escape in \"100%\""]),
    ("deny user=*@%4", &["invalid escape"]),
    ("deny to=exämple.org", &["\"exämple.org\" is not ASCII", "xn--"]),
    ("deny to=a.test,.BÜCHER.example", &["\".BÜCHER.example\" is not ASCII"]),
    ("deny to=a.test.\u{ff0e}org", &["is not ASCII"]),
    ("deny from=10.1.1.1:5555", &["\"10.1.1.1:5555\" has a port (write from=10.1.1.1)"]),
    ("deny from=[::1]:5555", &["\"[::1]:5555\" has a port (write from=[::1])"]),
    ("deny to=example.org:https", &["\"example.org:https\" has a port (write to=example.org port=https)"]),
    ("deny to=10.0.0.0/8:443", &["has a port (write to=10.0.0.0/8 port=443)"]),
    ("deny client=10.0.0.1", &["unknown key \"client\" (write from=)"]),
    ("\u{feff}allow", &["\"\\u{feff}allow\""]),
    ("allow deny", &["\"deny\"", "key=value"]),
    ("allow example.org", &["\"example.org\"", "key=value, such as from=10.0.0.0/8, found"]),
    ("allow to=example.org:443", &["to=: \"example.org:443\" has a port (write to=example.org port=443)"]),
    ("allow to=a,127.0.0.1:80", &["\"127.0.0.1:80\" has a port (write to=127.0.0.1 port=80)"]),
    ("deny to=[::1]:80", &["\"[::1]:80\" has a port (write to=[::1] port=80)"]),
    ("allow port", &["\"port\""]),
    ("allow port = 80", &["\"port\""]),
    ("allow port =80", &["\"port\""]),
    ("allow ports=80", &["line 4: unknown key \"ports\" (keys are from, "]),
    ("allow Port=80", &["\"Port\""]),
    ("allow dst=10.0.0.1", &["unknown key \"dst\" (write to=)"]),
    ("allow =80", &["unknown key \"\""]),
    ("allow po\u{1b}rt=80", &["po\\u{1b}rt"]),
    ("allow port= 80", &["\"port=\"", "empty"]),
    ("allow port=80 port=81", &["\"port=81\"", "port=", "duplicate key (lists are comma-separated)"]),
    ("allow to=a command=udp to=b", &["\"to=b\"", "duplicate key (lists are comma-separated)"]),
    ("allow from=192.0.2.0/33", &["\"192.0.2.0/33\"", "CIDR"]),
    ("allow from=192.0.2.1,10.0.0.1/8", &["\"10.0.0.1/8\"", "10.0.0.0/8"]),
    ("allow from=192.0.2.1/24", &["\"192.0.2.1/24\"", "192.0.2.0/24"]),
    ("allow to=2001:db8::1/32", &["\"2001:db8::1/32\"", "2001:db8::/32"]),
    ("allow to=1.0.0.0/0", &["\"1.0.0.0/0\"", "0.0.0.0/0"]),
    ("allow to=::ffff:192.0.2.1", &["\"::ffff:192.0.2.1\"", "192.0.2.1"]),
    ("allow from=example.org", &["\"example.org\"", "loopback"]),
    ("allow user=a*", &["\"a*\"", "%2A"]),
    ("allow method=plain", &["\"plain\"", "password"]),
    ("allow command=CONNECT", &["\"CONNECT\"", "connect"]),
    ("allow command=associate", &["\"associate\"", "udp"]),
    ("allow to=*.example.org", &["\"*.example.org\"", ".example.org to match"]),
    ("allow port=0", &["\"0\"", "65535"]),
    ("allow port=80,5-1", &["\"5-1\""]),
    ("allow via=c", &["via=", "\"c\"", "--hop NAME=URL"]),
    ("deny via=a", &["via=", "only valid with allow"]),
];

/// Invalid values of each key. The error message must contain the value.
const INVALID_VALUES: [(&str, &str); 5] = [
    (
        "from",
        "192.0.2.0/ 192.0.2.0/a 192.0.2.0/-1 192.0.2.0/255.255.255.0 192.0.2/24 192.0.2.256 \
         2001:db8::/129 2001:db8 fe80::1%eth0 192.0.2.1:80 [::1 * Loopback",
    ),
    (
        "to",
        "::ffff:0:0/96 10.0.0 0x7f.1 127.1 2130706433 127.0.0.0X1 .10 10.0.0.1. * . a..b ..b \
         http://example.org",
    ),
    ("user", "** *@ *example.org *@*.org *%40example.org"),
    ("method", "None"),
    ("port", "70000 1- -1 0-5 1-65536 1-2-3 80x x http 0x50 - 5-1"),
];

fn check_error(bad: &str, words: &[&str]) {
    let text = format!("# a comment\n\nallow port=80\n{bad}\npermit\n");
    let error = parse_rules(&text, "file", &hops()).map(|rules| rules.len()).expect_err(bad);
    let shown = error.to_string();
    assert_eq!(error.line, 4, "{bad:?}: {shown}");
    assert!(shown.starts_with("line 4: ") && shown.contains(&error.message), "{shown}");
    for word in words {
        assert!(shown.contains(word), "{bad:?} without {word:?}: {shown}");
    }
    assert!(!shown.contains(char::is_control) && shown.len() < 200, "{shown:?}");
    let quoted_end = format!("{}\"", bad.rsplit('=').next().unwrap_or_default());
    assert!(quoted_end.len() < 4 || shown.matches(&quoted_end).count() < 2, "repeats the value: {shown}");
}

#[test]
fn error_names_line_and_word() {
    INVALID_RULES.iter().for_each(|(bad, words)| check_error(bad, words));
    for (key, values) in INVALID_VALUES {
        for value in values.split_whitespace() {
            check_error(&format!("allow {key}={value}"), &[&format!("{value:?}")]);
        }
    }
    for condition in "port= from= user= port=80, port=,80 to=a,,b user=,".split(' ') {
        check_error(&format!("allow {condition}"), &[&format!("{condition:?}"), "empty"]);
    }
}

#[test]
fn via_requires_allow_and_one_defined_hop() {
    for bad in ["direct,a", "a,b", "A", "Direct", "no"] {
        check_error(&format!("allow via={bad}"), &["via="]);
    }
    for via in ["direct", "a", "c"] {
        check_error(&format!("deny via={via}"), &["via="]);
    }
    parse_rule("allow via=a", "", &[]).expect_err("no hop is defined");
    parse_rule("allow via=direct", "", &[]).expect("direct requires no hop");
}

#[test]
fn outbound_requires_allow_and_one_address_per_family() {
    for bad in ["eth0", "192.0.2.0/24", "192.0.2.1,192.0.2.2", "::1,::2", "192.0.2.1,::1,::2", "[::1]", "192.0.2.1:80"]
    {
        check_error(&format!("allow outbound={bad}"), &["outbound="]);
    }
    check_error("deny outbound=192.0.2.1", &["outbound=: only valid with allow"]);
    let rules = rules("allow outbound=192.0.2.1,2001:db8::1 via=a");
    let Decision::Allow(_, route) = rules.evaluate(&AccessRequest::default(), &|_| false) else {
        return assert!(rules.only_route(&AccessRequest::default()).is_some_and(|route| route.outbound.is_some()));
    };
    assert_eq!((route.hop, route.outbound.is_some()), (Some(0), true));
}

proptest! {
    #![proptest_config(config(500))]

    #[test]
    fn any_text_parses_or_fails_in_one_of_its_lines(
        text in "((allow|deny|[ -~é]{0,5})( (from|to|port|user|via|[a-z]{0,3})[=]?[ -~é\u{1b}]{0,12}){0,3}\r?\n){0,5}",
    ) {
        match parse_rules(&text, "f", &hops()) {
            Ok(rules) => prop_assert!(rules.len() <= text.lines().count()),
            Err(error) => {
                prop_assert!((1..=text.lines().count()).contains(&error.line));
                let bad = text.lines().nth(error.line - 1).expect("the line exists");
                let alone = parse_rule(bad, "f", &hops()).map(|_| ());
                prop_assert_eq!(alone, Err(error.message));
            }
        }
    }

    #[test]
    fn any_value_of_to_parses_or_fails(value in "[0-9a-fx.:/*\\[\\]]{1,12}") {
        if let Ok(Some(rule)) = parse_rule(&format!("deny to={value}"), "f", &[]) {
            prop_assert_eq!(rule.to_string(), format!("deny to={value}"));
            prop_assert!(!value.contains('*'));
        }
    }
}
