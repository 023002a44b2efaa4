//! The client's side of delta ADS without its I/O: responses in, changes and answers out.
//!
//! What is held is remembered by name and version, so that a reconnect transfers only differences. Every response
//! has exactly one answer. Resources are taken one by one: a bad one is refused by name, its siblings apply, and its
//! previous version stays.

use crate::authorization::{authorization_from_bytes, stand_in};
use crate::workload::address_from_proto;
use crate::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Object, ObjectEvent, ResourceError};
use cairn_mesh::{Change, ResourceName};
use cairn_proto::discovery::{
    BadRequest, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status, bad_request,
};
use cairn_proto::workload::Address;
use prost::Message;
use prost_types::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// What a [`Object`]'s changes are. It is given what happened to an object of one of the subscribed types, and
/// answers with changes, or with the reason to refuse it.
pub type ObjectDecoder = Box<dyn Fn(&ObjectEvent) -> Result<Vec<Change>, String> + Send>;

/// gRPC's INVALID_ARGUMENT.
const INVALID_ARGUMENT: i32 = 3;
/// What stands for every name.
const EVERYTHING: &str = "*";
const BAD_REQUEST_TYPE: &str = "type.googleapis.com/google.rpc.BadRequest";
/// At most so many refused resources are named in one answer, which a server may limit to 8 KiB of header-like text.
const REFUSED_NAMED_MAX: usize = 16;
/// Names and versions of one request take at most so many bytes: servers read messages of up to 4 MiB (gRPC's default).
const VERSIONS_BYTES_MAX: usize = 3 << 20;
/// What each of them takes beside its texts.
const VERSION_BYTES: usize = 16;
/// At most so much of a reason is sent.
const REASON_CHARS_MAX: usize = 256;

/// Something to report about a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The resource's type.
    pub type_url: Arc<str>,
    /// The resource's name.
    pub name: String,
    /// What is wrong.
    pub reason: String,
    /// Whether the resource was refused; otherwise it is in force, on the safe side of what was not understood.
    pub refused: bool,
}

/// What came of one response.
#[derive(Debug)]
pub(crate) struct Received {
    /// What to answer.
    pub(crate) answer: DeltaDiscoveryRequest,
    /// Which subscription it was for; `None` if for none.
    pub(crate) subscription: Option<usize>,
    /// The changes, in order.
    pub(crate) changes: Vec<Change>,
    /// What to report.
    pub(crate) problems: Vec<Problem>,
    /// The names of resources about which there is nothing to report, any more.
    pub(crate) settled: Vec<String>,
    /// The server's generation, if it is one of ours.
    pub(crate) generation: Option<u64>,
    /// Of a type that is asked for by name: the names about which something was said, and whether there is anything.
    pub(crate) answered: Vec<(String, bool)>,
}

/// The state of the protocol, over all connections.
pub(crate) struct Session {
    node: Node,
    subscriptions: Vec<Subscription>,
}

struct Subscription {
    type_url: Arc<str>,
    /// What is held, by resource name.
    held: HashMap<String, Held>,
    /// Whether resources are held in their wire form as well, to be kept on disk.
    has_records: bool,
    /// What is held was kept on disk, and no server has said anything yet.
    is_restored: bool,
    /// What is held and there was no room for in the first request: the server's first word says whether it is still there.
    untold: HashSet<String>,
    /// Resources are asked for by name.
    is_on_demand: bool,
}

struct Held {
    /// `""` for what only stands in for a refused resource.
    version: Box<str>,
    kind: HeldKind,
    /// The resource as it came.
    record: Option<Arc<[u8]>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum HeldKind {
    Workload,
    Service,
    Authorization,
    Object,
}

impl Session {
    /// A session that subscribes to L4 policies, then to workloads and services, then to these types of objects.
    pub(crate) fn new(node: Node, object_types: impl IntoIterator<Item = String>) -> Self {
        let own = [AUTHORIZATION_TYPE.to_owned(), ADDRESS_TYPE.to_owned()];
        let subscription = |type_url: String| Subscription {
            type_url: type_url.into(),
            held: HashMap::new(),
            has_records: false,
            is_restored: false,
            untold: HashSet::new(),
            is_on_demand: false,
        };
        Self { node, subscriptions: own.into_iter().chain(object_types).map(subscription).collect() }
    }

    /// How many types are subscribed.
    pub(crate) fn subscription_count(&self) -> usize {
        self.subscriptions.len()
    }

    /// Holds policies, workloads and services in their wire form from now on. Objects are not: what is in them does not say
    /// which subscription they came by.
    pub(crate) fn hold_records(&mut self) {
        let own = |it: &&mut Subscription| [AUTHORIZATION_TYPE, ADDRESS_TYPE].contains(&&*it.type_url);
        self.subscriptions.iter_mut().filter(own).for_each(|subscription| subscription.has_records = true);
    }

    /// Asks for workloads and services by name from now on. Returns which subscription that is.
    pub(crate) fn ask_by_name(&mut self) -> Option<usize> {
        let index = self.subscriptions.iter().position(|it| *it.type_url == *ADDRESS_TYPE)?;
        self.subscriptions.get_mut(index)?.is_on_demand = true;
        Some(index)
    }

    /// The request for more names, and for fewer.
    pub(crate) fn ask(&self, names: Vec<String>, given_up: Vec<String>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest { resource_names_unsubscribe: given_up, ..asking(names) }
    }

    /// Every resource that is held in its wire form.
    pub(crate) fn records(&self) -> Vec<Arc<[u8]>> {
        let held = self.subscriptions.iter().flat_map(|subscription| subscription.held.values());
        held.filter_map(|held| held.record.clone()).collect()
    }

    /// Takes what was kept of an earlier session, as if a server had said it. The first word of a server about a type
    /// replaces all of it. Returns what came of each type.
    pub(crate) fn restore(
        &mut self,
        resources: Vec<Resource>,
        decoder: Option<&ObjectDecoder>,
    ) -> Vec<Received> {
        let mut by_type: HashMap<String, Vec<Resource>> = HashMap::new();
        for resource in resources {
            let type_url = resource.resource.as_ref().map(|content| content.type_url.clone());
            by_type.entry(type_url.unwrap_or_default()).or_default().push(resource);
        }
        let mut restored = Vec::new();
        for subscription in &mut self.subscriptions {
            let Some(resources) = by_type.remove(&*subscription.type_url) else { continue };
            let mut received = Received::of(&subscription.type_url);
            for resource in resources {
                subscription.put(resource, decoder, &mut received);
            }
            subscription.is_restored = true;
            restored.push(received);
        }
        restored
    }

    /// The first requests of a connection: one subscription per type, with what is held. It is to everything, or, where
    /// names are asked for, to what is held and to these names (facts: the ztunnel's on-demand mode subscribes to
    /// everything and unsubscribes from it, and what is waited for has the version ""). No request is larger than servers
    /// read: what it has no room for is sent by the server as if it were new, or asked for by name in further ones.
    pub(crate) fn connect(&mut self, waiting: &[String]) -> Vec<DeltaDiscoveryRequest> {
        let node = &self.node;
        let mut further = Vec::new();
        let mut first: Vec<DeltaDiscoveryRequest> = Vec::new();
        for subscription in &mut self.subscriptions {
            let waiting = if subscription.is_on_demand { waiting } else { &[] };
            let (versions, left) = subscription.versions(waiting);
            let mut request = DeltaDiscoveryRequest {
                node: Some(node.clone()),
                type_url: subscription.type_url.to_string(),
                initial_resource_versions: versions,
                ..DeltaDiscoveryRequest::default()
            };
            if subscription.is_on_demand {
                request.resource_names_subscribe = vec![EVERYTHING.to_owned()];
                request.resource_names_unsubscribe = vec![EVERYTHING.to_owned()];
                further.extend(in_pieces(left).map(asking));
            } else {
                subscription.untold = left.into_iter().collect();
            }
            first.push(request);
        }
        first.append(&mut further);
        first
    }

    /// Takes one response.
    pub(crate) fn receive(
        &mut self,
        response: DeltaDiscoveryResponse,
        decoder: Option<&ObjectDecoder>,
    ) -> Received {
        let mut received = Received::of(&response.type_url);
        received.answer.response_nonce = response.nonce;
        received.generation = generation(&response.system_version_info);
        let of_type = |subscription: &Subscription| *subscription.type_url == *response.type_url;
        let Some(index) = self.subscriptions.iter().position(of_type) else {
            let reason = "not subscribed".to_owned();
            let problem =
                Problem { type_url: response.type_url.into(), name: String::new(), reason, refused: true };
            received.answer.error_detail = Some(refusal(std::slice::from_ref(&problem)));
            received.problems.push(problem);
            return received;
        };
        received.subscription = Some(index);
        if let Some(subscription) = self.subscriptions.get_mut(index) {
            if subscription.is_on_demand {
                let removed = response.removed_resources.iter().map(|name| (name.clone(), false));
                received.answered.extend(removed);
                for resource in &response.resources {
                    let names = resource.aliases.iter().chain([&resource.name]);
                    received.answered.extend(names.map(|name| (name.clone(), true)));
                }
            }
            let unsaid = subscription.unsaid(&response.resources);
            for name in response.removed_resources.into_iter().chain(unsaid) {
                subscription.remove(name, decoder, &mut received);
            }
            for resource in response.resources {
                subscription.put(resource, decoder, &mut received);
            }
        }
        let refused: Vec<Problem> = received.problems.iter().filter(|it| it.refused).cloned().collect();
        if !refused.is_empty() {
            received.answer.error_detail = Some(refusal(&refused));
        }
        received
    }
}

impl Received {
    /// Nothing yet, of this type.
    fn of(type_url: &str) -> Self {
        let answer = DeltaDiscoveryRequest { type_url: type_url.to_owned(), ..Default::default() };
        Self {
            answer,
            subscription: None,
            changes: Vec::new(),
            problems: Vec::new(),
            settled: Vec::new(),
            generation: None,
            answered: Vec::new(),
        }
    }
}

/// The request for these names.
fn asking(names: Vec<String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_owned(),
        resource_names_subscribe: names,
        ..DeltaDiscoveryRequest::default()
    }
}

/// As many as one request has room for at a time.
fn in_pieces(mut names: Vec<String>) -> impl Iterator<Item = Vec<String>> {
    std::iter::from_fn(move || {
        let mut room = Room::default();
        let count = names.iter().take_while(|name| room.take(name, "")).count();
        // One alone is never larger than a message.
        let rest = names.split_off(count.max(1).min(names.len()));
        Some(std::mem::replace(&mut names, rest)).filter(|piece| !piece.is_empty())
    })
}

/// What a request has room for still.
struct Room(usize);

impl Default for Room {
    fn default() -> Self {
        Self(VERSIONS_BYTES_MAX)
    }
}

impl Room {
    /// Takes room for a name and a version; false if there is none.
    fn take(&mut self, name: &str, version: &str) -> bool {
        let left = self.0.checked_sub(name.len() + version.len() + VERSION_BYTES);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }
}

impl Subscription {
    /// What is held, and what is waited for, as a connection's first request says it; and the names of which it cannot.
    fn versions(&self, waiting: &[String]) -> (BTreeMap<String, String>, Vec<String>) {
        let (mut versions, mut left, mut room) = (BTreeMap::new(), Vec::new(), Room::default());
        let waiting = waiting.iter().map(|name| (name, ""));
        // What was kept on disk is replaced whole: nobody vouches that this server remembers what is gone since.
        let held = self.held.iter().filter(|_| !self.is_restored).map(|(name, held)| (name, &*held.version));
        for (name, version) in waiting.chain(held) {
            if room.take(name, version) {
                versions.insert(name.clone(), version.to_owned());
            } else {
                left.push(name.clone());
            }
        }
        (versions, left)
    }

    /// What is held, but not in the first word of a server that was not told of it.
    fn unsaid(&mut self, said: &[Resource]) -> Vec<String> {
        let untold = std::mem::take(&mut self.untold);
        let is_restored = std::mem::take(&mut self.is_restored);
        if !is_restored && untold.is_empty() {
            return Vec::new();
        }
        let said: HashSet<&str> = said.iter().map(|resource| resource.name.as_str()).collect();
        let held = self.held.keys().filter(|name| is_restored || untold.contains(name.as_str()));
        held.filter(|name| !said.contains(name.as_str())).cloned().collect()
    }

    fn remove(&mut self, name: String, decoder: Option<&ObjectDecoder>, received: &mut Received) {
        let Some(held) = self.held.remove(&name) else {
            received.settled.push(name);
            return;
        };
        match held.kind {
            HeldKind::Workload => received.changes.push(Change::WorkloadRemoved(name.as_str().into())),
            HeldKind::Service => {
                received.changes.extend(ResourceName::parse(&name).map(Change::ServiceRemoved));
            }
            HeldKind::Authorization => {
                received.changes.extend(ResourceName::parse(&name).map(Change::AuthorizationRemoved));
            }
            HeldKind::Object => {
                let parsed = ResourceName::parse(&name);
                let event =
                    parsed.map(|name| ObjectEvent::Removed { type_url: self.type_url.to_string(), name });
                match event.map(|event| decode(decoder, &event)) {
                    Some(Ok(changes)) => received.changes.extend(changes),
                    Some(Err(error)) => {
                        return received.problems.push(self.problem(name, error.to_string(), true));
                    }
                    None => {}
                }
            }
        }
        received.settled.push(name);
    }

    fn put(&mut self, resource: Resource, decoder: Option<&ObjectDecoder>, received: &mut Received) {
        let record = self.has_records.then(|| resource.encode_to_vec().into());
        let Resource { name, version, resource: content, .. } = resource;
        let content = content.unwrap_or_default();
        match self.read(&name, &content, decoder) {
            Ok(read) => {
                received.changes.extend(read.changes);
                self.held.insert(name.clone(), Held { version: version.into(), kind: read.kind, record });
                if read.not_understood.is_empty() {
                    received.settled.push(name);
                } else {
                    received.problems.push(self.problem(name, read.not_understood.join("; "), false));
                }
            }
            Err(error) => {
                if *self.type_url == *AUTHORIZATION_TYPE
                    && !self.held.contains_key(&name)
                    && let Some(parsed) = ResourceName::parse(&name)
                {
                    received.changes.push(Change::Authorization(stand_in(parsed, &content.value)));
                    let held = Held { version: "".into(), kind: HeldKind::Authorization, record };
                    self.held.insert(name.clone(), held);
                }
                received.problems.push(self.problem(name, error.to_string(), true));
            }
        }
    }

    fn read(
        &self,
        name: &str,
        content: &Any,
        decoder: Option<&ObjectDecoder>,
    ) -> Result<ReadResource, ResourceError> {
        let mut not_understood = Vec::new();
        let (changes, kind) = match &*self.type_url {
            ADDRESS_TYPE => {
                let change = address_from_proto(Address::decode(self.checked(content)?)?)?;
                let (kind, own) = match &change {
                    Change::Service(service) => (HeldKind::Service, service.key().to_string()),
                    Change::Workload(workload) => (HeldKind::Workload, workload.uid.to_string()),
                    _ => return Err(ResourceError::Missing { field: "type" }),
                };
                same_name(name, &own)?;
                (vec![change], kind)
            }
            AUTHORIZATION_TYPE => {
                let read = authorization_from_bytes(self.checked(content)?)?;
                same_name(name, &read.policy.name.to_string())?;
                not_understood = read.not_understood;
                (vec![Change::Authorization(read.policy)], HeldKind::Authorization)
            }
            type_url => {
                let object = Object::from_any(type_url, content)?;
                same_name(name, &object.name.to_string())?;
                (decode(decoder, &ObjectEvent::Put(object))?, HeldKind::Object)
            }
        };
        Ok(ReadResource { changes, kind, not_understood })
    }

    /// The bytes of a content that says it is of the subscribed type.
    fn checked<'a>(&self, content: &'a Any) -> Result<&'a [u8], ResourceError> {
        if content.type_url != *self.type_url {
            return Err(ResourceError::WrongType { found: content.type_url.clone() });
        }
        Ok(&content.value)
    }

    fn problem(&self, name: String, reason: String, refused: bool) -> Problem {
        Problem { type_url: Arc::clone(&self.type_url), name, reason, refused }
    }
}

struct ReadResource {
    changes: Vec<Change>,
    kind: HeldKind,
    not_understood: Vec<String>,
}

/// A resource is removed by its name, so that must be the name its content goes by.
fn same_name(name: &str, own: &str) -> Result<(), ResourceError> {
    if name == own { Ok(()) } else { Err(ResourceError::value("name", format_args!("`{name}` of `{own}`"))) }
}

fn decode(decoder: Option<&ObjectDecoder>, event: &ObjectEvent) -> Result<Vec<Change>, ResourceError> {
    let decoder = decoder.ok_or_else(|| ResourceError::Object("no decoder for objects".to_owned()))?;
    decoder(event).map_err(ResourceError::Object)
}

/// The error that refuses these resources: readable as a text, and resource by resource.
fn refusal(refused: &[Problem]) -> Status {
    let reason = |problem: &Problem| problem.reason.chars().take(REASON_CHARS_MAX).collect::<String>();
    let violation = |problem: &Problem| bad_request::FieldViolation {
        field: problem.name.clone(),
        description: reason(problem),
    };
    let named = refused.iter().take(REFUSED_NAMED_MAX);
    let texts: Vec<String> = named.clone().map(|it| format!("{}: {}", it.name, reason(it))).collect();
    let mut message = texts.join("; ");
    if refused.len() > REFUSED_NAMED_MAX {
        message.push_str(&format!("; and {} more", refused.len() - REFUSED_NAMED_MAX));
    }
    let detail = BadRequest { field_violations: named.map(violation).collect() };
    let detail = Any { type_url: BAD_REQUEST_TYPE.to_owned(), value: detail.encode_to_vec() };
    Status { code: INVALID_ARGUMENT, message, details: vec![detail] }
}

/// Which resources an answer refuses, and why; one without a name when the client does not say which.
pub(crate) fn refused_resources(error: &Status) -> Vec<(String, String)> {
    let details = error.details.iter().filter(|detail| detail.type_url == BAD_REQUEST_TYPE);
    let violations = details.filter_map(|detail| BadRequest::decode(detail.value.as_slice()).ok());
    let named: Vec<_> = violations
        .flat_map(|detail| detail.field_violations)
        .take(REFUSED_NAMED_MAX)
        .map(|violation| (violation.field, violation.description))
        .collect();
    if named.is_empty() { vec![(String::new(), error.message.clone())] } else { named }
}

/// What marks a generation of our own server in `system_version_info`, where other servers write what they like.
const GENERATION_MARK: &str = "cairn:";

/// How our server writes a generation.
pub(crate) fn generation_text(generation: u64) -> String {
    format!("{GENERATION_MARK}{generation}")
}

fn generation(text: &str) -> Option<u64> {
    text.strip_prefix(GENERATION_MARK)?.parse().ok()
}

#[cfg(test)]
#[path = "session/tests.rs"]
mod tests;
