//! A compiled rule: who, what and under which conditions, each split into what a connection settles and what is left
//! for its requests.

use super::check::{ConnectionFacts, Miss, OfConnection};
use super::request::{Asked, Claim, Header, Metadata, OfRequest, Path};
use cairn_mesh::{AuthorizationPolicy, Condition, Operation, PolicyRule, Source, Values};
use std::sync::Arc;

/// One compiled rule.
#[derive(Debug)]
pub(super) struct Rule {
    /// `ns[x]-policy[y]-rule[0]`, as Istio names it.
    pub(super) id: Arc<str>,
    /// The name of its policy.
    pub(super) policy: Arc<str>,
    /// Its place in the policy as written.
    pub(super) index: usize,
    pub(super) from: Vec<Checks>,
    pub(super) to: Vec<Checks>,
    pub(super) when: Checks,
}

/// Checks all of which must hold.
#[derive(Debug, Default)]
pub(super) struct Checks {
    pub(super) connection: Vec<OfConnection>,
    pub(super) request: Vec<OfRequest>,
}

/// What a connection leaves of a rule that it may match.
#[derive(Clone, Debug)]
pub(super) struct Open {
    /// The position of the rule.
    pub(super) rule: u32,
    from: Left,
    to: Left,
}

/// What a connection leaves of alternatives.
#[derive(Clone, Debug)]
enum Left {
    /// Nothing: one of them holds.
    Settled,
    /// The request checks of these.
    Any(Box<[u16]>),
}

impl Rule {
    /// Compiles `rule` of `policy`.
    pub(super) fn new(policy: &AuthorizationPolicy, rule: &PolicyRule) -> Self {
        let name = &policy.name;
        let mut when = Checks::default();
        for condition in &rule.when {
            when.condition(condition);
        }
        Self {
            id: format!("ns[{}]-policy[{}]-rule[{}]", name.namespace, name.name, rule.index).into(),
            policy: Arc::clone(&name.name),
            index: rule.index,
            from: rule.from.iter().map(Checks::source).collect(),
            to: rule.to.iter().map(Checks::operation).collect(),
            when,
        }
    }

    /// Whether connections differ in what they leave of it.
    pub(super) fn depends_on_connection(&self) -> bool {
        self.from.iter().chain(&self.to).chain([&self.when]).any(|checks| !checks.connection.is_empty())
    }

    /// What a connection leaves of it; `None` when no request of the connection can match.
    pub(super) fn open(&self, position: u32, facts: &ConnectionFacts) -> Option<Open> {
        if !self.when.hold_for(facts) {
            return None;
        }
        Some(Open { rule: position, from: left(&self.from, facts)?, to: left(&self.to, facts)? })
    }

    /// Whether every request of the connection that left `open` matches.
    pub(super) fn is_settled(&self, open: &Open) -> bool {
        matches!((&open.from, &open.to), (Left::Settled, Left::Settled)) && self.when.request.is_empty()
    }

    /// Whether a request matches what its connection left.
    pub(super) fn matches(&self, open: &Open, asked: &Asked<'_>) -> bool {
        let holds = |left: &Left, alternatives: &[Checks]| match left {
            Left::Settled => true,
            Left::Any(these) => these
                .iter()
                .any(|at| alternatives.get(usize::from(*at)).is_some_and(|checks| checks.hold_of(asked))),
        };
        holds(&open.to, &self.to) && holds(&open.from, &self.from) && self.when.hold_of(asked)
    }

    /// How far a request is from matching: how many checks fail, in the alternatives where the fewest do.
    pub(super) fn distance(&self, asked: &Asked<'_>) -> usize {
        let nearest = |alternatives| nearest(alternatives, asked).map_or(0, |(distance, _)| distance);
        nearest(&self.from) + nearest(&self.to) + self.when.distance(asked)
    }

    /// The first check that fails on the shortest way to a match.
    pub(super) fn first_miss(&self, asked: &Asked<'_>) -> Option<Miss> {
        let from = nearest(&self.from, asked).map(|(_, checks)| checks);
        let to = nearest(&self.to, asked).map(|(_, checks)| checks);
        from.into_iter().chain(to).chain([&self.when]).find_map(|checks| checks.first_miss(asked))
    }
}

/// Of alternatives, the one of which the fewest checks fail, and how many do.
fn nearest<'a>(alternatives: &'a [Checks], asked: &Asked<'_>) -> Option<(usize, &'a Checks)> {
    let looked_at = alternatives.iter().take(ALTERNATIVES_EXPLAINED_MAX);
    looked_at.map(|checks| (checks.distance(asked), checks)).min_by_key(|(distance, _)| *distance)
}

/// The most alternatives of a rule that an explanation looks at: refusing must stay cheap.
const ALTERNATIVES_EXPLAINED_MAX: usize = 16;

/// `None` when none of the alternatives can hold. No alternatives ask for nothing.
fn left(alternatives: &[Checks], facts: &ConnectionFacts) -> Option<Left> {
    if alternatives.is_empty() {
        return Some(Left::Settled);
    }
    let mut remaining = Vec::new();
    for (checks, at) in alternatives.iter().zip(0..=u16::MAX) {
        if checks.hold_for(facts) {
            if checks.request.is_empty() {
                return Some(Left::Settled);
            }
            remaining.push(at);
        }
    }
    (!remaining.is_empty()).then(|| Left::Any(remaining.into()))
}

impl Checks {
    fn source(source: &Source) -> Self {
        let mut checks = Self::default();
        checks.on_connection(&source.principals, OfConnection::Principal);
        checks.on_connection(&source.namespaces, OfConnection::Namespace);
        checks.on_connection(&source.service_accounts, OfConnection::ServiceAccount);
        checks.on_connection(&source.trust_domains, OfConnection::TrustDomain);
        checks.on_connection(&source.ip_blocks, OfConnection::SourceIp);
        checks.on_request(&source.remote_ip_blocks, OfRequest::RemoteIp);
        checks.on_request(&source.request_principals, OfRequest::RequestPrincipal);
        checks
    }

    fn operation(operation: &Operation) -> Self {
        let mut checks = Self::default();
        checks.on_connection(&operation.ports, OfConnection::DestinationPort);
        checks.on_request(&operation.methods, OfRequest::Method);
        if !operation.paths.is_empty() {
            let compile = |paths: &[_]| paths.iter().map(Path::new).collect();
            let Values { any, none } = &operation.paths;
            checks.request.push(OfRequest::Path(Values { any: compile(any), none: compile(none) }));
        }
        checks.on_request(&operation.hosts, OfRequest::Host);
        checks
    }

    fn condition(&mut self, condition: &Condition) {
        match condition {
            Condition::RequestHeader(name, values) => {
                self.on_request(values, |values| OfRequest::Header(Header::new(name), values));
            }
            Condition::SourceIp(values) => self.on_connection(values, OfConnection::SourceIp),
            Condition::RemoteIp(values) => self.on_request(values, OfRequest::RemoteIp),
            Condition::SourceNamespace(values) => self.on_connection(values, OfConnection::Namespace),
            Condition::SourcePrincipal(values) => self.on_connection(values, OfConnection::Principal),
            Condition::SourceServiceAccount(values) => {
                self.on_connection(values, OfConnection::ServiceAccount)
            }
            Condition::SourceTrustDomain(values) => self.on_connection(values, OfConnection::TrustDomain),
            Condition::DestinationIp(values) => self.on_connection(values, OfConnection::DestinationIp),
            Condition::DestinationPort(values) => self.on_connection(values, OfConnection::DestinationPort),
            Condition::ConnectionSni(values) => self.on_connection(values, OfConnection::Sni),
            Condition::RequestPrincipal(values) => self.on_request(values, OfRequest::RequestPrincipal),
            Condition::RequestAudiences(values) => {
                self.on_request(values, |values| OfRequest::Claim(Claim::named("aud", "audience"), values));
            }
            Condition::RequestPresenter(values) => {
                self.on_request(values, |values| OfRequest::Claim(Claim::named("azp", "presenter"), values));
            }
            Condition::RequestClaim(path, values) => {
                self.on_request(values, |values| OfRequest::Claim(Claim::new(path), values));
            }
            Condition::FilterMetadata(key, values) => {
                self.on_request(values, |values| OfRequest::Metadata(Metadata::new(key), values));
            }
        }
    }

    fn on_connection<T: Clone>(&mut self, values: &Values<T>, check: impl FnOnce(Values<T>) -> OfConnection) {
        if !values.is_empty() {
            self.connection.push(check(values.clone()));
        }
    }

    fn on_request<T: Clone>(&mut self, values: &Values<T>, check: impl FnOnce(Values<T>) -> OfRequest) {
        if !values.is_empty() {
            self.request.push(check(values.clone()));
        }
    }

    fn hold_for(&self, facts: &ConnectionFacts) -> bool {
        self.connection.iter().all(|check| check.holds(facts))
    }

    fn hold_of(&self, asked: &Asked<'_>) -> bool {
        self.request.iter().all(|check| check.holds(asked))
    }

    fn distance(&self, asked: &Asked<'_>) -> usize {
        let of_connection = self.connection.iter().filter(|check| !check.holds(asked.facts)).count();
        of_connection + self.request.iter().filter(|check| !check.holds(asked)).count()
    }

    fn first_miss(&self, asked: &Asked<'_>) -> Option<Miss> {
        let of_connection = self.connection.iter().find(|check| !check.holds(asked.facts));
        let of_request = || self.request.iter().find(|check| !check.holds(asked));
        of_connection
            .map(|check| check.miss(asked.facts))
            .or_else(|| of_request().map(|check| check.miss(asked)))
    }
}
