//! How a command line is read and answered: arguments, values, help, manual, errors and exit statuses.

pub mod argv;
pub(super) mod completions;
pub mod escape;
pub mod exit;
pub(super) mod help;
pub(super) mod logfmt;
pub(super) mod logger;
pub(super) mod manual;
pub mod secrets;
pub mod syntax;
pub(super) mod text_file;
