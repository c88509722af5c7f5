//! Reads a transcript; the format stands at the top of `wire.rs`. Plays nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// One piece of a line of octets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Octets(Vec<u8>),
    /// `??`
    Any,
    /// `{name}`
    Named(String),
    /// `...`
    Rest,
}

/// Who a line is about, besides the SOCKS client and the SOCKS server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// From where it should come: the client's own UDP socket, or BIND's expected peer.
    Own,
    /// From another port of the same address.
    Other,
    /// From another address.
    Stranger,
}

#[derive(Clone, Debug)]
pub enum Step {
    ToServer(Vec<Item>),
    ToClient(Vec<Item>),
    UdpToServer(Who, Vec<Item>),
    UdpToClient(Who, Vec<Item>),
    Connects(Who),
    PeerSends(Vec<Item>),
    PeerGets(Vec<Item>),
    PeerFin,
    PeerEof,
    Fin,
    Reset,
    Eof,
    Close,
    /// Nothing has the port of BND: TCP's where that is true, else UDP's.
    Gone(bool),
    Log(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// We are the client of `s5 serve`.
    Server,
    /// We are the server of this s5 client: its arguments.
    Client(Vec<String>),
}

#[derive(Clone, Debug)]
pub struct User {
    pub bcrypt: bool,
    pub name: Vec<u8>,
    pub password: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct Transcript {
    /// Its file's name.
    pub name: String,
    pub demands: Vec<u32>,
    pub role: Role,
    pub server_args: Vec<String>,
    pub users: Vec<User>,
    /// Where the client connects to.
    pub over: IpAddr,
    /// Every two-way split is played as well.
    pub splits: bool,
    pub stdin: Vec<u8>,
    pub stdin_stays_open: bool,
    /// With the number of its line.
    pub steps: Vec<(usize, Step)>,
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<String>,
}

impl Transcript {
    /// Reads a file; `Err` has the line that is wrong.
    pub fn read(path: &Path) -> Result<Self, String> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let text = std::fs::read_to_string(path).map_err(|error| format!("{name}: {error}"))?;
        let mut transcript = Self {
            name: name.clone(),
            demands: Vec::new(),
            role: Role::Server,
            server_args: Vec::new(),
            users: Vec::new(),
            over: Ipv4Addr::LOCALHOST.into(),
            splits: false,
            stdin: Vec::new(),
            stdin_stays_open: false,
            steps: Vec::new(),
            status: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        if !text.starts_with("# ") {
            return Err(format!("{name}:1: a transcript opens with its fact"));
        }
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            transcript.take(number, line).map_err(|error| format!("{name}:{number}: {error}"))?;
        }
        if transcript.demands.is_empty() {
            return Err(format!("{name}: no demands"));
        }
        Ok(transcript)
    }

    fn take(&mut self, number: usize, line: &str) -> Result<(), String> {
        if let Some(step) = step(line)? {
            self.steps.push((number, step));
            return Ok(());
        }
        let (key, value) = line.split_once(':').map_or((line, ""), |(key, value)| (key, value.trim()));
        let words = || value.split_whitespace().map(String::from);
        match key {
            "demands" => {
                let numbers: Result<_, _> = words().map(|word| word.parse()).collect();
                self.demands = numbers.map_err(|_| "demands are numbers")?;
            }
            "role" if value == "server" => self.role = Role::Server,
            "role" => self.role = Role::Client(words().collect()),
            "server" => self.server_args.extend(words()),
            "user" | "bcrypt user" => {
                let end = end_of_word(value);
                let (name, password) = (octets(&value[..end])?, octets(&value[end..])?);
                self.users.push(User { bcrypt: key != "user", name, password });
            }
            "over" if value == "::1" => self.over = Ipv6Addr::LOCALHOST.into(),
            "splits" => self.splits = true,
            "stdin" => self.stdin = octets(value)?,
            "stdin open" => (self.stdin, self.stdin_stays_open) = (octets(value)?, true),
            "status" => self.status = value.parse().map_err(|_| "a status is a number")?,
            "stdout" => self.stdout = octets(value)?,
            "stderr" => self.stderr.push(value.into()),
            _ => return Err(format!("what is {line:?}?")),
        }
        Ok(())
    }
}

fn step(line: &str) -> Result<Option<Step>, String> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    Ok(Some(match (word, rest) {
        (">", rest) => Step::ToServer(items(rest)?),
        ("<", rest) => Step::ToClient(items(rest)?),
        ("udp>", rest) => Step::UdpToServer(Who::Own, items(rest)?),
        ("udp<", rest) => Step::UdpToClient(Who::Own, items(rest)?),
        ("other>", rest) => Step::UdpToServer(Who::Other, items(rest)?),
        ("stranger>", rest) => Step::UdpToServer(Who::Stranger, items(rest)?),
        ("stranger<", rest) => Step::UdpToClient(Who::Stranger, items(rest)?),
        ("peer", "connects") => Step::Connects(Who::Own),
        ("other", "connects") => Step::Connects(Who::Other),
        ("stranger", "connects") => Step::Connects(Who::Stranger),
        ("peer", "fin") => Step::PeerFin,
        ("peer", "eof") => Step::PeerEof,
        ("peer", rest) => match rest.split_once(' ') {
            Some(("sends", rest)) => Step::PeerSends(items(rest)?),
            Some(("gets", rest)) => Step::PeerGets(items(rest)?),
            _ => return Err("a peer connects, sends, gets, fin or eof".into()),
        },
        ("fin", "") => Step::Fin,
        ("reset", "") => Step::Reset,
        ("eof", "") => Step::Eof,
        ("close", "") => Step::Close,
        ("gone", "tcp" | "udp") => Step::Gone(rest == "tcp"),
        ("log:", rest) => Step::Log(rest.into()),
        _ => return Ok(None),
    }))
}

/// A line of items that are all octets.
fn octets(text: &str) -> Result<Vec<u8>, String> {
    let plain = |item| match item {
        Item::Octets(octets) => Ok(octets),
        other => Err(format!("{other:?} has no place here")),
    };
    Ok(items(text)?.into_iter().map(plain).collect::<Result<Vec<_>, _>>()?.concat())
}

fn items(text: &str) -> Result<Vec<Item>, String> {
    let mut items = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = end_of_word(rest);
        let (word, behind) = rest.split_at(end);
        items.push(item(word)?);
        rest = behind.trim_start();
    }
    Ok(items)
}

/// Blanks end a word, but not inside of quotes.
fn end_of_word(text: &str) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => return i,
            _ => {}
        }
    }
    text.len()
}

fn item(word: &str) -> Result<Item, String> {
    let bad = || format!("{word:?} is neither octets nor a name");
    if let Some(name) = word.strip_prefix('{').and_then(|word| word.strip_suffix('}')) {
        return Ok(Item::Named(name.into()));
    }
    let (what, count) = match word.rsplit_once('*') {
        Some((what, count)) if !count.contains('"') => (what, count.parse().map_err(|_| bad())?),
        _ => (word, 1),
    };
    match what {
        "??" => return Ok(Item::Any),
        "..." => return Ok(Item::Rest),
        _ => {}
    }
    let octets = match what.strip_prefix('"').and_then(|what| what.strip_suffix('"')) {
        Some(quoted) => unescape(quoted).ok_or_else(bad)?,
        None if what.len() == 2 => vec![u8::from_str_radix(what, 16).map_err(|_| bad())?],
        None => return Err(bad()),
    };
    Ok(Item::Octets(octets.repeat(count)))
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
