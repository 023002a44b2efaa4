//! The operating system's network: listeners, original destination, transparent sockets, namespaces, packets with
//! descriptors, copy, drain.
//!
//! Everything here is about sockets and bytes; who is at the other end is the business of the crates above.

mod address;
mod buffer;
mod copy;
mod drain;
mod namespace;
mod packet;
mod socket;

pub use address::may_be_asked;
pub use buffer::{BUFFER_BYTES, Buffer};
pub use copy::{ByteCounts, HALF_CLOSED_MAX, LARGE_BYTES, Side, copy, copy_sides};
pub use drain::{Drain, DrainGuard, DrainTrigger, drain};
pub use namespace::{Namespace, NamespaceId, ZTUNNEL_MARK};
pub use packet::{Packet, PacketError, PacketListener, PacketSocket};
pub use socket::{ConnectOptions, ListenOptions, NetError, connect, datagram, listen, listen_datagram};
pub use socket::{SocketKind, adopt, adopt_datagram, fits, original_destination, prepare};
