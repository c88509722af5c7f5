//! The server, end to end on loopback, and the relay without a server. tests/limits tests the limits of the server.

#![allow(unused_qualifications, reason = "the names of std that support exports may be written with their path")]

mod guard;
mod lifecycle;
mod metrics;
mod relay;
mod serve;
#[path = "../support/mod.rs"]
mod support;
mod udp;

use support::*;
