//! RequestAuthentication as Envoy's JWT filter knows it: the translation that Istio's control plane does.

use serde_json::{Value, json};

/// The providers and the requirement of the RequestAuthentications among `objects`; names begin with `scenario`.
/// `None` without any.
pub fn translate(objects: &[Value], scenario: usize) -> Option<(Vec<(String, Value)>, Value)> {
    let of_kind = objects.iter().filter(|object| object["kind"] == "RequestAuthentication");
    let rules = of_kind.flat_map(|object| object["spec"]["jwtRules"].as_array().into_iter().flatten());
    let mut rules: Vec<&Value> = rules.collect();
    rules.sort_by_key(|rule| rule["issuer"].as_str());
    let name = |index: usize| format!("{scenario}-origins-{index}");
    let providers: Vec<(String, Value)> =
        rules.iter().enumerate().map(|(index, rule)| (name(index), provider(rule))).collect();
    let one = |index: usize| json!({ "provider_name": name(index) });
    let any = |list: Vec<Value>| json!({ "requires_any": { "requirements": list } });
    let or_missing = |index: usize| any(vec![one(index), json!({ "allow_missing": {} })]);
    let requirement = match providers.len() {
        0 => return None,
        1 => or_missing(0),
        count => {
            let all: Vec<Value> = (0..count).map(or_missing).collect();
            let none = json!({ "requires_all": { "requirements": all } });
            any((0..count).map(one).chain([none]).collect())
        }
    };
    Some((providers, requirement))
}

fn provider(rule: &Value) -> Value {
    let list = |field: &str| rule[field].as_array().cloned().unwrap_or_default();
    let mut spaced = vec![json!("permission"), json!("scope")];
    spaced.extend(list("spaceDelimitedClaims"));
    let mut provider = json!({
        "issuer": rule["issuer"],
        "local_jwks": { "inline_string": rule["jwks"] },
        "payload_in_metadata": "payload",
        "normalize_payload_in_metadata": { "space_delimited_claims": spaced },
        "forward": rule["forwardOriginalToken"].as_bool().unwrap_or_default(),
        "audiences": list("audiences"),
        "from_params": list("fromParams"),
        "from_cookies": list("fromCookies"),
    });
    let headers = list("fromHeaders").into_iter().map(|header| {
        json!({ "name": header["name"], "value_prefix": header["prefix"].as_str().unwrap_or_default() })
    });
    provider["from_headers"] = headers.collect::<Vec<_>>().into();
    let claims = list("outputClaimToHeaders").into_iter();
    let claims = claims.map(|claim| json!({ "header_name": claim["header"], "claim_name": claim["claim"] }));
    provider["claim_to_headers"] = claims.collect::<Vec<_>>().into();
    if let Some(name) = rule["outputPayloadToHeader"].as_str() {
        provider["forward_payload_header"] = name.into();
    }
    provider
}
