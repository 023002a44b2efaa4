//! The compiled configuration of one destination, pinned once by each exchange.

use crate::RouteTable;
use arc_swap::ArcSwap;
use cairn_filter::Chain;
use cairn_mesh::{AppProtocol, PathNormalization, Service, TextMatch, Workload};
use cairn_telemetry::Observe;
use std::sync::Arc;

/// What is done with the traffic to one destination: a port of a service, or a workload.
pub struct Site {
    /// The filters.
    pub chain: Chain,
    /// The routes.
    pub routes: RouteTable,
    /// The service; `None` for traffic addressed to a workload.
    pub service: Option<Arc<Service>>,
    /// The port addressed.
    pub port: u16,
    /// What the port is declared to carry.
    pub protocol: AppProtocol,
    /// How paths are normalised.
    pub normalization: PathNormalization,
    /// Principals of clients who are told what decided their requests.
    pub explain_to: Arc<[TextMatch]>,
    /// The waypoint's own workload, from whose place in the world endpoints are preferred.
    pub viewpoint: Option<Arc<Workload>>,
    /// How its traffic is observed; `None`: with the standard metrics, in the process's own log.
    pub observer: Option<Arc<dyn Observe>>,
}

/// Where the current [`Site`] of a destination is found.
pub type SiteHandle = Arc<ArcSwap<Site>>;
