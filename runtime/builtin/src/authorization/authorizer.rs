//! The pure decision on a request: DENY before ALLOW, in two steps. A connection settles once what identity, addresses
//! and ports decide; its requests look only at what is left.

mod explain;
mod remarks;

pub use remarks::Remarks;

use super::check::ConnectionFacts;
use super::index::Index;
use super::request::{Asked, Known};
use super::rule::{Open, Rule};
use cairn_filter::RequestHead;
use cairn_mesh::{AuthorizationPolicy, PolicyAction, TrustDomains};
use std::sync::Arc;

/// The compiled policies of one destination.
#[derive(Debug)]
pub struct Authorizer {
    deny: Ruleset,
    allow: Ruleset,
    audit: Ruleset,
    dry_deny: Ruleset,
    dry_allow: Ruleset,
}

/// What a connection leaves to be decided about its requests.
#[derive(Clone, Debug)]
pub struct Standing {
    facts: ConnectionFacts,
    deny: Arc<Alive>,
    allow: Arc<Alive>,
    audit: Arc<Alive>,
    dry_deny: Arc<Alive>,
    dry_allow: Arc<Alive>,
}

/// Whether a request may pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes.
    Allow {
        /// The rule that allows it, `ns[x]-policy[y]-rule[0]`; `None` when no ALLOW policy is attached.
        by: Option<Arc<str>>,
    },
    /// No.
    Deny {
        /// The DENY rule that matches; `None` when ALLOW policies are attached and none of their rules matches.
        policy: Option<Arc<str>>,
        /// One sentence that names the rule, or the rule that came nearest and what it failed on.
        reason: String,
    },
}

impl Authorizer {
    /// Compiles the policies attached to a destination, in the order of their names. Who they name in one of the
    /// mesh's trust domains is named in all of them.
    pub fn compile(policies: &[Arc<AuthorizationPolicy>], domains: &TrustDomains) -> Self {
        let mut sorted: Vec<AuthorizationPolicy> =
            policies.iter().map(|policy| domains.expand(policy)).collect();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        let select = |action: PolicyAction, dry_run: bool| {
            let ours = |policy: &&AuthorizationPolicy| policy.action == action && policy.dry_run == dry_run;
            Ruleset::new(sorted.iter().filter(ours))
        };
        Self {
            deny: select(PolicyAction::Deny, false),
            allow: select(PolicyAction::Allow, false),
            audit: select(PolicyAction::Audit, false),
            dry_deny: select(PolicyAction::Deny, true),
            dry_allow: select(PolicyAction::Allow, true),
        }
    }

    /// Whether there is no policy, so that every request passes without a word.
    pub fn is_empty(&self) -> bool {
        let sets = [&self.deny, &self.allow, &self.audit, &self.dry_deny, &self.dry_allow];
        sets.into_iter().all(|set| set.policies.is_empty())
    }

    /// Settles once for a connection all that does not depend on its requests.
    pub fn settle(&self, facts: ConnectionFacts) -> Standing {
        Standing {
            deny: self.deny.alive(&facts),
            allow: self.allow.alive(&facts),
            audit: self.audit.alive(&facts),
            dry_deny: self.dry_deny.alive(&facts),
            dry_allow: self.dry_allow.alive(&facts),
            facts,
        }
    }

    /// Decides on one request: any DENY match denies; without ALLOW policies the rest passes; otherwise one of their
    /// rules must match. `known` is what filters before this one found out.
    pub fn decide<'a>(
        &self,
        standing: &'a Standing,
        head: &'a RequestHead,
        known: impl Into<Known<'a>>,
    ) -> Decision {
        let asked = &Asked { facts: &standing.facts, head, known: known.into() };
        if let Some(rule) = self.deny.first_match(&standing.deny, asked) {
            let reason = format!("DENY {} rule {} matched", rule.policy, rule.index);
            return Decision::Deny { policy: Some(Arc::clone(&rule.id)), reason };
        }
        if self.allow.policies.is_empty() {
            return Decision::Allow { by: None };
        }
        match self.allow.first_match(&standing.allow, asked) {
            Some(rule) => Decision::Allow { by: Some(Arc::clone(&rule.id)) },
            None => Decision::Deny { policy: None, reason: self.allow.explain(&standing.allow, asked) },
        }
    }

    /// The first DENY rule, by id, that a request matches.
    pub(crate) fn denying<'a>(
        &self,
        standing: &'a Standing,
        head: &'a RequestHead,
        known: impl Into<Known<'a>>,
    ) -> Option<Arc<str>> {
        let asked = &Asked { facts: &standing.facts, head, known: known.into() };
        self.deny.first_match(&standing.deny, asked).map(|rule| Arc::clone(&rule.id))
    }

    /// What policies that decide nothing have to say about a request: AUDIT policies that match, and what policies on
    /// trial (dry run) would do.
    pub fn remarks<'a>(
        &self,
        standing: &'a Standing,
        head: &'a RequestHead,
        known: impl Into<Known<'a>>,
    ) -> Remarks {
        let asked = &Asked { facts: &standing.facts, head, known: known.into() };
        let mut remarks = Remarks::default();
        if let Some(rule) = self.audit.first_match(&standing.audit, asked) {
            remarks.audited(&rule.id);
        }
        if !self.dry_deny.policies.is_empty() {
            let rule = self.dry_deny.first_match(&standing.dry_deny, asked);
            remarks.on_trial("deny", rule.map(|rule| &rule.id), rule.is_none());
            remarks.lines.extend(rule.map(|rule| format!("dry run: {} would deny", rule.id)));
        }
        if !self.dry_allow.policies.is_empty() {
            let rule = self.dry_allow.first_match(&standing.dry_allow, asked);
            remarks.on_trial("allow", rule.map(|rule| &rule.id), rule.is_some());
            remarks.lines.push(match rule {
                Some(rule) => format!("dry run: {} would allow", rule.id),
                None => {
                    let nearest = self.dry_allow.explain(&standing.dry_allow, asked);
                    format!("dry run: would deny, {nearest}")
                }
            });
        }
        remarks.lines.extend(self.verdict_on_trial(standing, asked));
        remarks
    }

    /// What would become of a request if the policies on trial were in force with the others. Each engine of Envoy
    /// tells its own half of it only.
    fn verdict_on_trial(&self, standing: &Standing, asked: &Asked<'_>) -> Option<String> {
        if self.dry_deny.policies.is_empty() && self.dry_allow.policies.is_empty() {
            return None;
        }
        let matches = |set: &Ruleset, alive: &Alive| set.first_match(alive, asked).is_some();
        let denied = matches(&self.deny, &standing.deny) || matches(&self.dry_deny, &standing.dry_deny);
        let any_may = self.allow.policies.is_empty() && self.dry_allow.policies.is_empty();
        let allowed =
            any_may || matches(&self.allow, &standing.allow) || matches(&self.dry_allow, &standing.dry_allow);
        let verdict = if allowed && !denied { "allowed" } else { "denied" };
        Some(format!("dry run: with the policies in force it would be {verdict}"))
    }
}

/// The rules of all policies of one action.
#[derive(Debug)]
struct Ruleset {
    /// The names of the policies, those without rules included.
    policies: Vec<Arc<str>>,
    rules: Vec<Rule>,
    index: Index,
    /// What every connection leaves, when connections make no difference.
    for_all: Option<Arc<Alive>>,
}

/// The rules that requests of a connection can match, by position. None comes after one that all of them match.
#[derive(Debug, Default)]
struct Alive {
    open: Vec<Open>,
}

impl Alive {
    /// Those of `positions` that are open, in order. It goes through whichever are fewer.
    fn among<'a>(&'a self, positions: &'a [u32]) -> impl Iterator<Item = &'a Open> {
        let (few, many) = match positions.len() <= self.open.len() {
            true => (Some(positions), None),
            false => (None, Some(&self.open)),
        };
        let by_position = few.into_iter().flatten().filter_map(|position| {
            let at = self.open.binary_search_by_key(position, |open| open.rule).ok()?;
            self.open.get(at)
        });
        let by_rule = many.into_iter().flatten().filter(|open| positions.binary_search(&open.rule).is_ok());
        by_position.chain(by_rule)
    }
}

/// Up to this many open rules are tried one after the other; more are looked up in the index.
const SCAN_MAX: usize = 8;

/// The most rules that an explanation looks at: refusing must stay cheap.
const RULES_EXPLAINED_MAX: usize = 64;

impl Ruleset {
    fn new<'a>(policies: impl Iterator<Item = &'a AuthorizationPolicy>) -> Self {
        let (mut names, mut rules) = (Vec::new(), Vec::new());
        for policy in policies {
            names.push(Arc::clone(&policy.name.name));
            rules.extend(policy.rules.iter().map(|rule| Rule::new(policy, rule)));
        }
        // Envoy goes through policies in the order of their ids as texts, and names the first that matches: rule[10]
        // comes before rule[2].
        rules.sort_by(|a, b| a.id.cmp(&b.id));
        let mut set = Self { policies: names, index: Index::new(&rules), rules, for_all: None };
        if !set.rules.iter().any(Rule::depends_on_connection) {
            let nobody = ConnectionFacts {
                identity: None,
                source: std::net::Ipv4Addr::UNSPECIFIED.into(),
                destination: (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
            };
            set.for_all = Some(set.alive(&nobody));
        }
        set
    }

    fn alive(&self, facts: &ConnectionFacts) -> Arc<Alive> {
        if let Some(alive) = &self.for_all {
            return Arc::clone(alive);
        }
        let mut alive = Alive::default();
        for (rule, position) in self.rules.iter().zip(0..) {
            let Some(open) = rule.open(position, facts) else { continue };
            let is_settled = rule.is_settled(&open);
            alive.open.push(open);
            if is_settled {
                break;
            }
        }
        Arc::new(alive)
    }

    fn rule(&self, position: u32) -> Option<&Rule> {
        self.rules.get(usize::try_from(position).ok()?)
    }

    fn first_match(&self, alive: &Alive, asked: &Asked<'_>) -> Option<&Rule> {
        let matching = |open: &Open| self.rule(open.rule).filter(|rule| rule.matches(open, asked));
        if alive.open.len() <= SCAN_MAX {
            return alive.open.iter().find_map(matching);
        }
        let mut first: Option<(u32, &Rule)> = None;
        self.index.candidates(asked, &mut |positions| {
            let before = first.map_or(u32::MAX, |(position, _)| position);
            let mut open = alive.among(positions).take_while(|open| open.rule < before);
            first = open.find_map(|open| Some((open.rule, matching(open)?))).or(first);
        });
        first.map(|(_, rule)| rule)
    }

    /// One sentence on the rule that came nearest to matching: the one with the fewest checks that failed. Rules that
    /// the connection left open are looked at first.
    fn explain(&self, alive: &Alive, asked: &Asked<'_>) -> String {
        let open = alive.open.iter().filter_map(|open| self.rule(open.rule));
        let looked_at = open.chain(&self.rules).take(RULES_EXPLAINED_MAX);
        let nearest = looked_at.min_by_key(|rule| rule.distance(asked));
        match nearest.and_then(|rule| Some((rule, rule.first_miss(asked)?))) {
            Some((rule, miss)) => {
                format!("ALLOW {} rule {} failed on {}: {}", rule.policy, rule.index, miss.field, miss.text)
            }
            None => match self.policies.first() {
                Some(policy) => format!("ALLOW {policy} has no rule, so it allows nothing"),
                None => "no ALLOW policy matched".to_owned(),
            },
        }
    }
}
