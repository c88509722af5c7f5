//! Netcat features of the clients: retries, stdin and stdout or a program on the tunnel, reports, local ports, and
//! datagram framings. client.rs tests the clients against proxies.

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
