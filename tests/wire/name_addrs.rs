//! The addresses of a name, without sockets and with a clock of the test.

use proptest::prelude::*;
use s5::name_addrs::{ANSWER_TIMEOUT, LOOKUP_INTERVAL, MAX_ADDRS, NameAddrs};

use crate::*;

/// The port of all datagrams but those of one test.
const PORT: u16 = 53;

/// Addresses with [`PORT`], from hosts separated by spaces.
fn addrs(hosts: &str) -> Vec<SocketAddr> {
    hosts.split_whitespace().map(|host| SocketAddr::new(host.parse().expect("valid address"), PORT)).collect()
}

fn addr(host: &str) -> SocketAddr {
    addrs(host)[0]
}

/// A name, and the time of the test.
struct Name {
    addrs: NameAddrs,
    now: Instant,
}

impl Name {
    fn new(hosts: &str) -> Self {
        let now = Instant::now();
        Self { addrs: NameAddrs::new(now, &addrs(hosts)), now }
    }

    fn wait(&mut self, time: Duration) -> &mut Self {
        self.now += time;
        self
    }

    /// Returns the host that a datagram goes to.
    fn send(&mut self) -> String {
        self.addrs.select(self.now, PORT).expect("an address").ip().to_string()
    }

    /// Starts and ends a lookup.
    fn look_up(&mut self, hosts: &str) -> &mut Self {
        self.wait(LOOKUP_INTERVAL);
        assert!(self.addrs.start_lookup(self.now));
        self.addrs.update(&addrs(hosts));
        self
    }
}

const ALMOST: Duration = ANSWER_TIMEOUT.saturating_sub(Duration::from_nanos(1));

#[test]
fn silent_address_is_left_a_second_after_its_first_datagram() {
    let mut name = Name::new("::1 127.0.0.1");
    assert_eq!(name.send(), "::1");
    assert_eq!(name.wait(ALMOST).send(), "::1");
    assert_eq!(name.wait(Duration::from_nanos(1)).send(), "127.0.0.1");
    assert_eq!(name.wait(ALMOST).send(), "127.0.0.1");
    // No address is given up.
    assert_eq!(name.wait(ANSWER_TIMEOUT).send(), "::1");
}

#[test]
fn time_without_datagrams_does_not_count() {
    let mut name = Name::new("::1 127.0.0.1");
    assert_eq!(name.wait(LOOKUP_INTERVAL).send(), "::1");
    name.addrs.on_answer(addr("::1"));
    assert_eq!(name.wait(LOOKUP_INTERVAL * 10).send(), "::1");
    assert_eq!(name.wait(ANSWER_TIMEOUT).send(), "::1");
}

#[test]
fn address_that_has_answered_is_kept_for_a_minute_without_an_answer() {
    let mut name = Name::new("::1 127.0.0.1");
    name.send();
    name.addrs.on_answer(addr("::1"));
    assert_eq!(name.send(), "::1");
    assert_eq!(name.wait(LOOKUP_INTERVAL - Duration::from_nanos(1)).send(), "::1");
    assert_eq!(name.wait(Duration::from_nanos(1)).send(), "127.0.0.1");
}

#[test]
fn error_selects_the_next_address_at_once() {
    let mut name = Name::new("::1 127.0.0.1");
    name.send();
    assert!(name.addrs.fail(addr("::1")));
    assert_eq!(name.send(), "127.0.0.1");
    // The address with an error is not used in turn with a silent one.
    for _ in 0..5 {
        assert_eq!(name.wait(ANSWER_TIMEOUT).send(), "127.0.0.1");
    }
    // When all have failed, they are tried again.
    assert!(!name.addrs.fail(addr("127.0.0.1")));
    assert_eq!(name.send(), "::1");
}

#[test]
fn error_about_another_address_or_after_an_answer() {
    let mut name = Name::new("::1 127.0.0.1 127.0.0.2");
    name.send();
    name.addrs.on_answer(addr("::1"));
    assert!(name.addrs.fail(addr("127.0.0.1")));
    assert_eq!(name.send(), "::1");
    assert!(name.addrs.fail(addr("::1")));
    assert_eq!(name.send(), "127.0.0.2");
    // A lookup forgets the errors.
    assert_eq!(name.look_up("::1 127.0.0.1 127.0.0.2").send(), "::1");
}

#[test]
fn late_answer_selects_its_address_unless_another_one_has_answered() {
    let mut name = Name::new("::1 127.0.0.1");
    name.send();
    assert_eq!(name.wait(ANSWER_TIMEOUT).send(), "127.0.0.1");
    name.addrs.on_answer(addr("::1"));
    assert_eq!(name.send(), "::1");
    name.addrs.on_answer(addr("127.0.0.1"));
    assert_eq!(name.send(), "::1");
    name.addrs.on_answer(addr("192.0.2.1"));
    assert_eq!(name.send(), "::1");
}

#[test]
fn datagrams_are_kept_only_for_addresses_that_have_not_answered() {
    let mut name = Name::new("::1 127.0.0.1");
    name.send();
    assert!(name.addrs.is_uncertain(addr("::1")) && !name.addrs.is_uncertain(addr("127.0.0.1")));
    name.addrs.on_answer(addr("::1"));
    assert!(!name.addrs.is_uncertain(addr("::1")));
    let mut name = Name::new("::1");
    name.send();
    assert!(!name.addrs.is_uncertain(addr("::1")));
}

#[test]
fn each_port_has_its_own_address() {
    let mut name = Name::new("::1 127.0.0.1");
    let select = |name: &mut Name, port| name.addrs.select(name.now, port).expect("an address").to_string();
    assert_eq!([select(&mut name, 1), select(&mut name, 2)], ["[::1]:1", "[::1]:2"]);
    name.addrs.fail("[::1]:1".parse().expect("valid address"));
    name.addrs.on_answer("[::1]:2".parse().expect("valid address"));
    name.wait(ANSWER_TIMEOUT * 2);
    assert_eq!([select(&mut name, 1), select(&mut name, 2)], ["127.0.0.1:1", "[::1]:2"]);
    // A server may answer from another port.
    name.addrs.on_answer("127.0.0.1:999".parse().expect("valid address"));
    name.wait(ANSWER_TIMEOUT * 2);
    assert_eq!([select(&mut name, 1), select(&mut name, 2)], ["127.0.0.1:1", "[::1]:2"]);
}

#[test]
fn lookup_is_due_once_a_minute_and_its_result_replaces_silent_addresses() {
    let mut name = Name::new("127.0.0.1");
    assert!(!name.addrs.start_lookup(name.now + LOOKUP_INTERVAL - Duration::from_nanos(1)));
    assert_eq!(name.send(), "127.0.0.1");
    assert_eq!(name.look_up("127.0.0.2").send(), "127.0.0.2");
    assert!(!name.addrs.start_lookup(name.now));
    // An address that answers is used until it stops.
    name.addrs.on_answer(addr("127.0.0.2"));
    assert_eq!(name.look_up("127.0.0.3").send(), "127.0.0.2");
    assert_eq!(name.wait(ALMOST).send(), "127.0.0.2");
    name.addrs.on_answer(addr("127.0.0.2"));
    assert_eq!(name.send(), "127.0.0.2");
    assert_eq!(name.wait(ANSWER_TIMEOUT).send(), "127.0.0.3");
    // A lookup without a result changes nothing.
    assert_eq!(name.look_up("").send(), "127.0.0.3");
}

#[test]
fn families_alternate_and_addresses_and_ports_are_limited() {
    let hosts: Vec<String> = (1..=20).map(|n| format!("2001:db8::{n}")).collect();
    let mut name = Name::new(&(hosts.join(" ") + " 127.0.0.1"));
    assert_eq!(name.send(), "2001:db8::1");
    assert_eq!(name.wait(ANSWER_TIMEOUT).send(), "127.0.0.1");
    let used: Vec<String> = (0..MAX_ADDRS).map(|_| name.wait(ANSWER_TIMEOUT).send()).collect();
    assert_eq!((used[0].as_str(), used[MAX_ADDRS - 2].as_str()), ("2001:db8::2", "2001:db8::1"));
    for port in 0..=u16::MAX {
        name.addrs.select(name.now, port);
    }
    // The oldest port is forgotten.
    assert_eq!(name.send(), "2001:db8::1");
    assert!(Name::new("").addrs.select(Instant::now(), PORT).is_none());
}

/// What happens between two datagrams: time in milliseconds, and whether the receiver answers.
fn steps() -> impl Strategy<Value = Vec<(u64, bool)>> {
    prop::collection::vec((0..3000_u64, any::<bool>()), 1..60)
}

proptest! {
    /// Only one of the addresses works, and the others are silent or return errors.
    #[test]
    fn working_address_is_found_and_kept(count in 1..8_u8, working in 0..8_u8, errors in any::<u8>(), steps in steps()) {
        let working = working % count;
        let hosts: Vec<String> = (0..count).map(|n| format!("192.0.2.{n}")).collect();
        let mut name = Name::new(&hosts.join(" "));
        let (mut started, mut answered) = (name.now, false);
        for (millis, answers) in steps {
            let host = name.wait(Duration::from_millis(millis)).send();
            let index: u8 = host.rsplit('.').next().and_then(|n| n.parse().ok()).expect("a number");
            prop_assert!(!answered || index == working, "left an address that answers: {host}");
            if index == working && answers {
                (answered, started) = (true, name.now);
                name.addrs.on_answer(addr(&host));
            } else if index != working && errors >> index & 1 == 1 {
                name.addrs.fail(addr(&host));
            }
            if name.now - started > LOOKUP_INTERVAL / 2 {
                break;
            }
        }
        // Each other address costs at most a second, if there are datagrams.
        let found = (0..2 * usize::from(count)).any(|_| name.wait(ANSWER_TIMEOUT).send() == format!("192.0.2.{working}"));
        prop_assert!(found);
    }
}
