//! Finds the rules that may decide a request, without a scan of all rules.
//!
//! A group has all rules with the same action and conditions, except for their targets. Its conditions are matched
//! once. If they match, only three rules of the group can be the first that matches: one without `to=`, one that lists
//! the target, and one that may list it because the target is not known yet.

use std::collections::HashMap;
use std::sync::Arc;

use super::conditions::{
    AccessRequest, ClientPattern, Conditions, Match, TargetPattern, UserPattern, embedded_addrs, normalize_name,
};
use super::parse::parse_target;
use super::rule::Rule;
use crate::policy::index::{Index, to_index, to_u32};

/// Space of the targets of groups without key.
const NO_KEY: u32 = u32::MAX;

/// The groups of a list of rules, with indexes of the clients and targets that the rules name.
#[derive(Debug, Default)]
pub(super) struct Groups {
    groups: Vec<Group>,
    /// Groups that any client may match.
    without_key: Vec<u32>,
    /// Groups that only named users match. Each may match while the user is not known: `deny`, then `allow`.
    with_users: [Vec<u32>; 2],
    by_user: Index<u32>,
    /// Groups that only clients of some networks match.
    by_client: Index<u32>,
    /// Rules by target. The space is the group, or `NO_KEY`.
    by_target: Index<Target>,
}

#[derive(Debug)]
struct Group {
    conditions: Arc<Conditions>,
    first: usize,
    first_without_to: Option<usize>,
    first_listed: Option<usize>,
    first_net: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Target {
    rule: u32,
    /// Offset in the source of the rule.
    offset: u32,
}

#[derive(PartialEq)]
enum Key {
    None,
    Users,
    Nets,
}

impl Key {
    fn of(conditions: &Conditions) -> Self {
        let Conditions { users, from, .. } = conditions;
        match () {
            () if !users.is_empty() && users.iter().all(|user| matches!(user, UserPattern::Named(_))) => Self::Users,
            () if !from.is_empty() && from.iter().all(|client| matches!(client, ClientPattern::Net(_))) => Self::Nets,
            () => Self::None,
        }
    }
}

impl Groups {
    pub(super) fn new(rules: &[Rule]) -> Self {
        let targets = rules.iter().map(|rule| rule.targets().count()).sum();
        let mut groups = Self { by_target: Index::with_capacity(targets), ..Self::default() };
        let mut ids: HashMap<Arc<Conditions>, u32> = HashMap::new();
        for (i, rule) in rules.iter().enumerate() {
            let new_id = || groups.add_group(i, &rule.conditions);
            let id = *ids.entry(rule.conditions.clone()).or_insert_with(new_id);
            groups.add_rule(id, i, rule);
        }
        groups
    }

    pub(super) fn first_rules(&self) -> impl Iterator<Item = usize> {
        self.groups.iter().map(|group| group.first)
    }

    fn add_group(&mut self, first: usize, conditions: &Arc<Conditions>) -> u32 {
        let id = to_u32(self.groups.len());
        match Key::of(conditions) {
            Key::None => self.without_key.push(id),
            Key::Nets => {
                for client in &conditions.from {
                    if let ClientPattern::Net(net) = client {
                        self.by_client.insert_net(NO_KEY, *net, id);
                    }
                }
            }
            Key::Users => {
                let [deny, allow] = &mut self.with_users;
                if conditions.allow { allow } else { deny }.push(id);
                for user in &conditions.users {
                    if let UserPattern::Named(name) = user {
                        self.by_user.insert(NO_KEY, name, id);
                    }
                }
            }
        }
        let conditions = conditions.clone();
        self.groups.push(Group { conditions, first, first_without_to: None, first_listed: None, first_net: None });
        id
    }

    fn add_rule(&mut self, id: u32, index: usize, rule: &Rule) {
        let Some(group) = self.groups.get_mut(to_index(id)) else { return };
        if !rule.has_to_condition() {
            group.first_without_to.get_or_insert(index);
            return;
        }
        group.first_listed.get_or_insert(index);
        let space = if Key::of(&rule.conditions) == Key::None { NO_KEY } else { id };
        for (offset, target) in rule.targets() {
            let value = Target { rule: to_u32(index), offset };
            match parse_target(target) {
                Ok(TargetPattern::Net(net)) => {
                    group.first_net.get_or_insert(index);
                    self.by_target.insert_net(space, net, value);
                }
                Ok(TargetPattern::Name(name) | TargetPattern::Suffix(name)) => {
                    self.by_target.insert(space, name.as_bytes(), value);
                }
                Err(_) => {}
            }
        }
    }
}

/// A search for the rules that match a request, or may match it.
pub(super) struct Search<'a, 'r> {
    pub(super) groups: &'r Groups,
    pub(super) rules: &'r [Rule],
    pub(super) request: &'a AccessRequest<'a>,
    /// Matches the target of a rule without `to=`.
    pub(super) match_target: &'a dyn Fn(&Rule) -> Match,
    /// If set, later rules than those found with the same action may be left out.
    pub(super) only_first: bool,
}

impl<'r> Search<'_, 'r> {
    /// Calls `found` for the first rules that match or may match, and others, in any order, some of them repeatedly.
    pub(super) fn run(&self, found: &mut dyn FnMut(usize, &'r Rule, Match)) {
        if self.rules.is_empty() {
            return;
        }
        let name = self.request.target_name.map(|name| normalize_name(name.as_str()));
        let name = name.as_deref();
        for id in &self.groups.without_key {
            self.visit_group(*id, found);
        }
        self.visit_targets(NO_KEY, name, found);
        for id in self.request.client_ip.into_iter().flat_map(|ip| self.groups.by_client.find_ip(NO_KEY, ip)) {
            self.visit_group(id, found);
            self.visit_targets(id, name, found);
        }
        let Some(identity) = self.request.identity else { return self.visit_all_users(name, found) };
        for id in identity.user.into_iter().flat_map(|user| self.groups.by_user.find(NO_KEY, user)) {
            self.visit_group(id, found);
            self.visit_targets(id, name, found);
        }
    }

    /// Visits the groups of all users, because the user is not known yet.
    fn visit_all_users(&self, name: Option<&str>, found: &mut dyn FnMut(usize, &'r Rule, Match)) {
        for groups in &self.groups.with_users {
            let mut first_found = usize::MAX;
            for id in groups {
                let first = self.groups.groups.get(to_index(*id)).map_or(usize::MAX, |group| group.first);
                if self.only_first && first > first_found {
                    break;
                }
                let mut found = |index: usize, rule, matches| {
                    if matches > Match::No {
                        first_found = first_found.min(index);
                    }
                    found(index, rule, matches);
                };
                self.visit_group(*id, &mut found);
                self.visit_targets(*id, name, &mut found);
            }
        }
    }

    /// Reports the rules of a group that match every target, or any target that is not known yet.
    fn visit_group(&self, id: u32, found: &mut dyn FnMut(usize, &'r Rule, Match)) {
        let Some(group) = self.groups.groups.get(to_index(id)) else { return };
        let undecided = match (self.request.target_ip, self.request.target_name) {
            (None, None) => group.first_listed,
            (None, Some(_)) => group.first_net,
            (Some(_), _) => None,
        };
        // Many groups may differ only in `outbound=` and `via=`, so nothing else is compared first.
        if group.first_without_to.or(undecided).is_none() {
            return;
        }
        let matches = group.conditions.matches(self.request);
        if matches == Match::No {
            return;
        }
        let rule = |index: usize| Some((index, self.rules.get(index)?));
        if let Some((index, rule)) = group.first_without_to.and_then(rule) {
            found(index, rule, matches.min((self.match_target)(rule)));
        }
        if let Some((index, rule)) = undecided.and_then(rule) {
            found(index, rule, Match::Maybe);
        }
    }

    fn visit_targets(&self, space: u32, name: Option<&str>, found: &mut dyn FnMut(usize, &'r Rule, Match)) {
        let by_target = &self.groups.by_target;
        let named = name.into_iter().flat_map(|name| by_target.find_domains(space, name));
        let addrs = self.request.target_ip.into_iter().flat_map(embedded_addrs);
        for target in named.chain(addrs.flat_map(|ip| by_target.find_ip(space, ip))) {
            let index = to_index(target.rule);
            let Some(rule) = self.rules.get(index) else { continue };
            let pattern = parse_target(rule.target_at(target.offset));
            let is_listed = pattern.map_or(Match::No, |pattern| pattern.matches(rule.conditions.allow, self.request));
            found(index, rule, is_listed.min(rule.conditions.matches(self.request)));
        }
    }
}
