//! Which resources apply to which destination of this waypoint. Pure.

use cairn_mesh::{
    AuthorizationPolicy, CustomPolicy, GatewayAddress, GatewayTarget, HttpRoute, L7, NetworkAddress,
    RequestAuthentication, ResourceName, RouteForm, Service, Snapshot, TargetKind, TargetRef,
    TelemetryPolicy, Unenforceable, WasmPlugin, Workload,
};
use std::net::IpAddr;
use std::sync::Arc;

/// The class of Istio's waypoints: what `targetRefs` of kind GatewayClass must name.
const WAYPOINT_CLASS: &str = "istio-waypoint";

/// Who this waypoint is.
#[derive(Clone, Debug)]
pub struct Own {
    /// Its Gateway.
    pub gateway: ResourceName,
    /// Its pod's address.
    pub address: IpAddr,
}

/// What traffic is addressed to.
#[derive(Clone, Copy, Debug)]
pub enum Addressed<'a> {
    /// A service: its port matters to routes.
    Service(&'a Service),
    /// A pod.
    Workload(&'a Workload),
}

impl Own {
    /// Whether a binding names this waypoint: its service has our address among its endpoints, or its address is ours.
    pub fn is_named_by(&self, snapshot: &Snapshot, reference: &GatewayAddress) -> bool {
        let serves = |key: &ResourceName| {
            snapshot.service(key).is_some_and(|state| {
                let mut workloads = state.endpoints.iter().map(|endpoint| &endpoint.workload);
                workloads.any(|workload| workload.addresses.contains(&self.address))
            })
        };
        match &reference.target {
            GatewayTarget::Hostname(key) => serves(key),
            GatewayTarget::Address(NetworkAddress { network, address }) => {
                let at = NetworkAddress { network: Arc::clone(network), address: *address };
                *address == self.address
                    || snapshot.services_at(&at).any(|state| serves(&state.service.key()))
            }
        }
    }

    /// Whether a resource of `namespace` with `targets` applies to what is addressed (Istio: targetRefs to the
    /// Gateway, to its class from the root namespace, or to the service from its own namespace).
    fn is_target(
        &self,
        namespace: &str,
        targets: &[TargetRef],
        addressed: Addressed<'_>,
        root: &str,
    ) -> bool {
        targets.iter().any(|target| match target.kind {
            TargetKind::Gateway => {
                *target.name == *self.gateway.name && *namespace == *self.gateway.namespace
            }
            TargetKind::GatewayClass => &*target.name == WAYPOINT_CLASS && namespace == root,
            TargetKind::Service => match addressed {
                Addressed::Service(service) => {
                    *target.name == *service.name && *namespace == *service.namespace
                }
                Addressed::Workload(_) => false,
            },
            TargetKind::ServiceEntry => false,
        })
    }

    /// The policies that apply, by name.
    pub fn policies(&self, l7: &L7, addressed: Addressed<'_>, root: &str) -> Vec<Arc<AuthorizationPolicy>> {
        let applies = |policy: &&Arc<AuthorizationPolicy>| {
            self.is_target(&policy.name.namespace, &policy.targets, addressed, root)
        };
        l7.policies.values().filter(applies).cloned().collect()
    }

    /// The RequestAuthentications that apply, by name.
    pub fn authentications(
        &self,
        l7: &L7,
        addressed: Addressed<'_>,
        root: &str,
    ) -> Vec<Arc<RequestAuthentication>> {
        let applies = |one: &&Arc<RequestAuthentication>| {
            self.is_target(&one.name.namespace, &one.targets, addressed, root)
        };
        l7.authentications.values().filter(applies).cloned().collect()
    }

    /// The policies with action CUSTOM that apply, by name.
    pub fn custom_policies(&self, l7: &L7, addressed: Addressed<'_>, root: &str) -> Vec<Arc<CustomPolicy>> {
        let applies = |custom: &&Arc<CustomPolicy>| {
            let AuthorizationPolicy { name, targets, .. } = &custom.policy;
            self.is_target(&name.namespace, targets, addressed, root)
        };
        l7.custom_policies.values().filter(applies).cloned().collect()
    }

    /// The plugins that apply, by name.
    pub fn plugins(&self, l7: &L7, addressed: Addressed<'_>, root: &str) -> Vec<Arc<WasmPlugin>> {
        let applies = |plugin: &&Arc<WasmPlugin>| {
            self.is_target(&plugin.name.namespace, &plugin.targets, addressed, root)
        };
        l7.plugins.values().filter(applies).cloned().collect()
    }

    /// What is attached and cannot be enforced. One whose targets cannot be read applies to its whole namespace, and
    /// from the root namespace to everything.
    pub fn unenforceable(&self, l7: &L7, addressed: Addressed<'_>, root: &str) -> Vec<Arc<Unenforceable>> {
        let namespace = match addressed {
            Addressed::Service(service) => &service.namespace,
            Addressed::Workload(workload) => &workload.namespace,
        };
        let applies = |what: &&Arc<Unenforceable>| {
            if what.targets.is_empty() {
                let place = &*what.namespace;
                return place == root || *place == **namespace || *place == *self.gateway.namespace;
            }
            self.is_target(&what.namespace, &what.targets, addressed, root)
        };
        l7.unenforceable.values().filter(applies).cloned().collect()
    }

    /// The Telemetry that applies, most general first: of the root namespace, of the waypoint's, of the service's, and
    /// then what names the waypoint or the service, oldest first. Of several for one namespace the oldest counts.
    pub fn telemetry(&self, l7: &L7, addressed: Addressed<'_>, root: &str) -> Vec<Arc<TelemetryPolicy>> {
        let mut by_age: Vec<&Arc<TelemetryPolicy>> = l7.telemetry.values().collect();
        by_age.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
        let own = match addressed {
            Addressed::Service(service) => &service.namespace,
            Addressed::Workload(workload) => &workload.namespace,
        };
        let mut places: Vec<&str> = Vec::new();
        for place in [root, &*self.gateway.namespace, own] {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        let general = places.iter().filter_map(|place| {
            by_age.iter().find(|policy| policy.targets.is_empty() && *policy.name.namespace == **place)
        });
        let attached = by_age
            .iter()
            .filter(|policy| self.is_target(&policy.name.namespace, &policy.targets, addressed, root));
        general.chain(attached).map(|policy| Arc::clone(policy)).collect()
    }

    /// The routes of a service's port: those of the service's namespace, else of the waypoint's (Istio ignores other
    /// namespaces' routes at a waypoint). VirtualServices count only where no HTTPRoute is attached.
    pub fn routes(&self, l7: &L7, service: &Service, port: u16) -> Vec<Arc<HttpRoute>> {
        let attached = |route: &&Arc<HttpRoute>| {
            let near =
                route.name.namespace == service.namespace || route.name.namespace == self.gateway.namespace;
            near && route.parents.iter().any(|parent| {
                parent.service.name == service.name
                    && parent.service.namespace == service.namespace
                    && parent.port.is_none_or(|only| only == port)
            })
        };
        let of_form =
            |form| l7.routes.values().filter(attached).filter(move |route| route.form == form).cloned();
        let routes: Vec<_> = of_form(RouteForm::HttpRoute).collect();
        if routes.is_empty() { of_form(RouteForm::VirtualService).collect() } else { routes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::{Change, Identity, PolicyAction, Store};

    fn service(namespace: &str, name: &str) -> Service {
        Service {
            name: name.into(),
            namespace: namespace.into(),
            hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
            vips: Vec::new(),
            ports: Vec::new(),
            subject_alt_names: Vec::new(),
            waypoint: None,
            load_balancing: Default::default(),
            canonical: true,
            ..Service::default()
        }
    }

    #[test]
    fn policies_apply_as_istio_attaches_them() {
        let own = Own { gateway: ResourceName::new("shop", "wp"), address: "10.0.0.1".parse().unwrap() };
        let shop = service("shop", "catalog");
        let other = service("other", "catalog");
        let pod = Workload::new("p", "p", Identity::new("td", "shop", "x").unwrap());
        for (name, namespace, kind, target, addressed, expected) in [
            ("gateway", "shop", TargetKind::Gateway, "wp", Addressed::Service(&shop), true),
            ("gateway, pod addressed", "shop", TargetKind::Gateway, "wp", Addressed::Workload(&pod), true),
            ("another gateway", "shop", TargetKind::Gateway, "x", Addressed::Service(&shop), false),
            (
                "gateway of another namespace",
                "other",
                TargetKind::Gateway,
                "wp",
                Addressed::Service(&shop),
                false,
            ),
            (
                "class in the root namespace",
                "root",
                TargetKind::GatewayClass,
                "istio-waypoint",
                Addressed::Service(&shop),
                true,
            ),
            (
                "class elsewhere",
                "shop",
                TargetKind::GatewayClass,
                "istio-waypoint",
                Addressed::Service(&shop),
                false,
            ),
            ("another class", "root", TargetKind::GatewayClass, "x", Addressed::Service(&shop), false),
            ("service", "shop", TargetKind::Service, "catalog", Addressed::Service(&shop), true),
            (
                "service, pod addressed",
                "shop",
                TargetKind::Service,
                "catalog",
                Addressed::Workload(&pod),
                false,
            ),
            (
                "service of another namespace",
                "shop",
                TargetKind::Service,
                "catalog",
                Addressed::Service(&other),
                false,
            ),
        ] {
            let mut store = Store::new();
            store.apply([Change::Policy(AuthorizationPolicy {
                name: ResourceName::new(namespace, "p"),
                targets: vec![TargetRef { kind, name: target.into() }],
                action: PolicyAction::Allow,
                rules: Vec::new(),
                dry_run: false,
            })]);
            let found = own.policies(store.current().l7(), addressed, "root");
            assert_eq!(!found.is_empty(), expected, "{name}");
        }
    }

    #[test]
    fn telemetry_applies_from_the_mesh_down_to_the_service() {
        let own = Own { gateway: ResourceName::new("infra", "wp"), address: "10.0.0.1".parse().unwrap() };
        let service = service("shop", "catalog");
        let telemetry = |namespace: &str, name: &str, created: &str, target: Option<(TargetKind, &str)>| {
            Change::Telemetry(TelemetryPolicy {
                name: ResourceName::new(namespace, name),
                created: created.into(),
                targets: target
                    .map(|(kind, name)| TargetRef { kind, name: name.into() })
                    .into_iter()
                    .collect(),
                access_logging: Vec::new(),
                metrics: Vec::new(),
                tracing: Vec::new(),
            })
        };
        let mut store = Store::new();
        store.apply([
            telemetry("shop", "younger-service", "2026-02", Some((TargetKind::Service, "catalog"))),
            telemetry("shop", "older-service", "2026-01", Some((TargetKind::Service, "catalog"))),
            telemetry("shop", "another-service", "2026-01", Some((TargetKind::Service, "other"))),
            telemetry("infra", "of-gateway", "2025-01", Some((TargetKind::Gateway, "wp"))),
            telemetry("shop", "of-namespace", "2026-03", None),
            telemetry("shop", "of-namespace-younger", "2026-04", None),
            telemetry("infra", "of-waypoints-namespace", "2026-05", None),
            telemetry("root", "of-mesh", "2026-06", None),
            telemetry("elsewhere", "not-ours", "2020-01", None),
        ]);
        let found = own.telemetry(store.current().l7(), Addressed::Service(&service), "root");
        let names: Vec<&str> = found.iter().map(|policy| &*policy.name.name).collect();
        assert_eq!(
            names,
            [
                "of-mesh",
                "of-waypoints-namespace",
                "of-namespace",
                "of-gateway",
                "older-service",
                "younger-service"
            ]
        );
    }
}
