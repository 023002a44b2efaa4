//! A process's beginning and end: when its ports are opened or taken over, and when it stops accepting and ends.

use crate::handover::{Offer, Phase, Predecessor};
use crate::settings::Afterwards;
use crate::{LAST_WORDS_MAX, Proxy, follow, onward, recheck, serve_pods, start_operators};
use anyhow::{Context, bail};
use cairn_net::DrainTrigger;
use cairn_process::{Readiness, Serving, stop_signal};
use cairn_telemetry::Direction;
use parking_lot::Mutex;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// What was written to a tunnel at the very last is sent by its connection's own task within this time.
const FLUSH: Duration = Duration::from_millis(100);

/// Connections that end with the process are named each, up to so many.
const CUT_NAMED_MAX: usize = 1000;

/// What a process knows of who was before it and who comes after it.
struct Succession {
    proxy: Arc<Proxy>,
    readiness: Readiness,
    /// Operators' ports, once they are ours.
    operators: Mutex<Option<Serving>>,
    phase: watch::Sender<Phase>,
    /// Whether we have stopped accepting.
    stopped: watch::Sender<bool>,
}

/// Runs the proxy until it is told to stop or is succeeded, and drains.
///
/// # Errors
/// When operators' ports cannot be had, or a control task ends.
pub async fn run(proxy: Arc<Proxy>, trigger: DrainTrigger) -> anyhow::Result<()> {
    let handover = proxy.settings.handover.as_ref();
    let predecessor = match handover {
        Some(handover) => Predecessor::find(&handover.socket, proxy.sockets.network()).await,
        None => None,
    };
    let succession = Arc::new(Succession {
        proxy: Arc::clone(&proxy),
        readiness: Readiness::default(),
        operators: Mutex::default(),
        phase: watch::Sender::new(Phase::Alone),
        stopped: watch::Sender::new(false),
    });
    // Where ours are a predecessor's still, they are taken over when all is ready.
    if !predecessor.as_ref().is_some_and(|predecessor| predecessor.shares_network) {
        succession.serve_operators()?;
    }
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&proxy.certificates).renew());
    tasks.spawn(follow(Arc::clone(&proxy)));
    tasks.spawn(recheck(Arc::clone(&proxy)));
    if let Some(revocations) = proxy.certificates.trust().revocations().cloned() {
        tasks.spawn(revocations.follow());
    }
    tasks.spawn(Arc::clone(&succession).serve(predecessor));
    succession.end(tasks, trigger).await
}

impl Succession {
    fn serve_operators(&self) -> anyhow::Result<()> {
        let mut operators = self.operators.lock();
        if operators.is_none() {
            *operators = Some(start_operators(&self.proxy, self.readiness.clone())?);
        }
        Ok(())
    }

    /// Serves pods as soon as the mesh is known; takes over from a predecessor before, and offers to hand over after.
    async fn serve(self: Arc<Self>, mut predecessor: Option<Predecessor>) {
        let (state, listening) = (self.readiness.wait_for("state manager"), self.readiness.wait_for("proxy"));
        self.proxy.mesh.ready().await;
        state.done();
        tracing::info!("first state received");
        if let Some(found) = predecessor.take() {
            match found.take().await {
                Ok(sockets) => {
                    tracing::info!(count = sockets.len(), "sockets of the predecessor received");
                    self.proxy.sockets.leave(sockets);
                    predecessor = Some(found);
                }
                Err(error) => {
                    tracing::warn!(error = onward::chain(&error), "the predecessor hands nothing over");
                }
            }
        }
        if predecessor.is_none()
            && let Err(error) = self.serve_operators()
        {
            return tracing::error!(error = format!("{error:#}"), "operators' ports cannot be had");
        }
        let pods = serve_pods(Arc::clone(&self.proxy), self.readiness.clone(), listening);
        tokio::join!(pods, self.succeed(predecessor));
    }

    /// Tells the predecessor to stop when every pod is served here, and waits for a successor.
    async fn succeed(&self, predecessor: Option<Predecessor>) {
        if let Some(predecessor) = predecessor {
            self.readiness.ready().await;
            if let Err(error) = self.serve_operators() {
                // It may go on accepting on what it handed over, and so do we.
                tracing::error!(error = format!("{error:#}"), "operators' ports cannot be taken over");
            }
            match predecessor.serving().await {
                Ok(()) => tracing::info!("the predecessor accepts no more connections"),
                Err(error) => tracing::warn!(error = onward::chain(&error), "the predecessor is gone"),
            }
            let count = self.proxy.sockets.close_left();
            tracing::debug!(count, "sockets of the predecessor that were of no use");
        }
        if let Some(handover) = &self.proxy.settings.handover {
            let sockets = Arc::clone(&self.proxy.sockets);
            match Offer::at(&handover.socket, sockets, self.phase.clone(), self.stopped.subscribe()) {
                Ok(offer) => offer.run().await,
                Err(error) => tracing::error!(error = onward::chain(&error), "nothing can be handed over"),
            }
        }
        std::future::pending().await
    }

    /// Names the connections that end with the process, in the words of Istio's ztunnel.
    fn tell_cut(&self) {
        let open = self.proxy.open.list();
        for connection in open.iter().take(CUT_NAMED_MAX) {
            let direction = if connection.is_inbound { Direction::Inbound } else { Direction::Outbound };
            tracing::error!(
                target: "access",
                source = %connection.source,
                destination = %connection.actual,
                direction = direction.as_str(),
                error = "connection closed due to connection drain",
                "connection complete"
            );
        }
        if let Some(more) = open.len().checked_sub(CUT_NAMED_MAX).filter(|more| *more > 0) {
            tracing::error!(target: "access", more, "further connections closed due to connection drain");
        }
    }

    /// Waits for the end and drains.
    async fn end(&self, mut tasks: JoinSet<()>, trigger: DrainTrigger) -> anyhow::Result<()> {
        let settings = &self.proxy.settings;
        let mut phase = self.phase.subscribe();
        let mut signal = pin!(async {
            tokio::select! {
                signal = stop_signal() => signal.context("cannot watch for signals"),
                () = self.proxy.quit.notified() => Ok("quitquitquit"),
            }
        });
        let mut began = Instant::now();
        let told = tokio::select! {
            signal = &mut signal => Some(signal?),
            _succeeded = phase.wait_for(|phase| *phase != Phase::Alone) => None,
            // Without any of its control tasks the proxy would go on with what it last knew, looking healthy.
            ended = tasks.join_next() => bail!("a control task ended: {ended:?}"),
        };
        if let Some(signal) = told {
            began = Instant::now();
            if settings.handover.is_some() {
                // One may be getting ready, and what connects before it accepts must not be refused.
                tracing::info!(signal, "accepting until there is a successor");
                let succeeded = phase.wait_for(|phase| *phase != Phase::Alone);
                let _succeeded_or_not = tokio::time::timeout(settings.drain / 2, succeeded).await;
            }
        }
        if *self.phase.borrow() == (Phase::Succeeded { shares_network: true })
            && let Some(operators) = self.operators.lock().take()
        {
            operators.close();
        }
        trigger.start();
        tracing::info!(signal = told.unwrap_or("succeeded"), "draining");
        self.stopped.send_replace(true);
        if told.is_none() {
            began = Instant::now();
            let stays = settings.handover.as_ref().map(|handover| handover.afterwards);
            if stays == Some(Afterwards::Stay) {
                let signal = signal.await?;
                began = Instant::now();
                tracing::info!(signal, "ending");
            }
        }
        let all_ended = trigger.finished(settings.drain.saturating_sub(began.elapsed())).await;
        if all_ended {
            tokio::time::sleep(FLUSH).await;
        } else {
            self.tell_cut();
        }
        if let Some(collector) = &self.proxy.collector {
            collector.flush(LAST_WORDS_MAX).await;
        }
        tracing::info!(all_ended, "stopped");
        Ok(())
    }
}
