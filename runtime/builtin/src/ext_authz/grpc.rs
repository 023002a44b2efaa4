//! Asking a provider over gRPC: `envoy.service.auth.v3.Authorization/Check`.

use super::headers::{HeaderChange, How, is_free};
use super::query::QueryChanges;
use super::{ANSWER_BYTES_MAX, Changes, DENIED, Decision, ERROR};
use bytes::{BufMut, Bytes, BytesMut};
use cairn_filter::{BodyRead, CalloutAnswer, CalloutRequest, Connection, Exchange, LocalReply, RequestHead};
use cairn_mesh::{AuthorizationProvider, Identity};
use cairn_proto::ext_authz::{
    Address, AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, HeaderAppendAction,
    HeaderValueOption, HttpRequest, OkHttpResponse, Peer, Request as Asked, SocketAddress, address,
    check_response::HttpResponse, socket_address,
};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use prost::Message;
use prost_types::{Struct, value::Kind};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

const METHOD: &str = "/envoy.service.auth.v3.Authorization/Check";
const OK: i32 = 0;

/// The question.
pub(super) fn question(provider: &AuthorizationProvider, attributes: AttributeContext) -> CalloutRequest {
    let message = CheckRequest { attributes: Some(attributes) }.encode_to_vec();
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(&message);
    let mut request = Request::new(framed.freeze());
    let authority = format!("{}:{}", provider.host, provider.port);
    let uri = Uri::builder().scheme("http").authority(authority).path_and_query(METHOD).build();
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.unwrap_or_else(|_| Uri::from_static(METHOD));
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    CalloutRequest {
        host: Arc::clone(&provider.host),
        namespace: provider.namespace.clone(),
        port: provider.port,
        http2: true,
        request,
        trailers: HeaderMap::new(),
        timeout: provider.timeout,
        answer_bytes_max: ANSWER_BYTES_MAX,
    }
}

/// What is told of a connection: its ends, with the identities proven in the tunnel.
pub(super) fn of_connection(connection: &Connection) -> AttributeContext {
    AttributeContext {
        source: Some(peer(connection.source.address, connection.source.identity.as_ref())),
        destination: Some(peer(connection.destination, connection.local.as_ref())),
        ..AttributeContext::default()
    }
}

/// What is told of a request's body.
pub(super) struct Told<'a> {
    /// Whether there is one.
    pub(super) has_body: bool,
    /// What was read of it.
    pub(super) body: Option<&'a BodyRead>,
    /// It is told as bytes rather than as text.
    pub(super) as_bytes: bool,
}

/// What is told of a request.
pub(super) fn of_request(exchange: &Exchange, head: &RequestHead, told: &Told<'_>) -> AttributeContext {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let header = |name: &str| head.headers.get(name).map(text);
    let declared = header(CONTENT_LENGTH.as_str()).and_then(|length| length.parse().ok());
    let size = declared.unwrap_or(if told.has_body { -1 } else { 0 });
    let (as_text, raw_body) = match told.body {
        Some(body) if told.as_bytes => (String::new(), body.bytes.to_vec()),
        Some(body) => (String::from_utf8_lossy(&body.bytes).into_owned(), Vec::new()),
        None => (String::new(), Vec::new()),
    };
    let http = HttpRequest {
        id: header("x-request-id").unwrap_or_default(),
        method: head.method.to_string(),
        headers: headers(head, told.body),
        path: head.path.to_string(),
        host: text(&head.authority),
        scheme: text(&head.scheme),
        size,
        protocol: exchange.protocol.as_str().to_owned(),
        body: as_text,
        raw_body,
    };
    let asked = Asked { time: Some(exchange.started_at.into()), http: Some(http) };
    AttributeContext { request: Some(asked), ..of_connection(&exchange.connection) }
}

fn peer(address: SocketAddr, identity: Option<&Identity>) -> Peer {
    let socket = SocketAddress {
        address: address.ip().to_canonical().to_string(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(address.port().into())),
    };
    Peer {
        address: Some(Address { address: Some(address::Address::SocketAddress(socket)) }),
        principal: identity.map(|identity| identity.as_str().to_owned()).unwrap_or_default(),
        ..Peer::default()
    }
}

/// All headers, several of one name joined by `,`, and what HTTP/2 has for the request line.
fn headers(head: &RequestHead, body: Option<&BodyRead>) -> BTreeMap<String, String> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let mut headers = BTreeMap::from([
        (":authority".to_owned(), text(&head.authority)),
        (":method".to_owned(), head.method.to_string()),
        (":path".to_owned(), head.path.to_string()),
        (":scheme".to_owned(), text(&head.scheme)),
    ]);
    for (name, value) in &head.headers {
        let joined = headers.entry(name.to_string()).or_default();
        if !joined.is_empty() {
            joined.push(',');
        }
        joined.push_str(&text(value));
    }
    if let Some(body) = body {
        headers.insert("x-envoy-auth-partial-body".to_owned(), (!body.is_whole).to_string());
    }
    headers
}

/// What the answer means.
pub(super) fn decision(answer: &CalloutAnswer) -> Result<Decision, String> {
    let answer = message(answer)?;
    let is_ok = answer.status.as_ref().is_none_or(|status| status.code == OK);
    let said = answer.dynamic_metadata;
    Ok(match answer.http_response {
        // The provider itself says that it could not decide.
        Some(HttpResponse::ErrorResponse(error)) => {
            let status = status_of(&error);
            Decision::Fail(status, Box::new(LocalReply { details: ERROR.into(), ..reply(error) }))
        }
        Some(HttpResponse::OkResponse(ok)) if is_ok => Decision::Allow(Box::new(changes(ok, said))),
        _ if is_ok => Decision::Allow(Box::new(changes(OkHttpResponse::default(), said))),
        Some(HttpResponse::DeniedResponse(denied)) => Decision::Deny(Box::new(reply(denied))),
        _ => Decision::Deny(Box::new(reply(DeniedHttpResponse::default()))),
    })
}

/// The message in an answer whose gRPC status is OK.
fn message(answer: &CalloutAnswer) -> Result<CheckResponse, String> {
    let status = answer.response.status();
    if status != StatusCode::OK {
        return Err(format!("its status is {}", status.as_u16()));
    }
    let in_headers = || answer.response.headers().get("grpc-status");
    let grpc = answer.trailers.get("grpc-status").or_else(in_headers).and_then(|value| value.to_str().ok());
    if grpc != Some("0") {
        return Err(format!("its gRPC status is {}", grpc.unwrap_or("missing")));
    }
    let unreadable = || "its message cannot be read".to_owned();
    let (frame, rest) = answer.response.body().split_first_chunk::<5>().ok_or_else(unreadable)?;
    let [compressed, length @ ..] = *frame;
    if compressed != 0 || usize::try_from(u32::from_be_bytes(length)) != Ok(rest.len()) {
        return Err(unreadable());
    }
    CheckResponse::decode(rest).map_err(|_| unreadable())
}

fn changes(ok: OkHttpResponse, said: Option<Struct>) -> Changes {
    let mut changes = Changes::default();
    let mut left_out = Vec::new();
    let mut keep = |read: Result<HeaderChange, String>| read.map_err(|what| left_out.push(what)).ok();
    changes.request = ok.headers.iter().filter_map(|header| keep(to_upstream(header))).collect();
    changes.response =
        ok.response_headers_to_add.iter().filter_map(|header| keep(to_downstream(header))).collect();
    for name in &ok.headers_to_remove {
        match HeaderName::from_bytes(name.as_bytes()).ok().filter(is_free) {
            Some(name) => changes.removed.push(name),
            None => left_out.push(format!("removal of header {}", name.escape_debug())),
        }
    }
    // The one in the answer to requests that pass is older, and Envoy still takes it.
    for said in ok.dynamic_metadata.into_iter().chain(said) {
        changes.metadata.extend(map(said, 0));
    }
    let set = ok.query_parameters_to_set.into_iter().map(|parameter| (parameter.key, parameter.value));
    changes.query = QueryChanges::new(set, ok.query_parameters_to_remove, &mut left_out);
    changes.left_out = left_out;
    changes
}

/// The deepest that what a provider says may be nested.
const DEPTH_MAX: usize = 32;

fn map(said: Struct, depth: usize) -> Map<String, Value> {
    said.fields.into_iter().map(|(name, said)| (name, value(said, depth))).collect()
}

fn value(said: prost_types::Value, depth: usize) -> Value {
    match said.kind {
        Some(Kind::BoolValue(truth)) => truth.into(),
        Some(Kind::NumberValue(number)) => number.into(),
        Some(Kind::StringValue(text)) => text.into(),
        Some(Kind::StructValue(inner)) if depth < DEPTH_MAX => map(inner, depth + 1).into(),
        Some(Kind::ListValue(list)) if depth < DEPTH_MAX => {
            list.values.into_iter().map(|inner| value(inner, depth + 1)).collect()
        }
        Some(Kind::NullValue(_) | Kind::StructValue(_) | Kind::ListValue(_)) | None => Value::Null,
    }
}

/// A header for the request. As in Envoy, `append` alone says what happens to values that are there, and only to such is
/// anything appended; `append_action` says nothing here.
fn to_upstream(option: &HeaderValueOption) -> Result<HeaderChange, String> {
    change(option, if option.append == Some(true) { How::AppendIfPresent } else { How::Overwrite })
}

/// A header for the response.
fn to_downstream(option: &HeaderValueOption) -> Result<HeaderChange, String> {
    let how = match (option.append, option.append_action()) {
        (Some(true), _) | (None, HeaderAppendAction::AppendIfExistsOrAdd) => How::Append,
        (Some(false), _) | (None, HeaderAppendAction::OverwriteIfExistsOrAdd) => How::Overwrite,
        (None, HeaderAppendAction::AddIfAbsent) => How::AddIfAbsent,
        (None, HeaderAppendAction::OverwriteIfExists) => How::OverwriteIfPresent,
    };
    change(option, how)
}

fn change(option: &HeaderValueOption, how: How) -> Result<HeaderChange, String> {
    let Some(header) = &option.header else { return Err("a header without name".to_owned()) };
    let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
    HeaderChange::new(&header.key, value, how)
}

fn status_of(denied: &DeniedHttpResponse) -> Option<StatusCode> {
    let code = denied.status.as_ref().and_then(|status| u16::try_from(status.code).ok());
    code.filter(|code| *code >= 200).and_then(|code| StatusCode::from_u16(code).ok())
}

fn reply(denied: DeniedHttpResponse) -> LocalReply {
    let status = status_of(&denied);
    let mut headers = HeaderMap::new();
    for header in &denied.headers {
        if let Ok(change) = to_downstream(header) {
            change.apply(&mut headers);
        }
    }
    let status = status.unwrap_or(StatusCode::FORBIDDEN);
    LocalReply { headers, ..LocalReply::text(status, Bytes::from(denied.body), DENIED) }
}
