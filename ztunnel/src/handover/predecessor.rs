//! The predecessor's side: offers its sockets to one successor at a time, until one of them serves.

use super::message::{Message, VERSION, receive, send, send_socket};
use super::{HandoverError, STEP_MAX, SUCCESSOR_MAX, Sockets};
use cairn_net::{PacketError, PacketListener, PacketSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// A pause when no successor can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// How far a hand-over has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nobody has taken over.
    Alone,
    /// A successor serves. `shares_network`: it has our own ports as well.
    Succeeded {
        /// It is in our network namespace.
        shares_network: bool,
    },
}

/// The offer to hand over. It stands until somebody has taken it, or this is dropped.
pub struct Offer {
    listener: PacketListener,
    sockets: Arc<Sockets>,
    phase: watch::Sender<Phase>,
    /// Accepting has ended, as it must before the successor is told so.
    stopped: watch::Receiver<bool>,
}

impl Offer {
    /// Listens for successors at `path`, in place of whoever did. `phase` is told when one serves; then accepting is to be
    /// stopped, and `stopped` to say so.
    ///
    /// # Errors
    /// When the path cannot be listened at.
    pub fn at(
        path: &Path,
        sockets: Arc<Sockets>,
        phase: watch::Sender<Phase>,
        stopped: watch::Receiver<bool>,
    ) -> Result<Self, PacketError> {
        let listener = PacketListener::bind(path)?;
        Ok(Self { listener, sockets, phase, stopped })
    }

    /// Attends to successors until one serves.
    pub async fn run(self) {
        loop {
            let socket = match self.listener.accept().await {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!(error = crate::onward::chain(&error), "no successor can be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let attended = tokio::select! {
                attended = self.attend(&socket) => attended,
                () = self.turn_away() => return,
            };
            match attended {
                Ok(()) => return tracing::info!("a successor serves: no more connections are accepted"),
                Err(error) => {
                    tracing::warn!(error = crate::onward::chain(&error), "a successor did not take over");
                }
            }
        }
    }

    /// Tells others that somebody is being attended to.
    async fn turn_away(&self) {
        loop {
            match self.listener.accept().await {
                Ok(socket) => {
                    let reason = "another successor is about to take over".to_owned();
                    // It may have gone away itself.
                    let _told = send(&socket, &Message::Refused { reason }).await;
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    async fn attend(&self, socket: &PacketSocket) -> Result<(), HandoverError> {
        if !socket.is_of_our_user().map_err(HandoverError::UnknownPeer)? {
            return Err(HandoverError::OtherUser);
        }
        let network = self.welcome(socket).await?;
        expect(socket, &Message::Take).await?;
        let sockets = self.sockets.open(&network);
        let count = sockets.len();
        for (name, descriptor) in sockets {
            send_socket(socket, name, &descriptor).await?;
        }
        send(socket, &Message::End { count }).await?;
        tracing::info!(count, "a successor listens on our sockets as well");
        expect(socket, &Message::Serving).await?;
        let shares_network = network == self.sockets.network();
        self.phase.send_replace(Phase::Succeeded { shares_network });
        let mut stopped = self.stopped.clone();
        // Both an error and a time-out mean that the process ends, which is as good.
        drop(tokio::time::timeout(STEP_MAX, stopped.wait_for(|stopped| *stopped)).await);
        if let Err(error) = send(socket, &Message::Stopped).await {
            // It serves, whether it hears it or not.
            tracing::debug!(error = crate::onward::chain(&error), "the successor does not wait");
        }
        Ok(())
    }

    /// Agrees on a version. Returns the successor's network namespace.
    async fn welcome(&self, socket: &PacketSocket) -> Result<String, HandoverError> {
        let (versions, release, network) = match receive(socket, STEP_MAX).await?.0 {
            Message::Hello { versions, release, network } => (versions, release, network),
            other => return Err(HandoverError::Unexpected(format!("{other:?}"))),
        };
        if !versions.contains(&VERSION) {
            let error = HandoverError::Version { theirs: versions, ours: VERSION };
            send(socket, &Message::Refused { reason: format!("version {VERSION} only") }).await?;
            return Err(error);
        }
        tracing::info!(release, "a successor gets ready");
        let welcome = Message::Welcome {
            version: VERSION,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            network: self.sockets.network().to_owned(),
        };
        send(socket, &welcome).await?;
        Ok(network)
    }
}

/// Waits for a message of the successor, as long as it may take.
async fn expect(socket: &PacketSocket, expected: &Message) -> Result<(), HandoverError> {
    match receive(socket, SUCCESSOR_MAX).await?.0 {
        message if message == *expected => Ok(()),
        other => Err(HandoverError::Unexpected(format!("{other:?}"))),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
