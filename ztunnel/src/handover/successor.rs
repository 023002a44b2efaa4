//! The successor's side: finds a predecessor, takes its sockets, and tells it to stop.

use super::message::{Message, VERSION, receive, send};
use super::sockets::SocketName;
use super::{HandoverError, STEP_MAX};
use cairn_net::{PacketError, PacketSocket};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A predecessor that will hand over.
pub struct Predecessor {
    socket: PacketSocket,
    /// It is in our own network namespace, so that our ports are in use.
    pub shares_network: bool,
}

impl Predecessor {
    /// Asks whoever listens at `path`. `None`, and said why in the log, when there is nobody or it will not hand over.
    pub async fn find(path: &Path, network: &str) -> Option<Self> {
        match Self::greet(path, network).await {
            Ok((predecessor, release)) => {
                let shares_network = predecessor.shares_network;
                tracing::info!(path = %path.display(), release, shares_network, "predecessor found");
                Some(predecessor)
            }
            Err(HandoverError::Packet(PacketError::Connect { source, .. }))
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                tracing::info!(path = %path.display(), "no predecessor");
                None
            }
            Err(error) => {
                let error = crate::onward::chain(&error);
                tracing::warn!(path = %path.display(), error, "nothing is handed over: ports are opened anew");
                None
            }
        }
    }

    async fn greet(path: &Path, network: &str) -> Result<(Self, String), HandoverError> {
        let socket = PacketSocket::connect(path)?;
        if !socket.is_of_our_user().map_err(HandoverError::UnknownPeer)? {
            return Err(HandoverError::OtherUser);
        }
        let hello = Message::Hello {
            versions: vec![VERSION],
            release: env!("CARGO_PKG_VERSION").to_owned(),
            network: network.to_owned(),
        };
        send(&socket, &hello).await?;
        match receive(&socket, STEP_MAX).await?.0 {
            Message::Welcome { version: VERSION, release, network: theirs } => {
                Ok((Self { socket, shares_network: theirs == network }, release))
            }
            Message::Welcome { version, .. } => {
                Err(HandoverError::Version { theirs: vec![version], ours: VERSION })
            }
            Message::Refused { reason } => Err(HandoverError::Refused(reason)),
            other => Err(HandoverError::Unexpected(format!("{other:?}"))),
        }
    }

    /// Takes its sockets. It goes on accepting on them as well.
    ///
    /// # Errors
    /// When it has ended, or does not do as agreed: then it may still accept, and so may we on what we open.
    pub async fn take(&self) -> Result<Vec<(SocketName, OwnedFd)>, HandoverError> {
        send(&self.socket, &Message::Take).await?;
        let mut sockets = Vec::new();
        loop {
            match receive(&self.socket, STEP_MAX).await? {
                (Message::Socket(name), Some(descriptor)) => sockets.push((name, descriptor)),
                (Message::End { count }, _) if count == sockets.len() => return Ok(sockets),
                (other, _) => return Err(HandoverError::Unexpected(format!("{other:?}"))),
            }
        }
    }

    /// Tells it that every pod is served here, and waits until it accepts no more.
    ///
    /// # Errors
    /// When it has ended already, or does not answer.
    pub async fn serving(self) -> Result<(), HandoverError> {
        send(&self.socket, &Message::Serving).await?;
        match receive(&self.socket, STEP_MAX).await?.0 {
            Message::Stopped => Ok(()),
            other => Err(HandoverError::Unexpected(format!("{other:?}"))),
        }
    }
}
