//! Who may go where, end to end: rules, what names lead to, hosts that are not this one, new rules for a server that
//! runs, and ways through other proxies. A test here asks whether something gets through that should not.

mod common;
mod kit;

#[allow(dead_code, reason = "the tests of UDP use the rest")]
#[path = "udp/association.rs"]
mod association;
#[path = "guard/closed_sessions.rs"]
mod closed_sessions;
#[path = "guard/hosts.rs"]
mod hosts;
#[path = "guard/names.rs"]
mod names;
#[path = "guard/reload.rs"]
mod reload;
#[path = "guard/reload_steps.rs"]
mod reload_steps;
#[path = "guard/rules.rs"]
mod rules;
#[path = "guard/startup.rs"]
mod startup;
#[path = "guard/tools.rs"]
mod tools;
#[path = "guard/via.rs"]
mod via;
