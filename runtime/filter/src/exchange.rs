//! What is known of one exchange while it lives: the facts filters read, and the trail they leave.

use crate::{Callout, Denial, Metadata, Token};
use cairn_mesh::{Identity, Service, Workload};
use http::StatusCode;
use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Who is at the other end of a tunnel.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The client's own address: the TCP peer of the tunnel, which keeps the pod's IP.
    pub address: SocketAddr,
    /// The identity proven in the TLS handshake.
    pub identity: Option<Identity>,
    /// The workload at that address with that identity, if the mesh knows it.
    pub workload: Option<Arc<Workload>>,
}

/// What is the same for all exchanges of one tunnelled connection.
#[derive(Debug)]
pub struct Connection {
    /// Numbers connections within the process, for plugins and logs.
    pub id: u64,
    /// The worker that owns the connection: 0 up to the number of workers. Filters index per-worker state with it.
    pub worker: usize,
    /// The client.
    pub source: Peer,
    /// Where the client meant to go: the service's VIP and port, or a pod's IP and port.
    pub destination: SocketAddr,
    /// The service at that VIP; `None` for traffic addressed to a pod.
    pub service: Option<Arc<Service>>,
    /// The waypoint's own identity.
    pub local: Option<Identity>,
    /// How filters at work on this connection ask other services.
    pub callout: Arc<dyn Callout>,
}

/// The protocol of an exchange, as metrics and plugins name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// None that is known: the bytes of a connection.
    Tcp,
}

impl Protocol {
    /// `HTTP/1.1` and so on, as in access logs and in the plugin property `request.protocol`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
            Self::Tcp => "TCP",
        }
    }
}

/// One thing that a filter did to an exchange, for the explanation.
#[derive(Clone, Debug)]
pub struct Note {
    /// The filter's [`crate::Factory::name`].
    pub filter: Arc<str>,
    /// What it did, in a few words.
    pub text: Cow<'static, str>,
}

/// What was measured of an exchange that is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measures {
    /// Bytes of the request's body.
    pub request_body_bytes: u64,
    /// Bytes of the request, about as HTTP/1.1 writes them.
    pub request_bytes: u64,
    /// Bytes of the response's body.
    pub response_body_bytes: u64,
    /// Bytes of the response, about as HTTP/1.1 writes them.
    pub response_bytes: u64,
    /// How often the request was sent.
    pub attempts: u32,
    /// From the request's way upstream to the response's head.
    pub upstream_duration: Option<Duration>,
    /// Envoy's response flags, joined by commas; `-` for none.
    pub flags: &'static str,
    /// The gRPC status of the answer, if it had one.
    pub grpc_status: Option<u8>,
}

/// The most notes kept of one exchange; further ones are dropped.
pub const NOTES_MAX: usize = 16;

/// One exchange: the facts known so far, filled in as it proceeds.
#[derive(Debug)]
pub struct Exchange {
    /// The connection it came on.
    pub connection: Arc<Connection>,
    /// When its head arrived, for durations.
    pub started: Instant,
    /// When its head arrived, for people.
    pub started_at: SystemTime,
    /// What the client spoke.
    pub protocol: Protocol,
    /// Whether local replies are gRPC statuses.
    pub grpc: bool,
    /// The name of the route rule in force, `ns/name/rule-index`, or `default`; `None` when none matches.
    pub route: Option<Arc<str>>,
    /// The chosen cluster, in Istio's naming, once known.
    pub cluster: Option<Arc<str>>,
    /// The chosen endpoint's address, once known.
    pub upstream: Option<SocketAddr>,
    /// The chosen endpoint's workload, once known.
    pub upstream_workload: Option<Arc<Workload>>,
    /// What was measured of it, once it is over.
    pub measures: Option<Measures>,
    /// The answer's status, once known.
    pub status: Option<StatusCode>,
    /// Envoy's `%RESPONSE_CODE_DETAILS%`, once known.
    pub details: Cow<'static, str>,
    /// What a verified token says of the requester; `None` without one.
    pub token: Option<Arc<Token>>,
    /// What filters have said of it, by Envoy's names.
    pub metadata: Metadata,
    /// The policy that allowed the exchange, as Istio names it; `None` when no ALLOW policy was in force.
    pub allowed_by: Option<Arc<str>>,
    /// Who denied it, if it was denied.
    pub denial: Option<Denial>,
    /// What filters did, at most [`NOTES_MAX`].
    pub notes: Vec<Note>,
}

impl Exchange {
    /// A new exchange on `connection`, with nothing known but its protocol.
    pub fn new(connection: Arc<Connection>, protocol: Protocol, now: Instant, wall: SystemTime) -> Self {
        Self {
            connection,
            started: now,
            started_at: wall,
            protocol,
            grpc: false,
            route: None,
            cluster: None,
            upstream: None,
            upstream_workload: None,
            measures: None,
            status: None,
            details: Cow::Borrowed(""),
            token: None,
            metadata: Metadata::default(),
            allowed_by: None,
            denial: None,
            notes: Vec::new(),
        }
    }

    /// Records what a filter did.
    pub fn note(&mut self, filter: &Arc<str>, text: impl Into<Cow<'static, str>>) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(Note { filter: Arc::clone(filter), text: text.into() });
        }
    }
}
