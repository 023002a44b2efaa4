//! The routes of one destination: compiled once, looked up for each exchange.

use crate::Failure;
use crate::matcher::Matcher;
use crate::rewrite::{HeaderOps, HostAndPath, backend_ops};
use cairn_filter::{Considered, RequestHead, Token};
use cairn_mesh::{
    BackendKind, HttpRoute, Precedence, Redirect, ResourceName, RouteFilter, RouteForm, RouteRule, Service,
};
use std::sync::Arc;

/// The routes of one destination.
#[derive(Clone, Debug)]
pub struct RouteTable {
    /// By precedence.
    entries: Vec<Entry>,
    /// Where everything goes when no route is attached.
    implicit: Option<Arc<Rule>>,
    depends_on_filters: bool,
}

#[derive(Clone, Debug)]
struct Entry {
    matcher: Matcher,
    rule: Arc<Rule>,
}

/// A rule, compiled.
#[derive(Debug)]
pub(crate) struct Rule {
    /// `namespace/name/index`, or `default`.
    pub(crate) name: Arc<str>,
    /// Requests are answered 500, for this reason.
    pub(crate) broken: Option<Arc<str>>,
    pub(crate) request: HeaderOps,
    pub(crate) response: HeaderOps,
    pub(crate) redirect: Option<Redirect>,
    pub(crate) rewrite: Option<HostAndPath>,
    backends: Vec<Backend>,
    weight: u64,
}

/// Where a share of a rule's requests goes, compiled.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) target: Target,
    /// Istio's name of the cluster.
    pub(crate) cluster: Arc<str>,
    pub(crate) request: HeaderOps,
    pub(crate) response: HeaderOps,
    pub(crate) weight: u32,
}

/// What a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A port of a service.
    Service { key: ResourceName, port: u16 },
    /// The workload that the client addressed.
    Addressed,
    /// Nothing that can be used, for this reason.
    Invalid(Arc<str>),
}

/// A rule that matches, and the prefix it matched by.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) rule: Arc<Rule>,
    pub(crate) prefix: Option<Arc<str>>,
}

/// The most rules that an explanation tells of.
const PASSED_OVER_MAX: usize = 128;

impl RouteTable {
    /// Compiles the routes of `service`'s `port` (`None`: of a workload, which has none). `routes` are those attached
    /// to it. With none, everything goes to the service; with some, what matches none is answered 404.
    pub fn compile(
        routes: &[Arc<HttpRoute>],
        service: Option<&Service>,
        port: u16,
        cluster_domain: &str,
    ) -> Self {
        let own = service.map(|service| (service, port));
        if routes.is_empty() {
            return Self {
                entries: Vec::new(),
                implicit: Some(implicit_rule(own)),
                depends_on_filters: false,
            };
        }
        let mut routes: Vec<&HttpRoute> = routes.iter().map(|route| &**route).collect();
        routes.sort_by_key(|route| route.precedence());
        let is_as_written = routes.iter().all(|route| route.form == RouteForm::VirtualService);
        let mut entries: Vec<(Precedence, Entry)> = Vec::new();
        for route in routes {
            for (index, rule) in route.rules.iter().enumerate() {
                compile_rule(route, index, rule, own, cluster_domain, &mut entries);
            }
        }
        // Those of VirtualServices are tried as written; forms are never mixed.
        if !is_as_written {
            entries.sort_by_key(|(precedence, _)| *precedence);
        }
        let entries: Vec<Entry> = entries.into_iter().map(|(_, entry)| entry).collect();
        let depends_on_filters = entries.iter().any(|entry| entry.matcher.depends_on_filters());
        Self { entries, implicit: None, depends_on_filters }
    }

    /// The rule for a request with this verified token, or `None` when there are routes and none matches.
    pub(crate) fn find(&self, head: &RequestHead, token: Option<&Token>) -> Option<Found> {
        if let Some(rule) = &self.implicit {
            return Some(Found { rule: Arc::clone(rule), prefix: None });
        }
        let entry = self.entries.iter().find(|entry| entry.matcher.matches(head, token))?;
        Some(Found { rule: Arc::clone(&entry.rule), prefix: entry.matcher.prefix().cloned() })
    }

    /// The rules that are tried before the one that [`RouteTable::find`] finds, and what each fails on.
    pub(crate) fn passed_over(&self, head: &RequestHead, token: Option<&Token>) -> Vec<Considered> {
        let missed = |entry: &Entry| {
            let because = entry.matcher.miss(head, token)?;
            Some(Considered { what: entry.rule.name.to_string(), matched: false, because })
        };
        self.entries.iter().map_while(missed).take(PASSED_OVER_MAX).collect()
    }

    /// Whether the answer may depend on the request at all.
    pub(crate) fn is_implicit(&self) -> bool {
        self.implicit.is_some()
    }

    /// Whether filters may change the answer: what they do to headers, or the token that they verify.
    pub(crate) fn depends_on_filters(&self) -> bool {
        self.depends_on_filters
    }
}

impl Rule {
    /// The backend for the point `at(total weight)` on the line of weights, with its index.
    pub(crate) fn backend(&self, at: impl FnOnce(u64) -> u64) -> Result<(usize, &Backend), Failure> {
        let none = || Failure::InvalidBackend("no backend has a weight".into());
        let mut at = match (&*self.backends, self.weight) {
            (_, 0) => return Err(none()),
            ([only], _) => return Ok((0, only)),
            (_, total) => at(total),
        };
        for (index, backend) in self.backends.iter().enumerate() {
            let weight = u64::from(backend.weight);
            if at < weight {
                return Ok((index, backend));
            }
            at -= weight;
        }
        Err(none())
    }

    /// All backends.
    pub(crate) fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.backends.iter()
    }

    /// The sum of the backends' shares.
    pub(crate) fn weight(&self) -> u64 {
        self.weight
    }

    /// The backend with this index.
    pub(crate) fn backend_at(&self, index: usize) -> Option<&Backend> {
        self.backends.get(index)
    }
}

fn implicit_rule(own: Option<(&Service, u16)>) -> Arc<Rule> {
    let (target, cluster) = match own {
        Some((service, port)) => (
            Target::Service { key: service.key(), port },
            format!("inbound-vip|{port}|http|{}", service.hostname).into(),
        ),
        None => (Target::Addressed, "encap".into()),
    };
    let backend =
        Backend { target, cluster, request: HeaderOps::default(), response: HeaderOps::default(), weight: 1 };
    Arc::new(Rule {
        name: "default".into(),
        broken: None,
        request: HeaderOps::default(),
        response: HeaderOps::default(),
        redirect: None,
        rewrite: None,
        backends: vec![backend],
        weight: 1,
    })
}

fn compile_rule(
    route: &HttpRoute,
    index: usize,
    rule: &RouteRule,
    own: Option<(&Service, u16)>,
    cluster_domain: &str,
    entries: &mut Vec<(Precedence, Entry)>,
) {
    let name: Arc<str> = format!("{}/{index}", route.name).into();
    let compiled = match &rule.broken {
        Some(reason) => broken_rule(&name, reason),
        None => match rule_of(&name, rule, own, cluster_domain) {
            Ok(rule) => rule,
            Err(reason) => broken_rule(&name, &reason.into()),
        },
    };
    let compiled = Arc::new(compiled);
    for alternative in &rule.matches {
        let precedence = alternative.precedence();
        match Matcher::compile(alternative) {
            Ok(matcher) => entries.push((precedence, Entry { matcher, rule: Arc::clone(&compiled) })),
            Err(error) => {
                // What it would match is not known: it takes what its path takes, and that is all for an expression.
                let rule = Arc::new(broken_rule(&name, &error.to_string().into()));
                entries.push((precedence, Entry { matcher: Matcher::of_path_alone(alternative), rule }));
            }
        }
    }
}

fn broken_rule(name: &Arc<str>, reason: &Arc<str>) -> Rule {
    tracing::warn!(route = %name, %reason, "a route cannot be honoured: its requests are answered 500");
    Rule {
        name: Arc::clone(name),
        broken: Some(Arc::clone(reason)),
        request: HeaderOps::default(),
        response: HeaderOps::default(),
        redirect: None,
        rewrite: None,
        backends: Vec::new(),
        weight: 0,
    }
}

fn rule_of(
    name: &Arc<str>,
    rule: &RouteRule,
    own: Option<(&Service, u16)>,
    cluster_domain: &str,
) -> Result<Rule, String> {
    let (mut request, mut response) = (HeaderOps::default(), HeaderOps::default());
    let (mut redirect, mut rewrite) = (None, None);
    for filter in &rule.filters {
        match filter {
            RouteFilter::RequestHeaders(changes) => request.extend(changes)?,
            RouteFilter::ResponseHeaders(changes) => response.extend(changes)?,
            RouteFilter::Redirect(to) => redirect = Some(to.clone()),
            RouteFilter::Rewrite(to) => rewrite = Some(HostAndPath::compile(to)?),
        }
    }
    if redirect.is_some() && rewrite.is_some() {
        return Err("a rule cannot both redirect and rewrite".into());
    }
    let mut backends = Vec::with_capacity(rule.backends.len());
    for backend in &rule.backends {
        let (request, response) = backend_ops(&backend.filters)?;
        let (target, cluster) = target_of(&backend.kind, own, cluster_domain);
        backends.push(Backend { target, cluster, request, response, weight: backend.weight });
    }
    let weight = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    Ok(Rule { name: Arc::clone(name), broken: None, request, response, redirect, rewrite, backends, weight })
}

fn target_of(kind: &BackendKind, own: Option<(&Service, u16)>, cluster_domain: &str) -> (Target, Arc<str>) {
    let (service, port) = match kind {
        BackendKind::Invalid(reason) => return (Target::Invalid(Arc::clone(reason)), "".into()),
        BackendKind::Service { service, port } => (service, *port),
        BackendKind::SamePort(service) => match own {
            Some((_, port)) => (service, port),
            None => return (Target::Invalid("a pod has no port of its service".into()), "".into()),
        },
    };
    let hostname: Arc<str> = if service.name.contains('.') {
        Arc::clone(&service.name)
    } else {
        format!("{}.{}.svc.{cluster_domain}", service.name, service.namespace).into()
    };
    let key = ResourceName { namespace: Arc::clone(&service.namespace), name: hostname };
    let is_own = own.is_some_and(|(own, own_port)| own.key() == key && own_port == port);
    let cluster = if is_own {
        format!("inbound-vip|{port}|http|{}", key.name)
    } else {
        format!("outbound|{port}||{}", key.name)
    };
    (Target::Service { key, port }, cluster.into())
}

#[cfg(test)]
#[path = "route/tests.rs"]
mod tests;
