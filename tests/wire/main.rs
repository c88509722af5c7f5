//! The messages of the RFCs: their encoding, protected streams, reassembly of datagrams, transcripts of sessions. Also
//! the addresses of names.

#![allow(unused_qualifications, reason = "the names of std that support exports may be written with their path")]

mod client_role;
mod fixtures;
mod interrupted_handshakes;
mod name_addrs;
mod protected;
mod proto;
mod proxy_header;
mod reassembly;
mod server_role;
#[path = "../support/mod.rs"]
mod support;
mod transcripts;

use support::*;
