//! AuthorizationPolicy as Envoy's RBAC filter knows it: the translation that Istio's control plane does for a
//! waypoint, written down again from its documentation and shared with nothing of ours.

use crate::scenario::Scenario;
use serde_json::{Value, json};

/// The actions, in the order in which their filters stand.
pub const ACTIONS: [&str; 3] = ["AUDIT", "DENY", "ALLOW"];

/// The configuration of the filter of one action, of the policies of `scenario`.
pub fn filter(scenario: &Scenario, action: &str) -> Value {
    let mut rbac = json!({});
    if let Some(rules) = rules(scenario, action, false) {
        rbac["rules"] = rules;
    }
    if let Some(rules) = rules(scenario, action, true) {
        rbac["shadow_rules"] = rules;
        rbac["shadow_rules_stat_prefix"] = shadow_prefix(action).into();
    }
    rbac
}

/// The configuration of the filter of one action for connections that carry no HTTP.
pub fn connection_filter(scenario: &Scenario, action: &str) -> Value {
    let objects = scenario.objects.iter().map(|object| without_http(object, action)).collect();
    let stripped = Scenario { objects, ..scenario.clone() };
    match rules(&stripped, action, false) {
        Some(rules) => json!({ "rules": rules }),
        None => json!({}),
    }
}

/// What the policies with action CUSTOM of `provider` match; `None` when there are none.
pub fn custom(scenario: &Scenario, provider: &str, is_known: bool) -> Option<Value> {
    let ours = |object: &&Value| {
        object["spec"]["action"] == "CUSTOM" && object["spec"]["provider"]["name"] == provider
    };
    let end = if is_known { "" } else { "-deny-due-to-bad-CUSTOM-action" };
    let named = |(id, policy)| (format!("istio-ext-authz-{provider}-{id}{end}"), policy);
    let all =
        scenario.objects.iter().filter(ours).flat_map(|object| rules_of(object, &scenario.trust_domains));
    let all: serde_json::Map<String, Value> = all.map(named).collect();
    (!all.is_empty()).then(|| json!({ "action": "DENY", "policies": all }))
}

/// The conditions that only HTTP has; sources and operations have such fields, too.
const OF_HTTP: [&str; 6] = ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"];

/// A policy as it is told to a chain without HTTP: a rule that asks about HTTP is left out of ALLOW, and loses only what
/// it asks for in any other.
fn without_http(object: &Value, action: &str) -> Value {
    let mut object = object.clone();
    let Some(rules) = object["spec"]["rules"].as_array_mut() else { return object };
    if action == "ALLOW" {
        rules.retain(|rule| without_http_fields(rule) == *rule);
    } else {
        rules.iter_mut().for_each(|rule| *rule = without_http_fields(rule));
    }
    object
}

fn without_http_fields(rule: &Value) -> Value {
    let mut rule = rule.clone();
    for to in rule["to"].as_array_mut().into_iter().flatten() {
        if let Some(operation) = to["operation"].as_object_mut() {
            operation.retain(|field, _| !OF_HTTP.contains(&field.as_str()));
        }
    }
    if let Some(when) = rule["when"].as_array_mut() {
        when.retain(|condition| !text(&condition["key"]).starts_with("request."));
    }
    // Looking at what is not there put it there.
    if let Some(fields) = rule.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    rule
}

/// The prefix of what a filter's trial rules say.
pub fn shadow_prefix(action: &str) -> String {
    format!("istio_dry_run_{}_", action.to_ascii_lowercase())
}

/// All rules of one action; `None` when no policy has it.
fn rules(scenario: &Scenario, action: &str, dry_run: bool) -> Option<Value> {
    let of_action = |object: &&Value| {
        let is_trial = object["metadata"]["annotations"]["istio.io/dry-run"] == "true";
        object["kind"] == "AuthorizationPolicy"
            && object["spec"]["action"].as_str().unwrap_or("ALLOW") == action
            && is_trial == dry_run
    };
    let policies: Vec<&Value> = scenario.objects.iter().filter(of_action).collect();
    let all: serde_json::Map<String, Value> =
        policies.iter().flat_map(|object| rules_of(object, &scenario.trust_domains)).collect();
    let envoy = match action {
        "AUDIT" => "LOG",
        other => other,
    };
    (!policies.is_empty()).then(|| json!({ "action": envoy, "policies": all }))
}

fn rules_of(object: &Value, trust_domains: &[String]) -> Vec<(String, Value)> {
    let (namespace, name) = (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
    let id = |index: usize| format!("ns[{namespace}]-policy[{name}]-rule[{index}]");
    let rules = list(&object["spec"]["rules"]);
    if rules.is_empty() {
        let never = json!({ "permissions": [not(json!({ "any": true }), "not_rule")],
                            "principals": [not(json!({ "any": true }), "not_id")] });
        return vec![(id(0), never)];
    }
    let rule = |rule: &Value| translate(&with_aliases(rule, trust_domains), namespace);
    rules.iter().enumerate().map(|(index, written)| (id(index), rule(written))).collect()
}

/// A rule with all names of everybody in it: Istio's bundle of trust domains.
fn with_aliases(rule: &Value, trust_domains: &[String]) -> Value {
    let mut rule = rule.clone();
    let each = |values: &mut Value, meant: &dyn Fn(&str) -> Vec<String>| {
        if let Some(list) = values.as_array() {
            *values = list.iter().flat_map(|value| meant(text(value))).map(Value::from).collect();
        }
    };
    let principals = |value: &str| principal_aliases(value, trust_domains);
    let domains = |value: &str| match trust_domains.iter().any(|known| known == value) {
        true => trust_domains.to_vec(),
        false => vec![value.to_owned()],
    };
    for from in rule["from"].as_array_mut().into_iter().flatten() {
        for field in ["principals", "notPrincipals"] {
            each(&mut from["source"][field], &principals);
        }
        for field in ["trustDomains", "notTrustDomains"] {
            each(&mut from["source"][field], &domains);
        }
    }
    for condition in rule["when"].as_array_mut().into_iter().flatten() {
        let key = text(&condition["key"]).to_owned();
        for field in ["values", "notValues"] {
            match key.as_str() {
                "source.principal" => each(&mut condition[field], &principals),
                "source.trustDomain" => each(&mut condition[field], &domains),
                _ => {}
            }
        }
    }
    rule
}

fn principal_aliases(value: &str, trust_domains: &[String]) -> Vec<String> {
    let unchanged = || vec![value.to_owned()];
    let parts: Vec<&str> = value.split('/').collect();
    let [domain, rest @ ..] = &parts[..] else { return unchanged() };
    if parts.len() != 5 || *domain == "*" {
        return unchanged();
    }
    let begins =
        |text: &str, pattern: &str| pattern.strip_suffix('*').is_some_and(|start| text.starts_with(start));
    let ends = |text: &str, pattern: &str| pattern.strip_prefix('*').is_some_and(|end| text.ends_with(end));
    let is_ours = |known: &String| known == domain || begins(known, domain) || ends(known, domain);
    if *domain != "cluster.local" && !trust_domains.iter().any(is_ours) {
        return unchanged();
    }
    let in_domain = |known: &String| match ends(known, domain) {
        true => value.to_owned(),
        false => format!("{known}/{}", rest.join("/")),
    };
    let mut all: Vec<String> = trust_domains.iter().map(in_domain).collect();
    all.dedup();
    all
}

fn translate(rule: &Value, namespace: &str) -> Value {
    let (mut of_permission, mut of_principal) = (Vec::new(), Vec::new());
    for condition in list(&rule["when"]) {
        let key = text(&condition["key"]);
        let (values, none) = (&condition["values"], &condition["notValues"]);
        if ["destination.", "connection.sni", "experimental."].iter().any(|start| key.starts_with(start)) {
            of_permission.extend(both(values, none, PERMISSION, |value| permission(key, value)));
        } else {
            of_principal.extend(both(values, none, PRINCIPAL, |value| principal(key, value, namespace)));
        }
    }
    let operations = list(&rule["to"]).iter().map(|to| {
        let fields =
            [("hosts", "notHosts"), ("ports", "notPorts"), ("methods", "notMethods"), ("paths", "notPaths")];
        let operation = &to["operation"];
        let field =
            |(any, none)| both(&operation[any], &operation[none], PERMISSION, |value| permission(any, value));
        fields.into_iter().flat_map(field).collect()
    });
    let sources = list(&rule["from"]).iter().map(|from| {
        let fields = [
            ("principals", "notPrincipals"),
            ("requestPrincipals", "notRequestPrincipals"),
            ("namespaces", "notNamespaces"),
            ("serviceAccounts", "notServiceAccounts"),
            ("ipBlocks", "notIpBlocks"),
            ("remoteIpBlocks", "notRemoteIpBlocks"),
            ("trustDomains", "notTrustDomains"),
        ];
        let source = &from["source"];
        let field = |(any, none)| {
            both(&source[any], &source[none], PRINCIPAL, |value| principal(any, value, namespace))
        };
        fields.into_iter().flat_map(field).collect()
    });
    json!({
        "permissions": alternatives(operations.collect(), &of_permission, PERMISSION),
        "principals": alternatives(sources.collect(), &of_principal, PRINCIPAL),
    })
}

/// What permissions and principals call their combinations.
#[derive(Clone, Copy)]
struct Words {
    and: (&'static str, &'static str),
    or: (&'static str, &'static str),
    not: &'static str,
}

const PERMISSION: Words = Words { and: ("and_rules", "rules"), or: ("or_rules", "rules"), not: "not_rule" };
const PRINCIPAL: Words = Words { and: ("and_ids", "ids"), or: ("or_ids", "ids"), not: "not_id" };

/// Each of `lists` together with `further`; anything, if there is nothing in them.
fn alternatives(lists: Vec<Vec<Value>>, further: &[Value], words: Words) -> Vec<Value> {
    let lists = if lists.is_empty() { vec![Vec::new()] } else { lists };
    let all = |list: Vec<Value>| {
        let list: Vec<Value> = list.into_iter().chain(further.iter().cloned()).collect();
        let list = if list.is_empty() { vec![json!({ "any": true })] } else { list };
        json!({ words.and.0: { words.and.1: list } })
    };
    lists.into_iter().map(all).collect()
}

/// A field and its opposite: at most one combination of each.
fn both(any: &Value, none: &Value, words: Words, one: impl Fn(&str) -> Value) -> Vec<Value> {
    let or = |values: &Value| {
        let each: Vec<Value> = list(values).iter().map(|value| one(text(value))).collect();
        (!each.is_empty()).then(|| json!({ words.or.0: { words.or.1: each } }))
    };
    or(any).into_iter().chain(or(none).map(|value| not(value, words.not))).collect()
}

fn not(value: Value, word: &str) -> Value {
    json!({ word: value })
}

fn permission(key: &str, value: &str) -> Value {
    match key {
        "hosts" => json!({ "header": header(":authority", value, true) }),
        "methods" => json!({ "header": header(":method", value, false) }),
        "ports" | "destination.port" => {
            json!({ "destination_port": value.parse::<u32>().expect("a port") })
        }
        "paths" if value.contains(['{', '}']) => {
            let template = value.replace("{**}", "**").replace("{*}", "*");
            let config = json!({
                "@type": "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
                "path_template": template,
            });
            json!({ "uri_template": { "name": "uri-template", "typed_config": config } })
        }
        "paths" => json!({ "url_path": { "path": string(value, "") } }),
        "destination.ip" => json!({ "destination_ip": block(value) }),
        "connection.sni" => json!({ "requested_server_name": string(value, "") }),
        _ => json!({ "metadata": filter_metadata(key, value) }),
    }
}

/// What a filter knows, `experimental.FILTER[key]…`: a text, or in brackets an element of a list.
fn filter_metadata(key: &str, value: &str) -> Value {
    let (filter, path) = key.trim_start_matches("experimental.").split_once('[').expect("a key of metadata");
    let path: Vec<Value> =
        path.trim_end_matches(']').split("][").map(|name| json!({ "key": name })).collect();
    let matcher = match value.strip_prefix('[').and_then(|value| value.strip_suffix(']')) {
        Some(one) => json!({ "list_match": { "one_of": { "string_match": string(one, "") } } }),
        None => json!({ "string_match": string(value, "") }),
    };
    json!({ "filter": filter, "path": path, "value": matcher })
}

fn principal(key: &str, value: &str, namespace: &str) -> Value {
    match key {
        "principals" | "source.principal" => peer(string(value, "spiffe://")),
        "namespaces" | "source.namespace" => {
            let pattern = value.split('*').map(quoted).collect::<Vec<_>>().join(".*");
            peer(regex(&format!(".*/ns/{pattern}/.*")))
        }
        "serviceAccounts" | "source.serviceAccount" => {
            let (namespace, account) = value.split_once('/').unwrap_or((namespace, value));
            let (namespace, account) = (quoted(namespace), quoted(account));
            peer(regex(&format!("spiffe://.+/ns/{namespace}/(.+/|)sa/{account}(/.+)?")))
        }
        "trustDomains" | "source.trustDomain" => peer(match value {
            "*" => json!({ "prefix": "spiffe://" }),
            _ if value.contains('*') => {
                let pattern = value.split('*').map(quoted).collect::<Vec<_>>().join("[^/]*");
                regex(&format!("spiffe://{pattern}/.*"))
            }
            _ => json!({ "prefix": format!("spiffe://{value}/") }),
        }),
        // Deprecated in Envoy, and the one that can be told from outside who connects.
        "ipBlocks" | "source.ip" => json!({ "source_ip": block(value) }),
        "remoteIpBlocks" | "remote.ip" => json!({ "remote_ip": block(value) }),
        "requestPrincipals" | "request.auth.principal" => request_principal(value),
        "request.auth.audiences" => claim(&["aud"], value),
        "request.auth.presenter" => claim(&["azp"], value),
        _ => {
            if let Some(path) = key.strip_prefix("request.auth.claims[") {
                let path: Vec<&str> = path.trim_end_matches(']').split("][").collect();
                return claim(&path, value);
            }
            let name = key.strip_prefix("request.headers[").and_then(|key| key.strip_suffix(']'));
            json!({ "header": header(name.expect("a key of conditions"), value, false) })
        }
    }
}

/// `issuer/subject`: a token's, and not a mere text.
fn request_principal(value: &str) -> Value {
    let metadata = |name: &str, matcher: Value| {
        json!({ "metadata": {
            "filter": "envoy.filters.http.jwt_authn",
            "path": [{ "key": "payload" }, { "key": name }],
            "value": { "string_match": matcher },
        } })
    };
    let present = || regex(".+");
    let (issuer, subject) = match value.rsplit_once('/') {
        _ if value == "*" => (present(), present()),
        Some((issuer, subject)) => {
            let subject = match subject {
                _ if value.starts_with('*') => json!({ "exact": subject }),
                "*" => present(),
                _ => string(subject, ""),
            };
            let issuer = if value.starts_with('*') { string(issuer, "") } else { json!({ "exact": issuer }) };
            (issuer, subject)
        }
        None if value.starts_with('*') => (present(), string(value, "")),
        None if value.ends_with('*') => (string(value, ""), present()),
        None => (json!({ "exact": value }), json!({ "exact": "" })),
    };
    json!({ "and_ids": { "ids": [metadata("iss", issuer), metadata("sub", subject)] } })
}

/// A claim that is this text, or a list with it.
fn claim(path: &[&str], value: &str) -> Value {
    let keys: Vec<Value> = ["payload"].iter().chain(path).map(|key| json!({ "key": key })).collect();
    let one = json!({ "string_match": string(value, "") });
    let matcher = json!({ "or_match": { "value_matchers": [one, { "list_match": { "one_of": one } }] } });
    json!({ "metadata": { "filter": "envoy.filters.http.jwt_authn", "path": keys, "value": matcher } })
}

fn peer(matcher: Value) -> Value {
    json!({ "filter_state": { "key": "io.istio.peer_principal", "string_match": matcher } })
}

fn header(name: &str, value: &str, ignore_case: bool) -> Value {
    if value == "*" {
        return json!({ "name": name, "present_match": true });
    }
    let mut matcher = string(value, "");
    if ignore_case {
        matcher["ignore_case"] = true.into();
    }
    json!({ "name": name, "string_match": matcher })
}

/// A text of a policy, to be found after `prefix`.
fn string(value: &str, prefix: &str) -> Value {
    if value == "*" {
        regex(".+")
    } else if let Some(suffix) = value.strip_prefix('*') {
        match prefix {
            "" => json!({ "suffix": suffix }),
            prefix => regex(&format!("{prefix}.*{}", quoted(suffix))),
        }
    } else if let Some(start) = value.strip_suffix('*') {
        json!({ "prefix": format!("{prefix}{start}") })
    } else {
        json!({ "exact": format!("{prefix}{value}") })
    }
}

fn regex(pattern: &str) -> Value {
    json!({ "safe_regex": { "regex": pattern } })
}

fn quoted(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars() {
        if r"\.+*?()|[]{}^$".contains(character) {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

fn block(value: &str) -> Value {
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address, length.parse().expect("a prefix length")),
        None => (value, if value.contains(':') { 128 } else { 32_u8 }),
    };
    json!({ "address_prefix": address, "prefix_len": length })
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
