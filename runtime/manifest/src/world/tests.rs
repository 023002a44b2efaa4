//! What sets of manifests become: the mesh they describe, and what is said of what does not fit.

use super::*;
use crate::testing::{objects, short_placed};
use cairn_mesh::{
    AppProtocol, Clause, Decision, DenyReason, GatewayTarget, Health, HealthPolicy, L4Peer, L4Rule,
    LoadBalancingMode, PolicyAction, PortMapping, Scope, Store, TextMatch, TunnelProtocol, WorkloadKind,
    decide,
};

/// Numbers pods and services as they come.
#[derive(Default)]
struct Numbers {
    pods: u8,
    services: u8,
}

impl Addressing for Numbers {
    fn pod(&mut self, _: &str, _: &str) -> Option<IpAddr> {
        self.pods += 1;
        Some([10, 0, 0, self.pods].into())
    }

    fn service(&mut self, _: &str, _: &str) -> Option<IpAddr> {
        self.services += 1;
        Some([10, 1, 0, self.services].into())
    }
}

fn build(text: &str) -> (Vec<Object>, World) {
    let objects = objects(text);
    let world = World::build(&objects, &mut Numbers::default(), &MeshSettings::default());
    (objects, world)
}

fn world(text: &str) -> World {
    build(text).1
}

impl World {
    fn workload(&self, name: &str) -> &Workload {
        let found = self.workloads.iter().find(|workload| *workload.name == *name);
        found.unwrap_or_else(|| panic!("no {name} in {:?}", self.workloads))
    }

    fn service(&self, name: &str) -> &Service {
        self.services.iter().find(|service| *service.name == *name).unwrap()
    }

    fn said(&self) -> Vec<String> {
        self.diagnostics.iter().map(short_placed).collect()
    }

    fn gateways_of(&self, index: usize) -> Vec<String> {
        let found = self.scoped.iter().find(|(own, _)| *own == index);
        found.into_iter().flat_map(|(_, gateways)| gateways).map(ToString::to_string).collect()
    }
}

const AMBIENT: &str = "---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
";

const BOUND: &str = "---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: wp}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";

fn pod(name: &str, labels: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}\n"
    )
}

fn service(name: &str, selector: &str) -> String {
    let head = format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n");
    format!("{head}spec: {{selector: {{{selector}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n")
}

fn policy(name: &str, spec: &str) -> String {
    let head = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy";
    format!("{head}\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  {}\n", spec.replace('\n', "\n  "))
}

#[test]
fn a_deployment_gives_its_pods() {
    let world = world(&format!(
        "{AMBIENT}---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: shop}}
spec:
  replicas: 2
  template:
    metadata: {{labels: {{app: web-app, version: v2}}}}
    spec:
      serviceAccountName: web-sa
      containers: [{{ports: [{{name: api, containerPort: 8080}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec:
  selector: {{app: web-app}}
  ports:
  - {{name: http-main, port: 80, targetPort: api}}
  - {{name: x, port: 81, appProtocol: kubernetes.io/h2c}}
  - {{name: dns, port: 53, protocol: UDP}}
"
    ));
    assert_eq!(world.workloads.len(), 2);
    let pod = world.workload("web-1");
    assert_eq!(&*pod.uid, "Kubernetes//Pod/shop/web-1");
    assert_eq!(pod.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/web-sa");
    assert_eq!((&*pod.canonical_name, &*pod.canonical_revision), ("web-app", "v2"));
    assert_eq!((pod.kind, &*pod.workload_name), (WorkloadKind::Deployment, "web"));
    assert_eq!((pod.protocol, pod.health, &*pod.node), (TunnelProtocol::Hbone, Health::Healthy, "node"));
    let service = world.service("web");
    assert_eq!(&*service.hostname, "web.shop.svc.cluster.local");
    assert_eq!(service.vips[0].address, IpAddr::from([10, 1, 0, 1]));
    let ports: Vec<_> =
        service.ports.iter().map(|port| (port.port, port.target_port, port.protocol)).collect();
    assert_eq!(ports, [(80, 0, AppProtocol::Http11), (81, 81, AppProtocol::Http2)]);
    let mapping = |service_port, target_port| PortMapping { service_port, target_port };
    assert_eq!(pod.services, [(service.key(), vec![mapping(80, 8080), mapping(81, 81)])]);
    assert_eq!(world.said(), [""; 0]);
}

#[test]
fn written_pods_stand_in_for_those_of_their_deployment() {
    let deployment = "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\nspec: {replicas: 3}\n";
    let pod = |owner: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: web-abc-1, namespace: shop, labels: {{pod-template-hash: \
             abc}}, ownerReferences: [{owner}]}}\nspec: {{nodeName: n1}}\nstatus: {{podIP: 10.9.9.9, conditions: [{{type: \
             Ready, status: \"False\"}}]}}\n"
        )
    };
    let of_set = pod("{kind: ReplicaSet, name: web-abc, controller: true}");
    let world_of = |text: &str| world(&format!("{AMBIENT}{deployment}{text}"));
    let built = world_of(&of_set);
    assert_eq!(built.workloads.len(), 1);
    let found = built.workload("web-abc-1");
    assert_eq!((found.kind, &*found.workload_name, &*found.node), (WorkloadKind::Deployment, "web", "n1"));
    assert_eq!((found.addresses[0], found.health), (IpAddr::from([10, 9, 9, 9]), Health::Unhealthy));
    let set = "---\napiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {name: web-abc, namespace: shop, ownerReferences: \
               [{kind: Deployment, name: web}]}\nspec: {replicas: 5}\n";
    assert_eq!(world_of(&format!("{of_set}{set}")).workloads.len(), 1, "an owned set gives none itself");
    assert_eq!(world_of(&pod("{kind: Job, name: web}")).workloads.len(), 4, "another owner's pod");
}

#[test]
fn pods_are_in_the_mesh_by_label() {
    let plain = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    for (name, namespace, labels, spec, expected) in [
        ("namespace", AMBIENT, "", "{}", TunnelProtocol::Hbone),
        ("opted out", AMBIENT, "istio.io/dataplane-mode: none", "{}", TunnelProtocol::None),
        ("no label", plain, "", "{}", TunnelProtocol::None),
        ("own label", plain, "istio.io/dataplane-mode: ambient", "{}", TunnelProtocol::Hbone),
        ("on the node's network", AMBIENT, "", "{hostNetwork: true}", TunnelProtocol::None),
        ("its own tunnel", plain, "networking.istio.io/tunnel: http", "{}", TunnelProtocol::Hbone),
        ("a tunnel unknown to Istio", plain, "networking.istio.io/tunnel: x", "{}", TunnelProtocol::None),
    ] {
        let world = world(&format!("{namespace}{}spec: {spec}\n", pod("a", labels)));
        let found = world.workload("a");
        assert_eq!(found.protocol, expected, "{name}");
        assert_eq!(found.native_tunnel, labels == "networking.istio.io/tunnel: http", "{name}");
    }
}

#[test]
fn ports_carry_what_they_declare() {
    for (port, expected) in [
        ("name: http", AppProtocol::Http11),
        ("name: http2-api", AppProtocol::Http2),
        ("name: grpc-web", AppProtocol::Grpc),
        ("name: tcp-x", AppProtocol::Tcp),
        ("name: https", AppProtocol::Tls),
        ("name: web", AppProtocol::Unknown),
        ("name: httpx", AppProtocol::Unknown),
        ("name: tcp, appProtocol: http", AppProtocol::Http11),
        ("name: http, appProtocol: example.com/x", AppProtocol::Unknown),
    ] {
        let head = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n";
        let world = world(&format!("{head}spec: {{ports: [{{port: 80, {port}}}]}}\n"));
        assert_eq!(world.service("a").ports[0].protocol, expected, "{port}");
    }
}

#[test]
fn services_without_selector_take_their_slices() {
    let text = format!(
        "{AMBIENT}{}status: {{podIP: 10.9.0.1}}
---
apiVersion: v1
kind: Service
metadata: {{name: db, namespace: shop}}
spec: {{clusterIP: None, publishNotReadyAddresses: true, trafficDistribution: PreferClose, ports: [{{name: sql, port: 5432}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: db-1, namespace: shop, labels: {{kubernetes.io/service-name: db}}}}
ports: [{{name: sql, port: 15432}}]
endpoints: [{{addresses: [10.9.0.1]}}, {{addresses: [192.0.2.1], conditions: {{ready: false}}}}]
",
        pod("a", "")
    );
    let world = world(&text);
    let service = world.service("db");
    assert!(service.vips.is_empty());
    assert_eq!(service.load_balancing.health, HealthPolicy::AllowAll);
    assert_eq!(service.load_balancing.mode, LoadBalancingMode::Failover);
    let expected = vec![(service.key(), vec![PortMapping { service_port: 5432, target_port: 15432 }])];
    assert_eq!(world.workload("a").services, expected, "the pod at the address");
    let outside = world.workloads.iter().find(|workload| workload.uid.contains("EndpointSlice")).unwrap();
    assert_eq!((&outside.services, outside.protocol), (&expected, TunnelProtocol::None));
    assert_eq!(outside.health, Health::Unhealthy);
}

#[test]
fn a_gateway_gives_a_waypoint_and_its_service() {
    let world = world(BOUND);
    let [gateway] = world.gateways.as_slice() else { panic!() };
    assert_eq!(
        (gateway.name.to_string(), gateway.waypoint_for),
        ("shop/wp".to_owned(), WaypointFor::Service)
    );
    assert_eq!(gateway.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/wp");
    assert_eq!(gateway.workloads, ["Kubernetes//Pod/shop/wp-0"]);
    let pod = world.workload("wp-0");
    assert_eq!((pod.native_tunnel, pod.protocol), (true, TunnelProtocol::Hbone));
    assert_eq!(pod.identity, gateway.identity);
    let service = world.service("wp");
    assert_eq!(service.key(), gateway.service);
    assert_eq!((service.ports[0].port, &service.waypoint), (15008, &None));
    assert_eq!(pod.services[0].0, gateway.service);
}

#[test]
fn a_waypoint_may_stand_behind_a_ztunnel() {
    let annotated = |text: &str| {
        let name = "name: wp, namespace: shop";
        let with = format!("{name}, annotations: {{ambient.istio.io/waypoint-inbound-binding: {text}}}");
        assert!(BOUND.contains(name));
        BOUND.replacen(name, &with, 1)
    };
    let tunnel = |handover, port| Some(cairn_mesh::ApplicationTunnel { handover, port });
    use cairn_mesh::TunnelHandover::{None as Plain, Proxy};
    for (text, expected, said) in [
        ("PROXY/15088", tunnel(Proxy, Some(15088)), 0),
        ("PROXY", tunnel(Proxy, None), 0),
        ("NONE/15080", tunnel(Plain, Some(15080)), 0),
        ("PROXY/0", None, 1),
        ("proxy/15088", None, 1),
        ("PROXY/x", None, 1),
    ] {
        let world = world(&annotated(text));
        let pod = world.workload("wp-0");
        assert_eq!(pod.application_tunnel, expected, "{text}");
        assert_eq!(pod.native_tunnel, expected.is_none(), "{text}");
        assert_eq!(pod.protocol, TunnelProtocol::Hbone, "{text}");
        let found = world.diagnostics.iter().filter(|found| found.code == "invalid-value").count();
        assert_eq!(found, said, "{text}: {:?}", world.diagnostics);
    }
}

#[test]
fn bindings_follow_the_nearest_label() {
    let labelled = |text: String, labels: &str| {
        text.replace("namespace: shop}", &format!("namespace: shop, labels: {{{labels}}}}}"))
    };
    let web = service("web", "app: web");
    for (name, gateway, web, bound, said) in [
        ("namespace", BOUND.to_owned(), web.clone(), true, vec![]),
        ("opted out", BOUND.to_owned(), labelled(web.clone(), "istio.io/use-waypoint: none"), false, vec![]),
        (
            "dangling",
            BOUND.to_owned(),
            labelled(web.clone(), "istio.io/use-waypoint: nowhere"),
            false,
            vec!["13:49 error dangling-waypoint metadata.labels[\"istio.io/use-waypoint\"]"],
        ),
        (
            "for workloads only",
            BOUND.replace(
                "{name: wp, namespace: shop}",
                "{name: wp, namespace: shop, labels: {istio.io/waypoint-for: workload}}",
            ),
            labelled(web.clone(), "istio.io/use-waypoint: wp"),
            false,
            vec!["13:49 warning wrong-waypoint metadata.labels[\"istio.io/use-waypoint\"]"],
        ),
        (
            "the namespace's is dangling",
            AMBIENT.replace("ambient", "ambient, istio.io/use-waypoint: wp"),
            web.clone(),
            false,
            vec!["4:67 error dangling-waypoint metadata.labels[\"istio.io/use-waypoint\"]"],
        ),
    ] {
        let world = world(&format!("{gateway}{web}"));
        let waypoint = &world.service("web").waypoint;
        assert_eq!(waypoint.is_some(), bound, "{name}");
        if let Some(address) = waypoint {
            assert_eq!(address.hbone_port, 15008);
            assert!(
                matches!(&address.target, GatewayTarget::Hostname(key) if key.to_string() == "shop/wp.shop.svc.cluster.local")
            );
        }
        assert_eq!(world.said(), said, "{name}");
    }
}

#[test]
fn workloads_have_a_waypoint_only_when_it_is_for_them() {
    for (waypoint_for, service_bound, pod_bound) in
        [("service", true, false), ("workload", false, true), ("all", true, true), ("none", false, false)]
    {
        let gateway = BOUND.replace(
            "{name: wp, namespace: shop}",
            &format!("{{name: wp, namespace: shop, labels: {{istio.io/waypoint-for: {waypoint_for}}}}}"),
        );
        let world = world(&format!("{gateway}{}{}", service("web", "app: web"), pod("a", "app: web")));
        assert_eq!(world.service("web").waypoint.is_some(), service_bound, "{waypoint_for}");
        assert_eq!(world.workload("a").waypoint.is_some(), pod_bound, "{waypoint_for}");
        assert_eq!(world.workload("wp-0").waypoint, None, "{waypoint_for}");
    }
}

#[test]
fn a_waypoint_of_another_namespace_must_allow_it() {
    let gateway = |routes: &str| {
        format!(
            "{AMBIENT}---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: wp, namespace: infra}}\n\
             spec: {{gatewayClassName: istio-waypoint, listeners: [{{port: 15008, protocol: HBONE{routes}}}]}}\n{}",
            service("web", "app: web").replace(
                "namespace: shop}",
                "namespace: shop, labels: {istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: infra}}"
            )
        )
    };
    let same = world(&gateway(""));
    assert_eq!(same.service("web").waypoint, None);
    assert_eq!(same.diagnostics[0].code, "dangling-waypoint");
    let all = world(&gateway(", allowedRoutes: {namespaces: {from: All}}"));
    assert!(all.service("web").waypoint.is_some());
    assert_eq!(all.said(), [""; 0]);
    let none =
        world(&gateway(", allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {a: b}}}}"));
    assert_eq!(none.service("web").waypoint, None);
}

/// Decides as a ztunnel would for a peer to port 8080 of the pod `a`.
fn decision(text: &str, peer: Option<&str>) -> Decision {
    let world = world(text);
    let uid = world.workload("a").uid.clone();
    let destination = (world.workload("a").addresses[0], 8080).into();
    let mut store = Store::new();
    store.apply(world.authorizations.into_iter().map(cairn_mesh::Change::Authorization));
    store.apply(world.workloads.into_iter().map(cairn_mesh::Change::Workload));
    let snapshot = store.snapshot();
    let identity = peer.map(|account| Identity::new("cluster.local", "shop", account).unwrap());
    let peer = L4Peer { identity: identity.as_ref(), source: ([10, 0, 0, 99], 1234).into(), destination };
    decide(&snapshot, snapshot.workload(&uid).unwrap(), &peer)
}

fn allowed(text: &str, peer: Option<&str>) -> bool {
    matches!(decision(text, peer), Decision::Allow(_))
}

#[test]
fn l4_policies_are_converted_as_istiod_does() {
    let from = "rules:\n- from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]";
    let to = "to: [{operation: {paths: [/admin]}}]";
    for (name, spec, web, other, said) in [
        ("allow", format!("action: ALLOW\n{from}"), true, false, vec![]),
        ("deny", format!("action: DENY\n{from}"), false, true, vec![]),
        ("nothing allowed", "{}".to_owned(), false, false, vec![]),
        ("everything allowed", "rules: [{}]".to_owned(), true, true, vec![]),
        (
            "port",
            "action: DENY\nrules:\n- to: [{operation: {ports: [\"8080\"]}}]".to_owned(),
            false,
            false,
            vec![],
        ),
        (
            "another port",
            "action: DENY\nrules:\n- to: [{operation: {ports: [\"80\"]}}]".to_owned(),
            true,
            true,
            vec![],
        ),
        (
            "condition",
            "action: DENY\nrules:\n- when: [{key: source.principal, notValues: [\"*/sa/web\"]}]".to_owned(),
            true,
            false,
            vec![],
        ),
        (
            "allow with a path allows nothing",
            format!("action: ALLOW\n{from}\n  {to}"),
            false,
            false,
            vec!["warning l7-in-l4-policy spec.rules[0].to[0].operation.paths"],
        ),
        (
            "deny with a path alone in its clause never denies",
            format!("action: DENY\n{from}\n  {to}"),
            true,
            true,
            vec!["error l7-in-l4-policy spec.rules[0].to[0].operation.paths"],
        ),
        (
            "deny with a path beside a port denies the port",
            format!("action: DENY\n{from}\n  to: [{{operation: {{ports: [\"8080\"], methods: [GET]}}}}]"),
            false,
            true,
            vec!["warning l7-in-l4-policy spec.rules[0].to[0].operation.methods"],
        ),
        (
            "deny with a token's condition never denies",
            format!("action: DENY\n{from}\n  when: [{{key: request.auth.principal, values: [a]}}]"),
            true,
            true,
            vec!["error l7-in-l4-policy spec.rules[0].when[0].key"],
        ),
        (
            "allow with a star inside a namespace allows nothing",
            "rules:\n- from: [{source: {notNamespaces: [\"a*b\"]}}]".to_owned(),
            false,
            false,
            vec!["warning l7-in-l4-policy spec.rules[0].from"],
        ),
        (
            "audit",
            "action: AUDIT\nrules: [{}]".to_owned(),
            true,
            true,
            vec!["error l7-in-l4-policy spec.action"],
        ),
    ] {
        let text = format!("{AMBIENT}{}{}", pod("a", "app: a"), policy("p", &spec));
        assert_eq!((allowed(&text, Some("web")), allowed(&text, Some("other"))), (web, other), "{name}");
        let said_now: Vec<String> = world(&text)
            .diagnostics
            .iter()
            .map(|d| format!("{} {} {}", d.severity, d.code, d.field))
            .collect();
        assert_eq!(said_now, said, "{name}");
    }
}

#[test]
fn l4_policies_name_principals_in_every_trust_domain_of_the_mesh() {
    let settings = MeshSettings { trust_domain_aliases: vec!["old".into()], ..MeshSettings::default() };
    let spec = "rules:\n- from: [{source: {principals: [old/ns/shop/sa/web]}}]\n  when: [{key: source.principal, \
                notValues: [cluster.local/ns/shop/sa/x]}]";
    let world = World::build(&objects(&policy("p", spec)), &mut Numbers::default(), &settings);
    let clauses = &world.authorizations[0].rules[0].clauses;
    let texts = |values: &[TextMatch]| values.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        texts(&clauses[0].matches[0].principals.any),
        ["cluster.local/ns/shop/sa/web", "old/ns/shop/sa/web"]
    );
    assert_eq!(
        texts(&clauses[1].matches[0].principals.none),
        ["cluster.local/ns/shop/sa/x", "old/ns/shop/sa/x"]
    );
}

#[test]
fn the_scope_of_an_l4_policy_is_its_place_and_selector() {
    let allow_nothing = |namespace: &str, selector: &str| {
        let policy = policy("p", &format!("{{{selector}}}"))
            .replace("namespace: shop", &format!("namespace: {namespace}"));
        format!("{AMBIENT}{}{policy}", pod("a", "app: a"))
    };
    for (name, namespace, selector, scope, named, applies) in [
        ("namespace", "shop", "", Scope::Namespace, false, true),
        ("another namespace", "other", "", Scope::Namespace, false, false),
        ("root", "istio-system", "", Scope::Global, false, true),
        ("selected", "shop", "selector: {matchLabels: {app: a}}", Scope::WorkloadSelector, true, true),
        ("not selected", "shop", "selector: {matchLabels: {app: b}}", Scope::WorkloadSelector, false, false),
        (
            "selected elsewhere",
            "other",
            "selector: {matchLabels: {app: a}}",
            Scope::WorkloadSelector,
            false,
            false,
        ),
        (
            "selected from the root",
            "istio-system",
            "selector: {matchLabels: {app: a}}",
            Scope::WorkloadSelector,
            true,
            true,
        ),
        ("an empty selector is none", "shop", "selector: {matchLabels: {}}", Scope::Namespace, false, true),
    ] {
        let text = allow_nothing(namespace, selector);
        let world = world(&text);
        assert_eq!(world.authorizations[0].scope, scope, "{name}");
        assert_eq!(!world.workload("a").authorization_policies.is_empty(), named, "{name}");
        assert_eq!(!allowed(&text, Some("web")), applies, "{name}");
    }
}

#[test]
fn a_broken_l4_policy_denies_what_it_is_for() {
    let broken = "rules: [{frm: []}]";
    for (name, spec, denied) in [
        ("namespace", broken.to_owned(), true),
        ("selected", format!("selector: {{matchLabels: {{app: a}}}}\n{broken}"), true),
        ("not selected", format!("selector: {{matchLabels: {{app: b}}}}\n{broken}"), false),
        ("its selector is not readable", format!("selector: {{labels: {{app: b}}}}\n{broken}"), true),
        ("for a waypoint", format!("targetRefs: [{{kind: Service, name: a}}]\n{broken}"), false),
        ("for something unknown", "targetRefs: [{kind: Thing, name: a}]".to_owned(), true),
    ] {
        let text = format!("{AMBIENT}{}{}", pod("a", "app: a"), policy("p", &spec));
        let is_denied = matches!(decision(&text, Some("web")), Decision::Deny(DenyReason::Policy(..)));
        assert_eq!(is_denied, denied, "{name}");
    }
}

fn peer(name: &str, namespace: &str, spec: &str) -> String {
    let head = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication";
    format!("{head}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n")
}

#[test]
fn plaintext_is_refused_where_mtls_is_strict() {
    let strict = "mtls: {mode: STRICT}";
    let own = "selector: {matchLabels: {app: a}}";
    let permissive = "mtls: {mode: PERMISSIVE}";
    for (name, peers, plaintext) in [
        ("none", String::new(), true),
        ("mesh", peer("d", "istio-system", strict), false),
        ("namespace", peer("d", "shop", strict), false),
        ("another namespace", peer("d", "other", strict), true),
        ("namespace over mesh", peer("d", "istio-system", strict) + &peer("d", "shop", permissive), true),
        (
            "an unset namespace leaves it to the mesh",
            peer("d", "istio-system", strict) + &peer("d", "shop", "mtls: {mode: UNSET}"),
            false,
        ),
        (
            "workload over namespace",
            peer("d", "shop", strict) + &peer("w", "shop", &format!("{own}, {permissive}")),
            true,
        ),
        ("workload", peer("w", "shop", &format!("{own}, {strict}")), false),
        (
            "port open",
            peer(
                "w",
                "shop",
                &format!(
                    "{own}, {strict}, portLevelMtls: {{8080: {permissive_mode}}}",
                    permissive_mode = "{mode: DISABLE}"
                ),
            ),
            true,
        ),
        (
            "another port open",
            peer("w", "shop", &format!("{own}, {strict}, portLevelMtls: {{81: {{mode: PERMISSIVE}}}}")),
            false,
        ),
        (
            "port strict",
            peer("w", "shop", &format!("{own}, portLevelMtls: {{8080: {{mode: STRICT}}}}")),
            false,
        ),
        (
            "two ports strict",
            peer(
                "w",
                "shop",
                &format!("{own}, portLevelMtls: {{81: {{mode: STRICT}}, 8080: {{mode: STRICT}}}}"),
            ),
            false,
        ),
        (
            "another port strict",
            peer("w", "shop", &format!("{own}, portLevelMtls: {{81: {{mode: STRICT}}}}")),
            true,
        ),
        (
            "port open under a strict mesh",
            peer("d", "istio-system", strict)
                + &peer("w", "shop", &format!("{own}, portLevelMtls: {{8080: {{mode: PERMISSIVE}}}}")),
            true,
        ),
        ("broken", peer("d", "shop", "mtls: {mode: strict}"), false),
    ] {
        let text = format!("{AMBIENT}{}{peers}", pod("a", "app: a"));
        assert_eq!(allowed(&text, None), plaintext, "{name}");
        assert!(allowed(&text, Some("web")), "{name}: an identity is enough");
    }
}

#[test]
fn strict_workloads_name_the_policies_that_istiod_names() {
    let text = format!("{AMBIENT}{}{}", pod("a", ""), peer("d", "shop", "mtls: {mode: STRICT}"));
    let world = world(&text);
    assert_eq!(
        world.workload("a").authorization_policies[0].to_string(),
        "istio-system/istio_converted_static_strict"
    );
    let policy = &world.authorizations[0];
    assert_eq!((policy.scope, policy.action), (Scope::WorkloadSelector, PolicyAction::Deny));
    let L4Rule { clauses } = &policy.rules[0];
    let [Clause { matches }] = clauses.as_slice() else { panic!() };
    assert_eq!(matches[0].principals.none, [cairn_mesh::TextMatch::Present]);
}

#[test]
fn waypoints_get_what_attaches_to_them() {
    let text = format!(
        "{BOUND}{}{}{}{}{}---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop}}
spec:
  parentRefs: [{{group: \"\", kind: Service, name: web}}]
  rules: [{{backendRefs: [{{name: web, port: 80}}]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: c, namespace: istio-system}}
spec: {{targetRefs: [{{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}}]}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data: {{mesh: \"trustDomain: x\"}}
",
        service("web", "app: web"),
        policy("to-service", "targetRefs: [{kind: Service, name: web}]"),
        policy("to-gateway", "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: wp}]"),
        policy("for-workloads", "{}"),
        policy("uncertain", "targetRefs: [{kind: Thing, name: x}]"),
    );
    let (objects, world) = build(&text);
    assert_eq!(world.said(), [""; 0]);
    for (index, object) in objects.iter().enumerate() {
        let gets_it = !matches!(
            object.to_string().as_str(),
            "Namespace shop" | "Service shop/web" | "AuthorizationPolicy shop/for-workloads"
        );
        let expected: &[&str] = if gets_it { &["shop/wp"] } else { &[] };
        assert_eq!(world.gateways_of(index), expected, "{object}");
    }
}

#[test]
fn references_that_lead_nowhere_are_told() {
    let route = |spec: &str| {
        let head = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}";
        format!("{head}\nspec:\n  {}\n", spec.replace('\n', "\n  "))
    };
    let parent = "parentRefs: [{group: \"\", kind: Service, name: web}]";
    let unbound = AMBIENT;
    for (name, namespace, object, expected) in [
        (
            "no service",
            BOUND,
            policy("p", "targetRefs: [{kind: Service, name: x}]"),
            "target-not-found spec.targetRefs[0]",
        ),
        (
            "no gateway",
            BOUND,
            policy("p", "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: x}]"),
            "target-not-found spec.targetRefs[0]",
        ),
        (
            "no waypoint",
            unbound,
            policy("p", "targetRefs: [{kind: Service, name: web}]"),
            "target-not-bound spec.targetRefs[0]",
        ),
        (
            "service entry",
            BOUND,
            policy("p", "targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: x}]"),
            "not-supported spec.targetRefs[0]",
        ),
        (
            "no parent",
            BOUND,
            route(
                "parentRefs: [{group: \"\", kind: Service, name: x}]\nrules: [{backendRefs: [{name: web, port: 80}]}]",
            ),
            "parent-not-found spec.parentRefs[0]",
        ),
        (
            "parent without waypoint",
            unbound,
            route(&format!("{parent}\nrules: [{{backendRefs: [{{name: web, port: 80}}]}}]")),
            "parent-not-bound spec.parentRefs[0]",
        ),
        (
            "no such port of the parent",
            BOUND,
            route(
                "parentRefs: [{group: \"\", kind: Service, name: web, port: 81}]\nrules: [{backendRefs: [{name: web, port: 80}]}]",
            ),
            "parent-not-found spec.parentRefs[0].port",
        ),
        (
            "no backend",
            BOUND,
            route(&format!(
                "{parent}\nrules: [{{backendRefs: [{{name: web, port: 80}}, {{name: x, port: 80}}]}}]"
            )),
            "backend-not-found spec.rules[0].backendRefs[1]",
        ),
        (
            "no such port of the backend",
            BOUND,
            route(&format!("{parent}\nrules: [{{backendRefs: [{{name: web, port: 81}}]}}]")),
            "backend-not-found spec.rules[0].backendRefs[0].port",
        ),
    ] {
        let (objects, world) = build(&format!("{namespace}{}{object}", service("web", "app: web")));
        let said: Vec<String> =
            world.diagnostics.iter().map(|d| format!("{} {} {}", d.severity, d.code, d.field)).collect();
        assert_eq!(said, [format!("error {expected}")], "{name}");
        let diagnostic = &world.diagnostics[0];
        let at = objects.last().unwrap().origin.as_ref().unwrap();
        assert!(diagnostic.line as usize > at.line && diagnostic.column > 0, "{name}: {diagnostic}");
        assert_eq!(
            diagnostic.object.as_deref(),
            Some(objects.last().unwrap().to_string().as_str()),
            "{name}"
        );
    }
}

#[test]
fn mistakes_in_core_kinds_are_found_at_their_field() {
    for (name, text, expected) in [
        (
            "port as text",
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: \"80\"}]}",
            "spec.ports[0].port",
        ),
        (
            "selector is a list",
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {selector: [a]}",
            "spec.selector",
        ),
        (
            "replicas as text",
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {replicas: many}",
            "spec.replicas",
        ),
        ("bad address", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: x}", "status.podIP"),
        (
            "bad listener",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: a}\nspec: {listeners: [{port: x}]}",
            "spec.listeners[0].port",
        ),
        (
            "bad mode",
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a}\nspec: {mtls: {mode: strict}}",
            "spec.mtls.mode",
        ),
        (
            "ports without selector",
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a}\nspec: {portLevelMtls: {80: {mode: STRICT}}}",
            "spec.portLevelMtls",
        ),
    ] {
        let findings = check(&objects(text)[0], &MeshSettings::default());
        let fields: Vec<String> = findings.list.iter().map(|finding| finding.field.to_string()).collect();
        assert_eq!((fields, findings.broken), (vec![expected.to_owned()], true), "{name}");
    }
    let nulls = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {selector: null, ports: null, clusterIP: null}";
    assert!(!check(&objects(nulls)[0], &MeshSettings::default()).broken, "null is absent");
}

#[test]
fn too_many_replicas_are_cut() {
    let text = format!(
        "{AMBIENT}---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: web, namespace: shop}}\nspec: {{replicas: 1000000000}}\n"
    );
    struct One;
    impl Addressing for One {
        fn pod(&mut self, _: &str, _: &str) -> Option<IpAddr> {
            Some([10, 0, 0, 1].into())
        }
        fn service(&mut self, _: &str, _: &str) -> Option<IpAddr> {
            None
        }
    }
    let world = World::build(&objects(&text), &mut One, &MeshSettings::default());
    assert_eq!(world.workloads.len(), 1000);
    assert_eq!(world.said(), ["9:8 error invalid-value spec.replicas"]);
}

#[test]
fn pods_without_address_are_left_out_and_told() {
    struct Nothing;
    impl Addressing for Nothing {
        fn pod(&mut self, _: &str, _: &str) -> Option<IpAddr> {
            None
        }
        fn service(&mut self, _: &str, _: &str) -> Option<IpAddr> {
            None
        }
    }
    let text = format!("{BOUND}{}{}", pod("a", "app: web"), service("web", "app: web"));
    let world = World::build(&objects(&text), &mut Nothing, &MeshSettings::default());
    assert!(world.workloads.is_empty());
    assert!(world.service("web").waypoint.is_some(), "a binding holds before the waypoint has an address");
    assert!(world.service("web").vips.is_empty());
    let codes: Vec<&str> = world.diagnostics.iter().map(|diagnostic| diagnostic.code).collect();
    assert_eq!(codes, ["no-address", "no-address"]);
}
