//! Access control of a running server: rules, name resolution, other hosts, reload, upstream proxies. Each test checks
//! that denied traffic does not get through.

mod closed_sessions;
mod explain;
mod fail_over;
pub mod hosts;
mod long_lists;
mod names;
mod reload;
mod reload_steps;
mod rules;
mod startup;
pub mod tools;
mod udp_hops;
mod upstream_passwords;
mod via;
