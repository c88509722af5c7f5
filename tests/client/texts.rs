//! Texts of users: addresses, URLs of proxies, listeners, times, and arguments. Also parts of messages and reports.

use std::io;
use std::time::Duration;

use rustix::io::Errno;
use s5::client::{Proxy, parse_addr_or_host};
use s5::cmd::cli::argv::normalize;
use s5::cmd::cli::escape::{plain_os_errors, quote};
use s5::cmd::cli::secrets::{password_in_option, password_in_url};
use s5::cmd::netcat::progress::format_size;
use s5::cmd::netcat::proxies::is_excluded;
use s5::cmd::netcat::report::format_millis;
use s5::cmd::syntax;
use s5::net::{DialError, parse_literal};
use s5::server::ListenAddr;
use s5::values::{parse_duration, parse_rate};

#[test]
fn ipv6_address_without_brackets_is_ambiguous_if_it_may_end_with_a_port() {
    for text in ["fd77:1::1:1080", "::1:1080", "fe80::1:0", "1:2:3:4:5:6::7:8"] {
        assert!(parse_addr_or_host(text, 1).is_err_and(|error| error.contains("is ambiguous")), "{text}");
    }
    let table = [
        ("::1", "[::1]:1"),
        ("fd77::1", "[fd77::1]:1"),
        ("fd77:1::1:a080", "[fd77:1::1:a080]:1"),
        ("1:2:3:4:5:6:7:8", "[1:2:3:4:5:6:7:8]:1"),
        ("[fd77:1::1:1080]", "[fd77:1::1:1080]:1"),
        ("[fd77:1::1]:1080", "[fd77:1::1]:1080"),
        ("::1:99999", "invalid IPv6 address \"::1:99999\""),
    ];
    for (text, expected) in table {
        let shown = parse_addr_or_host(text, 1).map_or_else(|error| error, |addr| addr.to_string());
        assert_eq!(shown, expected, "{text}");
    }
}

#[test]
fn parse_literal_accepts_every_form_of_inet_aton() {
    let table = [
        ("127.0.0.1", Some("127.0.0.1")),
        ("[::1]", Some("::1")),
        ("127.1", Some("127.0.0.1")),
        ("2130706433", Some("127.0.0.1")),
        ("0x7f.1", Some("127.0.0.1")),
        ("0177.0.0.1", Some("127.0.0.1")),
        ("0xA9FEA9FE", Some("169.254.169.254")),
        ("10.258", Some("10.0.1.2")),
        ("0", Some("0.0.0.0")),
        ("4294967296", None),
        ("1.2.3.256", None),
        ("256.1", None),
        ("1.2.3.4.5", None),
        ("08", None),
        ("+1", None),
        ("1.", None),
        ("a.1", None),
        ("face", None),
        ("fe80::1%eth0", Some("fe80::1")),
        ("fe80::1%", None),
        ("::1%lo", None),
        ("127.0.0.1%lo", None),
        ("example.org%eth0", None),
    ];
    for (text, ip) in table {
        assert_eq!(parse_literal(text).map(|ip| ip.to_string()).as_deref(), ip, "{text}");
    }
}

fn proxy(text: &str) -> Result<(String, Option<(String, String)>), String> {
    let proxy: Proxy = text.parse()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((proxy.to_string(), proxy.credentials.map(|c| (text(&c.uname), text(&c.passwd)))))
}

#[test]
fn proxy_url_is_parsed_in_every_form() {
    let table = [
        ("socks5://example.org", "example.org:1080"),
        ("[::1]", "[::1]:1080"),
        ("[::1]:9", "[::1]:9"),
        ("::1", "[::1]:1080"),
    ];
    for (text, shown) in table {
        assert_eq!(proxy(text), Ok((shown.into(), None)), "{text}");
    }
    for text in ["", ":pass@host", ":@host"] {
        assert!(proxy(text).is_err(), "{text}");
    }
}

#[test]
fn userinfo_is_percent_decoded_and_absent_from_messages() {
    let decoded = proxy("socks5h://al%40ice:p%3A%2C%25@host:1").expect("a proxy");
    assert_eq!(decoded, ("host:1".into(), Some(("al@ice".into(), "p:,%".into()))));
    let long = format!("{}:x@host", "u".repeat(256));
    assert_eq!(proxy(&long), Err("the user name has 256 bytes: SOCKS5 allows 1 to 255".into()));
    let debug = format!("{:?}", "u:topsecret@host".parse::<Proxy>().expect("a proxy"));
    assert!(!debug.contains("topsecret"), "{debug}");
}

#[test]
fn listen_addr_displays_as_the_text_it_was_parsed_from() {
    let texts = ["127.0.0.1:1080", "localhost:0", "[::1]:1080", "1080", "*:1080", "unix:/run/s5.sock"];
    for text in texts {
        assert_eq!(text.parse::<ListenAddr>().map(|listen| listen.to_string()).as_deref(), Ok(text));
    }
    for text in ["", ":", "host:", "host:65536", "[host]:1", "unix:", "-1", "[]", "[host]", "70000", "*:x"] {
        let error = text.parse::<ListenAddr>().expect_err(text);
        assert!(!error.contains("write"), "{text}: {error}");
    }
}

#[test]
fn listen_addr_error_names_what_is_probably_meant() {
    let table = [
        (":1081", "*:1081 for all addresses, or 1081 for loopback"),
        ("0.0.0.0", "*:PORT"),
        ("*", "*:PORT"),
        ("[::]", "*:PORT"),
        ("::", "*:PORT"),
        (":::1081", "*:1081"),
        ("::1:1081", "[::1]:1081"),
        ("fe80::1%eth0:1081", "[fe80::1%eth0]:1081"),
        ("::1", "[::1]:PORT"),
        ("[2001:db8::7]", "[2001:db8::7]:PORT"),
        ("2001:db8::7", "[2001:db8::7]:PORT"),
        ("192.0.2.7", "192.0.2.7:PORT"),
        ("host", "host:PORT"),
    ];
    for (text, meant) in table {
        let error = text.parse::<ListenAddr>().expect_err(text);
        assert!(error.ends_with(&format!(" (write {meant})")), "{text}: {error}");
    }
}

#[test]
fn parse_duration_defaults_to_seconds() {
    let table = [
        ("10", 10_000),
        ("2.5", 2500),
        ("0.25s", 250),
        (".5", 500),
        ("500ms", 500),
        ("10s", 10_000),
        ("5m", 300_000),
        ("2h", 7_200_000),
        ("1m30s", 90_000),
        ("1h1m1.5s250ms", 3_661_750),
    ];
    for (text, millis) in table {
        assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
    }
}

#[test]
fn parse_duration_requires_a_unit_for_each_part_of_a_sum() {
    for text in ["1m30", "30s5", "1m s", "m30s", "1m-30s", "1m30s ", "1mm", "99999999999h1s"] {
        assert!(parse_duration(text).is_err(), "{text}");
    }
}

#[test]
fn parse_rate_has_units_of_1000() {
    let table = [("1", 1), ("1500", 1500), ("64k", 64_000), ("10M", 10_000_000), ("2G", 2_000_000_000)];
    for (text, rate) in table {
        assert_eq!(parse_rate(text), Ok(rate));
    }
}

/// Returns the mode and the arguments for argh, the first line of the help, or the error.
fn normalize_line(line: &str) -> String {
    let args: Vec<String> = line.split(' ').map(String::from).collect();
    let program = syntax();
    match normalize(&args, &program) {
        Ok((syntax, Some(args))) => format!("{} {}", syntax.name, args.join(" ")).trim().into(),
        Ok((syntax, None)) => format!("help of {}", syntax.usage()),
        Err(error) => error,
    }
}

#[test]
fn arguments_are_separated_aliases_replaced_and_typing_errors_corrected() {
    let table = [
        ("connect -x proxy -w 3 host 80", "connect -x proxy -w 3 -- host 80"),
        ("connect -xproxy -w3 host:80", "connect -x proxy -w 3 -- host:80"),
        ("connect -vw3 host:80", "connect -v -w 3 -- host:80"),
        ("connect -vvw=3 host:80", "connect -v -v -w 3 -- host:80"),
        ("connect -zv4w3 host:80", "connect -z -v -4 -w 3 -- host:80"),
        ("connect --proxy=a=b --timeout=3 host:80", "connect --proxy a=b --timeout 3 -- host:80"),
        ("connect --proxy= host:80", "connect --proxy  -- host:80"),
        ("connect -x= host:80", "connect -x  -- host:80"),
        ("connect -x -v host:80", "connect -x -v -- host:80"),
        ("connect help 80 -v", "connect -v -- help 80"),
        ("connect -- -v -w3", "connect -- -v -w3"),
        ("connect - host", "connect -- - host"),
        ("serve --listen=*:1080 -qv", "serve --listen *:1080 -q -v"),
        ("--version", "--version"),
        ("connect --help", "help of s5 connect [options] [target]"),
        ("help bind", "help of s5 bind [options] [peer]"),
        ("udp -vh", "help of s5 udp [options] [target]"),
        ("-h", "help of s5 <mode> [options]"),
        ("connect --no-proxy host:80", "connect --direct -- host:80"),
        ("udp --resolve=local host:80", "udp --proxy-dns local -- host:80"),
        ("connect --wait 3 host:80", "connect --retry 3 -- host:80"),
        ("bind --bound-to=file", "bind --address-file file"),
        ("serve --drain 3", "serve --drain-timeout 3"),
        ("serve --open", "serve --allow-open-relay"),
        ("serve --wait 3", "unrecognized option --wait"),
        ("connect --porxy a b", "unrecognized option --porxy (did you mean --proxy?)"),
        ("serve --user f", "unrecognized option --user (did you mean --users?)"),
        ("serve --nonsense", "unrecognized option --nonsense"),
        ("serve --drian 3", "unrecognized option --drian (did you mean --drain-timeout?)"),
        ("serve --bound-t f", "unrecognized option --bound-t"),
        ("serve --port 1", "unrecognized option --port (use --listen [ADDR:]PORT)"),
        ("serve -p 1", "unrecognized option -p (use --listen [ADDR:]PORT)"),
        ("serve --bind a", "unrecognized option --bind"),
        ("serve --liten a", "unrecognized option --liten (did you mean --listen?)"),
        ("connect --port 1", "unrecognized option --port (write the port after the host: HOST:PORT)"),
        ("connect --check a", "unrecognized option --check (use -z)"),
        ("connect --chek a", "unrecognized option --chek"),
        ("connect -u a", "unrecognized option -u (use s5 udp)"),
        ("udp -zu a", "unrecognized option -u (not necessary: s5 udp always sends datagrams)"),
        ("connect -n a 80", "connect -- a 80"),
        ("connect -nzv a 80", "connect -z -v -- a 80"),
        ("bind -vn", "bind -v"),
        ("udp -nzv a 80", "udp -z -v -- a 80"),
        ("udp -zn 3 a 80", "udp -z -n 3 -- a 80"),
        ("udp -n3 a 80", "udp -n 3 -- a 80"),
        ("serve -n", "unrecognized option -n"),
        ("connect --proxy-auth u:p a 80", "connect --proxy-user u:p -- a 80"),
        ("connect -vZ", "unrecognized option -Z"),
        ("connect --json host:80", "connect --json fd:2 -- host:80"),
        ("connect --json=file host:80", "connect --json file -- host:80"),
        ("connect -Nv --shutdown host:80", "connect -v -- host:80"),
        ("connect --shutdown=yes host:80", "unrecognized option --shutdown"),
        ("serve -N", "unrecognized option -N"),
        ("connect --quiet=yes", "--quiet does not take a value"),
        ("--versoin", "unrecognized option --versoin (did you mean --version?)"),
    ];
    for (line, expected) in table {
        assert_eq!(normalize_line(line), expected, "{line}");
    }
}

#[test]
fn plain_os_errors_removes_numbers_and_capital_letters() {
    let error = |number| io::Error::from_raw_os_error(number).to_string();
    let message = format!("a: {} (hint); {}; {}", error(2), error(98), error(2));
    let plain = "a: no such file or directory (hint); address already in use; no such file or directory";
    assert_eq!(plain_os_errors(message), plain);
    for other in ["", "Other (os error x)", "Wrong text (os error 2)", " (os error "] {
        assert_eq!(plain_os_errors(other.into()), other);
    }
}

#[test]
fn connect_errno_maps_to_dial_error() {
    let v4 = "127.0.0.1:1".parse().expect("an address");
    let v6 = "[::1]:1".parse().expect("an address");
    let table = [
        (Errno::CONNREFUSED, v4, DialError::Refused),
        (Errno::NETUNREACH, v4, DialError::NetworkUnreachable),
        (Errno::HOSTUNREACH, v4, DialError::HostUnreachable),
        (Errno::TIMEDOUT, v4, DialError::TimedOut),
        (Errno::AFNOSUPPORT, v6, DialError::FamilyUnavailable),
        (Errno::ADDRNOTAVAIL, v6, DialError::FamilyUnavailable),
        (Errno::ADDRNOTAVAIL, v4, DialError::LocalResources),
        (Errno::INVAL, "[fe80::1]:1".parse().expect("an address"), DialError::ZoneRequired),
        (Errno::INVAL, v4, DialError::LocalResources),
        (Errno::MFILE, v4, DialError::LocalResources),
        (Errno::PERM, v4, DialError::Denied),
    ];
    for (errno, addr, error) in table {
        assert_eq!(DialError::from_connect(&errno.into(), addr), error, "{errno}");
    }
}

#[test]
fn no_proxy_ignores_case_and_accepts_wildcards_ports_and_ipv6() {
    let table = [
        ("example.org", "www.Example.ORG.:80", true),
        ("*.example.org", "www.example.org:80", true),
        ("example.org:80", "example.org:80", true),
        ("example.org:81", "example.org:80", false),
        ("10.1.2.3", "[::ffff:10.1.2.3]:80", true),
        ("::1", "[::1]:80", true),
        ("[::1]", "[::1]:80", true),
        ("[::1]:81", "[::1]:80", false),
        ("2001:db8::/32", "[2001:db8::7]:80", true),
        ("fe80::1%eth0", "[fe80::1%eth0]:80", true),
        ("fe80::/10", "[fe80::1%eth0]:80", true),
        ("fe80::2", "[fe80::1%eth0]:80", false),
        (".", "example.org:80", false),
    ];
    for (list, target, expected) in table {
        let dst = target.parse().expect("a target");
        assert_eq!(is_excluded(list, &dst), expected, "{list} {target}");
    }
}

#[test]
fn password_may_contain_delimiters_and_may_be_missing() {
    let table = [
        ("-xalice:se:cr@et@proxy", Some("se:cr@et")),
        ("-xalice:a://b@proxy", Some("a://b")),
        ("name=alice:secret@proxy", Some("secret")),
        ("alice@proxy:1080", None),
        ("alice@[::1]:1080", None),
        ("[::1]:1080", None),
        ("", None),
    ];
    for (arg, secret) in table {
        let found = password_in_url(arg).and_then(|span| arg.get(span));
        assert_eq!(found, secret, "{arg}");
    }
    let table = [("-Palice:a:b", Some("a:b")), ("alice:a:b", Some("a:b")), ("alice:a:bc", None)];
    for (arg, secret) in table {
        let found = password_in_option(arg, "alice:a:b").and_then(|span| arg.get(span));
        assert_eq!(found, secret, "{arg}");
    }
}

#[test]
fn size_has_the_largest_unit_not_above_it() {
    let table = [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 30) - 1, "1023.9 MiB"),
        (u64::MAX, "16777215.9 TiB"),
    ];
    for (bytes, shown) in table {
        assert_eq!(format_size(bytes), shown);
    }
}

#[test]
fn quote_escapes_quotes_backslashes_and_invisible_characters() {
    assert_eq!(quote("a\"b\\c\nd\x1be \u{e9}"), "\"a\\\"b\\\\c\\u000ad\\u001be \u{e9}\"");
    assert_eq!(quote("\u{7f}\u{202e}\u{e0041}"), r#""\u007f\u202e\udb40\udc41""#);
    assert_eq!(format_millis(Duration::from_micros(12_034_056)), "12034.056");
}
