//! Why a request would be answered as it would: the same plan, filters, routes and decisions as in traffic, told step
//! by step. Nothing is sent, no plugin runs, nobody is asked.

mod answer;
mod offline;

pub use answer::{Answer, Connection as L4Connection, End, Explanation, Line, Step, refusal};
pub use offline::offline;

use crate::sites::Table;
use answer::{considered, l4_considered};
use cairn_filter::{Admission, Connection, Exchange, Judgement, NoCallout, Peer, Protocol, Rehearsed};
use cairn_http::{Candidate, Failure, Next, Routed, Site};
use cairn_mesh::{
    AppProtocol, Decision, Destination, Identity, L4Peer, Plan, ResourceName, Snapshot, TunnelProtocol,
    Workload, candidates, consider, decide, plan, resolve,
};
use http::header::HOST;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// A request to be explained.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Who asks: the pod or service account `namespace/name`; `None`: somebody outside the mesh.
    pub from: Option<String>,
    /// Where it goes: `host:port`.
    pub to: String,
    /// The method.
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// Further headers.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unanswerable {
    /// There is no such client.
    #[error("there is no pod or service account `{0}` (written `namespace/name`)")]
    Source(String),
    /// The destination is not `host:port`, or the host is not known.
    #[error("`{0}` is not `host:port` of anything in the mesh")]
    Destination(String),
    /// It cannot be a request.
    #[error("this is no request: {0}")]
    Request(String),
}

/// A waypoint to be asked.
pub struct Place {
    /// Its Gateway.
    pub gateway: ResourceName,
    /// Who it is.
    pub identity: Identity,
    /// Its address.
    pub address: IpAddr,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) table: Arc<Table>,
}

/// The mesh as far as whoever explains knows it.
pub struct View<'a> {
    /// Its state.
    pub snapshot: &'a Snapshot,
    /// Whether the policies of ztunnels are in it.
    pub knows_l4: bool,
    /// Finds the waypoint that a workload is an instance of.
    pub waypoint: &'a dyn Fn(&Workload) -> Option<&'a Place>,
}

/// The most endpoints of one backend that are told of.
const ENDPOINTS_MAX: usize = 16;

/// Explains what would become of a request.
///
/// # Errors
/// When the question does not name a client and a destination of the mesh, or is no request.
pub fn explain(view: &View<'_>, question: &Question) -> Result<Explanation, Unanswerable> {
    let snapshot = view.snapshot;
    let source = match &question.from {
        Some(name) => Some(find_source(snapshot, name)?),
        None => None,
    };
    let namespace = source.map_or("", |source| &*source.namespace);
    let destination = find_destination(snapshot, &question.to, namespace)?;
    let mut trail = Trail { view, steps: Vec::new(), unless: Vec::new() };
    let captured = source.filter(|source| source.protocol == TunnelProtocol::Hbone);
    let answer = match captured {
        Some(source) => trail.go_by_ztunnel(source, destination, question)?,
        None => trail.go_straight(source, destination),
    };
    let who = question.from.as_deref().unwrap_or("outside the mesh");
    Ok(Explanation {
        request: format!("{} {}{} from {who}", question.method, question.to, question.path),
        steps: trail.steps,
        answer: Answer { unless: trail.unless, ..answer },
    })
}

fn find_source<'s>(snapshot: &'s Snapshot, name: &str) -> Result<&'s Arc<Workload>, Unanswerable> {
    let unknown = || Unanswerable::Source(name.to_owned());
    let wanted = ResourceName::parse(name).ok_or_else(unknown)?;
    let here = |workload: &&Arc<Workload>| workload.namespace == wanted.namespace;
    let named = |workload: &&Arc<Workload>| *workload.name == *wanted.name;
    let is_account = |workload: &&Arc<Workload>| workload.identity.service_account() == &*wanted.name;
    let first = |is_it: &dyn Fn(&&Arc<Workload>) -> bool| {
        snapshot
            .workloads()
            .filter(here)
            .filter(|workload| is_it(workload))
            .min_by_key(|found| found.uid.clone())
    };
    first(&named).or_else(|| first(&is_account)).ok_or_else(unknown)
}

fn find_destination(snapshot: &Snapshot, to: &str, namespace: &str) -> Result<SocketAddr, Unanswerable> {
    if let Ok(address) = to.parse::<SocketAddr>() {
        return Ok(address);
    }
    let unknown = || Unanswerable::Destination(to.to_owned());
    let (host, port) = to.rsplit_once(':').ok_or_else(unknown)?;
    let port = port.parse().map_err(|_| unknown())?;
    let ip = resolve(snapshot, host, namespace, &mut |_| 0).ok_or_else(unknown)?;
    Ok(SocketAddr::new(ip, port))
}

fn address(workload: &Workload) -> IpAddr {
    workload.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// The explanation while it grows.
struct Trail<'v, 'a> {
    view: &'v View<'a>,
    steps: Vec<Step>,
    unless: Vec<String>,
}

impl Trail<'_, '_> {
    fn step(&mut self, place: impl Into<String>, what: impl Into<String>, outcome: impl Into<String>) {
        self.steps.push(Step::new(place, what, outcome));
    }

    fn add_lines(&mut self, lines: Vec<Line>) {
        if let Some(last) = self.steps.last_mut() {
            last.lines.extend(lines);
        }
    }

    /// A client without a ztunnel connects straight, as plain TCP.
    fn go_straight(&mut self, source: Option<&Arc<Workload>>, destination: SocketAddr) -> Answer {
        let snapshot = self.view.snapshot;
        let said = "has no ztunnel: plain TCP straight to a pod, past any waypoint";
        self.step("client", "plan", said);
        let from =
            SocketAddr::new(source.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |source| address(source)), 0);
        let endpoints: Vec<Candidate> = match snapshot.destination(&snapshot.local(destination), "") {
            Some(Destination::Workload(workload)) => vec![Candidate { workload, address: destination }],
            Some(Destination::Service(state)) => candidates(&state, destination.port(), None)
                .into_iter()
                .map(|(endpoint, port)| Candidate {
                    workload: Arc::clone(&endpoint.workload),
                    address: SocketAddr::new(address(&endpoint.workload), port),
                })
                .collect(),
            None => return Answer::passes("goes to an address outside the mesh"),
        };
        self.arrive(&endpoints, None, from, None)
    }

    fn go_by_ztunnel(
        &mut self,
        source: &Arc<Workload>,
        destination: SocketAddr,
        question: &Question,
    ) -> Result<Answer, Unanswerable> {
        let place = format!("ztunnel of {}/{}", source.namespace, source.name);
        let from = SocketAddr::new(address(source), 0);
        let name = |workload: &Workload| format!("{}/{}", workload.namespace, workload.name);
        Ok(match plan(self.view.snapshot, source, destination, &mut |_| 0) {
            Plan::Waypoint { waypoint, service, .. } => {
                let what = match service {
                    Some(service) => format!("Service {}/{}", service.namespace, service.name),
                    None => "the pod addressed".to_owned(),
                };
                self.step(place, "plan", format!("{what} has a waypoint: through {}", name(&waypoint)));
                match (self.view.waypoint)(&waypoint) {
                    Some(at) => self.at_waypoint(at, source, destination, question)?,
                    None => {
                        let text = format!("{} is another waypoint: ask that one", name(&waypoint));
                        Answer::unknown(text)
                    }
                }
            }
            Plan::Direct { tunnel, workload, .. } => {
                self.step(place, "plan", format!("no waypoint: through a tunnel to {}", name(&workload)));
                let endpoint = Candidate { workload, address: tunnel.authority };
                self.arrive(&[endpoint], Some(&source.identity), from, None)
            }
            Plan::Cross(crossing) => {
                let gateway = name(&crossing.gateway);
                self.step(place, "plan", format!("into another network through its gateway {gateway}"));
                Answer::unknown(format!("{gateway} is a gateway: what is behind it decides"))
            }
            Plan::Resolve(workload) => {
                let hostname = &workload.hostname;
                self.step(place, "plan", format!("to an address that DNS says for {hostname}"));
                Answer::unknown(format!("only DNS knows the addresses of {hostname}"))
            }
            Plan::Plain { connect, workload, .. } => {
                let what =
                    workload.map_or_else(|| "an address outside the mesh".to_owned(), |found| name(&found));
                self.step(place, "plan", format!("plain TCP to {connect}, {what}"));
                Answer::passes("reaches an application outside the mesh")
            }
            Plan::Refuse(refusal) => {
                self.step(&*place, "plan", format!("refused: {refusal}"));
                Answer::fails(None, format!("the connection is refused by the {place}: {refusal}"))
            }
        })
    }

    fn at_waypoint(
        &mut self,
        at: &Place,
        source: &Arc<Workload>,
        destination: SocketAddr,
        question: &Question,
    ) -> Result<Answer, Unanswerable> {
        let place = format!("waypoint {}", at.gateway);
        let Some(site) = at.table.at(destination) else {
            let text = format!("{destination} is none of its destinations");
            self.step(place, "CONNECT", format!("404: {text}"));
            return Ok(Answer::fails(None, format!("the connection is refused: {text}")));
        };
        let site = site.load_full();
        let connection = Arc::new(Connection {
            id: 0,
            worker: 0,
            source: Peer {
                address: SocketAddr::new(address(source), 0),
                identity: Some(source.identity.clone()),
                workload: Some(Arc::clone(source)),
            },
            destination,
            service: site.service.clone(),
            local: Some(at.identity.clone()),
            callout: Arc::new(NoCallout),
        });
        if matches!(site.protocol, AppProtocol::Tcp | AppProtocol::Tls) {
            return Ok(self.connection(at, &place, &site, &connection));
        }
        let exchange = Exchange::new(connection, Protocol::Http11, Instant::now(), SystemTime::now());
        self.exchange(at, &place, &site, exchange, question)
    }

    /// A connection to a port that carries no HTTP.
    fn connection(&mut self, at: &Place, place: &str, site: &Site, connection: &Connection) -> Answer {
        match site.chain.admit(connection) {
            Admission::Refuse(denial) => {
                self.step(place, "connection", format!("denied by {}: {}", denial.policy, denial.reason));
                return Answer::denied(
                    None,
                    format!("the connection is denied by {place}: {}", denial.reason),
                );
            }
            Admission::Pass(by) => {
                let by = by.map_or_else(
                    || "no ALLOW policy is attached".to_owned(),
                    |by| format!("allowed by {by}"),
                );
                self.step(place, "connection", format!("the port carries no HTTP; {by}"));
            }
        }
        match site.endpoints_of_connection(&at.snapshot, connection.destination) {
            Ok(endpoints) => self.arrive_from(at, &endpoints),
            Err(failure) => Answer::fails(None, format!("{place}: {failure}")),
        }
    }

    fn exchange(
        &mut self,
        at: &Place,
        place: &str,
        site: &Site,
        mut exchange: Exchange,
        question: &Question,
    ) -> Result<Answer, Unanswerable> {
        let destination = exchange.connection.destination;
        let mut head = match site.head(request(question)?) {
            Ok(head) => head,
            Err(failure) => {
                self.step(place, "request", failure.to_string());
                return Ok(failed(place, &failure));
            }
        };
        exchange.grpc = head.is_grpc();
        exchange.route = site.route(&at.snapshot, &head, None, destination).rule;
        for one in site.chain.rehearse(&mut exchange, &mut head) {
            if let Some(answer) = self.filter(place, one, &exchange) {
                return Ok(answer);
            }
        }
        let routed = site.route(&at.snapshot, &head, exchange.token.as_deref(), destination);
        Ok(self.routed(at, place, routed))
    }

    /// What a filter came to; the answer, if it gave one.
    fn filter(&mut self, place: &str, one: Rehearsed, exchange: &Exchange) -> Option<Answer> {
        let Rehearsed { filter, considered: lines, judgement } = one;
        let what = format!("filter {filter}");
        let denial = exchange.denial.as_ref();
        let reason = denial.map_or("", |denial| &*denial.reason);
        let (outcome, answer) = match judgement {
            Judgement::Passed => match (&exchange.allowed_by, lines.is_empty()) {
                (Some(by), false) => (format!("allowed by {by}"), None),
                (None, false) => ("nothing denies it, and no ALLOW policy is attached".to_owned(), None),
                (_, true) => ("passes".to_owned(), None),
            },
            Judgement::Withheld(why) => {
                self.unless.push(format!("{filter} decides otherwise"));
                (format!("would take part, and did not here: {why}"), None)
            }
            Judgement::Replied(reply) => {
                let status = reply.status.as_u16();
                let text = format!("{status} from {place}, filter {filter}: {reason}");
                let outcome = format!("answers {status}: {reason}");
                (outcome, Some(Answer::denied(Some(status), text)))
            }
            Judgement::Ended => {
                let text = format!("{place}, filter {filter} ends the exchange without an answer");
                ("ends the exchange".to_owned(), Some(Answer::denied(None, text)))
            }
        };
        self.step(place, what, outcome);
        self.add_lines(lines.into_iter().map(considered).collect());
        let notes = exchange.notes.iter().filter(|note| *note.filter == *filter);
        self.add_lines(notes.map(|note| Line::note(&note.text)).collect());
        answer
    }

    fn routed(&mut self, at: &Place, place: &str, routed: Routed) -> Answer {
        let Routed { rule, passed_over, next } = routed;
        let rule = rule.map_or_else(|| "no rule matches".to_owned(), |rule| format!("rule {rule}"));
        self.step(place, "route", rule);
        self.add_lines(passed_over.into_iter().map(considered).collect());
        let shares = match next {
            Next::Fail(failure) => return failed(place, &failure),
            Next::Redirect(status, to) => {
                return Answer::replied(status, format!("{status} from {place}: redirected to {to}"));
            }
            Next::Send(shares) => shares,
        };
        let mut answers = Vec::new();
        for share in shares {
            let part = match share.weight == share.total {
                true => String::new(),
                false => format!(", {} of {} requests", share.weight, share.total),
            };
            self.step(place, format!("backend {}{part}", share.cluster), format!("sent as {}", share.sent));
            answers.push(match share.endpoints {
                Ok(endpoints) => self.arrive_from(at, &endpoints),
                Err(failure) => {
                    self.add_lines(vec![Line::note(&failure.to_string())]);
                    failed(place, &failure)
                }
            });
        }
        Answer::of_several(answers)
    }

    fn arrive_from(&mut self, at: &Place, endpoints: &[Candidate]) -> Answer {
        let from = SocketAddr::new(at.address, 0);
        self.arrive(endpoints, Some(&at.identity), from, Some(&at.gateway))
    }

    /// What the ztunnels of the endpoints, one of which is chosen, say of the connection.
    fn arrive(
        &mut self,
        endpoints: &[Candidate],
        identity: Option<&Identity>,
        from: SocketAddr,
        through: Option<&ResourceName>,
    ) -> Answer {
        let answers = endpoints.iter().take(ENDPOINTS_MAX).map(|endpoint| {
            let workload = &endpoint.workload;
            let name = format!("{}/{}", workload.namespace, workload.name);
            let place = format!("ztunnel of {name}");
            let what = format!("endpoint {} {name}", endpoint.address);
            if !endpoint.is_tunnelled() {
                self.step(place, what, "no ztunnel guards it: plain TCP");
                return Answer::passes(format!("reaches {name}"));
            }
            if !self.view.knows_l4 {
                self.unless.push(refusal(&place));
                self.step(
                    place,
                    what,
                    "its policies are not known here: ask a ztunnel (--ztunnel), or the manifests",
                );
                let proven = identity.map(|identity| identity.as_str().to_owned());
                let ask = L4Connection { from: proven, source: from.ip(), to: endpoint.address };
                if let Some(last) = self.steps.last_mut() {
                    last.ask = Some(ask);
                }
                return Answer::passes(format!("reaches {name}"));
            }
            let peer = L4Peer { identity, source: from, destination: endpoint.address };
            let decision = decide(self.view.snapshot, workload, &peer);
            let (outcome, answer) = arrived(&decision, &name, through);
            self.step(place, what, outcome);
            self.add_lines(consider(self.view.snapshot, workload, &peer).iter().map(l4_considered).collect());
            answer
        });
        let answers: Vec<Answer> = answers.collect();
        if answers.is_empty() {
            return Answer::fails(None, "no endpoint is ready".to_owned());
        }
        Answer::of_several(answers)
    }
}

/// The answer that a ztunnel's decision leads to. A client with a waypoint in between gets its 503.
fn arrived(decision: &Decision, name: &str, through: Option<&ResourceName>) -> (String, Answer) {
    match decision {
        Decision::Allow(by) => {
            let by = match by {
                Some((policy, rule)) => format!("allowed by {policy} rule {rule}"),
                None => "nothing denies it, and no ALLOW policy applies".to_owned(),
            };
            (by, Answer::passes(format!("reaches {name}")))
        }
        Decision::Deny(reason) => {
            let status =
                through.and_then(|_| Failure::Connect("").answer().status).map(|status| status.as_u16());
            let text = match (status, through) {
                (Some(status), Some(waypoint)) => {
                    format!("{status} from waypoint {waypoint}: the ztunnel of {name} refuses it: {reason}")
                }
                _ => format!("the connection is refused by the ztunnel of {name}: {reason}"),
            };
            (format!("denied: {reason}"), Answer::denied(status, text))
        }
    }
}

fn failed(place: &str, failure: &Failure) -> Answer {
    let status = failure.answer().status.map(|status| status.as_u16());
    let shown = status.map_or_else(String::new, |status| format!("{status} from "));
    Answer::fails(status, format!("{shown}{place}: {failure}"))
}

/// The request as an HTTP/1.1 client sends it.
fn request(question: &Question) -> Result<http::Request<()>, Unanswerable> {
    let mut request = http::Request::builder().method(&*question.method).uri(&*question.path);
    let names_host = question.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case(HOST.as_str()));
    if !names_host {
        request = request.header(HOST, question.to.trim_end_matches(":80"));
    }
    for (name, value) in &question.headers {
        request = request.header(name, value);
    }
    request.body(()).map_err(|error| Unanswerable::Request(error.to_string()))
}
