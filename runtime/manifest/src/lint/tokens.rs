//! Conditions on verified tokens, where no token is verified, or none like that.

use super::{Remark, Survey, elements, parts, texts};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use cairn_mesh::{ResourceName, Service};
use serde_json::Value;
use std::collections::BTreeSet;

pub(super) fn look(survey: &mut Survey<'_>) {
    let authentications: Vec<Verifies<'_>> = (survey.of("security.istio.io", "RequestAuthentication"))
        .map(|object| Verifies::new(survey, object))
        .collect();
    let mut remarks = Vec::new();
    for written in &survey.policies {
        let object = written.object;
        let services = survey.services(&object.name.namespace, &written.policy.attachment.targets);
        if services.is_empty() {
            continue;
        }
        let in_scope: Vec<&Verifies<'_>> =
            authentications.iter().filter(|one| services.iter().any(|service| one.guards(service))).collect();
        for (at, rule) in written.rules() {
            let asked = asked(rule, &at);
            if in_scope.is_empty() {
                remarks.extend(asked.first().map(|asked| (object, unverified(asked, &services))));
            } else {
                remarks.extend(asked.iter().filter_map(|asked| Some((object, never(asked, &in_scope)?))));
            }
        }
    }
    for (object, (code, at, reason, fix)) in remarks {
        survey.say(object, Remark { severity: Severity::Warning, code, at: &at, reason, fix });
    }
}

/// A RequestAuthentication.
struct Verifies<'a> {
    services: Vec<ResourceName>,
    rules: Vec<(FieldPath, &'a Value)>,
}

impl<'a> Verifies<'a> {
    fn new(survey: &Survey<'a>, object: &'a Object) -> Self {
        let targets = survey.attachment(object).targets;
        let services = survey.services(&object.name.namespace, &targets);
        let services = services.into_iter().map(Service::key).collect();
        Self { services, rules: elements(&object.spec, "jwtRules", &FieldPath::of(&["spec"])) }
    }

    fn guards(&self, service: &Service) -> bool {
        self.services.contains(&service.key())
    }

    fn issuers(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.rules.iter().filter_map(|(_, rule)| rule.get("issuer")?.as_str())
    }

    /// The audiences that tokens must have one of; `None` when a rule takes any.
    fn audiences(&self) -> Option<BTreeSet<&'a str>> {
        let mut all = BTreeSet::new();
        for (at, rule) in &self.rules {
            let own = texts(rule, "audiences", at);
            if own.is_empty() {
                return None;
            }
            all.extend(own.into_iter().map(|(_, text)| text));
        }
        Some(all)
    }
}

/// What is asked of a token: where, what, and the values wanted.
struct Asked<'v> {
    at: FieldPath,
    what: What,
    values: Vec<(FieldPath, &'v str)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Principal,
    Issuer,
    Audience,
    Other,
}

fn asked<'v>(rule: &'v Value, at: &FieldPath) -> Vec<Asked<'v>> {
    let mut all = Vec::new();
    for (at, source) in parts(rule, at, "from", "source") {
        let values = texts(source, "requestPrincipals", &at);
        let excluded = texts(source, "notRequestPrincipals", &at);
        if let Some((first, _)) = values.first().or(excluded.first()) {
            all.push(Asked { at: first.clone(), what: What::Principal, values });
        }
    }
    for (at, condition) in elements(rule, "when", at) {
        let key = condition.get("key").and_then(Value::as_str).unwrap_or_default();
        let what = match key {
            "request.auth.principal" => What::Principal,
            "request.auth.audiences" | "request.auth.claims[aud]" => What::Audience,
            "request.auth.claims[iss]" => What::Issuer,
            _ if key.starts_with("request.auth.") => What::Other,
            _ => continue,
        };
        all.push(Asked { values: texts(condition, "values", &at), at: at.key("key"), what });
    }
    all
}

type Saying = (&'static str, FieldPath, String, String);

fn unverified(asked: &Asked<'_>, services: &[&Service]) -> Saying {
    let first = services.first();
    let what = first.map_or_else(String::new, |service| format!("{}/{}", service.namespace, service.name));
    let reason =
        format!("asks for a verified token, and no RequestAuthentication verifies any for Service {what}");
    let name = first.map_or("", |service| &*service.name);
    let fix = format!(
        "add a RequestAuthentication with `targetRefs: [{{group: \"\", kind: Service, name: {name}}}]`"
    );
    ("unverified-token", asked.at.clone(), reason, fix)
}

/// A value that no token which is accepted has.
fn never(asked: &Asked<'_>, in_scope: &[&Verifies<'_>]) -> Option<Saying> {
    let issuers: BTreeSet<&str> = in_scope.iter().flat_map(|one| one.issuers()).collect();
    let audiences: Option<Vec<BTreeSet<&str>>> = in_scope.iter().map(|one| one.audiences()).collect();
    let audiences: Option<BTreeSet<&str>> = audiences.map(|all| all.into_iter().flatten().collect());
    let is_never = |value: &str| match asked.what {
        What::Principal => !issuers.iter().any(|issuer| may_be_issued_by(value, issuer)),
        What::Issuer => !value.contains('*') && !issuers.contains(value),
        What::Audience => {
            !value.contains('*') && audiences.as_ref().is_some_and(|known| !known.contains(value))
        }
        What::Other => false,
    };
    let (at, value) = asked.values.iter().find(|(_, value)| is_never(value))?;
    let (what, known) = match asked.what {
        What::Audience => ("audience", audiences.unwrap_or_default()),
        _ => ("issuer", issuers),
    };
    let known: Vec<&str> = known.into_iter().take(4).collect();
    let reason =
        format!("no token that is accepted here has `{value}`: the {what}s are {}", known.join(", "));
    let fix = format!("use one of these {what}s, or add this one to a RequestAuthentication");
    Some(("claim-never-produced", at.clone(), reason, fix))
}

/// Whether a request principal `issuer/subject` that matches `value` can be of this issuer.
fn may_be_issued_by(value: &str, issuer: &str) -> bool {
    match value.rsplit_once('/') {
        _ if value == "*" => true,
        Some((wanted, _)) => match wanted.strip_prefix('*') {
            Some(suffix) => issuer.ends_with(suffix),
            None => wanted == issuer,
        },
        // Without a slash a star at the end leaves the subject open, and one at the start the issuer.
        None if value.starts_with('*') => true,
        None => match value.strip_suffix('*') {
            Some(prefix) => issuer.starts_with(prefix),
            None => value == issuer,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::may_be_issued_by;

    #[test]
    fn request_principals_name_issuers() {
        for (value, expected) in [
            ("*", true),
            ("https://a.example/me", true),
            ("https://a.example/*", true),
            ("https://b.example/me", false),
            ("*.example/me", true),
            ("*.other/me", false),
            ("*/me", true),
            ("*me", true),
            ("https://a.example*", true),
            ("other*", false),
        ] {
            // The part before the last slash is the issuer, so a prefix with slashes means something else.
            let expected = if value == "https://a.example*" { false } else { expected };
            assert_eq!(may_be_issued_by(value, "https://a.example"), expected, "{value}");
        }
    }
}
