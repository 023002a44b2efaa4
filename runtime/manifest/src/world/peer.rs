//! PeerAuthentication, as the DENY policies that istiod makes of it: no identity, no entry.

use super::pods::Pod;
use super::{Scene, selects};
use crate::decode::target;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Findings, Node};
use cairn_mesh::{
    Authorization, Clause, L4Match, L4Rule, MeshSettings, PolicyAction, ResourceName, Scope, TextMatch,
    Values,
};
use std::collections::BTreeMap;

/// The policy that every strict workload names.
const STATIC_STRICT: &str = "istio_converted_static_strict";
/// What policies made of port levels are called, before the name of their origin.
const CONVERTED: &str = "converted_peer_authentication_";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Strict,
    /// Also DISABLE, as plaintext is then accepted and mTLS cannot be refused in a ztunnel.
    Permissive,
}

/// A PeerAuthentication. `None` as a mode: as the next wider one says.
#[derive(Debug)]
pub(super) struct Peer<'a> {
    object: &'a Object,
    index: usize,
    selector: Option<BTreeMap<String, String>>,
    mode: Option<Mode>,
    ports: BTreeMap<u16, Option<Mode>>,
}

/// Reads a PeerAuthentication, noting everything that is wrong.
pub(super) fn parse<'a>(object: &'a Object, settings: &MeshSettings, findings: &mut Findings) -> Peer<'a> {
    let spec = Node::new(&object.spec, object.root()).map(&["selector", "mtls", "portLevelMtls"], findings);
    let selector = spec.get("selector").and_then(|node| target::selector(&node, findings));
    let mode = spec.get("mtls").and_then(|node| read_mode(&node, findings));
    let mut ports = BTreeMap::new();
    if let Some(levels) = spec.get("portLevelMtls") {
        for (port, node) in levels.any_map(findings).all() {
            match port.parse::<u16>() {
                Ok(port) if port > 0 => drop(ports.insert(port, read_mode(&node, findings))),
                _ => findings.refuse("invalid-value", &node.at, format!("`{port}` is not a port number")),
            }
        }
        if selector.is_none() {
            findings.refuse("invalid-value", &levels.at, "modes of ports need a selector");
        }
    }
    if selector.is_some() && object.name.namespace == settings.root_namespace {
        let reason = "a selector in the root namespace selects nothing: the policy has no effect";
        findings.note(Severity::Error, "no-effect", &spec.at.key("selector"), reason);
    }
    Peer { object, index: 0, selector, mode, ports }
}

fn read_mode(node: &Node<'_>, findings: &mut Findings) -> Option<Mode> {
    const MODES: [(&str, Option<Mode>); 4] = [
        ("UNSET", None),
        ("STRICT", Some(Mode::Strict)),
        ("PERMISSIVE", Some(Mode::Permissive)),
        ("DISABLE", Some(Mode::Permissive)),
    ];
    let entry = node.map(&["mode"], findings).get("mode")?;
    if entry.value.as_str() == Some("DISABLE") {
        let reason = "mTLS cannot be disabled in the ambient mesh: it is taken as PERMISSIVE";
        findings.note(Severity::Warning, "not-supported", &entry.at, reason);
    }
    entry.choice(&MODES, findings).flatten()
}

/// Makes the policies, and lists on each pod the one that applies to it.
pub(super) fn policies(scene: &mut Scene<'_>, pods: &mut [Pod]) -> Vec<Authorization> {
    let peers = peers(scene);
    let root = scene.settings.root_namespace.clone();
    let wide = |namespace: &str| {
        peers.iter().find(|peer| peer.selector.is_none() && *peer.object.name.namespace == *namespace)
    };
    report_shadowed(scene, &peers);
    let base = |namespace: &str| {
        let inherited = wide(namespace).and_then(|peer| peer.mode).or_else(|| wide(&root)?.mode);
        inherited.unwrap_or(Mode::Permissive)
    };
    let static_strict = ResourceName::new(root.clone(), STATIC_STRICT);
    let mut converted: BTreeMap<ResourceName, Authorization> = BTreeMap::new();
    for pod in pods.iter_mut().filter(|pod| pod.gateway.is_none()) {
        let namespace = pod.workload.namespace.clone();
        let own = peers.iter().filter(|peer| peer.object.name.namespace == namespace && namespace != root);
        let own = own
            .into_iter()
            .find(|peer| peer.selector.as_ref().is_some_and(|wanted| selects(wanted, &pod.labels)));
        let mode = own.and_then(|peer| peer.mode).unwrap_or_else(|| base(&namespace));
        let exceptions = own.map(|peer| exceptions(peer, mode)).unwrap_or_default();
        let name = match own {
            Some(peer) if !exceptions.is_empty() => {
                ResourceName::new(namespace, format!("{CONVERTED}{}", peer.object.name.name))
            }
            _ if mode == Mode::Strict => static_strict.clone(),
            _ => continue,
        };
        converted.entry(name.clone()).or_insert_with(|| deny_plaintext(name.clone(), mode, exceptions));
        pod.workload.authorization_policies.push(name);
    }
    converted.into_values().collect()
}

/// All that apply, oldest first, as the oldest of equals wins. One that cannot be read is strict.
fn peers<'a>(scene: &Scene<'a>) -> Vec<Peer<'a>> {
    let mut peers = Vec::new();
    for (index, object) in scene.objects.iter().enumerate() {
        if object.is("security.istio.io", "PeerAuthentication") {
            let mut findings = Findings::default();
            let peer = parse(object, scene.settings, &mut findings);
            peers.push(if findings.broken || object.broken.is_some() {
                Peer { index, mode: Some(Mode::Strict), ports: BTreeMap::new(), ..peer }
            } else {
                Peer { index, ..peer }
            });
        }
    }
    peers.sort_by(|a, b| (&a.object.created, &a.object.name).cmp(&(&b.object.created, &b.object.name)));
    peers
}

fn report_shadowed(scene: &mut Scene<'_>, peers: &[Peer<'_>]) {
    let mut first: BTreeMap<&str, &Peer<'_>> = BTreeMap::new();
    for peer in peers.iter().filter(|peer| peer.selector.is_none()) {
        match first.get(&*peer.object.name.namespace) {
            None => drop(first.insert(&peer.object.name.namespace, peer)),
            Some(older) => {
                let reason = format!("has no effect: {} is older and for the same workloads", older.object);
                scene.note(peer.index, Severity::Warning, "no-effect", &FieldPath::root(), reason);
            }
        }
    }
}

/// The ports whose mode is not `base`.
fn exceptions(peer: &Peer<'_>, base: Mode) -> Vec<u16> {
    peer.ports
        .iter()
        .filter(|(_, mode)| mode.is_some_and(|mode| mode != base))
        .map(|(port, _)| *port)
        .collect()
}

/// Denies peers without identity: on every port but `exceptions` when strict, only on those when permissive.
fn deny_plaintext(name: ResourceName, mode: Mode, exceptions: Vec<u16>) -> Authorization {
    let plaintext = || L4Match {
        principals: Values { any: Vec::new(), none: vec![TextMatch::Present] },
        ..L4Match::default()
    };
    let clause = |one: L4Match| Clause { matches: vec![one] };
    let clauses = match mode {
        Mode::Strict if exceptions.is_empty() => vec![clause(plaintext())],
        Mode::Strict => {
            let others = Values { any: Vec::new(), none: exceptions };
            vec![clause(plaintext()), clause(L4Match { destination_ports: others, ..L4Match::default() })]
        }
        Mode::Permissive => {
            let ports = Values { any: exceptions, none: Vec::new() };
            vec![clause(L4Match { destination_ports: ports, ..plaintext() })]
        }
    };
    Authorization {
        name,
        scope: Scope::WorkloadSelector,
        action: PolicyAction::Deny,
        rules: vec![L4Rule { clauses }],
        dry_run: false,
    }
}
