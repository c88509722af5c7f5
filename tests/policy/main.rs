//! The policy without a server: rules and the users file.

mod rules;
mod users;
