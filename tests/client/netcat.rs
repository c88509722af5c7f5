//! Netcat features of the clients: retries, stdin and stdout or a program on the tunnel, reports, local ports, and
//! datagram framings. The files beside it test the clients against proxies.

mod bind;
mod connect;
pub mod forward;
mod remote_end;
mod report;
mod stdio;
mod timeouts;
mod udp;
