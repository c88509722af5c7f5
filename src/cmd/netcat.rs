//! What the three client modes share: options, proxies, credentials, and the use of a tunnel.

pub(super) mod child;
pub(super) mod connector;
pub(super) mod credentials;
pub(super) mod descriptor;
pub(super) mod forward;
pub mod options;
pub mod progress;
pub mod proxies;
pub mod report;
pub(super) mod stdio;
pub(super) mod target;
pub(super) mod tunnel;
