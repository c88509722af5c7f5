//! Normalizes the command line for argh, which does not support `--opt=value`, `-w3` and `-zv`. The definitions from
//! which the help is generated also show which options take a value.

use std::env;

use argh::FlagInfo;

use super::secrets::without_userinfo;
use super::syntax::{OPTIONAL_VALUE, Syntax, optional_value_name, value_name};

/// Maximum edit distance from an unrecognized option to the option that the error suggests.
const MAX_EDIT_DISTANCE: usize = 2;
/// Aliases of options, each with the name of the option. Most of them are former names.
pub(super) const ALIASES: [(&str, &str); 7] = [
    ("--no-proxy", "--direct"),
    ("--resolve", "--proxy-dns"),
    ("--wait", "--retry"),
    ("--proxy-auth", "--proxy-user"),
    ("--bound-to", "--address-file"),
    ("--drain", "--drain-timeout"),
    ("--open", "--allow-open-relay"),
];

/// Replaces the names of options by the aliases that the user has typed.
pub(crate) fn with_typed_names(message: &str) -> String {
    let typed: Vec<String> = env::args().map(|arg| arg.split('=').next().unwrap_or_default().into()).collect();
    let is_typed = |name: &str| typed.iter().any(|arg| arg == name);
    let replace = |message: String, (alias, long): &(&str, &str)| match is_typed(alias) && !is_typed(long) {
        true => message.replace(long, alias),
        false => message,
    };
    ALIASES.iter().fold(message.into(), replace)
}

/// Options that select the default, and the option that selects the opposite.
const DEFAULTS: [(&str, &str); 2] = [("-N", "--no-shutdown"), ("--shutdown", "--no-shutdown")];

/// Options of other programs, the modes in which users try them, and what to use instead.
const FOREIGN: [(&[&str], &[&str], &str); 5] = [
    (&["-u", "--udp"], &["connect", "bind"], "use s5 udp"),
    (&["-u", "--udp"], &["udp"], "not necessary: s5 udp always sends datagrams"),
    (&["--port"], &["connect", "bind", "udp"], "write the port after the host: HOST:PORT"),
    (&["-l", "-p", "--port"], &["serve"], "use --listen [ADDR:]PORT"),
    (&["--check"], &["connect", "bind", "udp"], "use -z"),
];

/// Selects the mode, and makes each of its options and each value a separate argument. `args` does not contain the
/// program's name. Returns the syntax of the mode or of the program, and the arguments for argh, `None` for help.
///
/// # Errors
/// An unrecognized mode or option, a missing value, or a value for an option that does not take one.
pub fn normalize<'a>(args: &[String], program: &'a Syntax) -> Result<(&'a Syntax, Option<Vec<String>>), String> {
    let is_help = args.first().is_some_and(|first| first == "help");
    let args = if is_help { args.get(1..).unwrap_or_default() } else { args };
    let (syntax, args) = match args.split_first() {
        Some((mode, args)) if !mode.starts_with('-') => {
            let unrecognized = || {
                let names: Vec<&str> = program.modes.iter().map(|mode| mode.name).collect();
                format!("unrecognized mode {} (expected one of {})", without_userinfo(mode), names.join(", "))
            };
            (program.modes.iter().find(|known| known.name == mode).ok_or_else(unrecognized)?, args)
        }
        _ => (program, args),
    };
    if is_help {
        return Ok((syntax, None));
    }
    let mut normalizer = Normalizer { syntax, out: Vec::new(), positionals: Vec::new(), has_help: false };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.strip_prefix('-') {
            None | Some("") => normalizer.positionals.push(arg.clone()),
            Some("-") => normalizer.positionals.extend(args.by_ref().cloned()),
            Some(text) => {
                let needs_value = match text.strip_prefix('-') {
                    Some(long) => normalizer.push_long(long)?,
                    None => normalizer.push_short(text)?,
                };
                if needs_value {
                    // The next argument is the value, even if it begins with `-`.
                    let value = args.next().ok_or_else(|| format!("{} requires a value", without_userinfo(arg)))?;
                    normalizer.out.push(value.clone());
                }
            }
        }
    }
    if normalizer.has_help {
        return Ok((syntax, None));
    }
    // After `--`, argh does not interpret the arguments: a host may be named help.
    if !normalizer.positionals.is_empty() {
        normalizer.out.push("--".into());
        normalizer.out.append(&mut normalizer.positionals);
    }
    Ok((syntax, Some(normalizer.out)))
}

struct Normalizer<'a> {
    syntax: &'a Syntax,
    out: Vec<String>,
    positionals: Vec<String>,
    has_help: bool,
}

impl<'a> Normalizer<'a> {
    /// Returns the option for which `matches` is true. Returns an error if the mode refuses this option.
    fn find(&self, name: &str, matches: impl Fn(&FlagInfo<'_>) -> bool) -> Result<Option<&'a FlagInfo<'a>>, String> {
        let flag = self.syntax.flags.iter().find(|flag| matches(flag));
        match flag.and_then(|flag| self.syntax.refusal(flag)) {
            Some(reason) => Err(format!("{} does not support {name}: {reason}", self.syntax.name)),
            None => Ok(flag),
        }
    }

    fn unrecognized_option(&self, option: &str) -> String {
        let is_meant =
            |(names, modes): (&[&str], &[&str])| names.contains(&option) && modes.contains(&self.syntax.name);
        if let Some((.., remedy)) = FOREIGN.iter().find(|(names, modes, _)| is_meant((names, modes))) {
            return format!("unrecognized option {option} ({remedy})");
        }
        let names = self.syntax.options().map(|flag| (flag.long, flag.long));
        let aliases = ALIASES.into_iter().filter(|(_, long)| self.syntax.options().any(|flag| flag.long == *long));
        let names = names.chain(aliases).filter(|_| option.starts_with("--"));
        let nearest = names.map(|(name, long)| (strsim::osa_distance(name, option), long)).min();
        // No suggestion if half of the letters differ: then another word is meant.
        let name_len = option.chars().skip_while(|c| *c == '-').count();
        let option = without_userinfo(option);
        match nearest.filter(|(distance, _)| *distance <= MAX_EDIT_DISTANCE && 2 * distance < name_len) {
            Some((_, long)) => format!("unrecognized option {option} (did you mean {long}?)"),
            None => format!("unrecognized option {option}"),
        }
    }

    /// Returns true if an option selects the default of the mode. Returns an error if the mode refuses it.
    fn is_default(&self, option: &str) -> Result<bool, String> {
        match DEFAULTS.iter().find(|(name, _)| *name == option) {
            Some((_, opposite)) => Ok(self.find(option, |flag| flag.long == *opposite)?.is_some()),
            None => Ok(false),
        }
    }

    /// Appends a long option, with its value if that follows `=`. Returns true if the next argument is the value.
    fn push_long(&mut self, text: &str) -> Result<bool, String> {
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let option = format!("--{name}");
        let long = ALIASES.iter().find(|(alias, _)| *alias == option).map_or(option.as_str(), |(_, long)| long);
        if value.is_none() && self.is_default(&option)? {
            return Ok(false);
        }
        let flag = self.find(long, |flag| flag.long == long)?.ok_or_else(|| self.unrecognized_option(&option))?;
        let default = optional_value_name(flag).map(|_| OPTIONAL_VALUE.1);
        if is_switch(flag) && default.is_none() && value.is_some() {
            return Err(format!("{option} does not take a value"));
        }
        self.has_help |= long == "--help";
        self.out.push(long.into());
        self.out.extend(value.or(default).map(str::to_owned));
        Ok(!is_switch(flag) && value.is_none())
    }

    /// Returns true if `-n` is nc's option without value or effect: s5 leaves names to the proxy. `rest` follows it.
    fn is_nodns(&self, rest: &str) -> bool {
        let count = self.syntax.flags.iter().find(|flag| flag.short == Some('n'));
        let is_bundle = rest.starts_with(|c: char| c.is_ascii_alphabetic());
        count.is_some_and(|count| is_bundle || self.syntax.refusal(count).is_some())
    }

    /// Appends the short options of one argument, such as `-vw3`. Returns true if the next argument is the value.
    fn push_short(&mut self, text: &str) -> Result<bool, String> {
        let mut chars = text.chars();
        while let Some(letter) = chars.next() {
            if letter == 'h' {
                self.has_help = true;
                continue;
            }
            if letter == 'n' && self.is_nodns(chars.as_str()) {
                continue;
            }
            let option = format!("-{letter}");
            if self.is_default(&option)? {
                continue;
            }
            let flag = self.find(&option, |flag| flag.short == Some(letter))?;
            let flag = flag.ok_or_else(|| self.unrecognized_option(&option))?;
            self.out.push(option);
            if !is_switch(flag) {
                let value = Some(chars.as_str()).filter(|value| !value.is_empty());
                self.out.extend(value.map(|value| value.strip_prefix('=').unwrap_or(value).to_owned()));
                return Ok(value.is_none());
            }
        }
        Ok(false)
    }
}

fn is_switch(flag: &FlagInfo<'_>) -> bool {
    value_name(flag).is_none()
}
