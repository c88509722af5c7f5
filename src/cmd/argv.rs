//! The command line as argh wants it. Hands write `--opt=value`, `-w3` and `-zv`, and argh takes none of them; which
//! options take a value is read off the definitions that the help is made from.

use argh::{ArgsInfo, FlagInfo, FlagInfoKind};

use super::client::unsupported_reason;
use super::secrets::without_userinfo;
use super::{Args, client, help, serve};

/// How far off a misspelt option may be, in letters.
const MISSPELT: usize = 3;
/// Other names that hands know for an option.
const ALIASES: [(&str, &str); 2] = [("--no-proxy", "--direct"), ("--resolve", "--proxy-dns")];

/// What a command line comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Normal {
    /// Words that argh takes.
    Words(Vec<String>),
    /// Help was asked for, and this is it.
    Help(String),
}

/// `args`, without the program's name, with each option and each value a word of its own.
///
/// # Errors
/// An option that there is not, with the nearest one that there is; or a value for one that takes none.
pub(super) fn normalise(args: &[String]) -> Result<Normal, String> {
    let asks = args.first().is_some_and(|first| first == "help");
    let args = if asks { args.get(1..).unwrap_or_default() } else { args };
    let (first, rest) = match args.split_first() {
        Some((first, rest)) if !first.starts_with('-') => (Some(first), rest),
        _ => (None, args),
    };
    let mode = first.map(String::as_str).unwrap_or_default();
    let flags = match mode {
        "serve" => serve::Args::get_args_info().flags,
        // All of theirs, since it takes no time.
        "connect" | "bind" | "udp" => client::Args::get_args_info().flags,
        "" => Args::get_args_info().flags,
        other => return Err(unknown_mode(other)),
    };
    if asks {
        return Ok(Normal::Help(help_of(mode)));
    }
    let out = first.into_iter().cloned().collect();
    let mut words = Words { mode, flags, out, positionals: Vec::new(), help: false };
    let mut rest = rest.iter();
    while let Some(word) = rest.next() {
        match word.strip_prefix('-') {
            None | Some("") => words.positionals.push(word.clone()),
            Some("-") => words.positionals.extend(rest.by_ref().cloned()),
            Some(text) => {
                let wants_value = match text.strip_prefix('-') {
                    Some(long) => words.long(long)?,
                    None => words.short(text)?,
                };
                if wants_value {
                    // Whatever it looks like.
                    let value = rest.next().ok_or_else(|| format!("no value for option {}", without_userinfo(word)))?;
                    words.out.push(value.clone());
                }
            }
        }
    }
    if words.help {
        return Ok(Normal::Help(help_of(mode)));
    }
    // So that none of them is taken for anything else, not even a host that is called help.
    if !words.positionals.is_empty() {
        words.out.push("--".into());
        words.out.append(&mut words.positionals);
    }
    Ok(Normal::Words(words.out))
}

/// Of a mode, or of the program.
fn help_of(mode: &str) -> String {
    let program = Args::get_args_info();
    let of_mode = program.commands.iter().find(|command| command.name == mode);
    help::text(of_mode.map_or(&program, |mode| &mode.command), of_mode.is_some())
}

fn unknown_mode(word: &str) -> String {
    let names: Vec<&str> = Args::get_args_info().commands.iter().map(|mode| mode.name).collect();
    format!("unrecognized mode {}: write {}", without_userinfo(word), names.join(", "))
}

struct Words<'a> {
    /// Empty, where there is none.
    mode: &'a str,
    flags: &'a [FlagInfo<'a>],
    out: Vec<String>,
    positionals: Vec<String>,
    help: bool,
}

impl<'a> Words<'a> {
    /// The option that is meant, if there is one; an error, if it is one of other modes.
    fn find(&self, name: &str, is_meant: impl Fn(&FlagInfo<'_>) -> bool) -> Result<Option<&'a FlagInfo<'a>>, String> {
        match unsupported_reason(self.mode, name) {
            Some(why) => Err(format!("{} takes no {name}: {why}", self.mode)),
            None => Ok(self.flags.iter().find(|flag| is_meant(flag))),
        }
    }

    fn unknown(&self, option: &str) -> String {
        let known =
            self.flags.iter().map(|flag| flag.long).filter(|long| unsupported_reason(self.mode, long).is_none());
        let nearest =
            known.filter(|_| option.starts_with("--")).map(|long| (strsim::osa_distance(long, option), long)).min();
        let option = without_userinfo(option);
        match nearest.filter(|(distance, _)| *distance <= MISSPELT) {
            Some((_, long)) => format!("unrecognized option {option}; is {long} meant?"),
            None => format!("unrecognized option {option}"),
        }
    }

    /// A long option; true when its value is the next word.
    fn long(&mut self, text: &str) -> Result<bool, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let long = format!("--{name}");
        let long = ALIASES.iter().find(|(alias, _)| *alias == long).map_or(long, |(_, long)| (*long).to_owned());
        let flag = self.find(&long, |flag| flag.long == long)?;
        let is_switch = match flag {
            Some(flag) => is_switch(flag),
            None if long == "--help" => true,
            None => return Err(self.unknown(&long)),
        };
        self.help |= long == "--help";
        self.out.push(long);
        match value {
            Some(_) if is_switch => Err(format!("--{name} takes no value")),
            Some(value) => {
                self.out.push(value.into());
                Ok(false)
            }
            None => Ok(!is_switch),
        }
    }

    /// Short options in one word, the last of which may have its value behind it; true when that is the next word.
    fn short(&mut self, text: &str) -> Result<bool, String> {
        let mut chars = text.chars();
        while let Some(letter) = chars.next() {
            let flag = self.find(&format!("-{letter}"), |flag| flag.short == Some(letter))?;
            if flag.is_none() && letter == 'h' {
                self.help = true;
                continue;
            }
            let Some(flag) = flag else { return Err(self.unknown(&format!("-{letter}"))) };
            self.out.push(format!("-{letter}"));
            if !is_switch(flag) {
                let value = match chars.as_str() {
                    "" => None,
                    value => Some(value.strip_prefix('=').unwrap_or(value).to_owned()),
                };
                let is_next = value.is_none();
                self.out.extend(value);
                return Ok(is_next);
            }
        }
        Ok(false)
    }
}

fn is_switch(flag: &FlagInfo<'_>) -> bool {
    matches!(flag.kind, FlagInfoKind::Switch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(line: &str) -> Result<String, String> {
        match normalise(&line.split(' ').map(String::from).collect::<Vec<_>>())? {
            Normal::Words(words) => Ok(words.join(" ")),
            Normal::Help(text) => Ok(text.lines().next().unwrap_or_default().into()),
        }
    }

    #[test]
    fn what_hands_write_becomes_what_argh_takes() {
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
            ("connect --no-proxy host:80", "connect --direct -- host:80"),
            ("serve --listen=*:1080 -qv", "serve --listen *:1080 -q -v"),
            ("--version", "--version"),
            ("connect --help", "Usage: s5 connect [options] [target]"),
            ("help bind", "Usage: s5 bind [options] [peer]"),
            ("udp -vh", "Usage: s5 udp [options] [target]"),
            ("-h", "Usage: s5 <mode> [options]"),
        ];
        for (line, expected) in table {
            assert_eq!(ask(line).as_deref(), Ok(expected), "{line}");
        }
    }

    #[test]
    fn a_misspelt_option_is_told_by_the_nearest() {
        let table = [
            ("connect --porxy a b", "unrecognized option --porxy; is --proxy meant?"),
            ("serve --user f", "unrecognized option --user; is --users meant?"),
            ("serve --nonsense", "unrecognized option --nonsense"),
            ("connect -vZ", "unrecognized option -Z"),
            ("connect --json=yes", "--json takes no value"),
            ("--versoin", "unrecognized option --versoin; is --version meant?"),
        ];
        for (line, expected) in table {
            assert_eq!(ask(line), Err(expected.into()), "{line}");
        }
    }
}
