//! Parses transcripts. `tests/wire/transcripts.rs` describes the format.

use super::*;

/// One word of a line of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Bytes(Vec<u8>),
    /// `??`
    AnyByte,
    /// `{name}`
    Named(String),
    /// `...`
    ToEnd,
}

/// The endpoint that sends a datagram or connects to BND.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The expected endpoint: the client's UDP socket, or the expected peer of BIND.
    Expected,
    /// The same IP address with another port.
    OtherPort,
    /// Another IP address.
    OtherIp,
}

#[derive(Clone, Debug)]
pub enum Step {
    ToServer(Vec<Item>),
    ToClient(Vec<Item>),
    /// Like `ToClient`, with 2 ms between two bytes.
    SlowlyToClient(Vec<Item>),
    UdpToServer(Endpoint, Vec<Item>),
    UdpToClient(Endpoint, Vec<Item>),
    Connects(Endpoint),
    PeerSends(Vec<Item>),
    PeerReceives(Vec<Item>),
    PeerFin,
    PeerEof,
    Fin,
    Reset,
    Eof,
    Close,
    /// Wait for this long.
    Pause(Duration),
    /// Nothing must arrive for this long.
    Quiet(Duration),
    /// s5 must release the port of BND: the TCP port if true, otherwise the UDP port.
    PortFree(bool),
    Log(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// s5 is the server. The test is its client.
    #[default]
    Server,
    /// s5 is the client, with these arguments. The test is its proxy.
    Client(Vec<String>),
}

#[derive(Clone, Debug)]
pub struct User {
    pub bcrypt: bool,
    pub name: Vec<u8>,
    pub password: Vec<u8>,
}

#[derive(Clone, Debug, Default)]
pub struct Transcript {
    /// File name.
    pub name: String,
    pub requirements: Vec<u32>,
    pub role: Role,
    pub server_args: Vec<String>,
    pub users: Vec<User>,
    /// The proxy has an IPv6 address.
    pub is_over_ipv6: bool,
    /// Play every split of the client's bytes into two writes.
    pub has_splits: bool,
    pub stdin: Vec<u8>,
    pub is_stdin_left_open: bool,
    /// The steps with their line numbers.
    pub steps: Vec<(usize, Step)>,
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<String>,
}

impl Transcript {
    /// Parses a file: one transcript, or one for each row of its table. Errors name the line.
    pub fn read(path: &Path) -> Result<Vec<Self>, String> {
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let text = fs::read_to_string(path).map_err(|error| format!("{file}: {error}"))?;
        let lines: Vec<(usize, &str)> = (1..).zip(text.lines()).collect();
        let (table, lines): (Vec<_>, Vec<_>) = lines.into_iter().partition(|(_, line)| line.starts_with("| "));
        if table.is_empty() {
            return Ok(vec![Self::parse(file, &lines, &[])?]);
        }
        let rows = table.iter().map(|(_, row)| unquoted(&row[1..], '|').map(str::trim).collect::<Vec<_>>());
        rows.map(|cells| Self::parse(format!("{file} ({})", cells[0]), &lines, &cells[1..])).collect()
    }

    /// Parses the lines of a transcript, with these cells instead of $1, $2 and so on.
    fn parse(name: String, lines: &[(usize, &str)], cells: &[&str]) -> Result<Self, String> {
        let fact = lines.first().and_then(|(_, line)| line.strip_prefix("# ")?.strip_suffix(']')?.rsplit_once(" ["));
        let (_, requirements) = fact.ok_or(format!("{name}:1: expected a fact and the numbers of its requirements"))?;
        let requirements = requirements.split(' ').map(str::parse).collect::<Result<_, _>>();
        let mut transcript = Self {
            requirements: requirements.map_err(|_| format!("{name}:1: expected numbers"))?,
            name,
            ..Self::default()
        };
        for (number, line) in &lines[1..] {
            let line = (1..=9).fold((*line).to_owned(), |line, column| {
                line.replace(&format!("${column}"), cells.get(column - 1).copied().unwrap_or_default())
            });
            for part in steps(&line) {
                let parsed = transcript.parse_line(*number, part);
                parsed.map_err(|error| format!("{}:{number}: {error}", transcript.name))?;
            }
        }
        Ok(transcript)
    }

    fn parse_line(&mut self, number: usize, line: &str) -> Result<(), String> {
        if let Some(step) = step(line)? {
            self.steps.push((number, step));
            return Ok(());
        }
        let (key, value) = line.split_once(':').map_or((line, ""), |(key, value)| (key, value.trim()));
        let words = || value.split_whitespace().map(String::from);
        match key {
            "role" => self.role = Role::Client(words().collect()),
            "server" => self.server_args.extend(words()),
            "user" | "bcrypt user" => {
                let end = word_len(value);
                let (name, password) = (bytes(&value[..end])?, bytes(&value[end..])?);
                self.users.push(User { bcrypt: key != "user", name, password });
            }
            "over" if value == "::1" => self.is_over_ipv6 = true,
            "splits" => self.has_splits = true,
            "stdin" => self.stdin = bytes(value)?,
            "stdin open" => (self.stdin, self.is_stdin_left_open) = (bytes(value)?, true),
            "status" => self.status = value.parse().map_err(|_| "status: expected a number")?,
            "stdout" => self.stdout = bytes(value)?,
            "stderr" => self.stderr.push(value.into()),
            _ => return Err(format!("unknown line {line:?}")),
        }
        Ok(())
    }
}

/// Splits text at a separator, except inside quotes.
fn unquoted(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |c| {
        let ends = c == separator && !quoted;
        quoted ^= c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })
}

/// The steps of a line, separated by semicolons.
fn steps(line: &str) -> impl Iterator<Item = &str> {
    unquoted(line, ';').map(str::trim).filter(|step| !step.is_empty())
}

/// Parses a script: steps that are separated by line ends or semicolons.
pub fn script(text: &str) -> Vec<Step> {
    text.lines()
        .flat_map(steps)
        .map(|line| step(line).and_then(|step| step.ok_or("unknown step".into())).expect(line))
        .collect()
}

fn step(line: &str) -> Result<Option<Step>, String> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    Ok(Some(match (word, rest) {
        (">", rest) => Step::ToServer(items(rest)?),
        ("<", rest) => Step::ToClient(items(rest)?),
        ("slowly<", rest) => Step::SlowlyToClient(items(rest)?),
        ("udp>", rest) => Step::UdpToServer(Endpoint::Expected, items(rest)?),
        ("udp<", rest) => Step::UdpToClient(Endpoint::Expected, items(rest)?),
        ("other-port>", rest) => Step::UdpToServer(Endpoint::OtherPort, items(rest)?),
        ("other-ip>", rest) => Step::UdpToServer(Endpoint::OtherIp, items(rest)?),
        ("other-port<", rest) => Step::UdpToClient(Endpoint::OtherPort, items(rest)?),
        ("other-ip<", rest) => Step::UdpToClient(Endpoint::OtherIp, items(rest)?),
        ("peer", "connects") => Step::Connects(Endpoint::Expected),
        ("other-ip", "connects") => Step::Connects(Endpoint::OtherIp),
        ("peer", "fin") => Step::PeerFin,
        ("peer", "eof") => Step::PeerEof,
        ("peer", rest) => match rest.split_once(' ') {
            Some(("sends", rest)) => Step::PeerSends(items(rest)?),
            Some(("receives", rest)) => Step::PeerReceives(items(rest)?),
            _ => return Err("expected connects, sends, receives, fin or eof after peer".into()),
        },
        ("fin", "") => Step::Fin,
        ("reset", "") => Step::Reset,
        ("eof", "") => Step::Eof,
        ("close", "") => Step::Close,
        ("pause" | "quiet", time) => {
            let time = time.strip_suffix("ms").and_then(|time| time.parse().ok());
            let time = Duration::from_millis(time.ok_or("expected a time in ms")?);
            if word == "pause" { Step::Pause(time) } else { Step::Quiet(time) }
        }
        ("port-free", "tcp" | "udp") => Step::PortFree(rest == "tcp"),
        ("log:", rest) => Step::Log(rest.into()),
        _ => return Ok(None),
    }))
}

/// Parses items that must be bytes, not placeholders.
fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let plain = |item| match item {
        Item::Bytes(bytes) => Ok(bytes),
        other => Err(format!("expected bytes, found {other:?}")),
    };
    Ok(items(text)?.into_iter().map(plain).collect::<Result<Vec<_>, _>>()?.concat())
}

pub fn items(text: &str) -> Result<Vec<Item>, String> {
    let mut items = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = word_len(rest);
        let (word, remainder) = rest.split_at(end);
        items.push(item(word)?);
        rest = remainder.trim_start();
    }
    Ok(items)
}

/// Returns the length of the first word. A space ends a word, except inside quotes.
fn word_len(text: &str) -> usize {
    unquoted(text, ' ').next().map_or(0, str::len)
}

fn item(word: &str) -> Result<Item, String> {
    let invalid = || format!("{word:?} is neither bytes nor a placeholder");
    if let Some(name) = word.strip_prefix('{').and_then(|word| word.strip_suffix('}')) {
        return Ok(Item::Named(name.into()));
    }
    let (text, count) = match word.rsplit_once('*') {
        Some((text, count)) if !count.contains('"') => (text, count.parse().map_err(|_| invalid())?),
        _ => (word, 1),
    };
    match text {
        "??" => return Ok(Item::AnyByte),
        "..." => return Ok(Item::ToEnd),
        _ => {}
    }
    let bytes = match text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        Some(quoted) => unescape(quoted).ok_or_else(invalid)?,
        None if text.len() == 2 => vec![u8::from_str_radix(text, 16).map_err(|_| invalid())?],
        None => return Err(invalid()),
    };
    Ok(Item::Bytes(bytes.repeat(count)))
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.extend(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        match chars.next()? {
            'r' => out.push(b'\r'),
            'n' => out.push(b'\n'),
            'x' => out.push(u8::from_str_radix(&[chars.next()?, chars.next()?].iter().collect::<String>(), 16).ok()?),
            c @ ('\\' | '"') => out.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
            _ => return None,
        }
    }
    Some(out)
}
