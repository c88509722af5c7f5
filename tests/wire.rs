//! Transcripts of the protocol, `wire/*.txt`: octets in, octets out, one fact a file.
//!
//! `>` is always from the SOCKS client to the SOCKS server, and `<` always back; `role` says which of them is s5. A
//! transcript opens with its fact as a comment and names the demands of the RFCs (numbered in the README) that it covers:
//!
//! ```text
//! # A right password is answered 01 00 (RFC 1929 section 2).
//! demands: 30 31
//! role: server                    s5 serve is played against; else a client and its arguments, with {proxy} for us
//! server: --bind-timeout 1s       more flags for s5 serve
//! user: "alice" "secret"          a user of the server (argon2id); `bcrypt user:` likewise
//! over: ::1                       the client connects to there; else to 127.0.0.1, or 127.0.0.7 where we are the server
//! splits                          every two-way split of what the client sends is played as well
//! > 05 01 00 "text\r\n\x00"       octets, in hex or quoted; 41*255 and "ab"*3 repeat; {echo} is an address, see below
//! > 03 09 "localhost" {echo:port} its port alone
//! < 05 ?? 00 {bnd} ...            exactly these must come; ?? is any octet, ... all up to the end
//! udp> udp<                       a datagram to BND from the client's own socket, one back to it
//! other> stranger> stranger<      from another port, from another address
//! peer connects                   BIND's expected peer connects to BND; also: peer sends, peer gets, peer fin, peer eof
//! other connects                  somebody from another port does (stranger: address), and must be closed
//! fin  reset                      our side ends its half, resets
//! eof  close                      theirs must end: with FIN; with FIN or a reset
//! gone tcp  gone udp              nothing has the port of BND any more
//! log: rep=5                      the server's line about this session has that in it
//! stdin: "text"                   what the client reads; `stdin open:` does not end behind it
//! status: 105                     how the client exits (0)
//! stdout: "text"                  all that it writes to stdout (nothing)
//! stderr: refused                 part of what it writes to stderr
//! ```
//!
//! `{bnd}` in a reply is any loopback address with a port; elsewhere, as `{same}` in a reply, it is the one that came
//! last. `{me}` is the client's UDP socket, `{peer}` the expected peer, `{own}` and `{own6}` the server's listeners,
//! `{relay}` our UDP socket where we are the server, `{anyrelay}` its port at 0.0.0.0; the others stand in
//! `wire/fixtures.rs`. At the end of each transcript our side is closed, and nothing that it does not mention may have come.

#[path = "wire/client_role.rs"]
mod client_role;
mod common;
#[path = "wire/cuts.rs"]
mod cuts;
#[path = "wire/fixtures.rs"]
mod fixtures;
#[path = "wire/octets.rs"]
mod octets;
#[path = "wire/server_role.rs"]
mod server_role;
#[path = "wire/transcript.rs"]
mod transcript;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use server_role::{Servers, Way};
use transcript::{Role, Transcript};

/// How many transcripts are played at once.
const THREADS: usize = 8;

#[test]
fn every_transcript_states_one_fact_and_the_demands_that_it_covers() {
    let all = transcripts();
    assert!(all.len() >= 65, "{} transcripts", all.len());
    let cited: BTreeSet<u32> = all.iter().flat_map(|transcript| transcript.demands.clone()).collect();
    assert!(cited.iter().all(|demand| (1..=33).contains(demand)), "{cited:?}");
    // Not in a transcript: the port by convention (1, see below) and protected methods (6, 33).
    let shown: BTreeSet<u32> = (2..=32).filter(|demand| *demand != 6).collect();
    let missing: Vec<&u32> = shown.difference(&cited).collect();
    assert!(missing.is_empty(), "demands without a transcript: {missing:?}");
    let mut facts = BTreeMap::new();
    for transcript in &all {
        let Transcript { role, server_args, users, over, stdin, .. } = transcript;
        let steps: Vec<_> = transcript.steps.iter().map(|(_, step)| step).collect();
        let fact = format!("{role:?} {server_args:?} {users:?} {over} {stdin:?} {steps:?}");
        let former = facts.insert(fact, &transcript.name);
        assert!(former.is_none(), "{} and {former:?} are the same", transcript.name);
    }
}

#[test]
fn the_readme_names_transcripts_that_cover_the_demand() {
    let readme = include_str!("../README.md");
    let all = transcripts();
    let mut rows = 0;
    for row in readme.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", number, _who, _demand, shown, ""] = cells[..] else { continue };
        let Ok(demand) = number.parse::<u32>() else { continue };
        rows += 1;
        // Words in backticks: every second part. Those with an underscore are tests, not transcripts.
        for name in shown.split('`').skip(1).step_by(2).filter(|name| !name.contains('_')) {
            let begin = name.trim_end_matches('*');
            let is_meant = |found: &str| if begin == name { found == name } else { found.starts_with(begin) };
            let covers =
                |found: &&Transcript| is_meant(found.name.trim_end_matches(".txt")) && found.demands.contains(&demand);
            assert!(all.iter().any(|found| covers(&found)), "demand {demand}: {name}");
        }
    }
    assert_eq!(rows, 33);
}

#[test]
fn the_server_answers_as_written() {
    play_all(|_, _| vec![Way::AsWritten]);
}

#[test]
fn the_server_answers_the_same_octet_by_octet() {
    play_all(|_, _| vec![Way::OctetByOctet]);
}

#[test]
fn the_server_answers_the_same_to_all_at_once() {
    play_all(|_, _| vec![Way::RunTogether]);
}

#[test]
fn the_server_answers_the_same_however_a_session_is_split() {
    let recorded = transcripts().into_iter().filter(|transcript| transcript.splits).count();
    assert!(recorded >= 6, "CONNECT, BIND and UDP ASSOCIATE, each without and with a login");
    play_all(|transcript, servers| {
        if !transcript.splits {
            return Vec::new();
        }
        (1..server_role::length(transcript, servers.of(transcript))).map(Way::Split).collect()
    });
}

#[test]
fn the_clients_speak_as_written() {
    play_clients(false);
}

#[test]
fn the_clients_understand_a_server_that_speaks_octet_by_octet() {
    play_clients(true);
}

#[test]
fn the_port_by_convention_is_the_default_of_both_sides() {
    if !common::in_namespace("the_port_by_convention_is_the_default_of_both_sides", "127.0.0.1 localhost\n", "") {
        return;
    }
    let server = common::Server::start_with(common::s5().arg("serve"), 1);
    assert_eq!(server.addr().to_string(), "127.0.0.1:1080");
    let echo = common::echo_server().to_string();
    for proxy in [&[][..], &["-x", "127.0.0.1"]] {
        let output = common::run(common::s5().arg("connect").args(proxy).arg(&echo), b"hello", common::SOON);
        assert_eq!(output.stdout, b"hello", "{output:?}");
    }
}

fn transcripts() -> Vec<Transcript> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire");
    let entries = std::fs::read_dir(folder).expect("the folder of the transcripts");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    paths.iter().map(|path| Transcript::read(path).unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// Plays the transcripts of the server in these ways; the servers are as they were, afterwards.
fn play_all(ways: impl Fn(&Transcript, &Servers) -> Vec<Way>) {
    let mut all = transcripts();
    all.retain(|transcript| transcript.role == Role::Server);
    let servers = Servers::start(&all);
    let jobs: Vec<(&Transcript, Way)> = all
        .iter()
        .flat_map(|transcript| ways(transcript, &servers).into_iter().map(move |way| (transcript, way)))
        .collect();
    all_of(jobs, |(transcript, way)| server_role::play(transcript, servers.of(transcript), way));
    servers.assert_at_rest();
}

fn play_clients(octet_by_octet: bool) {
    let mut all = transcripts();
    all.retain(|transcript| transcript.role != Role::Server);
    all_of(all.iter().collect(), |transcript| client_role::play(transcript, octet_by_octet));
}

/// Does all jobs, a few at a time, and fails with all that has failed.
fn all_of<J: Send>(jobs: Vec<J>, work: impl Fn(J) -> Result<(), String> + Sync) {
    assert!(!jobs.is_empty());
    let jobs = Mutex::new(jobs.into_iter());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let job = jobs.lock().expect("no panic holds it").next();
                    let Some(job) = job else { return };
                    let failure = work(job).err();
                    failures.lock().expect("no panic holds it").extend(failure);
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic holds it");
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}
