//! Other clients while one address attacks: an open tunnel stays quick, new clients are served at once, and afterwards
//! the server has its memory and descriptors back.

use std::sync::LazyLock;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::*;

const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 6, 6, 6);
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 7, 7, 7);
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
/// Round trips of the open tunnel take at most so many times their time on a quiet server, or so long: while all cores
/// compute, a thread that wakes up waits for one for some milliseconds.
const MAX_FACTOR: u32 = 5;
const MAX_ROUND_TRIP: Duration = Duration::from_millis(20);
const MAX_NEW_CLIENT: Duration = Duration::from_millis(50);
/// The limit of round trips for a server that has a core of its own, on which it computes all the time.
const MAX_ON_OWN_CORE: Duration = Duration::from_millis(5);
/// The limit of round trips beside many idle clients: a thread that wakes up may wait for a core for a moment.
const MAX_BESIDE_IDLE: Duration = Duration::from_millis(1);
/// Time of an attack before the measurement.
const RAMP: Duration = Duration::from_millis(500);
/// Memory in KiB that may remain: the allocator keeps some freed memory for each thread.
const TOLERANCE_KIB: usize = 6144;
/// A target with 32 addresses that accept no connection.
const SILENT_ADDRS: &str = "many.test";

/// A server, and what the attacks need.
struct Lab {
    server: Server,
    /// All clients are forwarded by a load balancer.
    is_balanced: bool,
    /// Accepts no connection.
    silent: FullBacklog,
    tcp_sink: SocketAddr,
    udp_echo: SocketAddr,
    number: AtomicUsize,
}

/// One step of an attack, which four threads repeat. The connections stay open until the attack is over.
type Step = fn(&Lab, &mut Vec<TcpStream>) -> io::Result<()>;

/// Name, number of connections that each thread keeps at most, and the step.
const ATTACKS: [(&str, usize, Step); 12] = [
    ("wrong passwords", 250, |lab, held| {
        let login = login_message(b"user2", format!("guess {}", lab.next()).as_bytes());
        lab.hold(held, &[&[5, 1, 2], &login[..]].concat())
    }),
    ("unfinished handshakes", 2500, |lab, held| lab.hold(held, &[5, 1])),
    ("names that no server answers", 500, |lab, held| {
        let name = format!("silent.n{}.test", lab.next());
        lab.hold_request(held, &request_by_name(CONNECT, &name, 9))
    }),
    ("names with 32 silent addresses", 500, |lab, held| {
        lab.hold_request(held, &request_by_name(CONNECT, SILENT_ADDRS, lab.silent.addr.port()))
    }),
    ("tunnels", 2000, |lab, held| lab.hold_request(held, &request(CONNECT, lab.tcp_sink))),
    ("idle tunnels and unfinished handshakes of many addresses", 1500, |lab, held| {
        let [.., high, low] = lab.next().to_be_bytes();
        let tunnel = [&[5, 1, 0][..], &request(CONNECT, lab.tcp_sink)].concat();
        lab.hold_from(Ipv4Addr::new(127, 8, high, low), held, if low % 2 == 0 { &tunnel } else { &[5, 1] })
    }),
    ("waiting BINDs", 2000, |lab, held| lab.hold_request(held, &request(BIND, ANY))),
    ("associations", 1000, |lab, held| lab.hold_request(held, &request(UDP_ASSOCIATE, ANY))),
    ("sessions that fail at once", 1, |lab, held| {
        lab.hold_request(held, &request(CONNECT, closed_port()))?;
        held.pop().map_or(Ok(()), |mut last| last.read_to_end(&mut Vec::new()).map(drop))
    }),
    ("data after a refusal", 1, |lab, held| {
        held.clear();
        lab.hold_request(held, &request(CONNECT, "192.0.2.1:9".parse().expect("valid address")))?;
        held.iter_mut().try_for_each(|stream| (0..1000).try_for_each(|_| stream.write_all(&[b'x'; 65_536])))
    }),
    ("datagrams", 1, |lab, _| {
        let message = [&[0, 0, 0][..], &request(0, lab.udp_echo)[3..], &[b'x'; 500]].concat();
        lab.send_datagrams(ATTACKER, &message)
    }),
    ("datagrams of strangers", 1, |lab, _| lab.send_datagrams(Ipv4Addr::new(127, 6, 6, 7), &[b'x'; 500])),
];

impl Lab {
    fn start(users: &str, is_balanced: bool) -> Self {
        let (target, tcp_sink) = listener(V4);
        thread::spawn(move || {
            target.incoming().flatten().for_each(|mut stream| {
                thread::spawn(move || io::copy(&mut stream, &mut io::sink()));
            })
        });
        let args = ["--users", users, "--auth", "none,password", "--deny", "to=192.0.2.0/24"];
        let from: &[&str] =
            if is_balanced { &["--proxy-protocol-from", "127.0.0.0/8", "--allow-open-relay"] } else { &[] };
        Self {
            server: Server::start(&[&args, from].concat()),
            is_balanced,
            silent: FullBacklog::at(ANY),
            tcp_sink,
            udp_echo: udp_echo_server(V4),
            number: AtomicUsize::new(0),
        }
    }

    fn next(&self) -> usize {
        self.number.fetch_add(1, Ordering::Relaxed)
    }

    /// Connects from the attacker's address, and sends these bytes.
    fn hold(&self, held: &mut Vec<TcpStream>, bytes: &[u8]) -> io::Result<()> {
        self.hold_from(ATTACKER, held, bytes)
    }

    fn hold_from(&self, source: Ipv4Addr, held: &mut Vec<TcpStream>, bytes: &[u8]) -> io::Result<()> {
        let mut stream = self.connect(source)?;
        stream.write_all(bytes)?;
        held.push(stream);
        Ok(())
    }

    fn connect(&self, source: Ipv4Addr) -> io::Result<TcpStream> {
        let mut stream = connect_from_ip(&self.server, source);
        if self.is_balanced {
            stream.write_all(format!("PROXY TCP4 {source} 127.0.0.1 1 1\r\n").as_bytes())?;
        }
        Ok(stream)
    }

    fn hold_request(&self, held: &mut Vec<TcpStream>, request: &[u8]) -> io::Result<()> {
        self.hold(held, &[&[5, 1, 0], request].concat())
    }

    /// Opens an association, and sends many datagrams to it from this address.
    fn send_datagrams(&self, source: Ipv4Addr, message: &[u8]) -> io::Result<()> {
        let mut control = Vec::new();
        self.hold_request(&mut control, &request(UDP_ASSOCIATE, ANY))?;
        assert_eq!(read_exact(&mut control[0], 2), [5, 0]);
        let (_, bnd) = read_reply(&mut control[0]);
        let socket = UdpSocket::bind((source, 0))?;
        (0..20_000).try_for_each(|_| socket.send_to(message, bnd).map(drop))
    }

    /// Repeats the step on a thread with low priority, until `is_over`: the attack has to load the server, and not the
    /// cores that the other client uses. Failures are what the server is free to answer.
    fn attack(&self, limit: usize, step: Step, is_over: &AtomicBool) {
        let thread = std::fs::read_link("/proc/thread-self").expect("this thread in /proc");
        let chrt =
            Command::new("chrt").args(["--idle", "--pid", "0"]).arg(thread.file_name().expect("its number")).status();
        assert!(chrt.expect("chrt runs").success(), "the thread has low priority");
        let mut held = Vec::new();
        while !is_over.load(Ordering::Relaxed) {
            let _ = step(self, &mut held);
            if held.len() > limit {
                held.swap_remove(0);
            }
        }
    }
}

/// The other client, with an open tunnel.
struct Other<'a> {
    lab: &'a Lab,
    echo: SocketAddr,
    tunnel: TcpStream,
}

impl<'a> Other<'a> {
    fn connect(lab: &'a Lab, echo: SocketAddr) -> Self {
        Self { lab, echo, tunnel: Self::open(lab, echo) }
    }

    fn open(lab: &Lab, echo: SocketAddr) -> TcpStream {
        let mut stream = lab.connect(OTHER).expect("connected");
        stream.set_nodelay(true).expect("option set");
        stream.write_all(&[5, 1, 0]).expect("greeting sent");
        assert_eq!(read_exact(&mut stream, 2), [5, 0]);
        stream.write_all(&request(CONNECT, echo)).expect("request sent");
        assert_eq!(read_reply(&mut stream).0, 0);
        stream
    }

    /// Returns the 99th percentile of round trips, and that of new clients with one round trip.
    fn measure(&mut self) -> [Duration; 2] {
        let (mut round_trips, mut new_clients) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            round_trips.extend((0..5).map(|_| timed(|| ping(&mut self.tunnel, b"round trip")).0));
            new_clients.push(timed(|| ping(&mut Self::open(self.lab, self.echo), b"new client")).0);
        }
        [round_trips, new_clients].map(|mut times| {
            times.sort_unstable();
            times[times.len() * 99 / 100]
        })
    }
}

/// The cores of this thread before it chooses some of them.
static CORES: LazyLock<Vec<usize>> = LazyLock::new(|| {
    let set = sched_getaffinity(None).expect("set of cores");
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
});

/// Makes this thread, and the threads and processes that it starts, run on the first core or on the others.
pub fn choose_core(is_first: bool) {
    let mut set = CpuSet::new();
    CORES.iter().enumerate().filter(|(i, _)| (*i == 0) == is_first).for_each(|(_, core)| set.set(*core));
    sched_setaffinity(None, &set).expect("cores set");
}

fn private_kib(server: &Server) -> usize {
    proc_kib(server, "smaps_rollup", "Private_Dirty")
}

/// Runs one attack and measures what the other client notices. `limits` are those of round trips and new clients.
fn run(lab: &Lab, echo: SocketAddr, attack: (&str, usize, Step), limits: [Duration; 2]) -> Result<(), String> {
    let (name, limit, step) = attack;
    let mut other = Other::connect(lab, echo);
    let quiet = other.measure();
    let (descriptors, memory) = (lab.server.descriptors(), private_kib(&lab.server));
    let is_over = AtomicBool::new(false);
    let attacked = thread::scope(|scope| {
        (0..4).for_each(|_| drop(scope.spawn(|| lab.attack(limit, step, &is_over))));
        thread::sleep(RAMP);
        let attacked = other.measure();
        eprintln!("{name}: {} descriptors at the end", lab.server.descriptors());
        is_over.store(true, Ordering::Relaxed);
        attacked
    });
    let ended = Instant::now();
    let is_freed = || lab.server.descriptors() <= descriptors && private_kib(&lab.server) <= memory + TOLERANCE_KIB;
    while !is_freed() && ended.elapsed() < TIMEOUT {
        thread::sleep(Duration::from_millis(20));
    }
    let now = [lab.server.descriptors(), private_kib(&lab.server)];
    eprintln!(
        "{name}: 99 % of round trips and new clients: quiet {quiet:?}, attack {attacked:?}; descriptors and KiB before \
         {:?}, after {now:?} and {:?}",
        [descriptors, memory],
        ended.elapsed(),
    );
    ensure(is_freed(), || format!("{name}: descriptors and memory {now:?}, before {:?}", [descriptors, memory]))?;
    ensure(attacked[0] <= limits[0].max(quiet[0] * MAX_FACTOR), || {
        format!("{name}: round trip {:?}, quiet {:?}", attacked[0], quiet[0])
    })?;
    ensure(attacked[1] <= limits[1].max(quiet[1] * MAX_FACTOR), || {
        format!("{name}: new client {:?}, quiet {:?}", attacked[1], quiet[1])
    })
}

/// Returns the machine for this test alone, and what servers and clients need: a users file and an echo server. `None`:
/// too few descriptors.
fn set_up() -> Option<(File, TempDir, String, SocketAddr)> {
    if !raise_fd_limit(20_000) {
        skip("too few descriptors");
        return None;
    }
    let machine = lock_machine();
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", &crate::login_memory::users_text());
    Some((machine, dir, users, echo_server()))
}

/// Starts a name server that does not know any name but [`SILENT_ADDRS`].
fn start_dns() {
    dns::start_with(|name, _| match name {
        SILENT_ADDRS => dns::Answer::addrs((1..=32).map(|n| Ipv4Addr::new(127, 9, 0, n))),
        _ => dns::Answer::NoReply,
    });
}

fn resolv() -> String {
    format!("{}options timeout:1 attempts:1\n", dns::RESOLV)
}

#[test]
fn attack_of_one_address_does_not_slow_other_clients() {
    enter_namespace!("", &resolv());
    let Some((_machine, _dir, users, echo)) = set_up() else { return };
    start_dns();
    for attack in ATTACKS {
        try_three_times(|| run(&Lab::start(&users, false), echo, attack, [MAX_ROUND_TRIP, MAX_NEW_CLIENT]));
    }
}

/// With a core of its own, the delays are those of the server alone: the threads of the test cause none.
#[test]
fn tunnels_and_new_clients_come_first_on_a_server_that_computes_all_the_time() {
    enter_namespace!("", &resolv());
    run_on_own_core(false);
}

#[test]
fn tunnels_and_new_clients_come_first_behind_a_load_balancer() {
    enter_namespace!("", &resolv());
    run_on_own_core(true);
}

fn run_on_own_core(is_balanced: bool) {
    if CORES.len() < 2 {
        return record_skip("this machine has one core");
    }
    choose_core(false);
    let Some((_machine, _dir, users, echo)) = set_up() else { return };
    start_dns();
    try_three_times(|| {
        choose_core(true);
        let lab = Lab::start(&users, is_balanced);
        choose_core(false);
        run(&lab, echo, ATTACKS[3], [MAX_ON_OWN_CORE, MAX_NEW_CLIENT])
    });
}

/// With 20,000 descriptors, a server has 9,000 sessions, and at most half of them are unfinished handshakes.
#[test]
fn new_clients_are_served_beside_4000_idle_tunnels_and_4000_unfinished_handshakes() {
    enter_namespace!("", &resolv());
    let Some((_machine, _dir, users, echo)) = set_up() else { return };
    let (lab, quiet) = (Lab::start(&users, false), Lab::start(&users, false));
    let [mut other, mut quiet] = [&lab, &quiet].map(|lab| Other::connect(lab, echo));
    let (_, _, step) = ATTACKS[5];
    let mut held = Vec::new();
    (0..8000).for_each(|_| step(&lab, &mut held).expect("connected"));
    wait_until("12,000 descriptors in use", TIMEOUT, || lab.server.descriptors() >= 12_000);
    try_three_times(|| {
        let [[quiet, _], [round_trip, new_client]] = [quiet.measure(), other.measure()];
        let limit = MAX_BESIDE_IDLE.max(quiet * MAX_FACTOR);
        ensure(round_trip <= limit, || format!("round trip {round_trip:?}, quiet {quiet:?}"))?;
        ensure(new_client <= MAX_NEW_CLIENT, || format!("new client {new_client:?}"))
    });
}
