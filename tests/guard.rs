//! Access control of a running server: rules, name resolution, other hosts, reload, upstream proxies. Each test checks
//! that denied traffic does not get through.

mod common;
mod kit;

#[allow(dead_code, reason = "some helpers are for the tests of UDP only")]
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
