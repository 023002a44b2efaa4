//! WasmPlugin.

use super::{plugin_limits, refusal, target, unenforceable};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use crate::reader::{Entries, Findings, Node};
use cairn_mesh::{
    Change, FailStrategy, Isolation, MeshSettings, PluginKind, PluginMode, PluginPhase, PullPolicy,
    ResourceKey, WasmPlugin,
};
use serde_json::{Number, Value};
use std::sync::Arc;

/// The annotation that lets a plugin see the body while it holds the head: Envoy's `allow_on_headers_stop_iteration`.
const HOLD_HEADERS: &str = "cairn.dev/hold-headers";
/// The annotation that says which instance of a plugin an exchange meets.
const ISOLATION: &str = "cairn.dev/isolation";
/// The annotation that says what a plugin's word counts for.
const MODE: &str = "cairn.dev/mode";

/// Istio's limits.
const NAME_LEN_MAX: usize = 256;
const ENV_MAX: usize = 256;
const ENV_VALUE_LEN_MAX: usize = 2048;
const SECRET_NAME_LEN_MAX: usize = 253;

const KNOWN: [&str; 16] = [
    "selector",
    "targetRef",
    "targetRefs",
    "url",
    "sha256",
    "imagePullPolicy",
    "imagePullSecret",
    "verificationKey",
    "pluginConfig",
    "pluginName",
    "phase",
    "priority",
    "failStrategy",
    "vmConfig",
    "match",
    "type",
];

/// What a waypoint does with the plugin.
pub(super) fn decode(
    object: &Object,
    key: &ResourceKey,
    settings: &MeshSettings,
    findings: &mut Findings,
) -> Vec<Change> {
    const PHASES: [(&str, PluginPhase); 4] = [
        ("UNSPECIFIED_PHASE", PluginPhase::Unspecified),
        ("AUTHN", PluginPhase::Authn),
        ("AUTHZ", PluginPhase::Authz),
        ("STATS", PluginPhase::Stats),
    ];
    const STRATEGIES: [(&str, FailStrategy); 3] = [
        ("FAIL_CLOSE", FailStrategy::Close),
        ("FAIL_OPEN", FailStrategy::Open),
        ("FAIL_RELOAD", FailStrategy::Reload),
    ];
    const ISOLATIONS: [(&str, Isolation); 2] =
        [("shared", Isolation::Shared), ("exchange", Isolation::Exchange)];
    const MODES: [(&str, PluginMode); 2] = [("enforce", PluginMode::Enforce), ("shadow", PluginMode::Shadow)];
    let spec = Node::new(&object.spec, object.root()).map(&KNOWN, findings);
    let attachment = target::attachment(&spec, object, settings, findings);
    let mut obstacle = None;
    let priority = spec.get("priority").and_then(|node| {
        node.integer(i64::from(i32::MIN)..=i64::from(i32::MAX), findings)
            .and_then(|number| i32::try_from(number).ok())
    });
    let (env, host_env) = env(&spec, findings);
    let kind = kind(&spec, findings);
    let selected = selected(&spec, kind, &mut obstacle, findings);
    let plugin = WasmPlugin {
        name: object.name.clone(),
        targets: attachment.targets.clone(),
        url: url(&spec, findings),
        sha256: sha256(&spec, findings),
        pull_policy: pull_policy(&spec, findings),
        pull_secret: pull_secret(&spec, findings),
        plugin_name: plugin_name(&spec, findings),
        kind,
        ports: selected.clone().unwrap_or_default(),
        config: config(&spec, findings),
        phase: spec.get("phase").and_then(|node| node.choice(&PHASES, findings)).unwrap_or_default(),
        priority: priority.unwrap_or(i32::MIN),
        fail_strategy: spec
            .get("failStrategy")
            .and_then(|node| node.choice(&STRATEGIES, findings))
            .unwrap_or_default(),
        env,
        host_env,
        holds_heads: annotated(object, HOLD_HEADERS, &[("false", false), ("true", true)], findings),
        limits: plugin_limits::decode(object, findings),
        isolation: annotated(object, ISOLATION, &ISOLATIONS, findings),
        mode: annotated(object, MODE, &MODES, findings),
    };
    of_exchanges_only(&plugin, &mut obstacle);
    unused_fields(&spec, &plugin, findings);
    let decides = plugin.mode == PluginMode::Enforce;
    if findings.broken && decides {
        return refusal(object, key, &attachment, findings);
    }
    if findings.broken {
        // What decides nothing need not be stood in for.
        return vec![Change::L7Removed(key.clone())];
    }
    if attachment.targets.is_empty() {
        let reason =
            "has no targetRefs: a waypoint takes only plugins that name it, its class or one of its services";
        findings.note(Severity::Warning, "not-attached", &spec.at, reason);
        return vec![Change::L7Removed(key.clone())];
    }
    if selected.is_none() {
        let reason = "is for clients only, and a waypoint stands on the server's side: the plugin never runs";
        findings.note(Severity::Warning, "not-attached", &spec.at.key("match"), reason);
        return vec![Change::L7Removed(key.clone())];
    }
    let Some((field, reason)) = obstacle else { return vec![Change::Plugin(plugin)] };
    if plugin.fail_strategy == FailStrategy::Open || !decides {
        let why = if decides { "failStrategy FAIL_OPEN" } else { "the mode shadow" };
        let said = format!("{reason}: traffic passes without the plugin, as {why} asks");
        findings.note(Severity::Error, "not-supported", &field, said);
        return vec![Change::L7Removed(key.clone())];
    }
    let said = format!("{reason}: the targets answer 503 until it is removed");
    findings.note(Severity::Error, "unenforceable", &field, said);
    vec![unenforceable(object, key, plugin.targets, format!("{field}: {reason}"))]
}

/// Why a plugin that is well written cannot run here, and where that is written.
type Obstacle = Option<(FieldPath, String)>;

/// The module's URL. That of an image is held against the grammar of references where it is fetched.
fn url(spec: &Entries<'_>, findings: &mut Findings) -> Arc<str> {
    let Some(node) = spec.require("url", findings) else { return "".into() };
    let Some(text) = node.filled(findings) else { return "".into() };
    match text.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => {}
        Some(("file", _)) => {
            findings.refuse("invalid-value", &node.at, "a file is named by its whole path, `file:///…`");
        }
        Some(("http" | "https" | "oci", rest)) if !rest.is_empty() && !rest.contains(char::is_whitespace) => {
        }
        None if !text.contains(char::is_whitespace) => {}
        Some(("http" | "https" | "oci", _)) | None => {
            findings.refuse("invalid-value", &node.at, "is not the URL of a module");
        }
        Some((scheme, _)) => {
            findings.refuse(
                "invalid-value",
                &node.at,
                format!("`{scheme}` is not one of file, http, https, oci"),
            );
        }
    }
    text.into()
}

fn sha256(spec: &Entries<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let node = spec.get("sha256")?;
    let text = node.text(findings).filter(|text| !text.is_empty())?;
    if text.len() != 64 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        findings.refuse("invalid-value", &node.at, "must be 64 lower-case hex digits");
    }
    Some(text.into())
}

/// The value of an annotation, for what `WasmPlugin` has no field for. Unset, it is the default, and so it is when the value
/// is none of those known, which is reported.
fn annotated<T: Copy + Default>(
    object: &Object,
    name: &str,
    known: &[(&str, T)],
    findings: &mut Findings,
) -> T {
    let Some(text) = object.annotations.get(name) else { return T::default() };
    if let Some((_, value)) = known.iter().find(|(word, _)| word == text) {
        return *value;
    }
    let words = known.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(" or ");
    let at = FieldPath::of(&["metadata", "annotations", name]);
    findings.note(Severity::Error, "invalid-value", &at, format!("is `{text}`, not {words}"));
    T::default()
}

fn plugin_name(spec: &Entries<'_>, findings: &mut Findings) -> Arc<str> {
    let Some(node) = spec.get("pluginName") else { return "".into() };
    let text = node.text(findings).unwrap_or_default();
    if text.len() > NAME_LEN_MAX {
        findings.refuse("invalid-value", &node.at, format!("is longer than {NAME_LEN_MAX} bytes"));
    }
    text.into()
}

/// The plugin's configuration as JSON text, which says `1` for 1.0 as protobuf's does.
fn config(spec: &Entries<'_>, findings: &mut Findings) -> Arc<str> {
    let Some(node) = spec.get("pluginConfig") else { return "".into() };
    node.any_map(findings);
    let mut value = node.value.clone();
    whole_numbers(&mut value);
    value.to_string().into()
}

fn whole_numbers(value: &mut Value) {
    match value {
        Value::Number(number) => {
            let whole =
                number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0 && float.abs() < 9e15);
            if let Some(whole) = whole {
                *number = Number::from(whole as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        Value::Object(entries) => entries.values_mut().for_each(whole_numbers),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// The variables with their values, and the names of those that the proxy's own environment gives.
type Env = (Vec<(Arc<str>, Arc<str>)>, Vec<Arc<str>>);

fn env(spec: &Entries<'_>, findings: &mut Findings) -> Env {
    let Some(vm_config) = spec.get("vmConfig") else { return Env::default() };
    let (mut env, mut host_env) = Env::default();
    for node in vm_config.map(&["env"], findings).bounded_list("env", ENV_MAX, findings) {
        let entries = node.map(&["name", "value", "valueFrom"], findings);
        let name =
            entries.require("name", findings).and_then(|node| node.filled(findings)).unwrap_or_default();
        let value = entries.text("value", findings).unwrap_or_default();
        let from_host = entries
            .get("valueFrom")
            .and_then(|node| node.choice(&[("INLINE", false), ("HOST", true)], findings));
        if name.len() > NAME_LEN_MAX || value.len() > ENV_VALUE_LEN_MAX {
            findings.refuse("invalid-value", &node.at, "name or value is too long");
        }
        if env.iter().map(|(known, _)| known).chain(&host_env).any(|known: &Arc<str>| **known == *name) {
            findings.refuse("invalid-value", &node.at, format!("`{name}` is set twice"));
        }
        if from_host == Some(true) {
            if !value.is_empty() {
                let reason = "must be empty: the value is the proxy's";
                findings.refuse("invalid-value", &entries.at.key("value"), reason);
            }
            host_env.push(name.into());
        } else {
            env.push((name.into(), value.into()));
        }
    }
    (env, host_env)
}

fn pull_policy(spec: &Entries<'_>, findings: &mut Findings) -> Option<PullPolicy> {
    const POLICIES: [(&str, Option<PullPolicy>); 3] = [
        ("UNSPECIFIED_POLICY", None),
        ("IfNotPresent", Some(PullPolicy::IfNotPresent)),
        ("Always", Some(PullPolicy::Always)),
    ];
    spec.get("imagePullPolicy").and_then(|node| node.choice(&POLICIES, findings)).flatten()
}

fn pull_secret(spec: &Entries<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let node = spec.get("imagePullSecret")?;
    let name = node.text(findings).filter(|name| !name.is_empty())?;
    if name.len() > SECRET_NAME_LEN_MAX {
        findings.refuse("invalid-value", &node.at, format!("is longer than {SECRET_NAME_LEN_MAX} bytes"));
    }
    Some(name.into())
}

fn kind(spec: &Entries<'_>, findings: &mut Findings) -> PluginKind {
    const TYPES: [(&str, PluginKind); 3] = [
        ("UNSPECIFIED_PLUGIN_TYPE", PluginKind::Http),
        ("HTTP", PluginKind::Http),
        ("NETWORK", PluginKind::Network),
    ];
    spec.get("type").and_then(|node| node.choice(&TYPES, findings)).unwrap_or_default()
}

/// The ports to which `match` takes traffic on the server's side, none for all; `None` where it takes no such traffic.
fn selected(
    spec: &Entries<'_>,
    kind: PluginKind,
    obstacle: &mut Obstacle,
    findings: &mut Findings,
) -> Option<Vec<u16>> {
    const MODES: [(&str, bool); 4] =
        [("UNDEFINED", true), ("CLIENT", false), ("SERVER", true), ("CLIENT_AND_SERVER", true)];
    let selectors = spec.list("match", findings);
    let mut all = selectors.is_empty();
    let mut some = Vec::new();
    for node in &selectors {
        let entries = node.map(&["mode", "ports"], findings);
        let takes_servers =
            entries.get("mode").is_none_or(|node| node.choice(&MODES, findings).unwrap_or(true));
        let ports = entries.get("ports");
        let numbers = ports.as_ref().map(|ports| ports_of(ports, findings)).unwrap_or_default();
        if let Some(ports) = ports.filter(|_| !numbers.is_empty() && kind == PluginKind::Http) {
            *obstacle = Some((ports.at, "plugins for some ports only are not supported yet".to_owned()));
        }
        if takes_servers {
            all |= numbers.is_empty();
            some.extend(numbers);
        }
    }
    some.sort_unstable();
    some.dedup();
    match (all, some.is_empty()) {
        (true, _) => Some(Vec::new()),
        (false, true) => None,
        (false, false) => Some(some),
    }
}

/// The numbers of a list of ports.
fn ports_of(ports: &Node<'_>, findings: &mut Findings) -> Vec<u16> {
    let number = |node: &Node<'_>, findings: &mut Findings| {
        let entries = node.map(&["number"], findings);
        let number = entries.require("number", findings)?.integer(1..=65535, findings)?;
        u16::try_from(number).ok()
    };
    ports.list(findings).iter().filter_map(|node| number(node, findings)).collect()
}

/// What can be asked for exchanges of HTTP only: a connection has no instance of its own, and no shadow.
fn of_exchanges_only(plugin: &WasmPlugin, obstacle: &mut Obstacle) {
    let annotation = match (plugin.kind, plugin.isolation, plugin.mode) {
        (PluginKind::Network, Isolation::Exchange, _) => ISOLATION,
        (PluginKind::Network, _, PluginMode::Shadow) => MODE,
        (PluginKind::Http, _, _) | (PluginKind::Network, Isolation::Shared, PluginMode::Enforce) => return,
    };
    let at = FieldPath::of(&["metadata", "annotations", annotation]);
    *obstacle = Some((at, "plugins of type NETWORK have no exchanges".to_owned()));
}

/// Fields without a meaning, here or for this module.
fn unused_fields(spec: &Entries<'_>, plugin: &WasmPlugin, findings: &mut Findings) {
    if let Some(node) = spec.get("verificationKey")
        && node.text(findings).is_some_and(|key| !key.is_empty())
    {
        let reason = "signatures of modules are not verified, here or in Istio; `sha256` pins the module";
        findings.note(Severity::Warning, "no-effect", &node.at, reason);
    }
    let is_image = !plugin.url.contains("://") || plugin.url.starts_with("oci://");
    if let Some(node) = spec.get("imagePullSecret").filter(|_| !is_image && plugin.pull_secret.is_some()) {
        let reason = "only registries of images are told who asks";
        findings.note(Severity::Warning, "no-effect", &node.at, reason);
    }
}
