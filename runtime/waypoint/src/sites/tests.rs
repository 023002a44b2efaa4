//! Tests of sites: whose traffic is ours, what each is made of, and what happens while a plugin is not there.

use super::*;
use crate::plugins::{Event, Loader, LoaderSettings, Plugins};
use crate::settings::Startup;
use cairn_builtin::TokenCache;
use cairn_fetch::{FetchSettings, Fetcher, Puller, StoreSettings};
use cairn_filter::NoCallout;
use cairn_mesh::{
    Change, GatewayAddress, GatewayTarget, HttpRoute, Identity, Isolation, Kind, PolicyAction, ResourceKey,
    ResourceName, RouteForm, ServicePort, Store, TargetKind, TargetRef, TunnelProtocol,
};
use cairn_telemetry::{Telemetry, TelemetrySettings};
use cairn_wasm::{Engine, EngineSettings};

const NAMESPACE: &str = "shop";

fn own() -> Own {
    Own { gateway: ResourceName::new(NAMESPACE, "wp"), address: "10.0.0.1".parse().unwrap() }
}

fn key(name: &str) -> ResourceName {
    ResourceName::new(NAMESPACE, format!("{name}.{NAMESPACE}.svc.cluster.local"))
}

fn bound_to_waypoint() -> Option<GatewayAddress> {
    Some(GatewayAddress { target: GatewayTarget::Hostname(key("wp")), hbone_port: 15008 })
}

fn service(name: &str, vip: &str, waypoint: Option<GatewayAddress>) -> Change {
    Change::Service(Service {
        name: name.into(),
        namespace: NAMESPACE.into(),
        hostname: key(name).name,
        vips: vec![NetworkAddress { network: "".into(), address: vip.parse().unwrap() }],
        ports: vec![ServicePort { port: 80, target_port: 8080, protocol: AppProtocol::Http11 }],
        subject_alt_names: Vec::new(),
        waypoint,
        load_balancing: Default::default(),
        canonical: true,
        ..Service::default()
    })
}

fn pod(name: &str, address: &str, of: &str, waypoint: Option<GatewayAddress>) -> Change {
    let identity = Identity::new("cluster.local", NAMESPACE, name).unwrap();
    Change::Workload(Workload {
        addresses: vec![address.parse().unwrap()],
        protocol: TunnelProtocol::Hbone,
        services: vec![(key(of), Vec::new())],
        waypoint,
        ..Workload::new(name, name, identity)
    })
}

fn target(kind: TargetKind, name: &str) -> Vec<TargetRef> {
    vec![TargetRef { kind, name: name.into() }]
}

fn plugin(strategy: FailStrategy) -> Change {
    plugin_in(PluginMode::Enforce, strategy)
}

fn plugin_in(mode: PluginMode, strategy: FailStrategy) -> Change {
    Change::Plugin(WasmPlugin {
        name: ResourceName::new(NAMESPACE, "p"),
        targets: target(TargetKind::Gateway, "wp"),
        url: "file:///nonexistent/p.wasm".into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "".into(),
        kind: PluginKind::Http,
        ports: Vec::new(),
        config: "".into(),
        phase: PluginPhase::Authn,
        priority: 0,
        fail_strategy: strategy,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        limits: Default::default(),
        isolation: Isolation::Shared,
        mode,
    })
}

/// A waypoint `wp` at 10.0.0.1 with two services and a pod of its own; `other` is not bound to it.
fn mesh(more: Vec<Change>) -> Store {
    let mut store = Store::new();
    let base = [
        service("wp", "10.1.0.1", None),
        pod("wp-0", "10.0.0.1", "wp", None),
        service("catalog", "10.1.0.2", bound_to_waypoint()),
        service("other", "10.1.0.3", None),
        pod("catalog-0", "10.0.0.2", "catalog", bound_to_waypoint()),
        pod("other-0", "10.0.0.3", "other", None),
    ];
    store.apply(base.into_iter().chain(more));
    store
}

struct Bench {
    sites: Sites,
    plugins: Plugins,
    events: tokio::sync::mpsc::Receiver<Event>,
}

impl Bench {
    fn new() -> Self {
        let engine = Arc::new(Engine::new(EngineSettings::default()).unwrap());
        let modules = Arc::new(cairn_fetch::Store::open(StoreSettings::default()).unwrap());
        let puller = Puller::new(Fetcher::new(FetchSettings::default()), Arc::clone(&modules));
        let loader = Loader::new(engine, puller, modules, LoaderSettings::default());
        let (plugins, events) = Plugins::new(Arc::new(loader));
        let telemetry = Telemetry::new("test", "0", &TelemetrySettings::default(), std::io::sink());
        let observers = Observers::of_process(cairn_observe::Own::default(), telemetry, drop);
        let keyring = Arc::new(Keyring::new(Arc::new(NoCallout), None, TokenCache::default()));
        Self { sites: Sites::new(own(), keyring, observers), plugins, events }
    }

    fn update(&mut self, store: &Store) -> Table {
        self.sites.update(store.current(), &mut self.plugins)
    }
}

fn filters(table: &Table, address: &str) -> Vec<String> {
    let site = table.at(address.parse().unwrap()).expect("a site").load_full();
    site.chain.names().map(str::to_owned).collect()
}

#[tokio::test]
async fn only_what_is_bound_to_this_waypoint_is_ours() {
    let table = Bench::new().update(&mesh(Vec::new()));
    for (name, address, expected) in [
        ("a service's port", "10.1.0.2:80", true),
        ("another port of it", "10.1.0.2:81", false),
        ("a service without waypoint", "10.1.0.3:80", false),
        ("a pod with this waypoint, any port", "10.0.0.2:9999", true),
        ("a pod without", "10.0.0.3:8080", false),
        ("the waypoint itself", "10.0.0.1:15008", false),
        ("nothing", "192.0.2.1:80", false),
    ] {
        assert_eq!(table.at(address.parse().unwrap()).is_some(), expected, "{name}");
    }
    assert_eq!(table.vip(&key("catalog").name), Some("10.1.0.2".parse().unwrap()));
    assert_eq!(table.vip(&key("other").name), None);
}

#[tokio::test]
async fn a_site_is_compiled_again_only_when_its_parts_change() {
    let mut bench = Bench::new();
    let mut store = mesh(vec![service("second", "10.1.0.4", bound_to_waypoint())]);
    let before = bench.update(&store);
    let at = |table: &Table, address: &str| table.at(address.parse().unwrap()).expect("a site").load_full();
    let (catalog, second) = (at(&before, "10.1.0.2:80"), at(&before, "10.1.0.4:80"));
    store.apply([Change::Policy(AuthorizationPolicy {
        name: ResourceName::new(NAMESPACE, "p"),
        targets: target(TargetKind::Service, "catalog"),
        action: PolicyAction::Allow,
        rules: Vec::new(),
        dry_run: false,
    })]);
    let after = bench.update(&store);
    assert!(!Arc::ptr_eq(&catalog, &at(&after, "10.1.0.2:80")), "the policy is in it");
    assert!(Arc::ptr_eq(&second, &at(&after, "10.1.0.4:80")), "nothing of it changed");
    assert!(
        Arc::ptr_eq(
            before.at("10.1.0.2:80".parse().unwrap()).unwrap(),
            after.at("10.1.0.2:80".parse().unwrap()).unwrap()
        ),
        "open connections hold the same handle"
    );
    assert_eq!(filters(&after, "10.1.0.2:80"), ["authorization"]);
    assert!(filters(&after, "10.1.0.4:80").is_empty());
}

#[tokio::test]
async fn a_plugin_that_cannot_run_closes_or_opens_as_it_says() {
    use PluginMode::{Enforce, Shadow};
    for (mode, strategy, loading, failed) in [
        (Enforce, FailStrategy::Close, vec!["unenforceable"], vec!["unenforceable"]),
        (Enforce, FailStrategy::Reload, vec!["unenforceable"], vec!["unenforceable"]),
        (Enforce, FailStrategy::Open, vec![], vec![]),
        (Shadow, FailStrategy::Close, vec![], vec![]),
    ] {
        let mut bench = Bench::new();
        let store = mesh(vec![plugin_in(mode, strategy)]);
        let table = bench.update(&store);
        assert_eq!(filters(&table, "10.1.0.2:80"), loading, "{strategy:?} while it loads");
        assert!(!bench.plugins.settled(Startup::Wait));
        let event = bench.events.recv().await.expect("a load that ended");
        bench.plugins.take(event);
        assert!(bench.plugins.settled(Startup::Wait));
        let table = bench.update(&store);
        assert_eq!(filters(&table, "10.1.0.2:80"), failed, "{strategy:?} when it failed");
        let brief = bench.plugins.list().remove(0).brief();
        assert_eq!(brief["state"], "failed");
        assert!(brief["reason"].as_str().is_some_and(|reason| reason.contains("/nonexistent/p.wasm")));
    }
}

#[tokio::test]
async fn a_plugin_for_connections_stands_where_there_are_some() {
    let attached = |strategy, ports: &[u16]| {
        let Change::Plugin(plugin) = plugin(strategy) else { unreachable!() };
        Change::Plugin(WasmPlugin { kind: PluginKind::Network, ports: ports.to_vec(), ..plugin })
    };
    let mut service = service("raw", "10.1.0.4", bound_to_waypoint());
    if let Change::Service(service) = &mut service {
        let port = |port, protocol| ServicePort { port, target_port: 8080, protocol };
        service.ports =
            vec![port(80, AppProtocol::Http11), port(81, AppProtocol::Unknown), port(90, AppProtocol::Tcp)];
    }
    // It is not loaded: where it stands, it closes connections and answers no request.
    for (name, strategy, ports, expected) in [
        ("everywhere but where there is HTTP only", FailStrategy::Close, &[][..], [false, true, true, true]),
        ("of some ports", FailStrategy::Close, &[80, 90][..], [false, false, true, false]),
        ("it may be missing", FailStrategy::Open, &[][..], [false; 4]),
    ] {
        let table = Bench::new().update(&mesh(vec![service.clone(), attached(strategy, ports)]));
        let found = ["10.1.0.4:80", "10.1.0.4:81", "10.1.0.4:90", "10.0.0.2:9999"].map(|address| {
            let site = table.at(address.parse().unwrap()).expect("a site").load_full();
            let stands = site.chain.names().any(|name| name == "shop/p");
            assert_eq!(closes(&site), stands, "{name}: {address}");
            assert!(site.chain.names().all(|name| name == "shop/p"), "{name}: nothing else refuses");
            stands
        });
        assert_eq!(found, expected, "{name}");
    }
}

/// Whether the filters of a site close a connection as soon as it is there.
fn closes(site: &Site) -> bool {
    let address = "10.0.0.9:1".parse().unwrap();
    let connection = cairn_filter::Connection {
        id: 1,
        worker: 0,
        source: cairn_filter::Peer { address, identity: None, workload: None },
        destination: address,
        service: None,
        local: None,
        callout: Arc::new(NoCallout),
    };
    let now = (std::time::Instant::now(), std::time::SystemTime::now());
    let tcp = cairn_filter::Protocol::Tcp;
    let mut exchange = cairn_filter::Exchange::new(Arc::new(connection), tcp, now.0, now.1);
    let filters = site.chain.connect(&exchange, &cairn_filter::Wakers::default());
    let mut passages = filters.into_iter().map(|mut filter| filter.opened(&mut exchange));
    passages.any(|passage| matches!(passage, cairn_filter::Passage::Close(_)))
}

#[tokio::test]
async fn what_cannot_be_enforced_answers_before_anything_else() {
    let what = Unenforceable {
        what: "RequestAuthentication shop/jwt".into(),
        targets: target(TargetKind::Service, "catalog"),
        namespace: NAMESPACE.into(),
        reason: "tokens are not verified yet".into(),
    };
    let name = ResourceName::new(NAMESPACE, "jwt");
    let jwt = ResourceKey { kind: Kind::RequestAuthentication, name };
    let store = mesh(vec![Change::Unenforceable(jwt, what)]);
    let table = Bench::new().update(&store);
    assert_eq!(filters(&table, "10.1.0.2:80"), ["unenforceable"]);
    assert!(filters(&table, "10.0.0.2:80").is_empty(), "not of the pod, which is no service");
}

#[tokio::test]
async fn routes_count_when_near_and_attached() {
    let route = |namespace: &str, name: &str, port| {
        Change::Route(HttpRoute {
            form: RouteForm::HttpRoute,
            name: ResourceName::new(namespace, name),
            created: "".into(),
            parents: vec![cairn_mesh::ParentRef { service: ResourceName::new(NAMESPACE, "catalog"), port }],
            rules: Vec::new(),
        })
    };
    let store = mesh(vec![
        route(NAMESPACE, "near", None),
        route("elsewhere", "far", None),
        route(NAMESPACE, "port", Some(81)),
    ]);
    let snapshot = store.current();
    let state = snapshot.service(&key("catalog")).unwrap();
    let names: Vec<String> =
        own().routes(snapshot.l7(), &state.service, 80).iter().map(|route| route.name.to_string()).collect();
    assert_eq!(names, ["shop/near"]);
}
