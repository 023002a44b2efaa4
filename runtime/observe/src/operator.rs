//! The operators of access log formats and the values they stand for (Envoy's "command operators").

use crate::Expression;
use crate::clock::TimeFormat;
use crate::facts::{Facts, Header, PeerField, Side, value_of};
use crate::json::append_json_bytes;
use cairn_telemetry::{Wants, append_address, append_bytes, append_number};
use http::HeaderMap;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;

/// One operator.
#[derive(Clone, Debug)]
pub(crate) enum Operator {
    StartTime(TimeFormat),
    Request(Header, Option<Header>),
    RequestWithoutQuery(Header, Option<Header>),
    Response(Header, Option<Header>),
    Trailer(Header, Option<Header>),
    Cel(Arc<Expression>),
    Peer(Side, PeerForm),
    LocalIdentity,
    /// What filters said: a namespace, and the keys that lead to a value in it.
    Metadata(Vec<String>),
    /// A claim of the verified token, or all as JSON.
    Claim(Vec<String>),
    GrpcStatus(StatusForm),
    Environment(String),
    Protocol,
    ResponseCode,
    ResponseFlags,
    ResponseFlagsLong,
    ResponseCodeDetails,
    BytesReceived,
    BytesSent,
    Duration,
    ResponseDuration,
    UpstreamHost(Part),
    UpstreamLocal(Part),
    UpstreamFailure,
    UpstreamCluster,
    DownstreamLocal(Part),
    DownstreamRemote(Part),
    RouteName,
    Attempts,
    TraceId,
    Hostname,
    ConnectionId,
    /// Known, and never there inside a waypoint: names of TLS, and why a connection that is over was ended.
    Absent,
}

/// What is said of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerForm {
    /// One of its fields.
    Field(PeerField),
    /// All of them, which in JSON are a map.
    Fields,
    /// All of them, which in JSON are one text.
    Text,
}

/// How a gRPC status is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StatusForm {
    Camel,
    Snake,
    Number,
}

/// Which part of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    Ip,
    Port,
}

/// Whether an operator had something to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    Something,
    Nothing,
}

/// The names of gRPC's statuses.
const STATUSES: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

/// The long names of the response flags that occur here.
const FLAGS: [(&str, &str); 12] = [
    ("UH", "NoHealthyUpstream"),
    ("UF", "UpstreamConnectionFailure"),
    ("UO", "UpstreamOverflow"),
    ("NR", "NoRouteFound"),
    ("UR", "UpstreamRemoteReset"),
    ("UC", "UpstreamConnectionTermination"),
    ("UPE", "UpstreamProtocolError"),
    ("DC", "DownstreamConnectionTermination"),
    ("NC", "NoClusterFound"),
    ("UT", "UpstreamRequestTimeout"),
    ("UAEX", "UnauthorizedExternalService"),
    ("URX", "UpstreamRetryLimitExceeded"),
];

impl Operator {
    /// An operator without an argument.
    pub(crate) fn plain(name: &str) -> Option<Self> {
        Some(match name {
            "PROTOCOL" => Self::Protocol,
            "RESPONSE_CODE" => Self::ResponseCode,
            "RESPONSE_FLAGS" => Self::ResponseFlags,
            "RESPONSE_FLAGS_LONG" => Self::ResponseFlagsLong,
            "RESPONSE_CODE_DETAILS" => Self::ResponseCodeDetails,
            "BYTES_RECEIVED" => Self::BytesReceived,
            "BYTES_SENT" => Self::BytesSent,
            "DURATION" => Self::Duration,
            "RESPONSE_DURATION" => Self::ResponseDuration,
            "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Self::UpstreamHost(Part::Whole),
            "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Self::UpstreamHost(Part::Ip),
            "UPSTREAM_REMOTE_PORT" => Self::UpstreamHost(Part::Port),
            "UPSTREAM_LOCAL_ADDRESS" => Self::UpstreamLocal(Part::Whole),
            "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Self::UpstreamLocal(Part::Ip),
            "UPSTREAM_LOCAL_PORT" => Self::UpstreamLocal(Part::Port),
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => Self::UpstreamFailure,
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Self::UpstreamCluster,
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Self::Attempts,
            "DOWNSTREAM_LOCAL_ADDRESS" => Self::DownstreamLocal(Part::Whole),
            "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Self::DownstreamLocal(Part::Ip),
            "DOWNSTREAM_LOCAL_PORT" => Self::DownstreamLocal(Part::Port),
            "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => {
                Self::DownstreamRemote(Part::Whole)
            }
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
                Self::DownstreamRemote(Part::Ip)
            }
            "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => Self::DownstreamRemote(Part::Port),
            "DOWNSTREAM_PEER_URI_SAN" => Self::Peer(Side::Downstream, PeerForm::Field(PeerField::Identity)),
            "DOWNSTREAM_LOCAL_URI_SAN" => Self::LocalIdentity,
            "UPSTREAM_PEER_URI_SAN" => Self::Peer(Side::Upstream, PeerForm::Field(PeerField::Identity)),
            "ROUTE_NAME" => Self::RouteName,
            "GRPC_STATUS_NUMBER" => Self::GrpcStatus(StatusForm::Number),
            "TRACE_ID" => Self::TraceId,
            "HOSTNAME" => Self::Hostname,
            "CONNECTION_ID" => Self::ConnectionId,
            "CONNECTION_TERMINATION_DETAILS"
            | "REQUESTED_SERVER_NAME"
            | "DOWNSTREAM_TRANSPORT_FAILURE_REASON"
            | "DOWNSTREAM_TLS_VERSION"
            | "DOWNSTREAM_TLS_CIPHER"
            | "DOWNSTREAM_TLS_SESSION_ID"
            | "DOWNSTREAM_PEER_SUBJECT"
            | "DOWNSTREAM_PEER_ISSUER"
            | "DOWNSTREAM_LOCAL_SUBJECT"
            | "UPSTREAM_TLS_VERSION"
            | "UPSTREAM_TLS_CIPHER"
            | "UPSTREAM_PEER_SUBJECT"
            | "FILTER_CHAIN_NAME"
            | "VIRTUAL_CLUSTER_NAME" => Self::Absent,
            _ => return None,
        })
    }

    /// `GRPC_STATUS`, alone or with a form.
    pub(crate) fn grpc_status(form: &str) -> Result<Self, String> {
        Ok(Self::GrpcStatus(match form {
            "" | "CAMEL_STRING" => StatusForm::Camel,
            "SNAKE_STRING" => StatusForm::Snake,
            "NUMBER" => StatusForm::Number,
            _ => return Err("the form is one of CAMEL_STRING, SNAKE_STRING, NUMBER".to_owned()),
        }))
    }

    /// `FILTER_STATE(key)`, with `:PLAIN`, `:TYPED` or `:FIELD:name` behind the key. Of keys that nothing sets here
    /// there is nothing to say, as in Envoy.
    pub(crate) fn filter_state(argument: &str) -> Result<Self, String> {
        let mut parts = argument.splitn(3, ':');
        let key = parts.next().unwrap_or_default();
        let form = parts.next();
        let field = match (form, parts.next()) {
            (None | Some("PLAIN" | "TYPED"), None) => None,
            (Some("FIELD"), Some(field)) => Some(field),
            _ => return Err("behind the key may stand PLAIN, TYPED or FIELD:name".to_owned()),
        };
        let side = match key {
            "downstream_peer" | "wasm.downstream_peer" | "downstream_peer_obj" => Side::Downstream,
            "upstream_peer" | "wasm.upstream_peer" | "upstream_peer_obj" => Side::Upstream,
            "io.istio.peer_principal" => {
                return Ok(Self::Peer(Side::Downstream, PeerForm::Field(PeerField::Identity)));
            }
            "io.istio.local_principal" => return Ok(Self::LocalIdentity),
            _ => return Ok(Self::Absent),
        };
        match field {
            None if form == Some("PLAIN") => Ok(Self::Peer(side, PeerForm::Text)),
            None => Ok(Self::Peer(side, PeerForm::Fields)),
            Some(name) => match PeerField::named(name) {
                Some(field) => Ok(Self::Peer(side, PeerForm::Field(field))),
                None => Err(format!("a peer has no field `{name}`")),
            },
        }
    }

    /// `DYNAMIC_METADATA(namespace:key:…)`: the token's claims, or what filters said.
    pub(crate) fn metadata(argument: &str) -> Result<Self, String> {
        let mut path = argument.split(':').map(str::to_owned);
        let namespace = path.next().unwrap_or_default();
        if namespace != "envoy.filters.http.jwt_authn" {
            return Ok(Self::Metadata([namespace].into_iter().chain(path).collect()));
        }
        let mut path: Vec<String> = path.collect();
        if path.first().is_some_and(|first| first == "payload") {
            path.remove(0);
        }
        Ok(Self::Claim(path))
    }

    /// `METADATA(kind:namespace:key:…)`.
    pub(crate) fn metadata_of(argument: &str) -> Result<Self, String> {
        match argument.split_once(':') {
            Some(("DYNAMIC", rest)) => Self::metadata(rest),
            Some(("CLUSTER" | "ROUTE" | "UPSTREAM_HOST" | "LISTENER" | "VIRTUAL_HOST", _)) => {
                Ok(Self::Absent)
            }
            _ => Err("begins with one of DYNAMIC, CLUSTER, ROUTE, UPSTREAM_HOST, LISTENER, VIRTUAL_HOST"
                .to_owned()),
        }
    }

    /// Asks for the headers it needs.
    pub(crate) fn want(&self, wants: &mut Wants) {
        let (place, headers) = match self {
            Self::Request(main, other) | Self::RequestWithoutQuery(main, other) => {
                (&mut wants.request, [Some(main), other.as_ref()])
            }
            Self::Response(main, other) => (&mut wants.response, [Some(main), other.as_ref()]),
            Self::Trailer(main, other) => (&mut wants.trailers, [Some(main), other.as_ref()]),
            Self::Cel(expression) => return expression.want(wants),
            _ => return,
        };
        for name in headers.into_iter().flatten().filter_map(Header::to_keep) {
            place.add(name);
        }
    }

    /// Appends its value as it is, but for what could end a line.
    pub(crate) fn write(&self, out: &mut Vec<u8>, facts: &Facts<'_>) -> Written {
        let record = facts.record;
        match self {
            Self::StartTime(format) => format.write(out, record.started),
            Self::UpstreamHost(part) => match record.upstream {
                Some(upstream) => address(out, upstream, *part),
                None => return Written::Nothing,
            },
            Self::UpstreamLocal(part) => match record.upstream_local {
                Some(local) => address(out, local, *part),
                None => return Written::Nothing,
            },
            Self::DownstreamLocal(part) => address(out, record.local, *part),
            Self::DownstreamRemote(part) => address(out, record.downstream, *part),
            _ => match self.number(facts) {
                Some(Some(number)) => append_number(out, number),
                Some(None) => return Written::Nothing,
                None => match self.value(facts) {
                    Some(value) => append_bytes(out, &value),
                    None => return Written::Nothing,
                },
            },
        }
        Written::Something
    }

    /// Appends its value as JSON: numbers and what has parts as they are, the rest as text.
    pub(crate) fn write_json(&self, out: &mut Vec<u8>, facts: &Facts<'_>) -> Written {
        if let Some(number) = self.number(facts) {
            let Some(number) = number else { return Written::Nothing };
            append_number(out, number);
            return Written::Something;
        }
        match self {
            Self::Claim(_) | Self::Metadata(_) | Self::Peer(_, PeerForm::Fields) => match self.parts(facts) {
                // Writing to a Vec cannot fail.
                Some(value) => drop(write!(out, "{value}")),
                None => return Written::Nothing,
            },
            Self::StartTime(TimeFormat::Default)
            | Self::UpstreamHost(_)
            | Self::UpstreamLocal(_)
            | Self::DownstreamLocal(_)
            | Self::DownstreamRemote(_) => {
                // Digits, letters and signs that JSON does not escape.
                let before = out.len();
                out.push(b'"');
                if self.write(out, facts) == Written::Nothing {
                    out.truncate(before);
                    return Written::Nothing;
                }
                out.push(b'"');
            }
            _ => match self.bytes(facts) {
                Some(bytes) => append_json_bytes(out, &bytes),
                None => return Written::Nothing,
            },
        }
        Written::Something
    }

    /// Its value as it is.
    pub(crate) fn bytes<'a>(&'a self, facts: &Facts<'a>) -> Option<Cow<'a, [u8]>> {
        if let Some(number) = self.number(facts) {
            return number.map(|number| number.to_string().into_bytes().into());
        }
        match self {
            Self::StartTime(_)
            | Self::UpstreamHost(_)
            | Self::UpstreamLocal(_)
            | Self::DownstreamLocal(_)
            | Self::DownstreamRemote(_) => {
                let mut out = Vec::new();
                (self.write(&mut out, facts) == Written::Something).then(|| out.into())
            }
            _ => self.value(facts),
        }
    }

    /// For an operator whose value is a number: the number, if there is one.
    pub(crate) fn number(&self, facts: &Facts<'_>) -> Option<Option<u64>> {
        let record = facts.record;
        let millis = |duration: std::time::Duration| duration.as_millis() as u64;
        Some(match self {
            Self::ResponseCode => Some(u64::from(record.status)),
            Self::BytesReceived => Some(record.request_body_bytes),
            Self::BytesSent => Some(record.response_body_bytes),
            Self::Duration => Some(millis(record.duration)),
            Self::ResponseDuration => record.first_byte.map(millis),
            Self::GrpcStatus(StatusForm::Number) => record.grpc_status.map(u64::from),
            Self::Attempts => Some(u64::from(record.attempts)),
            Self::ConnectionId => Some(record.connection_id),
            Self::DownstreamLocal(Part::Port) => Some(u64::from(record.local.port())),
            Self::DownstreamRemote(Part::Port) => Some(u64::from(record.downstream.port())),
            Self::UpstreamLocal(Part::Port) => record.upstream_local.map(|at| u64::from(at.port())),
            Self::UpstreamHost(Part::Port) => record.upstream.map(|at| u64::from(at.port())),
            _ => return None,
        })
    }

    /// Its value, where that is neither a number nor an address nor a time.
    fn value<'a>(&'a self, facts: &Facts<'a>) -> Option<Cow<'a, [u8]>> {
        let record = facts.record;
        let text = match self {
            // A header that is there and empty has a value: nothing.
            Self::Request(main, other) => return either(main, other, |header| facts.request_header(header)),
            Self::RequestWithoutQuery(main, other) => {
                return either(main, other, |header| facts.request_header(header)).map(without_query);
            }
            Self::Response(main, other) => return either(main, other, |header| response(facts, header)),
            Self::Trailer(main, other) => {
                return either(main, other, |header| named(record.response_trailers, header));
            }
            Self::Peer(side, PeerForm::Field(field)) => facts.peer(*side, *field)?,
            Self::LocalIdentity => &facts.own.identity,
            Self::Environment(value) => value,
            Self::Protocol => record.protocol,
            Self::ResponseFlags => record.flags,
            Self::ResponseCodeDetails if record.details.contains(' ') => {
                return Some(without_spaces(record.details));
            }
            Self::ResponseCodeDetails => record.details,
            Self::UpstreamFailure if record.upstream_failure.contains(' ') => {
                return Some(without_spaces(record.upstream_failure));
            }
            Self::UpstreamFailure => record.upstream_failure,
            Self::UpstreamCluster => record.cluster,
            Self::RouteName => record.route,
            Self::Hostname => &facts.own.hostname,
            Self::Cel(expression) => return expression.bytes(facts),
            Self::GrpcStatus(form) => {
                let status = record.grpc_status?;
                match STATUSES.get(usize::from(status)) {
                    Some((camel, _)) if *form == StatusForm::Camel => camel,
                    Some((_, snake)) => snake,
                    // What is no number and no name is what it is.
                    None => return Some(status.to_string().into_bytes().into()),
                }
            }
            _ => return self.made(facts).map(|text| text.into_bytes().into()),
        };
        Some(text.as_bytes()).filter(|text| !text.is_empty()).map(Cow::Borrowed)
    }

    /// Its value, when it must be made.
    fn made(&self, facts: &Facts<'_>) -> Option<String> {
        let record = facts.record;
        match self {
            Self::Claim(_) | Self::Metadata(_) | Self::Peer(_, PeerForm::Fields | PeerForm::Text) => {
                Some(match self.parts(facts)? {
                    Value::String(text) => text,
                    value => value.to_string(),
                })
            }
            // Several flags, or none.
            Self::ResponseFlagsLong => {
                Some(record.flags.split(',').map(long_flag).collect::<Vec<_>>().join(","))
            }
            Self::TraceId => record.trace.map(|trace| format!("{:032x}", trace.trace_id)),
            _ => None,
        }
    }

    /// The value of what may have parts.
    fn parts(&self, facts: &Facts<'_>) -> Option<Value> {
        let at = |all: &Map<String, Value>, path: &[String]| {
            let Some((first, rest)) = path.split_first() else { return Some(Value::Object(all.clone())) };
            rest.iter().try_fold(all.get(first)?, |value, key| value.get(key)).cloned()
        };
        match self {
            Self::Claim(path) => at(facts.record.claims?, path),
            Self::Metadata(path) => at(facts.record.metadata?, path),
            Self::Peer(side, _) => {
                facts.workload(*side)?;
                let fields = PeerField::ALL.iter().filter_map(|(name, field)| {
                    Some(((*name).to_owned(), facts.peer(*side, *field)?.into()))
                });
                Some(Value::Object(fields.collect()))
            }
            _ => None,
        }
    }
}

/// A header of the response.
fn response<'a>(facts: &Facts<'a>, header: &Header) -> Option<Cow<'a, [u8]>> {
    let record = facts.record;
    let number = match header {
        Header::Status => (record.status > 0).then(|| record.status.to_string()),
        Header::ServiceTime => record.upstream_duration.map(|duration| duration.as_millis().to_string()),
        header => return named(record.response_headers, header),
    };
    number.map(|number| number.into_bytes().into())
}

fn without_query(path: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    let end = path.iter().position(|byte| *byte == b'?').unwrap_or(path.len());
    match path {
        Cow::Borrowed(path) => path.get(..end).unwrap_or_default().into(),
        Cow::Owned(mut path) => {
            path.truncate(end);
            path.into()
        }
    }
}

/// Envoy puts no spaces into reasons.
fn without_spaces(text: &str) -> Cow<'_, [u8]> {
    text.replace(' ', "_").into_bytes().into()
}

fn long_flag(flag: &str) -> &str {
    FLAGS.iter().find(|(short, _)| *short == flag).map_or(flag, |(_, long)| long)
}

fn either<'a>(
    main: &Header,
    other: &Option<Header>,
    read: impl Fn(&Header) -> Option<Cow<'a, [u8]>>,
) -> Option<Cow<'a, [u8]>> {
    read(main).or_else(|| read(other.as_ref()?))
}

fn named<'a>(headers: Option<&'a HeaderMap>, header: &Header) -> Option<Cow<'a, [u8]>> {
    value_of(headers, header.to_keep()?)
}

fn address(out: &mut Vec<u8>, address: SocketAddr, part: Part) {
    match part {
        Part::Whole => append_address(out, address),
        // Writing to a Vec cannot fail.
        Part::Ip => drop(write!(out, "{}", address.ip())),
        Part::Port => append_number(out, u64::from(address.port())),
    }
}
