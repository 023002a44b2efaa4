//! Rules that change nothing, because others match all that they match.

use super::{Remark, Survey, Written, cover};
use crate::decode::policy::{Action, Rule};
use crate::diagnostic::Severity;
use crate::field::FieldPath;
use crate::object::Object;
use cairn_mesh::Service;

/// Up to this many rules of one kind are compared with each other: beyond, lint would be slow.
const RULES_COMPARED_MAX: usize = 1024;

pub(super) fn look(survey: &mut Survey<'_>) {
    for (object, at, (code, reason, fix)) in shadowed(survey) {
        survey.say(object, Remark { severity: Severity::Warning, code, at: &at, reason, fix });
    }
}

type Saying = (&'static str, String, String);

fn shadowed<'a>(survey: &Survey<'a>) -> Vec<(&'a Object, FieldPath, Saying)> {
    let mut remarks = Vec::new();
    let all = guards(survey);
    for (place, guard) in all.iter().enumerate() {
        let before = all.iter().enumerate().filter(|(other, _)| *other != place).find(|(other, wide)| {
            // Of two that match the same, the later one is to go.
            wide.is_before(guard) && (*other < place || !guard.is_before(wide))
        });
        let Some((_, wide)) = before else { continue };
        let reason = match (wide.action(), guard.action()) {
            (Action::Deny, Action::Allow) => {
                format!("allows nothing: {} denies all that it matches", wide.name())
            }
            _ => format!("changes nothing: {} matches all that it matches", wide.name()),
        };
        let (code, fix) = match wide.action() == guard.action() {
            true => ("shadowed-rule", "remove it, or make the wider rule narrower"),
            false => ("denied-anyway", "remove it, or make the DENY rule narrower"),
        };
        remarks.push((
            guard.written.object,
            guard.written.rule_at(guard.index),
            (code, reason, fix.to_owned()),
        ));
    }
    remarks
}

/// One rule of a policy, and what it guards.
struct Guard<'s, 'a> {
    written: &'s Written<'a>,
    index: usize,
    rule: &'s Rule,
    services: Vec<&'a Service>,
}

/// The rules of all policies of a certain effect, in the order in which they are reported.
fn guards<'s, 'a>(survey: &'s Survey<'a>) -> Vec<Guard<'s, 'a>> {
    let mut policies: Vec<&Written<'a>> =
        survey.policies.iter().filter(|written| is_enforced(written)).collect();
    policies.sort_by(|a, b| a.object.name.cmp(&b.object.name));
    let mut guards = Vec::new();
    for written in policies {
        let namespace = &written.object.name.namespace;
        let services = survey.services(namespace, &written.policy.attachment.targets);
        for (index, rule) in written.policy.rules.iter().enumerate() {
            guards.push(Guard { written, index, rule, services: services.clone() });
        }
    }
    guards.truncate(RULES_COMPARED_MAX);
    guards
}

fn is_enforced(written: &Written<'_>) -> bool {
    !written.policy.dry_run && matches!(written.policy.action, Action::Allow | Action::Deny)
}

impl Guard<'_, '_> {
    fn action(&self) -> Action {
        self.written.policy.action
    }

    /// Whether it decides whenever `narrow` would.
    fn is_before(&self, narrow: &Guard<'_, '_>) -> bool {
        let acts = self.action() == narrow.action() || self.action() == Action::Deny;
        acts && self.guards_all_of(narrow) && self.covers(narrow)
    }

    /// Whether it matches all that `narrow` matches.
    fn covers(&self, narrow: &Guard<'_, '_>) -> bool {
        // What a ztunnel cannot look at is another matter, and has been said already.
        let is_whole = |guard: &Guard<'_, '_>| guard.has_targets() || guard.rule.l7.is_empty();
        is_whole(self) && is_whole(narrow) && cover::rule(&self.rule.rule, &narrow.rule.rule)
    }

    fn has_targets(&self) -> bool {
        self.written.policy.attachment.has_targets
    }

    /// Whether it applies to everything that `narrow` applies to.
    fn guards_all_of(&self, narrow: &Guard<'_, '_>) -> bool {
        let (own, other) = (&self.written.policy.attachment, &narrow.written.policy.attachment);
        let namespace = &self.written.object.name.namespace;
        let same_place = *namespace == narrow.written.object.name.namespace;
        match (self.has_targets(), narrow.has_targets()) {
            (true, true) => {
                let known = |service: &&Service| self.services.iter().any(|own| own.key() == service.key());
                let same = same_place && other.targets.iter().all(|target| own.targets.contains(target));
                same || (!narrow.services.is_empty() && narrow.services.iter().all(known))
            }
            (false, false) => same_place && (own.selector.is_none() || own.selector == other.selector),
            // One is enforced at the waypoint, the other at the ztunnel.
            (true, false) | (false, true) => false,
        }
    }

    fn name(&self) -> String {
        let object = self.written.object;
        let action = if self.action() == Action::Deny { "DENY" } else { "ALLOW" };
        format!("{action} {} rule {}", object.name, self.index)
    }
}
