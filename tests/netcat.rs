//! The netcat features of the clients: retries, uses of a tunnel, reports, local ports, and framings of datagrams.
//! Their behaviour towards proxies is tested in client.rs.

mod common;
mod kit;
#[path = "common/scripted.rs"]
mod scripted;

#[path = "netcat/bind.rs"]
mod bind;
#[path = "netcat/connect.rs"]
mod connect;
#[path = "netcat/forward.rs"]
mod forward;
#[path = "netcat/report.rs"]
mod report;
#[path = "netcat/stdio.rs"]
mod stdio;
#[path = "netcat/udp.rs"]
mod udp;
