//! Rules of routes that no request reaches, because others of the same service come first and match all of it.

use super::{Remark, Survey};
use crate::decode::decode;
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use cairn_mesh::{Change, HttpRoute, NameMatch, PathRule, ResourceName, RouteMatch, Service, ValueMatch};
use regex::Regex;
use std::collections::BTreeMap;

pub(super) fn look(survey: &mut Survey<'_>) {
    let routes: Vec<(&Object, HttpRoute)> = (survey.of("gateway.networking.k8s.io", "HTTPRoute"))
        .filter_map(|object| Some((object, route(survey, object)?)))
        .collect();
    // A place is out of reach when it is so behind every parent.
    let mut places: BTreeMap<(ResourceName, FieldPath), Option<(usize, String)>> = BTreeMap::new();
    for service in &survey.world.services {
        for port in &service.ports {
            for (at, first) in table(survey, &routes, service, port.port) {
                let name = (at.route.name.clone(), at.place());
                let said = first.map(|first| (at.index, first.name()));
                let known = places.entry(name).or_insert_with(|| said.clone());
                *known = known.take().and(said);
            }
        }
    }
    for ((name, at), first) in places {
        let object = routes.iter().find(|(_, route)| route.name == name).map(|(object, _)| *object);
        let (Some(object), Some((_, first))) = (object, first) else { continue };
        let reason = format!("no request reaches this: {first} comes first and matches all of it");
        let fix = "remove it, or make it differ by a longer path, a method or a header".to_owned();
        survey.say(
            object,
            Remark { severity: Severity::Warning, code: "unreachable-route", at: &at, reason, fix },
        );
    }
}

/// The route that an object holds, if its parts are where they are written.
fn route(survey: &Survey<'_>, object: &Object) -> Option<HttpRoute> {
    let changes = decode(object, survey.settings).changes;
    let route = changes.into_iter().find_map(|change| match change {
        Change::Route(route) => Some(route),
        _ => None,
    })?;
    let count = |value: &serde_json::Value, key: &str| value.get(key)?.as_array().map(Vec::len);
    let rules = object.spec.get("rules").and_then(serde_json::Value::as_array)?;
    let is_whole = rules.len() == route.rules.len()
        && rules.iter().zip(&route.rules).all(|(written, rule)| {
            count(written, "matches").is_none_or(|count| count == 0 || count == rule.matches.len())
        });
    is_whole.then_some(route)
}

/// One alternative of a rule.
struct Alternative<'r> {
    route: &'r HttpRoute,
    rule: usize,
    /// Which of the rule's.
    index: usize,
    matches: &'r RouteMatch,
}

impl Alternative<'_> {
    fn place(&self) -> FieldPath {
        let rule = FieldPath::of(&["spec", "rules"]).index(self.rule);
        let alone = self.route.rules.get(self.rule).is_none_or(|rule| rule.matches.len() == 1);
        if alone { rule } else { rule.key("matches").index(self.index) }
    }

    fn name(&self) -> String {
        format!("HTTPRoute {} rule {}", self.route.name, self.rule)
    }
}

/// The alternatives for a service's port in the order of their precedence, each with an earlier one that covers it.
fn table<'r>(
    survey: &Survey<'_>,
    routes: &'r [(&Object, HttpRoute)],
    service: &Service,
    port: u16,
) -> Vec<(Alternative<'r>, Option<Alternative<'r>>)> {
    let waypoint = survey.waypoint_of(service).map(|waypoint| &waypoint.name.namespace);
    let is_attached = |route: &&HttpRoute| {
        let near = route.name.namespace == service.namespace || Some(&route.name.namespace) == waypoint;
        near && route.parents.iter().any(|parent| {
            parent.service.name == service.name
                && parent.service.namespace == service.namespace
                && parent.port.is_none_or(|only| only == port)
        })
    };
    let mut attached: Vec<&HttpRoute> = routes.iter().map(|(_, route)| route).filter(is_attached).collect();
    attached.sort_by_key(|route| route.precedence());
    let mut all: Vec<Alternative<'r>> = Vec::new();
    for route in attached {
        for (rule, written) in route.rules.iter().enumerate() {
            let matches = written.matches.iter().enumerate();
            all.extend(matches.map(|(index, matches)| Alternative { route, rule, index, matches }));
        }
    }
    all.sort_by_key(|alternative| alternative.matches.precedence());
    let first_of = |place: usize, matches: &RouteMatch| {
        let found = all.iter().take(place).find(|earlier| covers(earlier.matches, matches))?;
        Some(Alternative { ..*found })
    };
    all.iter()
        .enumerate()
        .map(|(place, one)| (Alternative { ..*one }, first_of(place, one.matches)))
        .collect()
}

/// Whether every request that matches `narrow` matches `wide`, as far as can be told.
fn covers(wide: &RouteMatch, narrow: &RouteMatch) -> bool {
    let asked = |wide: &[NameMatch], narrow: &[NameMatch]| {
        wide.iter().all(|asked| {
            narrow.iter().any(|given| {
                given.name == asked.name
                    && (given.inverted, asked.inverted) == (false, false)
                    && value(&asked.value, &given.value)
            })
        })
    };
    path(&wide.path, &narrow.path)
        && wide.method.as_ref().is_none_or(|method| narrow.method.as_ref() == Some(method))
        && asked(&wide.headers, &narrow.headers)
        && wide.claims.iter().all(|claim| narrow.claims.contains(claim))
        && asked(&wide.query, &narrow.query)
}

fn value(wide: &ValueMatch, narrow: &ValueMatch) -> bool {
    match (wide, narrow) {
        (ValueMatch::Regex(expression), ValueMatch::Exact(text)) => is_full_match(expression, text),
        (ValueMatch::Prefix(prefix), ValueMatch::Exact(text) | ValueMatch::Prefix(text)) => {
            text.starts_with(&**prefix)
        }
        (ValueMatch::Present, _) => true,
        (wide, narrow) => wide == narrow,
    }
}

fn path(wide: &PathRule, narrow: &PathRule) -> bool {
    match (wide, narrow) {
        (PathRule::Prefix(prefix), PathRule::Exact(text) | PathRule::Prefix(text)) => begins(text, prefix),
        (PathRule::Prefix(prefix), PathRule::Regex(expression)) => {
            let head = literal_head(expression);
            let prefix = prefix.trim_end_matches('/');
            prefix.is_empty() || head.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'))
        }
        (PathRule::Regex(expression), PathRule::Exact(text)) => is_full_match(expression, text),
        (wide, narrow) => wide == narrow,
    }
}

/// Whether `path` begins with the whole segments of `prefix`.
fn begins(path: &str, prefix: &str) -> bool {
    let rest = path.trim_end_matches('/').strip_prefix(prefix.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The text that everything an expression matches begins with, as far as it is plain.
fn literal_head(expression: &str) -> &str {
    let special = |character: char| !(character.is_ascii_alphanumeric() || "/-_~".contains(character));
    let end = expression.find(special).unwrap_or(expression.len());
    // What follows may repeat the last character, or make it one of several.
    let optional = expression.get(end..).is_some_and(|rest| rest.starts_with(['?', '*', '{', '|', '+']));
    let head = expression.get(..end).unwrap_or_default();
    if expression.contains('|') {
        return "";
    }
    if optional { head.get(..head.len().saturating_sub(1)).unwrap_or_default() } else { head }
}

fn is_full_match(expression: &str, text: &str) -> bool {
    Regex::new(&format!("^(?:{expression})$")).is_ok_and(|regex| regex.is_match(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(path: PathRule) -> RouteMatch {
        RouteMatch { path, headers: Vec::new(), claims: Vec::new(), query: Vec::new(), method: None }
    }

    #[test]
    fn a_path_covers_what_it_surely_matches_too() {
        let (exact, prefix, regex) = (PathRule::Exact, PathRule::Prefix, PathRule::Regex);
        for (wide, narrow, expected) in [
            (prefix("/a".into()), prefix("/a/".into()), true),
            (prefix("/a".into()), exact("/a/b".into()), true),
            (prefix("/a".into()), exact("/ab".into()), false),
            (prefix("/".into()), regex("/x|y".into()), true),
            (prefix("/a".into()), regex("/a/.*".into()), true),
            (prefix("/a".into()), regex("/a.*".into()), false),
            (prefix("/a".into()), regex("/a/?".into()), false),
            (prefix("/a".into()), regex("/a/b|/c".into()), false),
            (regex("/[ab]".into()), exact("/a".into()), true),
            (regex("/[ab]".into()), exact("/c".into()), false),
            (exact("/a".into()), exact("/a".into()), true),
            (exact("/a".into()), prefix("/a".into()), false),
        ] {
            assert_eq!(covers(&of(wide.clone()), &of(narrow.clone())), expected, "{wide:?} {narrow:?}");
        }
    }
}
