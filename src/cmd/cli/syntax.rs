//! The syntax of the command line: the modes and their options, from the definitions with which argh parses them.

use argh::{ArgsInfo, FlagInfo, FlagInfoKind};

pub(crate) const NAME: &str = "s5";
/// The option that can have a value after `=` and never takes the next argument, and its value without one.
pub(crate) const OPTIONAL_VALUE: (&str, &str) = ("--json", "fd:2");

/// The command line of the program, or of one of its modes.
#[derive(Default)]
pub struct Syntax {
    /// Name of the mode; empty for the program.
    pub name: &'static str,
    pub(crate) description: &'static str,
    pub(crate) argument: Option<&'static str>,
    /// All options, including those that the mode refuses.
    pub(crate) flags: &'static [FlagInfo<'static>],
    /// Options that the mode refuses, with the reason.
    pub(crate) refusals: Vec<(&'static [&'static str], &'static str)>,
    pub(crate) modes: Vec<Self>,
}

impl Syntax {
    pub(crate) fn of<T: ArgsInfo>(name: &'static str) -> Self {
        let info = T::get_args_info();
        Self { name, description: info.description, flags: info.flags, ..Self::default() }
    }

    /// Returns the options, without `--help` and those that the mode refuses.
    pub(crate) fn options(&self) -> impl Iterator<Item = &'static FlagInfo<'static>> {
        self.flags.iter().filter(|flag| flag.long != "--help" && self.refusal(flag).is_none())
    }

    /// Returns the reason why the mode refuses an option, if it does.
    pub(crate) fn refusal(&self, flag: &FlagInfo<'_>) -> Option<&'static str> {
        self.refusals.iter().find(|(options, _)| options.contains(&flag.long)).map(|(_, reason)| *reason)
    }

    /// Returns the synopsis, such as `s5 connect [options] [target]`.
    pub fn usage(&self) -> String {
        let name = if self.modes.is_empty() { self.name } else { "<mode>" };
        let argument = self.argument.map(|argument| format!(" [{argument}]")).unwrap_or_default();
        format!("{NAME} {name} [options]{argument}")
    }
}

/// Returns the placeholder for the value of an option, such as `FILE`. `None` for a switch and for an optional value.
pub(crate) fn value_name<'a>(flag: &FlagInfo<'a>) -> Option<&'a str> {
    any_value_name(flag).filter(|_| flag.long != OPTIONAL_VALUE.0)
}

pub(crate) fn optional_value_name<'a>(flag: &FlagInfo<'a>) -> Option<&'a str> {
    any_value_name(flag).filter(|_| flag.long == OPTIONAL_VALUE.0)
}

fn any_value_name<'a>(flag: &FlagInfo<'a>) -> Option<&'a str> {
    match flag.kind {
        FlagInfoKind::Switch => None,
        FlagInfoKind::Option { arg_name } => Some(arg_name),
    }
}

/// Splits a description into its first sentence and the following ones, which only the manual contains.
pub(crate) fn split_summary<'a>(flag: &FlagInfo<'a>) -> (&'a str, &'a str) {
    let text = flag.description.trim();
    text.split_once(". ").unwrap_or((text, ""))
}

pub(crate) fn summary<'a>(flag: &FlagInfo<'a>) -> &'a str {
    split_summary(flag).0
}
