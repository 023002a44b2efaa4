//! Observers of destinations: one per plan, shared by all destinations whose telemetry settings come to the same.

use crate::collectors::Collectors;
use crate::{Waypoint, node_id};
use cairn_mesh::{LogTarget, TelemetryPlan};
use cairn_observe::{Feed, Observer, Outputs, Own};
use cairn_telemetry::{Observe, Telemetry};
use std::sync::{Arc, Weak};

/// Compiles observers.
pub struct Observers {
    own: Arc<Own>,
    outputs: Outputs,
    known: Vec<(TelemetryPlan, Weak<Observer>)>,
}

impl Observers {
    /// Observers of a waypoint.
    pub(crate) fn new(waypoint: &Arc<Waypoint>) -> Self {
        let settings = &waypoint.settings;
        let own = Own {
            node_id: node_id(settings).into(),
            namespace: Arc::clone(&settings.gateway.namespace),
            name: Arc::clone(&settings.gateway.name),
            identity: settings.identity.as_str().into(),
            cluster_id: settings.cluster_id.as_str().into(),
            mesh_id: settings.identity.trust_domain().into(),
            hostname: hostname().into(),
        };
        let owner = Arc::clone(waypoint);
        // Collectors are reached as any service is, from a worker.
        Self::of_process(own, Arc::clone(&waypoint.telemetry), move |feed: Feed| {
            let waypoint = Arc::clone(&owner);
            tokio::spawn(async move {
                let of_worker = Arc::clone(&waypoint);
                let run = move |worker| async move {
                    if let Some(collectors) = Collectors::new(&of_worker, worker) {
                        feed.run(Arc::new(collectors)).await;
                    }
                };
                waypoint.workers.run(run).await;
            });
        })
    }

    /// Observers of `own`, which log through `telemetry` and send through what `start` runs.
    pub(crate) fn of_process(
        own: Own,
        telemetry: Arc<Telemetry>,
        start: impl Fn(Feed) + Send + Sync + 'static,
    ) -> Self {
        let own = Arc::new(own);
        Self { outputs: Outputs::new(telemetry, Arc::clone(&own), start), own, known: Vec::new() }
    }

    /// Opens the files of access logs anew.
    pub(crate) fn reopen_logs(&self) {
        self.outputs.reopen();
    }

    /// The observer of a plan; `None` where nobody asks for anything but the standard metrics and the process's log.
    pub(crate) fn of(&mut self, plan: &TelemetryPlan) -> Option<Arc<dyn Observe>> {
        if is_standard(plan) {
            return None;
        }
        self.known.retain(|(_, observer)| observer.strong_count() > 0);
        let known = self.known.iter().find(|(known, _)| known == plan);
        let observer = known.and_then(|(_, observer)| observer.upgrade()).unwrap_or_else(|| {
            let observer = Arc::new(Observer::compile(plan, &self.own, &self.outputs));
            self.known.push((plan.clone(), Arc::downgrade(&observer)));
            observer
        });
        Some(observer)
    }
}

fn is_standard(plan: &TelemetryPlan) -> bool {
    let TelemetryPlan { logs, metrics, tracing } = plan;
    let own_log = matches!(logs.as_slice(), [log] if log.to == LogTarget::Own && log.filter.is_none());
    own_log && *metrics == Default::default() && tracing.is_none()
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
