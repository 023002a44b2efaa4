//! Policies that guard nobody, or not those they seem to: selectors and waypoints.

use super::{Remark, Survey, Written};
use crate::decode::policy::Action;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::world::{GatewayEntry, WaypointFor};
use cairn_mesh::{
    Authorization, Change, Decision, DenyReason, GatewayTarget, Identity, L4Peer, ResourceName, Snapshot,
    Source, Store, TunnelProtocol, Workload, decide,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub(super) fn look(survey: &mut Survey<'_>) {
    selected(survey);
    let routes = Reach::all(survey);
    shut_out(survey, &routes);
    hidden_clients(survey, &routes);
    unused_waypoints(survey);
}

/// A waypoint, a workload behind it, and what it is reached as.
struct Reach<'a> {
    waypoint: &'a GatewayEntry,
    workload: &'a Workload,
    /// The service that leads there; `None` for a waypoint of the workload itself.
    service: Option<ResourceName>,
    /// The workload's ports.
    ports: BTreeSet<u16>,
}

impl<'a> Reach<'a> {
    /// All workloads that have a ztunnel and a waypoint.
    fn all(survey: &Survey<'a>) -> Vec<Self> {
        let world = survey.world;
        let mut found = Vec::new();
        for workload in world.workloads.iter().filter(|workload| is_guarded(workload)) {
            let mut all_ports = BTreeSet::new();
            for (key, mappings) in &workload.services {
                let ports: BTreeSet<u16> = mappings.iter().map(|mapping| mapping.target_port).collect();
                all_ports.extend(&ports);
                let service = world.services.iter().find(|service| service.key() == *key);
                let waypoint = service.and_then(|service| survey.waypoint_of(service));
                let Some((service, waypoint)) = service.zip(waypoint) else { continue };
                let service = Some(ResourceName::new(service.namespace.clone(), service.name.clone()));
                found.push(Self { waypoint, workload, service, ports });
            }
            let own = workload.waypoint.as_ref().and_then(|at| match &at.target {
                GatewayTarget::Hostname(key) => world.gateways.iter().find(|one| one.service == *key),
                GatewayTarget::Address(_) => None,
            });
            if let Some(waypoint) = own {
                found.push(Self { waypoint, workload, service: None, ports: all_ports });
            }
        }
        found
    }

    fn peer<'i>(&self, survey: &Survey<'_>, identity: &'i Identity, port: u16) -> L4Peer<'i> {
        let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let uid = self.waypoint.workloads.first();
        let pod =
            survey.world.workloads.iter().find(|workload| uid.is_some_and(|uid| *workload.uid == **uid));
        let source = pod.and_then(|pod| pod.addresses.first()).copied().unwrap_or(nowhere);
        let destination = self.workload.addresses.first().copied().unwrap_or(nowhere);
        L4Peer {
            identity: Some(identity),
            source: SocketAddr::new(source, 0),
            destination: SocketAddr::new(destination, port),
        }
    }

    fn what(&self) -> String {
        match &self.service {
            Some(service) => format!("Service {service}"),
            None => format!("pod {}/{}", self.workload.namespace, self.workload.name),
        }
    }
}

/// Whether a ztunnel enforces policies on a workload.
fn is_guarded(workload: &Workload) -> bool {
    workload.protocol == TunnelProtocol::Hbone && !workload.native_tunnel
}

/// Policies without targets that select nothing, or nothing that a ztunnel guards.
fn selected(survey: &mut Survey<'_>) {
    let mut remarks = Vec::new();
    for Written { object, policy } in &survey.policies {
        if policy.attachment.has_targets {
            continue;
        }
        let is_root = object.name.namespace == survey.settings.root_namespace;
        let near = |workload: &&Workload| is_root || workload.namespace == object.name.namespace;
        let in_scope: Vec<&Workload> = match &policy.attachment.selector {
            Some(_) => {
                let named = |workload: &&Workload| workload.authorization_policies.contains(&object.name);
                survey.world.workloads.iter().filter(named).collect()
            }
            None => survey.world.workloads.iter().filter(near).collect(),
        };
        let at = match &policy.attachment.selector {
            Some(_) => FieldPath::of(&["spec", "selector"]),
            None => FieldPath::of(&["spec"]),
        };
        if let Some(remark) = nobody(survey, object, &in_scope, policy.attachment.selector.is_some()) {
            remarks.push((*object, at, remark));
        }
    }
    for (object, at, (code, reason, fix)) in remarks {
        survey.say(object, Remark { severity: Severity::Error, code, at: &at, reason, fix });
    }
}

type Saying = (&'static str, String, String);

/// What is to be said of a policy when no ztunnel enforces it.
fn nobody(survey: &Survey<'_>, object: &Object, scope: &[&Workload], has_selector: bool) -> Option<Saying> {
    let namespace = &object.name.namespace;
    let of_gateway = |workload: &&&Workload| {
        let uid = &*workload.uid;
        survey.world.gateways.iter().find(|gateway| gateway.workloads.iter().any(|own| own == uid))
    };
    if scope.iter().any(|workload| is_guarded(workload)) {
        return None;
    }
    let waypoint = scope.iter().find_map(|workload| of_gateway(&workload)).filter(|_| has_selector);
    if let Some(waypoint) = waypoint {
        let reason = format!(
            "selects the pods of waypoint {}, and no waypoint looks at selectors: no effect",
            waypoint.name
        );
        let fix = format!(
            "replace the selector by `targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: {}}}]`",
            waypoint.name.name
        );
        return Some(("selector-on-waypoint", reason, fix));
    }
    if scope.is_empty() {
        let (what, fix) = match has_selector {
            true => {
                ("the selector matches no pod", "give it labels that pods have, or targetRefs to a Service")
            }
            false => {
                ("there are no pods in its namespace", "put it into the namespace of the pods it is for")
            }
        };
        return Some(("selects-nothing", format!("{what} ({namespace}): no effect"), fix.to_owned()));
    }
    let first = scope.first().map_or("", |workload| &*workload.name);
    let reason = format!("no ztunnel guards {first} or any other pod it is for: no effect");
    let fix = "label the namespace or the pods `istio.io/dataplane-mode: ambient`".to_owned();
    Some(("not-in-mesh", reason, fix))
}

/// A policy that refuses a waypoint, and where.
#[derive(Default)]
struct Refused {
    what: BTreeSet<String>,
    ports: BTreeSet<u16>,
    others_open: bool,
    rule: Option<usize>,
}

/// L4 policies that refuse the waypoint through which requests come.
fn shut_out(survey: &mut Survey<'_>, routes: &[Reach<'_>]) {
    let snapshot = snapshot(survey);
    let mut refused: BTreeMap<(ResourceName, ResourceName), Refused> = BTreeMap::new();
    for reach in routes {
        let decisions: Vec<(u16, Decision)> = (reach.ports.iter())
            .map(|port| {
                let peer = reach.peer(survey, &reach.waypoint.identity, *port);
                (*port, decide(&snapshot, reach.workload, &peer))
            })
            .collect();
        let is_open = decisions.iter().any(|(_, decision)| matches!(decision, Decision::Allow(_)));
        for (port, decision) in decisions {
            let (policy, rule) = match decision {
                Decision::Deny(DenyReason::Policy(name, rule)) => (name, Some(rule)),
                Decision::Deny(DenyReason::NotAllowed(names)) => match names.into_iter().next() {
                    Some(name) => (name, None),
                    None => continue,
                },
                Decision::Deny(DenyReason::MissingPolicy(_) | DenyReason::UnknownWorkload)
                | Decision::Allow(_) => continue,
            };
            let entry = refused.entry((policy, reach.waypoint.name.clone())).or_default();
            entry.what.insert(reach.what());
            entry.ports.insert(port);
            entry.others_open |= is_open;
            entry.rule = rule;
        }
    }
    for ((policy, waypoint), refused) in refused {
        say_shut_out(survey, &policy, &waypoint, &refused);
    }
}

fn say_shut_out(survey: &mut Survey<'_>, policy: &ResourceName, waypoint: &ResourceName, refused: &Refused) {
    let written = survey.policies.iter().find(|written| written.object.name == *policy);
    let gateway = survey.world.gateways.iter().find(|gateway| gateway.name == *waypoint);
    // Those made of other kinds of objects ask for an identity only, and a waypoint has one.
    let Some((written, gateway)) = written.zip(gateway) else { return };
    let rules = FieldPath::of(&["spec", "rules"]);
    let has_rules = !written.policy.rules.is_empty();
    let at = match refused.rule {
        Some(rule) => rules.index(rule),
        None if has_rules => rules,
        None => FieldPath::of(&["spec"]),
    };
    let what = refused.what.iter().next().map_or("", String::as_str);
    let more = match refused.what.len() {
        0 | 1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    let ports: Vec<String> = refused.ports.iter().map(ToString::to_string).collect();
    let (severity, which) = match refused.others_open {
        false => (Severity::Error, String::new()),
        true => (Severity::Warning, format!(" on port {}", ports.join(", "))),
    };
    let principal = gateway.identity.principal();
    let reason = format!(
        "refuses waypoint {waypoint} ({principal}){which}, through which all requests for {what}{more} come"
    );
    let fix = match refused.rule {
        Some(_) => format!(
            "exclude the waypoint with `notPrincipals: [{principal}]`, or attach the policy to it with targetRefs"
        ),
        None => format!(
            "allow the waypoint here (`principals: [{principal}]`), and name the clients in a policy with targetRefs"
        ),
    };
    let object = written.object;
    survey.say(object, Remark { severity, code: "waypoint-shut-out", at: &at, reason, fix });
}

fn snapshot(survey: &Survey<'_>) -> Snapshot {
    let mut store = Store::new();
    let world = survey.world;
    let policies = world.authorizations.iter().cloned().map(Change::Authorization);
    store.apply(policies.chain(world.workloads.iter().cloned().map(Change::Workload)));
    store.snapshot()
}

/// DENY rules on clients that a ztunnel does not see, because they come through a waypoint.
fn hidden_clients(survey: &mut Survey<'_>, routes: &[Reach<'_>]) {
    let mut remarks = Vec::new();
    for written in &survey.policies {
        let Written { object, policy } = written;
        if policy.attachment.has_targets || policy.action != Action::Deny || policy.dry_run {
            continue;
        }
        let compiled = survey.world.authorizations.iter().find(|one| one.name == object.name);
        let Some(compiled) = compiled else { continue };
        for (index, rule) in policy.rules.iter().enumerate() {
            let names_clients = !rule.rule.from.is_empty() && rule.rule.from.iter().all(names_clients);
            if !names_clients || !rule.l7.is_empty() {
                continue;
            }
            let Some(l4) = compiled.rules.get(index) else { continue };
            let alone = Authorization { rules: vec![l4.clone()], ..compiled.clone() };
            let is_root = object.name.namespace == survey.settings.root_namespace;
            let hides = |reach: &&Reach<'_>| {
                let workload = reach.workload;
                let applies = match policy.attachment.selector {
                    Some(_) => workload.authorization_policies.contains(&object.name),
                    None => is_root || workload.namespace == object.name.namespace,
                };
                let port = reach.ports.first().copied().unwrap_or_default();
                let peer = reach.peer(survey, &reach.waypoint.identity, port);
                applies && alone.matching_rule(&peer).is_none()
            };
            if let Some(reach) = routes.iter().find(hides) {
                remarks.push((*object, written.rule_at(index), hidden(reach)));
            }
        }
    }
    for (object, at, (code, reason, fix)) in remarks {
        survey.say(object, Remark { severity: Severity::Warning, code, at: &at, reason, fix });
    }
}

/// Whether a source asks who the client is.
fn names_clients(source: &Source) -> bool {
    let named = [source.principals.any.len(), source.namespaces.any.len(), source.service_accounts.any.len()];
    named.iter().any(|count| *count > 0)
}

fn hidden(reach: &Reach<'_>) -> Saying {
    let waypoint = &reach.waypoint.name;
    let reason = format!(
        "clients of {} come through waypoint {waypoint}, whose identity the ztunnel sees in place of theirs: only those \
         who go round it are denied",
        reach.what()
    );
    let fix = match &reach.service {
        Some(service) => format!(
            "attach the policy to the waypoint: `targetRefs: [{{group: \"\", kind: Service, name: {}}}]`",
            service.name
        ),
        None => format!(
            "attach the policy to the waypoint: `targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: \
             {}}}]`",
            waypoint.name
        ),
    };
    ("client-hidden", reason, fix)
}

/// Waypoints that nothing uses.
fn unused_waypoints(survey: &mut Survey<'_>) {
    let world = survey.world;
    let services = world.services.iter().filter_map(|service| service.waypoint.as_ref());
    let workloads = world.workloads.iter().filter_map(|workload| workload.waypoint.as_ref());
    let used: Vec<&GatewayTarget> = services.chain(workloads).map(|at| &at.target).collect();
    for object in survey.of("gateway.networking.k8s.io", "Gateway").collect::<Vec<_>>() {
        let Some(gateway) = world.gateways.iter().find(|gateway| gateway.name == object.name) else {
            continue;
        };
        let target = GatewayTarget::Hostname(gateway.service.clone());
        if gateway.waypoint_for == WaypointFor::None || used.contains(&&target) {
            continue;
        }
        let reason = "nothing uses this waypoint, so it guards nothing".to_owned();
        let fix = format!(
            "label what it is for, a Namespace, Service or Pod, `istio.io/use-waypoint: {}`",
            gateway.name.name
        );
        let at = FieldPath::root();
        survey.say(
            object,
            Remark { severity: Severity::Warning, code: "waypoint-unused", at: &at, reason, fix },
        );
    }
}
