//! One plugin in front of one upstream, over plain HTTP: the waypoint's own engine and chain, without a mesh around it.

use super::module::Contents;
use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use cairn_filter::{Chain, Connection, Peer, Position, Slot, sort_factories};
use cairn_http::{MeshCallout, RouteTable, Site, SiteHandle, Worker, WorkerSettings};
use cairn_mesh::{
    AppProtocol, Change, Identity, LoadBalancing, NetworkAddress, PathNormalization, PortMapping, Service,
    ServicePort, Store, Workload,
};
use cairn_net::Drain;
use cairn_telemetry::{Telemetry, TelemetrySettings};
use cairn_wasm::{Compiler, Engine, EngineSettings, WorkerPlace};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;

/// The name of what is behind the plugin.
const UPSTREAM: &str = "upstream";

/// A service that the plugin may ask: its name in callouts, its port, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    host: String,
    port: u16,
    address: SocketAddr,
}

impl Known {
    /// The cluster of Envoy's that stands for it, named as Istio names clusters.
    pub fn cluster(&self) -> String {
        format!("outbound|{}||{}", self.port, self.host)
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl std::str::FromStr for Known {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not `host:port=address:port`");
        let (name, address) = text.split_once('=').ok_or_else(wrong)?;
        let (host, port) = name.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        Ok(Self { host: host.to_owned(), port, address: address.parse().map_err(|_| wrong())? })
    }
}

/// A plugin's server.
pub struct Server {
    engine: Engine,
    name: String,
    worker: Arc<Worker>,
    site: SiteHandle,
    upstream: SocketAddr,
    drain: Drain,
    connections: AtomicU64,
}

impl Server {
    /// Starts `contents` as the plugin `name` in front of `upstream`. The access log goes to `log`.
    ///
    /// # Errors
    /// When the plugin does not start.
    pub fn new(
        (name, contents): (&str, &Contents),
        upstream: SocketAddr,
        known: &[Known],
        log: impl Write + Send + 'static,
        drain: Drain,
    ) -> Result<Arc<Self>> {
        let mut store = Store::new();
        let own = Known { host: UPSTREAM.to_owned(), port: upstream.port(), address: upstream };
        for (index, one) in std::iter::once(&own).chain(known).enumerate() {
            store.apply(changes(one, index)?);
        }
        let snapshot = Arc::new(ArcSwap::from_pointee(store.snapshot()));
        let telemetry = Telemetry::new("waypoint", "plugin", &TelemetrySettings::default(), log);
        let settings = WorkerSettings { server: None, ..WorkerSettings::default() };
        let worker = Worker::new(settings, Arc::clone(&snapshot), None, telemetry);
        let site: SiteHandle =
            Arc::new(ArcSwap::from_pointee(site(&service(&own)?, own.port, Chain::new(Vec::new()))));
        let callout = Arc::new(MeshCallout::new(Arc::clone(&worker), Arc::clone(&site), upstream));
        let place = WorkerPlace { runtime: tokio::runtime::Handle::current(), callout };
        let compiler = Compiler::this_program();
        let engine =
            Engine::new(EngineSettings { places: vec![place], compiler, ..EngineSettings::default() })?;
        let connections = AtomicU64::new(1);
        let server = Self { engine, name: name.to_owned(), worker, site, upstream, drain, connections };
        server.replace(contents)?;
        Ok(Arc::new(server))
    }

    /// Puts another version of the plugin in place of the one that runs; exchanges under way keep theirs.
    ///
    /// # Errors
    /// When it does not start; then the one before goes on.
    pub fn replace(&self, contents: &Contents) -> Result<()> {
        let factory = contents.start(&self.engine, &self.name)?;
        let slot = Slot { position: Position::PluginUnspecified, priority: 0, factory };
        let before = self.site.load_full();
        let service = before.service.clone().context("the upstream is gone")?;
        self.site.store(Arc::new(site(&service, before.port, Chain::new(sort_factories(vec![slot])))));
        self.worker.sites_changed();
        Ok(())
    }

    /// Takes connections until the drain begins.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        tokio::spawn(Arc::clone(&self.worker).maintain(self.drain.clone()));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.drain.started() => return,
            };
            let Ok((stream, client)) = accepted else {
                // Running out of descriptors must not become a hot loop.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let site = Arc::clone(&self.site);
            let connection = Arc::new(Connection {
                id: self.connections.fetch_add(1, Ordering::Relaxed),
                worker: 0,
                source: Peer { address: client, identity: None, workload: None },
                destination: self.upstream,
                service: site.load().service.clone(),
                local: None,
                callout: Arc::new(MeshCallout::new(
                    Arc::clone(&self.worker),
                    Arc::clone(&site),
                    self.upstream,
                )),
            });
            tokio::spawn(cairn_http::serve(
                stream,
                connection,
                site,
                Arc::clone(&self.worker),
                self.drain.clone(),
            ));
        }
    }
}

fn service(known: &Known) -> Result<Arc<Service>> {
    let address = NetworkAddress { network: "".into(), address: known.address.ip() };
    Ok(Arc::new(Service {
        name: known.host.as_str().into(),
        namespace: "default".into(),
        hostname: known.host.as_str().into(),
        vips: vec![address],
        ports: vec![ServicePort {
            port: known.port,
            target_port: known.address.port(),
            protocol: AppProtocol::Http11,
        }],
        subject_alt_names: Vec::new(),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        canonical: true,
        ..Service::default()
    }))
}

/// A service and the one workload behind it, which is outside any mesh.
fn changes(known: &Known, index: usize) -> Result<[Change; 2]> {
    let service = service(known)?;
    let identity = Identity::new("cluster.local", "default", "none").context("an identity")?;
    let ports = vec![PortMapping { service_port: known.port, target_port: known.address.port() }];
    let workload = Workload {
        addresses: vec![known.address.ip()],
        services: vec![(service.key(), ports)],
        ..Workload::new(format!("plugin//{index}"), known.host.as_str(), identity)
    };
    Ok([Change::Service(Arc::unwrap_or_clone(service)), Change::Workload(workload)])
}

fn site(service: &Arc<Service>, port: u16, chain: Chain) -> Site {
    Site {
        chain,
        routes: RouteTable::compile(&[], Some(service), port, "cluster.local"),
        service: Some(Arc::clone(service)),
        port,
        protocol: AppProtocol::Http11,
        normalization: PathNormalization::default(),
        explain_to: Arc::new([]),
        viewpoint: None,
        observer: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_named() {
        let known: Known = "auth.shop:80=127.0.0.1:9000".parse().unwrap();
        assert_eq!((known.host.as_str(), known.port, known.address.port()), ("auth.shop", 80, 9000));
        for text in ["auth=127.0.0.1:9000", "auth:80", "auth:x=127.0.0.1:1", "auth:80=localhost:1"] {
            assert!(text.parse::<Known>().is_err(), "{text}");
        }
    }
}
