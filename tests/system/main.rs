//! Tests of a server among other programs (`make test-system`): they need root, several network namespaces, a booted
//! systemd, or more time than the other tests.

mod cluster;
mod package;
mod ports;
#[path = "../support/mod.rs"]
mod support;

use support::*;
