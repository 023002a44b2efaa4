//! Why a connection would go where it goes, and be let in or not: the same plan and decision as in traffic, on the mesh as
//! this ztunnel knows it. Nothing is sent.

use cairn_mesh::{
    Decision, Destination, Identity, L4Peer, Plan, ResourceName, Snapshot, TunnelProtocol, Workload,
    consider, decide, plan, resolve,
};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// A connection to be explained.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Who connects: a pod or service account `namespace/name`, whose own ztunnel is asked first; or an identity
    /// `spiffe://…`, that of the other end of a tunnel; `None`: somebody without identity.
    pub from: Option<String>,
    /// The address that the connection comes from; left out: the pod's.
    #[serde(default)]
    pub source: Option<IpAddr>,
    /// Where it goes: `host:port`.
    pub to: String,
    /// What a waypoint would be asked as well: HTTP is not looked at here.
    #[serde(default, rename = "method")]
    pub _method: IgnoredAny,
    /// Likewise.
    #[serde(default, rename = "path")]
    pub _path: IgnoredAny,
    /// Likewise.
    #[serde(default, rename = "headers")]
    pub _headers: IgnoredAny,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unanswerable {
    /// There is no such client.
    #[error("there is no pod or service account `{0}` (written `namespace/name`), nor is it an identity")]
    Source(String),
    /// The destination is not `host:port`, or nothing in the mesh.
    #[error("`{0}` is not `host:port` of anything in the mesh")]
    Destination(String),
}

/// What would become of a connection, in the form in which waypoints explain requests.
#[derive(Debug, Serialize)]
pub struct Explanation {
    request: String,
    steps: Vec<Step>,
    answer: Answer,
}

#[derive(Debug, Serialize)]
struct Step {
    place: String,
    what: &'static str,
    outcome: String,
    lines: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    what: String,
    matched: bool,
    because: String,
}

#[derive(Debug, Serialize)]
struct Answer {
    end: &'static str,
    text: String,
}

/// Explains what would become of a connection.
///
/// # Errors
/// When the question does not name a client and a destination of the mesh.
pub fn explain(snapshot: &Snapshot, question: &Question) -> Result<Explanation, Unanswerable> {
    let client = Client::find(snapshot, question)?;
    let namespace = client.workload().map_or("", |workload| &*workload.namespace);
    let destination = find_destination(snapshot, &question.to, namespace)?;
    let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let own = client.workload().and_then(|workload| workload.addresses.first().copied());
    let source = SocketAddr::new(question.source.or(own).unwrap_or(unspecified), 0);
    let mut trail = Trail { snapshot, source, steps: Vec::new() };
    let answer = match &client {
        Client::Pod(workload) if workload.protocol == TunnelProtocol::Hbone => {
            trail.leave(workload, destination)
        }
        Client::Pod(_) | Client::Nobody => trail.arrive_at(None, destination)?,
        Client::Proven(identity) => trail.arrive_at(Some(identity), destination)?,
    };
    let who = question.from.as_deref().unwrap_or("outside the mesh");
    Ok(Explanation { request: format!("{} from {who}", question.to), steps: trail.steps, answer })
}

/// Who connects.
enum Client {
    Pod(Arc<Workload>),
    Proven(Identity),
    Nobody,
}

impl Client {
    fn find(snapshot: &Snapshot, question: &Question) -> Result<Self, Unanswerable> {
        let Some(from) = &question.from else { return Ok(Self::Nobody) };
        if let Ok(identity) = from.parse() {
            return Ok(Self::Proven(identity));
        }
        let unknown = || Unanswerable::Source(from.clone());
        let wanted = ResourceName::parse(from).ok_or_else(unknown)?;
        let here = snapshot.workloads().filter(|workload| workload.namespace == wanted.namespace);
        let rank = |workload: &Workload| match () {
            () if *workload.name == *wanted.name => Some(0),
            () if workload.identity.service_account() == &*wanted.name => Some(1),
            () => None,
        };
        let ranked = here.filter_map(|workload| Some((rank(workload)?, &workload.uid, workload)));
        let first = ranked.min_by_key(|(rank, uid, _)| (*rank, Arc::clone(uid)));
        first.map(|(_, _, workload)| Self::Pod(Arc::clone(workload))).ok_or_else(unknown)
    }

    fn workload(&self) -> Option<&Workload> {
        match self {
            Self::Pod(workload) => Some(workload),
            Self::Proven(_) | Self::Nobody => None,
        }
    }
}

fn find_destination(snapshot: &Snapshot, to: &str, namespace: &str) -> Result<SocketAddr, Unanswerable> {
    if let Ok(address) = to.parse::<SocketAddr>() {
        return Ok(address);
    }
    let unknown = || Unanswerable::Destination(to.to_owned());
    let (host, port) = to.rsplit_once(':').ok_or_else(unknown)?;
    let ip = resolve(snapshot, host, namespace, &mut |_| 0).ok_or_else(unknown)?;
    Ok(SocketAddr::new(ip, port.parse().map_err(|_| unknown())?))
}

/// The explanation while it grows.
struct Trail<'s> {
    snapshot: &'s Snapshot,
    source: SocketAddr,
    steps: Vec<Step>,
}

fn name(workload: &Workload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}

impl Trail<'_> {
    fn step(&mut self, place: String, what: &'static str, outcome: String) {
        self.steps.push(Step { place, what, outcome, lines: Vec::new() });
    }

    /// At the client's own ztunnel.
    fn leave(&mut self, client: &Workload, destination: SocketAddr) -> Answer {
        let place = format!("ztunnel of {}", name(client));
        match plan(self.snapshot, client, destination, &mut |_| 0) {
            Plan::Waypoint { waypoint, .. } => {
                let waypoint = name(&waypoint);
                self.step(place, "plan", format!("through waypoint {waypoint}"));
                Answer { end: "unknown", text: format!("{waypoint} is a waypoint: ask that") }
            }
            Plan::Direct { tunnel, workload, .. } => {
                self.step(place, "plan", format!("no waypoint: through a tunnel to {}", name(&workload)));
                self.arrive(&workload, Some(&client.identity), tunnel.authority)
            }
            Plan::Cross(crossing) => {
                let gateway = name(&crossing.gateway);
                self.step(place, "plan", format!("into another network through its gateway {gateway}"));
                Answer { end: "unknown", text: format!("{gateway} is a gateway: what is behind it decides") }
            }
            Plan::Resolve(workload) => {
                let hostname = &workload.hostname;
                self.step(place, "plan", format!("to an address that DNS says for {hostname}"));
                Answer { end: "unknown", text: format!("only DNS knows the addresses of {hostname}") }
            }
            Plan::Plain { connect, .. } => {
                self.step(place, "plan", format!("plain TCP to {connect}"));
                Answer { end: "passes", text: "reaches an application outside the mesh".to_owned() }
            }
            Plan::Refuse(refusal) => {
                self.step(place.clone(), "plan", format!("refused: {refusal}"));
                Answer { end: "fails", text: format!("the connection is refused by the {place}: {refusal}") }
            }
        }
    }

    /// At the ztunnel of the workload with this address.
    fn arrive_at(
        &mut self,
        identity: Option<&Identity>,
        destination: SocketAddr,
    ) -> Result<Answer, Unanswerable> {
        match self.snapshot.destination(&self.snapshot.local(destination), "") {
            Some(Destination::Workload(workload)) => Ok(self.arrive(&workload, identity, destination)),
            Some(Destination::Service(_)) | None => Err(Unanswerable::Destination(destination.to_string())),
        }
    }

    fn arrive(
        &mut self,
        workload: &Workload,
        identity: Option<&Identity>,
        destination: SocketAddr,
    ) -> Answer {
        let place = format!("ztunnel of {}", name(workload));
        if workload.protocol != TunnelProtocol::Hbone {
            self.step(place, "connection", "no ztunnel guards it: plain TCP".to_owned());
            return Answer { end: "passes", text: format!("reaches {}", name(workload)) };
        }
        let peer = L4Peer { identity, source: self.source, destination };
        let (outcome, answer) = match decide(self.snapshot, workload, &peer) {
            Decision::Allow(by) => {
                let by = match by {
                    Some((policy, rule)) => format!("allowed by {policy} rule {rule}"),
                    None => "nothing denies it, and no ALLOW policy applies".to_owned(),
                };
                (by, Answer { end: "passes", text: format!("reaches {}", name(workload)) })
            }
            Decision::Deny(reason) => {
                let text = format!("the connection is refused by the {place}: {reason}");
                (format!("denied: {reason}"), Answer { end: "denied", text })
            }
        };
        let line = |one: &cairn_mesh::L4Considered| Line {
            what: one.what(),
            matched: one.matched,
            because: one.because.clone(),
        };
        let lines = consider(self.snapshot, workload, &peer).iter().map(line).collect();
        self.steps.push(Step { place, what: "connection", outcome, lines });
        answer
    }
}

#[cfg(test)]
#[path = "explain/tests.rs"]
mod tests;
