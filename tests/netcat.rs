//! What the clients have beyond the protocol: when they try again, what a tunnel is used for, what is said of it, local
//! ports, and datagrams in all forms. What proxies do to them is in client.rs.

mod common;
mod kit;
#[path = "common/scripted.rs"]
mod scripted;

#[path = "netcat/bind.rs"]
mod bind;
#[path = "netcat/datagrams.rs"]
mod datagrams;
#[path = "netcat/establish.rs"]
mod establish;
#[path = "netcat/forward.rs"]
mod forward;
#[path = "netcat/report.rs"]
mod report;
#[path = "netcat/uses.rs"]
mod uses;
