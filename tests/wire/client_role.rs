//! Plays the proxy's side of a transcript against one of the s5 clients.

use crate::support::bytes::{LIMIT, hex};
use crate::support::transcript::{Role, Transcript};
use crate::*;

/// Plays a transcript, with one write per line or per byte. Errors name the file and line.
pub fn play(transcript: &Transcript, byte_by_byte: bool) -> Result<(), String> {
    let chunking = if byte_by_byte { "byte by byte" } else { "line by line" };
    let at = |line: usize, what: String| format!("tests/wire/{}:{line} ({chunking}): {what}", transcript.name);
    let Role::Client(args) = &transcript.role else { return Err(at(1, "role: client".into())) };
    // No other test uses this address.
    let ip = if transcript.is_over_ipv6 { V6 } else { ip("127.0.0.7") };
    let mut player = Player::new(SocketAddr::new(ip, 0)).map_err(|error| at(1, error.to_string()))?;
    player.byte_by_byte = byte_by_byte;
    let args = args.iter().map(|arg| arg.replace("{proxy}", &player.addr.to_string()));
    let mut client = RunningProgram::start(s5().env("CI", "true").args(args));
    client.write(&transcript.stdin);
    if !transcript.is_stdin_left_open {
        client.close_stdin();
    }
    for (line, step) in &transcript.steps {
        if let Err(error) = player.step(step) {
            let (status, _, stderr) = client.kill();
            return Err(at(*line, format!("{error}\nthe client ({status:?}) wrote: {stderr}")));
        }
    }
    let ended = player.close().and_then(|()| check_output(transcript, &mut client));
    let ended = if player.has_unexpected_client() { Err("unexpected connection".into()) } else { ended };
    ended.map_err(|error| at(0, format!("after the last line: {error}")))
}

/// Checks the client's exit status and output.
fn check_output(transcript: &Transcript, client: &mut RunningProgram) -> Result<(), String> {
    let (status, stdout, stderr) = client.output(LIMIT);
    let status = status.and_then(|status| status.code());
    let messages: Vec<&str> = stderr.lines().filter(|line| line.starts_with("s5: ")).collect();
    let is_expected = |line: &&str| transcript.stderr.iter().any(|text| line.contains(text.as_str()));
    let error = if status != Some(transcript.status) {
        format!("expected exit status {}, got {status:?}", transcript.status)
    } else if stdout != transcript.stdout {
        format!("unexpected stdout {}", hex(&stdout))
    } else if let Some(missing) = transcript.stderr.iter().find(|text| !stderr.contains(text.as_str())) {
        format!("{missing:?} is missing on stderr")
    } else if status == Some(0) && !messages.iter().all(is_expected) {
        "unexpected message on stderr".into()
    } else if status != Some(0) && messages.len() != 1 {
        "expected one message on stderr".into()
    } else if stderr.contains("secret") {
        "the password is on stderr".into()
    } else if stderr.contains(|c: char| c.is_control() && c != '\n') {
        "a control character is on stderr".into()
    } else {
        return Ok(());
    };
    Err(format!("{error}; the client wrote: {stderr}"))
}
