//! One rule: its conditions, and where its text is.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::conditions::{Conditions, UserPattern};
use crate::policy::index::{to_index, to_u32};
use crate::proto::{Method, ProtectionLevel};

/// Maximum length of a rule in messages, in bytes: a rule can have a list of many thousand targets.
const MAX_SHOWN: usize = 500;

/// A rule takes 32 bytes in addition to its text, because block lists have hundreds of thousands.
pub struct Rule {
    pub(super) conditions: Arc<Conditions>,
    pub(super) to: TargetCondition,
    source: Arc<Source>,
    /// Line in the file, from 1. 0 if the source is not a file.
    line: u32,
    /// Start and end of the rule in the text of the source.
    range: (u32, u32),
}

/// Text with rules: a file, an option or built in.
pub(super) struct Source {
    /// Name of the file or option, or "built in".
    pub(super) name: String,
    pub(super) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetCondition {
    /// `deny` without `to=`.
    Any,
    /// `allow` without `to=`: every target that the built-in rules do not deny to this client.
    Unprotected,
    /// Those listed in `to=`. The text of the rule has them. `has_net`: one is an address or CIDR block.
    Listed { has_net: bool },
    /// Built in: the targets that are protected from remote clients.
    Protected,
    /// Built in: the listeners of this server.
    OwnListeners,
}

impl Rule {
    /// `first` and `last` are the outer words of the rule in the text of `source`.
    pub(super) fn new(
        source: &Arc<Source>,
        line: usize,
        [first, last]: [&str; 2],
        conditions: Arc<Conditions>,
        to: TargetCondition,
    ) -> Self {
        let end = source.offset(last).saturating_add(to_u32(last.len()));
        Self { conditions, to, source: source.clone(), line: to_u32(line), range: (source.offset(first), end) }
    }

    /// Returns a built-in rule. Its text is for display only.
    pub(super) fn built_in(name: &str, text: &str, conditions: Conditions, to: TargetCondition) -> Self {
        let source = Arc::new(Source { name: name.into(), text: text.into() });
        Self::new(&source, 0, [&source.text; 2], Arc::new(conditions), to)
    }

    /// Returns the source of the rule: a file and line, an option, or "built in".
    pub fn origin(&self) -> String {
        let name = &self.source.name;
        if self.line == 0 { name.clone() } else { format!("{name} line {}", self.line) }
    }

    /// Returns a name that differs from those of other rules: the origin, and the text unless the origin has a line.
    pub fn label(&self) -> String {
        if self.line == 0 { format!("{} ({self})", self.source.name) } else { self.origin() }
    }

    /// Returns the text of the rule, with single spaces.
    pub fn text(&self) -> String {
        self.raw_text().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Returns whether this is the built-in rule that denies the listeners of this server.
    pub fn denies_own_listeners(&self) -> bool {
        self.to == TargetCondition::OwnListeners
    }

    pub(crate) fn has_to_condition(&self) -> bool {
        matches!(self.to, TargetCondition::Listed { .. })
    }

    pub(crate) fn users(&self) -> &[UserPattern] {
        &self.conditions.users
    }

    /// Returns whether a login with one of these methods can match.
    pub fn matches_any(&self, accepted: &[Method]) -> bool {
        let Conditions { methods, levels, .. } = &*self.conditions;
        let allows_unprotected = levels.is_empty() || levels.contains(&ProtectionLevel::None);
        let mut possible = accepted.iter().filter(|method| methods.is_empty() || methods.contains(method));
        possible.any(|method| allows_unprotected || *method == Method::GSSAPI)
    }

    /// Returns the addresses of `outbound=`.
    pub fn outbound(&self) -> impl Iterator<Item = IpAddr> {
        self.conditions.outbound.into_iter().flatten().flatten()
    }

    /// Returns the entries of `to=`, each with its offset in the text of the source.
    pub(super) fn targets(&self) -> impl Iterator<Item = (u32, &str)> {
        let list = self.raw_text().split_whitespace().find_map(|word| word.strip_prefix("to="));
        let is_listed = self.has_to_condition();
        let targets = list.filter(|_| is_listed).into_iter().flat_map(|list| list.split(','));
        targets.map(|target| (self.source.offset(target), target))
    }

    pub(super) fn target_at(&self, offset: u32) -> &str {
        let rest = self.source.text.get(to_index(offset)..to_index(self.range.1)).unwrap_or_default();
        rest.split(|c: char| c == ',' || c.is_whitespace()).next().unwrap_or_default()
    }

    fn raw_text(&self) -> &str {
        self.source.text.get(to_index(self.range.0)..to_index(self.range.1)).unwrap_or_default()
    }
}

/// The text of the rule, with single spaces. A long text is cut.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let raw = self.raw_text();
        let is_end = |end: &usize| raw.is_char_boundary(*end);
        let end = (0..=MAX_SHOWN.min(raw.len())).rev().find(is_end).unwrap_or_default();
        let (shown, rest) = raw.split_at(end);
        for (i, word) in shown.split_whitespace().enumerate() {
            write!(f, "{}{word}", if i == 0 { "" } else { " " })?;
        }
        f.write_str(if rest.is_empty() { "" } else { "..." })
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Source {
    fn offset(&self, part: &str) -> u32 {
        to_u32(part.as_ptr().addr().saturating_sub(self.text.as_ptr().addr()))
    }
}
