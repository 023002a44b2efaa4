//! The end of a connection whose peer's certificate is revoked while it is open.

use crate::wire::Wire;
use cairn_identity::PeerWatch;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::sync::Notify;

/// Whether a connection has ended because its peer's certificate was revoked. Its tunnels share this; clones are handles.
#[derive(Clone, Debug, Default)]
pub struct Revocation(Option<Arc<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    is_revoked: AtomicBool,
    revoked: Notify,
}

impl Revocation {
    /// Waits until it has; for ever if nobody says what is revoked.
    pub async fn revoked(&self) {
        let Some(shared) = &self.0 else { return std::future::pending().await };
        // Made before the look, so that nothing is missed between the two.
        let told = shared.revoked.notified();
        if !shared.is_revoked.load(Ordering::Acquire) {
            told.await;
        }
    }

    fn tell(&self) {
        if let Some(shared) = &self.0 {
            shared.is_revoked.store(true, Ordering::Release);
            shared.revoked.notify_waiters();
        }
    }
}

/// The peer that has just proven itself, or resumed a session in which it had, would be refused now.
#[derive(Debug)]
pub(crate) struct Revoked;

/// Looks at a connection's peer whenever other lists of revoked certificates are in force.
#[derive(Default)]
pub(crate) struct Guard {
    revocation: Revocation,
    /// Ready when the peer is revoked.
    watching: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Guard {
    /// Looks at the peer at once, and from then on.
    pub(crate) fn new(wire: &Wire, watch: Option<PeerWatch>) -> Result<Self, Revoked> {
        let Some(mut watch) = watch else { return Ok(Self::default()) };
        if wire.with_peer(|chain| watch.is_revoked(chain)) {
            return Err(Revoked);
        }
        let wire = wire.clone();
        let watching = async move {
            loop {
                watch.changed().await;
                if wire.with_peer(|chain| watch.is_revoked(chain)) {
                    return;
                }
            }
        };
        Ok(Self { revocation: Revocation(Some(Arc::default())), watching: Some(Box::pin(watching)) })
    }

    /// For the tunnels of the connection.
    pub(crate) fn revocation(&self) -> &Revocation {
        &self.revocation
    }

    /// Ready, once, when the connection must end. Its tunnels know by then.
    pub(crate) fn poll_revoked(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(watching) = &mut self.watching else { return Poll::Pending };
        if watching.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.watching = None;
        self.revocation.tell();
        Poll::Ready(())
    }
}
