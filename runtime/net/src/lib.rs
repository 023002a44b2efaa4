//! The operating system's network: listeners, original destination, transparent sockets, namespaces, copy, drain.
//!
//! Everything here is about sockets and bytes; who is at the other end is the business of the crates above.

mod address;
mod buffer;
mod copy;
mod drain;
mod namespace;
mod socket;

pub use address::may_be_asked;
pub use buffer::{BUFFER_BYTES, Buffer};
pub use copy::{ByteCounts, copy};
pub use drain::{Drain, DrainGuard, DrainTrigger, drain};
pub use namespace::{Namespace, ZTUNNEL_MARK};
pub use socket::{ConnectOptions, ListenOptions, NetError, connect, listen, original_destination, prepare};
