//! Typed access to what the proxy knows about an exchange.

use crate::Host;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The properties of the exchange at hand. Whatever the proxy does not know is `None`.
#[derive(Clone, Copy)]
pub struct Properties<'a> {
    host: &'a dyn Host,
}

/// A workload of the mesh, as the proxy knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The name of what controls the pod, such as its Deployment.
    pub workload: String,
    /// Its namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// Its canonical service.
    pub service: String,
}

impl<'a> Properties<'a> {
    pub(crate) fn new(host: &'a dyn Host) -> Self {
        Self { host }
    }

    /// The raw bytes of any property.
    pub fn bytes(&self, path: &[&str]) -> Option<Vec<u8>> {
        self.host.property(path)
    }

    /// A property that is text, read leniently.
    pub fn text(&self, path: &[&str]) -> Option<String> {
        self.bytes(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A property that is a number.
    pub fn number(&self, path: &[&str]) -> Option<i64> {
        self.bytes(path)?.try_into().ok().map(i64::from_le_bytes)
    }

    /// The client's address.
    pub fn source_address(&self) -> Option<SocketAddr> {
        self.text(&["source", "address"])?.parse().ok()
    }

    /// Where the client meant to go.
    pub fn destination_address(&self) -> Option<SocketAddr> {
        self.text(&["destination", "address"])?.parse().ok()
    }

    /// The client's identity, `spiffe://…`, as its certificate proves it.
    pub fn source_identity(&self) -> Option<String> {
        self.text(&["connection", "uri_san_peer_certificate"])
    }

    /// The client's identity without `spiffe://`, as Istio's policies write principals.
    pub fn source_principal(&self) -> Option<String> {
        let identity = self.source_identity()?;
        identity.strip_prefix("spiffe://").map(str::to_owned)
    }

    /// The client's workload.
    pub fn source_workload(&self) -> Option<Workload> {
        self.workload("downstream_peer")
    }

    /// The upstream's workload, once one was chosen.
    pub fn upstream_workload(&self) -> Option<Workload> {
        self.workload("upstream_peer")
    }

    /// The name of the route in force.
    pub fn route(&self) -> Option<String> {
        self.text(&["xds", "route_name"]).or_else(|| self.text(&["route_name"]))
    }

    /// The name of the upstream's cluster, once one was chosen.
    pub fn cluster(&self) -> Option<String> {
        self.text(&["xds", "cluster_name"]).or_else(|| self.text(&["cluster_name"]))
    }

    /// The id of the request, `x-request-id`.
    pub fn request_id(&self) -> Option<String> {
        self.text(&["request", "id"])
    }

    /// When the request arrived.
    pub fn request_time(&self) -> Option<SystemTime> {
        let nanos = u64::try_from(self.number(&["request", "time"])?).ok()?;
        Some(UNIX_EPOCH + Duration::from_nanos(nanos))
    }

    fn workload(&self, peer: &str) -> Option<Workload> {
        let field = |name: &str| self.text(&["filter_state", peer, name]);
        Some(Workload {
            workload: field("workload")?,
            namespace: field("namespace")?,
            name: field("name").unwrap_or_default(),
            service: field("service").unwrap_or_default(),
        })
    }
}
