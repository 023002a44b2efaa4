//! How collectors of telemetry are reached: as services of the mesh, else by address or DNS name.

use crate::{Waypoint, nobodys_site};
use cairn_filter::{Callout, CalloutError, CalloutFuture, CalloutRequest};
use cairn_http::MeshCallout;
use std::sync::Arc;

/// Asks collectors over the connections of one worker.
#[derive(Debug)]
pub struct Collectors {
    mesh: Arc<MeshCallout>,
}

impl Collectors {
    /// Over the connections of `worker`, on whose thread it is to be used; `None` if there is no such worker.
    pub fn new(waypoint: &Waypoint, worker: usize) -> Option<Self> {
        let engine = waypoint.engines.get(worker)?;
        // What is sent belongs to no destination: endpoints are preferred from nowhere in particular.
        let mesh = MeshCallout::new(Arc::clone(engine), nobodys_site(), waypoint.settings.hbone);
        Some(Self { mesh: Arc::new(mesh) })
    }
}

impl Callout for Collectors {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        let mesh = Arc::clone(&self.mesh);
        Box::pin(async move {
            match mesh.call(request.clone()).await {
                // A name that the mesh does not know was chosen by who configures the mesh: DNS may know it.
                Err(CalloutError::UnknownService(name)) => {
                    let looked_up = tokio::net::lookup_host((&*request.host, request.port));
                    let found = tokio::time::timeout(request.timeout, looked_up).await;
                    let found = found.map_err(|_| CalloutError::Timeout(request.timeout))?;
                    let address = found.ok().and_then(|mut addresses| addresses.next());
                    let address = address.ok_or(CalloutError::UnknownService(name))?;
                    mesh.call(CalloutRequest { host: address.ip().to_string().into(), ..request }).await
                }
                answer => answer,
            }
        })
    }
}
