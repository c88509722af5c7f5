//! The commands and messages of src/gssapi/README.md: the commands work, and the messages are in its table.

use crate::support::realm::{PASSWORD, REALM, Realm};
use crate::*;

const PAGE: &str = include_str!("../../src/gssapi/README.md");

/// Fails unless the table of messages contains this message.
pub fn assert_explains(message: &str) {
    let (_, table) = PAGE.split_once("\n| message |").expect("a table of messages");
    let (table, _) = table.split_once("\n\n").expect("the end of the table");
    assert!(table.contains(message), "src/gssapi/README.md does not explain {message:?}");
}

/// A shell in `dir` with s5 and the Kerberos programs in its PATH.
fn shell(realm: &Realm, dir: &Path, line: &str) -> Command {
    let programs = Path::new(env!("CARGO_BIN_EXE_s5")).parent().expect("a directory").display();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("sh");
    command.args(["-e", "-c", line]).current_dir(dir);
    realm.env(&mut command).env("PATH", format!("{programs}:{path}:/usr/sbin:/sbin"));
    // Neither a keytab nor a ticket is preset: the commands of the page must create them.
    command.env("KRB5CCNAME", format!("FILE:{}", dir.join("tickets").display())).env_remove("KRB5_KTNAME");
    command
}

#[test]
fn commands_lead_from_an_empty_keytab_to_a_working_login() {
    let Some(realm) = realm() else { return };
    if !is_installed("sh") {
        return;
    }
    let dir = temp_dir();
    let delete_principal = format!("kadmin.local -q 'delprinc -force rcmd/localhost@{REALM}'");
    stdout(&mut shell(&realm, dir.path(), &delete_principal), b"");
    let web = tcp_server(V4, |mut stream| {
        let mut request = [0; 18];
        stream.read_exact(&mut request).expect("a request");
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nit works").expect("sent");
    });
    let block = PAGE.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block of commands");
    let (mut server, mut commands_run) = (None::<Server>, String::new());
    for line in block.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let port = server.as_ref().map_or(0, |server| server.addr().port());
        let line = line
            .replace("-x proxy.example.org", &format!("-x localhost:{port}"))
            .replace("proxy.example.org", "localhost")
            .replace("'*:1080'", "127.0.0.1:0")
            .replace(" example.org:80", &format!(" {web}"))
            .replace("EXAMPLE.ORG", REALM);
        assert!(!line.contains("example"), "{line}: the test must not contact other hosts");
        writeln!(commands_run, "{line}").expect("text");
        if line.starts_with("s5 serve") {
            server = Some(Server::start_with(&mut shell(&realm, dir.path(), &format!("exec {line}")), 1));
            continue;
        }
        let stdin = match line.split(' ').next() {
            Some("kinit") => format!("{PASSWORD}\n"),
            Some("s5") => "GET / HTTP/1.0\r\n\r\n".to_owned(),
            _ => String::new(),
        };
        let output = run(&mut shell(&realm, dir.path(), &line), stdin.as_bytes(), LONG_TIMEOUT);
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        if line.starts_with("s5 connect") {
            assert_eq!(text(&output.stdout), "HTTP/1.0 200 OK\r\n\r\nit works");
            assert!(text(&output.stderr).contains(&format!("connected to {web}")), "{}", text(&output.stderr));
            let server = server.as_ref().expect("the server starts before the client");
            wait_session(server, &[ALICE, "command=connect", "rep=0"]);
        }
    }
    for command in ["addprinc", "ktadd", "s5 serve --keytab s5.keytab", "kinit alice", "s5 connect"] {
        assert!(commands_run.contains(command), "the page has no command {command}:\n{commands_run}");
    }
}
