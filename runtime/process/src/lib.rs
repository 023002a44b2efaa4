//! Being a daemon: settings, threads, signals, readiness, logging, and the HTTP servers for operators.
//!
//! A binary reads its settings with [`load_file`], starts [`Workers`], serves [`Operators`] ports on its control
//! runtime, and ends with [`stop_signal`] and a drain.

mod limits;
mod liveness;
mod logging;
mod memory;
mod operators;
mod profile;
mod readiness;
mod settings;
mod signals;
mod threads;

pub use limits::{encode_file_metrics, raise_file_limit};
pub use liveness::{Liveness, longest_turns};
pub use logging::{LogControl, LogFormat, LoggingError, init_logging, init_queued_logging};
pub use operators::{Open, OperatorError, Operators, Serving, Text, admin_layers};
pub use readiness::{Pending, Readiness};
pub use settings::{SettingsError, load_file};
pub use signals::{Signals, reopen_signals, stop_signal};
pub use threads::{ThreadError, Workers, control_runtime};
