//! The built-in rules, user rules that override them, and the default decision.

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use s5::policy::Policy;
use s5::policy::rules::{AccessRequest, Rules};
use s5::policy::users::Users;
use s5::proto::Method;

use super::{
    OWN_LISTENER, PROTECTED, UNPROTECTED, describe, embedded_addrs, evaluate, ip, rules, rules_with_route, through_hop,
};

const REMOTE_CLIENTS: [&str; 4] = ["192.0.2.7", "10.1.2.3", "2001:db8::7", "fe80::7"];
const LOOPBACK_CLIENTS: [&str; 3] = ["127.0.0.1", "127.1.2.3", "::1"];
/// Makes the client address unknown in [`evaluate`].
const UNKNOWN_CLIENT: &str = "";

/// Returns each address with the IPv6 addresses that embed it, if it is an IPv4 address.
fn with_embedded_forms(list: &str) -> Vec<String> {
    let forms = |text: &str| match ip(text) {
        IpAddr::V4(ip) => embedded_addrs(ip).to_vec(),
        ip => vec![ip],
    };
    list.split_whitespace().flat_map(forms).map(|ip| ip.to_string()).collect()
}

/// Evaluates CONNECT and UDP requests for `to`, with and without a name.
fn check(rules: &Rules, from: &str, to: &str, expected: &str) {
    let plain = format!("from={from} method=password user=alice command=connect ip={to} port=80");
    for facts in [plain.clone(), format!("{plain} name=example.net"), plain.replace("connect", "udp")] {
        assert_eq!(evaluate(rules, &facts), expected, "{facts} with {:?}", rules.user_rules());
    }
}

#[test]
fn only_allow_with_to_lets_remote_clients_reach_protected_addresses() {
    // Decision for remote clients and protected addresses, and for all others.
    let table = [
        ("", "deny protected", "allow default-allow"),
        ("allow", "deny protected", "allow line 1"),
        ("allow port=80", "deny protected", "allow line 1"),
        ("allow user=*", "deny protected", "allow line 1"),
        ("allow command=connect,udp method=password", "deny protected", "allow line 1"),
        ("allow via=a", "deny protected", "allow line 1 a"),
        ("allow to=0.0.0.0/0,::/0", "allow line 1", "allow line 1"),
    ];
    for (text, denied, allowed) in table {
        let rules = rules(text);
        for to in with_embedded_forms(PROTECTED) {
            REMOTE_CLIENTS.iter().for_each(|from| check(&rules, from, &to, denied));
            LOOPBACK_CLIENTS.iter().chain([&UNKNOWN_CLIENT]).for_each(|from| check(&rules, from, &to, allowed));
        }
        for to in with_embedded_forms(UNPROTECTED) {
            let clients = REMOTE_CLIENTS.iter().chain(&LOOPBACK_CLIENTS).chain([&UNKNOWN_CLIENT]);
            clients.for_each(|from| check(&rules, from, &to, allowed));
        }
    }
}

#[test]
fn allow_with_to_overrides_built_in_denials_for_its_targets_only() {
    let one = rules("allow to=169.254.169.254");
    for to in PROTECTED.split_whitespace() {
        let expected = if to == "169.254.169.254" { "allow line 1" } else { "deny protected" };
        with_embedded_forms(to).iter().for_each(|to| check(&one, "192.0.2.7", to, expected));
    }
    let named = rules("allow to=.example.net");
    for to in with_embedded_forms(PROTECTED) {
        let facts = format!("from=192.0.2.7 ip={to} port=80");
        assert_eq!(evaluate(&named, &format!("{facts} name=www.example.net")), "allow line 1", "{facts}");
        assert_eq!(evaluate(&named, &format!("{facts} name=example.com")), "deny protected", "{facts}");
    }
}

#[test]
fn deny_compares_outer_and_embedded_addresses_and_allow_the_innermost() {
    // The Teredo client is 198.51.100.1; the Teredo server is 127.0.0.1, then 192.0.2.1.
    let (bad, good) = ("2001:0:7f00:1:0:0:39cc:9bfe", "2001:0:c000:201:0:0:39cc:9bfe");
    let outer = "allow to=2002::/16,64:ff9b::/96,2001::/32,::/96,64:ff9b:1::/48";
    let table = [
        ("", bad, "deny protected"),
        ("", good, "allow default-allow"),
        ("deny to=192.0.2.0/24", good, "deny line 1"),
        ("deny to=198.51.100.0/24", good, "deny line 1"),
        ("allow to=198.51.100.0/24", bad, "allow line 1"),
        ("allow to=127.0.0.0/8", bad, "deny protected"),
        (outer, "::1", "allow line 1"),
        ("deny to=127.0.0.1\nallow to=127.0.0.0/8", "127.0.0.1", "deny line 1"),
        ("deny to=127.0.0.1\nallow to=127.0.0.0/8", "127.0.0.2", "allow line 2"),
    ];
    for (text, to, expected) in table {
        REMOTE_CLIENTS.iter().for_each(|from| check(&rules(text), from, to, expected));
    }
    for to in with_embedded_forms("127.0.0.1 169.254.169.254 224.0.0.1") {
        check(&rules(outer), "192.0.2.7", &to, "deny protected");
    }
    let forms = embedded_addrs(Ipv4Addr::new(198, 51, 100, 1)).map(|ip| ip.to_string());
    // Indexes of the forms that the net includes.
    let nets = [
        ("198.51.100.0/24", 0..6),
        ("::/0", 1..6),
        ("2002::/16", 3..4),
        ("64:ff9b::/96", 2..3),
        ("2001::/32", 4..5),
        ("64:ff9b:1::/48", 5..6),
    ];
    for (net, denied) in nets {
        for (i, to) in forms.iter().enumerate() {
            let expected = if denied.contains(&i) { "deny line 1" } else { "allow default-allow" };
            check(&rules(&format!("deny to={net}")), "::1", to, expected);
        }
    }
}

#[test]
fn own_listeners_are_denied_to_every_client() {
    let own_listener: SocketAddr = OWN_LISTENER.parse().expect("valid address");
    let to_own_listener = format!("ip={} port={}", own_listener.ip(), own_listener.port());
    let table = [
        ("", "deny own-listener"),
        ("allow", "deny own-listener"),
        ("allow port=1080", "deny own-listener"),
        ("allow from=0.0.0.0/0,::/0", "deny own-listener"),
        ("allow to=192.0.2.81", "deny own-listener"),
        ("allow to=192.0.2.80", "allow line 1"),
        ("allow to=192.0.2.0/24 port=1080", "allow line 1"),
        ("allow to=192.0.2.0/24 port=1081", "deny own-listener"),
        ("allow to=example.net", "deny own-listener"),
        ("deny\nallow to=192.0.2.80", "deny line 1"),
    ];
    for (text, expected) in table {
        let rules = rules(text);
        for from in REMOTE_CLIENTS.into_iter().chain(LOOPBACK_CLIENTS) {
            assert_eq!(evaluate(&rules, &format!("from={from} {to_own_listener}")), expected, "{text:?} from {from}");
        }
    }
    assert_eq!(evaluate(&rules(""), &to_own_listener), "deny own-listener", "unknown client");
    assert_eq!(
        evaluate(&rules("allow to=example.net"), &format!("{to_own_listener} name=example.net")),
        "allow line 1"
    );
    for other in ["ip=192.0.2.80 port=1081", "ip=192.0.2.81 port=1080"] {
        assert_eq!(evaluate(&rules(""), &format!("from=::1 {other}")), "allow default-allow");
    }
    assert_eq!(
        evaluate(&rules_with_route(through_hop(0), "allow"), &format!("from=::1 {to_own_listener}")),
        "deny own-listener"
    );
}

#[test]
fn is_local_is_called_only_for_ports_of_unspecified_listeners() {
    let addr = |text: &str| text.parse::<SocketAddr>().expect("valid address");
    let listen_addrs = vec![addr("127.0.0.1:1080"), addr("0.0.0.0:1081"), addr("[::1]:1082")];
    let advertised_ips = vec![ip("198.51.100.1")];
    let default_policy = Policy { listen_addrs: listen_addrs.clone(), advertised_ips, ..Policy::default() };
    let overriding = Policy { listen_addrs, rules: rules("allow to=0.0.0.0/0,::/0"), ..Policy::default() };
    let calls = Cell::new(0);
    let local = |to: SocketAddr| {
        calls.set(calls.get() + 1);
        to.ip() == ip("192.0.2.1")
    };
    let table = [
        ("127.0.0.1:1080", "deny own-listener", 0),
        ("127.0.0.2:1080", "allow default-allow", 0),
        ("127.0.0.1:1083", "allow default-allow", 0),
        ("198.51.100.1:1080", "deny own-listener", 0),
        ("198.51.100.1:1083", "allow default-allow", 0),
        ("192.0.2.1:1080", "allow default-allow", 0),
        ("192.0.2.1:1081", "deny own-listener", 1),
        ("192.0.2.2:1081", "allow default-allow", 2),
        ("[::1]:1082", "deny own-listener", 0),
        ("[::1]:1081", "allow default-allow", 0),
    ];
    for (to, expected, expected_calls) in table.map(|(to, expected, calls)| (addr(to), expected, calls)) {
        let request = AccessRequest {
            client_ip: Some(ip("::1")),
            target_ip: Some(to.ip()),
            target_port: Some(to.port()),
            ..AccessRequest::default()
        };
        calls.set(0);
        assert_eq!(describe(default_policy.evaluate(&request, local)), expected, "{to}");
        assert_eq!(calls.get() > 0, expected_calls > 0, "{to}");
        assert_eq!(describe(overriding.evaluate(&request, local)), "allow line 1", "{to}");
    }
}

#[test]
fn allow_with_from_makes_deny_the_default() {
    let table = [
        ("allow from=10.0.0.0/8", "10.1.2.3", "198.51.100.1", "allow line 1"),
        ("allow from=10.0.0.0/8", "192.0.2.7", "198.51.100.1", "deny default-deny"),
        ("allow from=10.0.0.0/8", "::1", "198.51.100.1", "deny default-deny"),
        ("allow from=10.0.0.0/8", UNKNOWN_CLIENT, "198.51.100.1", "deny default-deny"),
        ("allow from=10.0.0.0/8", "10.1.2.3", "127.0.0.1", "deny protected"),
        ("allow from=10.0.0.0/8 to=127.0.0.1", "10.1.2.3", "127.0.0.1", "allow line 1"),
        ("allow from=10.0.0.0/8 to=127.0.0.1", "10.1.2.3", "198.51.100.1", "deny default-deny"),
        ("allow from=10.0.0.0/8 port=22", "10.1.2.3", "198.51.100.1", "deny default-deny"),
        ("allow port=80\nallow from=10.0.0.0/8", "192.0.2.7", "198.51.100.1", "allow line 1"),
        ("allow port=22\nallow from=10.0.0.0/8", "192.0.2.7", "198.51.100.1", "deny default-deny"),
        ("allow from=loopback\nallow", "192.0.2.7", "198.51.100.1", "allow line 2"),
        ("deny from=10.0.0.0/8", "192.0.2.7", "198.51.100.1", "allow default-allow"),
        ("deny from=10.0.0.0/8", "10.1.2.3", "198.51.100.1", "deny line 1"),
        ("allow user=bob", "192.0.2.7", "198.51.100.1", "allow default-allow"),
        ("allow to=203.0.113.1", "192.0.2.7", "198.51.100.1", "allow default-allow"),
    ];
    for (text, from, to, expected) in table {
        check(&rules(text), from, to, expected);
    }
}

#[test]
fn built_in_rules_follow_user_rules() {
    let names = |rules: &Rules| rules.in_display_order().map(super::label).collect::<Vec<_>>();
    let none = Rules::default();
    assert_eq!(
        (none.user_rules().len(), names(&none)),
        (0, ["own-listener", "protected", "default-allow"].map(Into::into).into())
    );
    let list = rules("allow from=::1\ndeny\n");
    let expected = ["line 1", "line 2", "own-listener", "protected", "default-deny"].map(String::from);
    assert_eq!((list.user_rules().len(), names(&list)), (2, expected.into()));
}

#[test]
fn unmatched_users_are_those_that_cannot_log_in() {
    let users = |text: &str| Some(Arc::new(Users::parse(text).expect("valid users file")));
    let hash = "$2y$05$7hT6Qu9VIEHwTdqyYV9xDeEF1Ddl9G/Y3lkSBY/zO3DVHSZOQu1nS";
    let alice_and_bob = users(&format!("alice:{hash}\nbob@corp:{hash}\n"));
    let text = "deny user=alice,bob@corp\nallow user=eve,eve@corp\ndeny user=*@corp,*@lost\ndeny user=*\ndeny port=1";
    let table = [
        (None, vec![], "alice bob@corp eve eve@corp *@corp *@lost *"),
        (users("# none\n"), vec![], "alice bob@corp eve eve@corp *@corp *@lost *"),
        (alice_and_bob.clone(), vec![], "eve eve@corp *@lost"),
        // The KDC knows the principals.
        (None, vec![Method::GSSAPI], "alice eve"),
        (alice_and_bob, vec![Method::PASSWORD, Method::GSSAPI], "eve"),
    ];
    for (users, methods, expected) in table {
        let policy = Policy { users, methods, rules: rules(text), ..Policy::default() };
        let unmatched: Vec<String> = policy.unmatched_users().map(|(_, user)| user.to_string()).collect();
        assert_eq!(unmatched.join(" "), expected);
    }
}

#[test]
fn policy_is_open_relay_if_any_client_is_admitted_without_login() {
    let table = [
        ("", true),
        ("allow", true),
        ("deny from=192.0.2.0/24", true),
        ("deny port=25", true),
        ("deny user=*", true),
        ("deny method=password", true),
        ("deny to=0.0.0.0/0", true),
        ("allow user=alice", true),
        ("allow port=80\nallow from=10.0.0.0/8", true),
        ("allow from=loopback\nallow", true),
        ("deny", false),
        ("deny method=none", false),
        ("deny method=none,gssapi port=1-65535\ndeny method=none", false),
        ("allow user=*\ndeny", false),
        ("allow method=password\ndeny", false),
        ("allow from=10.0.0.0/8", false),
        ("allow from=loopback to=198.51.100.1", false),
        ("allow from=10.0.0.0/8\nallow user=*", false),
    ];
    for (text, is_open) in table {
        let policy = Policy { rules: rules(text), ..Policy::default() };
        assert_eq!(policy.is_open_relay(), is_open, "{text:?}");
        let with_users = Policy { users: Some(Arc::default()), ..policy };
        assert!(!with_users.is_open_relay(), "{text:?} with users");
    }
}
