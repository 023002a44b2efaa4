//! A restart without broken connections: a successor takes over the listening sockets, and its predecessor serves the
//! connections that it has until they end.
//!
//! Whoever waits to be accepted waits at the socket, not at a process, so nobody is lost. The successor connects to the
//! predecessor's Unix socket (`SOCK_SEQPACKET`, mode 0600, both of one user):
//!
//! | successor | predecessor |
//! |---|---|
//! | `hello`: the versions that it speaks, its network namespace | `welcome`, or `refused` and why |
//! | `take`, once it knows the mesh | `socket` for each that it listens on, a descriptor with each; `end` |
//! | `serving`, once it serves every pod | stops accepting; `stopped` |
//!
//! Until the last step both accept, and either may end at any time: the other goes on. What was not handed over is opened
//! anew, so a predecessor that refuses, or none, costs no more than that.
//!
//! `message.rs` is what they say, `sockets.rs` what is handed over, `predecessor.rs` and `successor.rs` either side.

mod message;
mod predecessor;
mod sockets;
mod successor;

pub use predecessor::{Offer, Phase};
pub use sockets::{Owner, Sockets};
pub use successor::Predecessor;

use cairn_net::PacketError;
use std::time::Duration;

/// The peer does its next step within this time, where that takes no more than a few system calls.
const STEP_MAX: Duration = Duration::from_secs(5);

/// A successor may take so long to get to know the mesh and to serve every pod. It costs nothing while it does, but
/// another one is turned away.
const SUCCESSOR_MAX: Duration = Duration::from_secs(10 * 60);

/// Why a hand-over did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// The connection could not be made, or broke.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The kernel does not say who the peer is.
    #[error("it is not known who the peer is")]
    UnknownPeer(#[source] std::io::Error),
    /// The peer is somebody else's.
    #[error("the peer runs as another user")]
    OtherUser,
    /// It has gone away.
    #[error("the peer closed the connection")]
    Closed,
    /// It takes too long.
    #[error("the peer did nothing for {0:?}")]
    Silent(Duration),
    /// It does not speak our version.
    #[error("the peer speaks versions {theirs:?} of the hand-over, and we {ours}")]
    Version {
        /// What it speaks.
        theirs: Vec<u32>,
        /// What we speak.
        ours: u32,
    },
    /// It says no.
    #[error("the peer refuses: {0}")]
    Refused(String),
    /// It says what cannot be read, or what does not belong there.
    #[error("the peer says what is not expected: {0}")]
    Unexpected(String),
}
