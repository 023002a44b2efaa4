//! Routes that answer a browser's preflights, behind policies that refuse them first.

use super::{Remark, Survey, Written, elements};
use crate::decode::decode;
use crate::decode::policy::Action;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use cairn_mesh::{Change, Condition, Operation, PolicyRule, ResourceName, Service, Source};
use serde_json::Value;

pub(super) fn look(survey: &mut Survey<'_>) {
    let mut remarks = Vec::new();
    for (object, at) in places(survey) {
        let services = parents(survey, object);
        let said = services.iter().find_map(|service| Some((*service, refusal(survey, service)?)));
        remarks.extend(said.map(|(service, refusal)| (object, at, service, refusal)));
    }
    for (object, at, service, Refusal { by, fix }) in remarks {
        let reason = format!(
            "before a request to Service {}/{} a browser asks with OPTIONS and without a token, and policies decide before \
             this does: {by}",
            service.namespace, service.name
        );
        survey.say(
            object,
            Remark { severity: Severity::Warning, code: "preflight-refused", at: &at, reason, fix },
        );
    }
}

/// Where routes say that they answer preflights, once in each route.
fn places<'a>(survey: &Survey<'a>) -> Vec<(&'a Object, FieldPath)> {
    let spec = FieldPath::of(&["spec"]);
    let place = |object: &&'a Object| -> Option<(&'a Object, FieldPath)> {
        let found = if object.is("gateway.networking.k8s.io", "HTTPRoute") {
            let rules = elements(&object.spec, "rules", &spec).into_iter();
            let mut filters = rules.flat_map(|(at, rule)| elements(rule, "filters", &at));
            filters.find(|(_, filter)| filter.get("type").and_then(Value::as_str) == Some("CORS"))?.0
        } else if object.is("networking.istio.io", "VirtualService") {
            let mut rules = elements(&object.spec, "http", &spec).into_iter();
            rules.find(|(_, rule)| rule.get("corsPolicy").is_some())?.0.key("corsPolicy")
        } else {
            return None;
        };
        Some((*object, found))
    };
    survey.objects.iter().filter_map(|object| place(&object)).collect()
}

/// The services with a waypoint that a route is for.
fn parents<'a>(survey: &Survey<'a>, route: &Object) -> Vec<&'a Service> {
    let changes = decode(route, survey.settings).changes;
    let routes = changes.into_iter().filter_map(|change| match change {
        Change::Route(route) => Some(route),
        _ => None,
    });
    let names: Vec<ResourceName> =
        routes.flat_map(|route| route.parents).map(|parent| parent.service).collect();
    let is_ours = |service: &&Service| {
        let name = ResourceName::new(service.namespace.clone(), service.name.clone());
        names.contains(&name) && survey.waypoint_of(service).is_some()
    };
    survey.world.services.iter().filter(is_ours).collect()
}

/// What refuses a preflight, and what would mend it.
struct Refusal {
    by: String,
    fix: String,
}

fn refusal(survey: &Survey<'_>, service: &Service) -> Option<Refusal> {
    let guards = |written: &&Written<'_>| {
        let (namespace, targets) = (&written.object.name.namespace, &written.policy.attachment.targets);
        let services = survey.services(namespace, targets);
        !written.policy.dry_run && services.iter().any(|one| one.key() == service.key())
    };
    let policies: Vec<&Written<'_>> = survey.policies.iter().filter(guards).collect();
    let with = |action: Action| policies.iter().filter(move |written| written.policy.action == action);
    let denying = with(Action::Deny).find_map(|written| {
        let at = written.policy.rules.iter().position(|rule| denies_all(&rule.rule))?;
        Some((written.object, at))
    });
    if let Some((object, index)) = denying {
        let by = format!("DENY {} rule {index} refuses all that have no token", object.name);
        let fix = format!("let {} rule {index} except them with `notMethods: [OPTIONS]`", object.name);
        return Some(Refusal { by, fix });
    }
    let first = with(Action::Allow).next()?;
    let may_pass = |written: &&Written<'_>| written.policy.rules.iter().any(|rule| may_match(&rule.rule));
    if with(Action::Allow).any(may_pass) {
        return None;
    }
    let name = &first.object.name;
    let by = format!("no ALLOW rule for it, as those of {name}, lets that pass");
    let fix = format!("give {name} a rule with `methods: [OPTIONS]` that asks for no token");
    Some(Refusal { by, fix })
}

fn has_options(operation: &Operation) -> bool {
    operation.methods.hold(|method| method.matches("OPTIONS"))
}

/// Whether a preflight can match the rule, some path and some client granted.
fn may_match(rule: &PolicyRule) -> bool {
    let from = rule.from.is_empty() || rule.from.iter().any(|one| one.request_principals.any.is_empty());
    let to = rule.to.is_empty() || rule.to.iter().any(has_options);
    from && to && !rule.when.iter().any(needs_credentials)
}

/// Whether a condition holds for no preflight, which has neither token nor cookie (Fetch §4.8).
fn needs_credentials(condition: &Condition) -> bool {
    match condition {
        Condition::RequestPrincipal(values) => !values.any.is_empty(),
        Condition::RequestAudiences(values)
        | Condition::RequestPresenter(values)
        | Condition::RequestClaim(_, values) => !values.any.is_empty(),
        Condition::RequestHeader(name, values) => {
            matches!(&**name, "authorization" | "cookie") && !values.any.is_empty()
        }
        _ => false,
    }
}

/// Whether a rule of a DENY policy matches every preflight, because it matches whatever has no token.
fn denies_all(rule: &PolicyRule) -> bool {
    let asks_for_tokens = |source: &Source| {
        let tokens = &source.request_principals;
        let others = Source { request_principals: Default::default(), ..source.clone() };
        !tokens.none.is_empty() && tokens.any.is_empty() && others == Source::default()
    };
    let only_methods = |operation: &Operation| {
        let others = Operation { methods: Default::default(), ..operation.clone() };
        others == Operation::default() && has_options(operation)
    };
    rule.when.is_empty()
        && rule.from.iter().any(asks_for_tokens)
        && (rule.to.is_empty() || rule.to.iter().any(only_methods))
}
