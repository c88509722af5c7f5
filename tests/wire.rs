//! Transcripts of the protocol, `wire/*.txt`: bytes in, bytes out, one fact a file.
//!
//! `>` is always from the SOCKS client to the SOCKS server, and `<` always back; `role` says which of them is s5. A
//! transcript opens with its fact as a comment and names the requirements of the RFCs (numbered in the README) that it covers:
//!
//! ```text
//! # A right password is answered 01 00 (RFC 1929 section 2).
//! requirements: 30 31
//! role: server                    s5 serve is played against; else a client and its arguments, with {proxy} for us
//! server: --bind-timeout 1s       more flags for s5 serve
//! user: "alice" "secret"          a user of the server (argon2id); `bcrypt user:` likewise
//! over: ::1                       the client connects to there; else to 127.0.0.1, or 127.0.0.7 where we are the server
//! splits                          every two-way split of what the client sends is played as well
//! > 05 01 00 "text\r\n\x00"       bytes, in hex or quoted; 41*255 and "ab"*3 repeat; {echo} is an address, see below
//! > 03 09 "localhost" {echo:port} its port alone
//! < 05 ?? 00 {bnd} ...            exactly these must come; ?? is any byte, ... all up to the end
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

#[path = "wire/bytes.rs"]
mod bytes;
#[path = "wire/client_role.rs"]
mod client_role;
mod common;
#[path = "wire/fixtures.rs"]
mod fixtures;
#[path = "wire/interrupted_handshakes.rs"]
mod interrupted_handshakes;
#[path = "wire/server_role.rs"]
mod server_role;
#[path = "wire/transcript.rs"]
mod transcript;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use server_role::{Chunking, Servers};
use transcript::{Role, Transcript};

/// How many transcripts are played at once.
const THREADS: usize = 8;

#[test]
fn transcripts_are_distinct_and_cover_every_requirement() {
    let all = transcripts();
    assert!(all.len() >= 65, "{} transcripts", all.len());
    let cited: BTreeSet<u32> = all.iter().flat_map(|transcript| transcript.requirements.clone()).collect();
    assert!(cited.iter().all(|requirement| (1..=33).contains(requirement)), "{cited:?}");
    // Not in a transcript: the port by convention (1, see below) and protected methods (6, 33).
    let shown: BTreeSet<u32> = (2..=32).filter(|requirement| *requirement != 6).collect();
    let missing: Vec<&u32> = shown.difference(&cited).collect();
    assert!(missing.is_empty(), "requirements without a transcript: {missing:?}");
    let mut facts = BTreeMap::new();
    for transcript in &all {
        let Transcript { role, server_args, users, proxy_ip, stdin, .. } = transcript;
        let steps: Vec<_> = transcript.steps.iter().map(|(_, step)| step).collect();
        let fact = format!("{role:?} {server_args:?} {users:?} {proxy_ip} {stdin:?} {steps:?}");
        let former = facts.insert(fact, &transcript.name);
        assert!(former.is_none(), "{} and {former:?} are the same", transcript.name);
    }
}

#[test]
fn readme_table_lists_transcripts_that_cover_each_requirement() {
    let readme = include_str!("../README.md");
    let all = transcripts();
    let mut rows = 0;
    for row in readme.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", number, _who, _demand, shown, ""] = cells[..] else { continue };
        let Ok(requirement) = number.parse::<u32>() else { continue };
        rows += 1;
        // Words in backticks: every second part. Those with an underscore are tests, not transcripts.
        for name in shown.split('`').skip(1).step_by(2).filter(|name| !name.contains('_')) {
            let begin = name.trim_end_matches('*');
            let is_meant = |found: &str| if begin == name { found == name } else { found.starts_with(begin) };
            let covers = |found: &&Transcript| {
                is_meant(found.name.trim_end_matches(".txt")) && found.requirements.contains(&requirement)
            };
            assert!(all.iter().any(|found| covers(&found)), "requirement {requirement}: {name}");
        }
    }
    assert_eq!(rows, 33);
}

#[test]
fn server_matches_transcripts_sent_line_by_line() {
    play_server_transcripts(|_, _| vec![Chunking::PerLine]);
}

#[test]
fn server_matches_transcripts_sent_byte_by_byte() {
    play_server_transcripts(|_, _| vec![Chunking::PerByte]);
}

#[test]
fn server_matches_transcripts_sent_in_one_write() {
    play_server_transcripts(|_, _| vec![Chunking::AllAtOnce]);
}

#[test]
fn server_matches_sessions_split_after_every_byte() {
    let recorded = transcripts().into_iter().filter(|transcript| transcript.has_splits).count();
    assert!(recorded >= 6, "CONNECT, BIND and UDP ASSOCIATE, each without and with a login");
    play_server_transcripts(|transcript, servers| {
        if !transcript.has_splits {
            return Vec::new();
        }
        (1..server_role::sent_length(transcript, servers.server_for(transcript))).map(Chunking::SplitAt).collect()
    });
}

#[test]
fn clients_match_transcripts() {
    play_client_transcripts(false);
}

#[test]
fn clients_match_transcripts_when_proxy_sends_byte_by_byte() {
    play_client_transcripts(true);
}

#[test]
fn server_and_clients_default_to_port_1080() {
    if !common::in_namespace("server_and_clients_default_to_port_1080", "127.0.0.1 localhost\n", "") {
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

/// Plays the transcripts of the server in these chunkings; the servers are as they were, afterwards.
fn play_server_transcripts(chunkings: impl Fn(&Transcript, &Servers) -> Vec<Chunking>) {
    let mut all = transcripts();
    all.retain(|transcript| transcript.role == Role::Server);
    let servers = Servers::start(&all);
    let jobs: Vec<(&Transcript, Chunking)> = all
        .iter()
        .flat_map(|transcript| chunkings(transcript, &servers).into_iter().map(move |chunking| (transcript, chunking)))
        .collect();
    run_all(jobs, |(transcript, chunking)| server_role::play(transcript, servers.server_for(transcript), chunking));
    servers.assert_no_leaks();
}

fn play_client_transcripts(byte_by_byte: bool) {
    let mut all = transcripts();
    all.retain(|transcript| transcript.role != Role::Server);
    run_all(all.iter().collect(), |transcript| client_role::play(transcript, byte_by_byte));
}

/// Does all jobs, a few at a time, and fails with all that has failed.
fn run_all<J: Send>(jobs: Vec<J>, work: impl Fn(J) -> Result<(), String> + Sync) {
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
