//! Plays the transcripts in `*.txt` against `s5 serve` and the s5 clients. `README.md` introduces them.
//!
//! A transcript starts with a comment that states its fact, and the RFC requirements that it tests. Lines may be joined
//! with `;`. Rows at the end make a table: each is a transcript of its own, with its name in the first cell, and the
//! other cells in the places of $1, $2 and so on. The keywords:
//!
//! ```text
//! # A correct password is answered 01 00 (RFC 1929 section 2). [30 31]    numbers of rows of the table in README.md
//! role: connect -x {proxy} ...    the arguments of the s5 client ({proxy}: the test); otherwise s5 is the server
//! server: --bind-timeout 1s       more arguments for s5 serve
//! user: "alice" "secret"          a user of the server (argon2id); with `bcrypt user:` the hash is bcrypt
//! over: ::1                       IP address of the proxy [default: 127.0.0.1 for s5, 127.0.0.7 for the test]
//! splits                          also play every split of the client's bytes into two writes
//! > 05 01 00 "text\r\n\x00"       bytes to the server, in hex or quoted; 41*255 and "ab"*3 repeat
//! > 03 09 "localhost" {echo:port} a placeholder for an address, or for its port alone
//! < 05 ?? 00 {bnd} ...            bytes from the server; ?? is any byte, ... is everything up to EOF
//! slowly< 05 00                   the same, with 2 ms between two bytes (if s5 is the client)
//! udp> udp<                       datagrams: from the client's UDP socket to BND, and back
//! other-port> other-ip>           datagrams from another port or another IP address; also: other-port< other-ip<
//! peer connects                   BIND's expected peer connects to BND
//! peer sends  peer receives       data of the peer; also: peer fin, peer eof
//! other-ip connects               a peer from another IP address connects; the server must close it
//! pause 50ms  quiet 50ms          the test waits; nothing must arrive for so long (if s5 is the client)
//! fin  reset                      the test half-closes, resets the TCP connection
//! eof  close                      s5 must close the TCP connection: with FIN; with FIN or RST
//! port-free tcp  port-free udp    s5 must release the port of BND
//! log: rep=5                      part of the session's line in the server's log; with ^, directly after from=
//! stdin: "text"                   stdin of the client; with `stdin open:` it stays open
//! status: 105                     exit status of the client [default: 0]
//! stdout: "text"                  complete output of the client on stdout [default: empty]
//! stderr: refused                 part of the client's output on stderr
//! | a wrong name | 05 "mallo"     a row of the table: name, $1
//! ```
//!
//! Placeholders: `{bnd}` in a reply accepts any loopback address with a port. `{same-bnd}` in a reply, and `{bnd}`
//! elsewhere, is the last such address. `{greeting}`, `{login}` and `{request}` accept any such message of a client.
//! `{client-udp}` is the client's UDP socket, `{peer}` the expected peer of BIND. `{listener}` and `{listener6}` are
//! the listeners of the server. If the test is the server, `{relay}` is its UDP socket and `{any-relay}` is 0.0.0.0
//! with the same port. `fixtures.rs` defines all others.
//!
//! After the last line the test closes its side. Bytes from s5 that the transcript does not mention are an error.

use crate::server_role::{Chunking, Servers};
use crate::support;
use crate::support::transcript::{Role, Transcript};
use crate::*;

#[test]
fn transcripts_are_distinct_and_cover_every_requirement() {
    let all = transcripts();
    assert!(all.len() >= 200, "{} transcripts", all.len());
    let cited: BTreeSet<u32> = all.iter().flat_map(|transcript| transcript.requirements.clone()).collect();
    assert!(cited.iter().all(|requirement| (1..=33).contains(requirement)), "{cited:?}");
    // Other tests cover the default port (1, below), encapsulation (6) and GSSAPI (33).
    let required: BTreeSet<u32> = (2..=32).filter(|requirement| *requirement != 6).collect();
    let missing: Vec<&u32> = required.difference(&cited).collect();
    assert!(missing.is_empty(), "requirements without a transcript: {missing:?}");
    let mut contents = BTreeMap::new();
    for transcript in &all {
        let Transcript { role, server_args, users, is_over_ipv6, stdin, .. } = transcript;
        let steps: Vec<_> = transcript.steps.iter().map(|(_, step)| step).collect();
        let content = format!("{role:?} {server_args:?} {users:?} {is_over_ipv6} {stdin:?} {steps:?}");
        let duplicate = contents.insert(content, &transcript.name);
        assert!(duplicate.is_none(), "{} and {duplicate:?} are identical", transcript.name);
    }
}

#[test]
fn readme_table_lists_tests_that_cover_each_requirement() {
    let readme = include_str!("README.md");
    let all = transcripts();
    let mut rows = 0;
    for row in readme.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", number, _role, _requirement, names, ""] = cells[..] else { continue };
        let Ok(requirement) = number.parse::<u32>() else { continue };
        rows += 1;
        // The cell may name test files, and test functions as `FUNCTION` in FILE.
        for entry in names.split(", ").filter(|entry| entry.contains("tests/")) {
            let file = entry.split(' ').find(|word| word.starts_with("tests/")).unwrap_or_default();
            let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file));
            let source = source.unwrap_or_else(|error| panic!("requirement {requirement}: {file}: {error}"));
            let function = entry.split('`').nth(1).map_or_else(String::new, |name| format!("#[test]\nfn {name}() {{"));
            assert!(source.contains(&function), "requirement {requirement}: {entry}");
        }
        // Every second part was in backticks. The other entries are transcripts.
        let transcripts = names.split(", ").filter(|entry| !entry.contains("tests/"));
        for name in transcripts.flat_map(|entry| entry.split('`').skip(1).step_by(2)) {
            let prefix = name.trim_end_matches('*');
            let is_match = |file: &str| if prefix == name { file == name } else { file.starts_with(prefix) };
            let covers = |transcript: &&Transcript| {
                transcript.name.split_once(".txt").is_some_and(|(file, _)| is_match(file))
                    && transcript.requirements.contains(&requirement)
            };
            assert!(all.iter().any(|transcript| covers(&transcript)), "requirement {requirement}: {name}");
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
    let count = transcripts().into_iter().filter(|transcript| transcript.has_splits).count();
    assert!(count >= 6, "{count}: CONNECT, BIND and UDP ASSOCIATE, each with and without a login");
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
    enter_namespace!("127.0.0.1 localhost\n", "");
    let server = Server::start_with(s5().arg("serve"), 1);
    assert_eq!(server.addr().to_string(), "127.0.0.1:1080");
    let echo = echo_server().to_string();
    for proxy in [&[][..], &["-x", "127.0.0.1"]] {
        let output = run(s5().arg("connect").args(proxy).arg(&echo), b"hello", TIMEOUT);
        assert_eq!(output.stdout, b"hello", "{output:?}");
    }
}

fn transcripts() -> Vec<Transcript> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire");
    let entries = std::fs::read_dir(dir).expect("directory read");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("directory entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    paths.iter().flat_map(|path| Transcript::read(path).unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// Plays the server transcripts with these chunkings, then checks that the servers have released all descriptors.
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

/// Runs all jobs. Panics with the list of failures.
fn run_all<J: Send>(jobs: Vec<J>, run: impl Fn(J) -> Result<(), String> + Sync) {
    assert!(!jobs.is_empty());
    let failures = Mutex::new(Vec::new());
    support::run_all(jobs, |job| failures.lock().expect("not poisoned").extend(run(job).err()));
    let failures = failures.into_inner().expect("no job panics");
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}
