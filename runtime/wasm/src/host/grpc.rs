//! gRPC calls of other services, single and streamed.

use super::Guest;
use super::calls::{Way, find, has_room, plain_headers, timeout};
use super::memory::{charge, check, hand_over, read, split, write_u32};
use crate::abi::{Done, Status, answer};
use crate::grpc::frame;
use crate::outside::CallKind;
use crate::state::State;
use bytes::Bytes;
use cairn_filter::CalloutRequest;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, TE};
use http::{Method, Request, Uri};
use prost::Message;
use std::time::Duration;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    define_calls(linker)?;
    linker.func_wrap(
        "env",
        "proxy_grpc_send",
        |mut guest: Guest<'_>, id: u32, message: u32, length: u32, end: u32| {
            answer(send(&mut guest, id, (message, length), end != 0))
        },
    )?;
    linker.func_wrap("env", "proxy_grpc_close", |mut guest: Guest<'_>, id: u32| {
        answer(guest.data_mut().outside.close_stream(id).map_err(Into::into))
    })?;
    linker.func_wrap("env", "proxy_grpc_cancel", |mut guest: Guest<'_>, id: u32| {
        answer(guest.data_mut().outside.cancel_grpc(id).map_err(Into::into))
    })?;
    linker.func_wrap(
        "env",
        "proxy_get_status",
        |mut guest: Guest<'_>, code_at: u32, pointer_at: u32, length_at: u32| {
            answer(status(&mut guest, code_at, (pointer_at, length_at)))
        },
    )?;
    Ok(())
}

fn define_calls(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_grpc_call",
        |mut guest: Guest<'_>,
         upstream: u32,
         upstream_length: u32,
         service: u32,
         service_length: u32,
         method: u32,
         method_length: u32,
         metadata: u32,
         metadata_length: u32,
         message: u32,
         message_length: u32,
         timeout_ms: u32,
         id_at: u32| {
            let target = Target {
                upstream: (upstream, upstream_length),
                service: (service, service_length),
                method: (method, method_length),
                metadata: (metadata, metadata_length),
                id_at,
            };
            answer(call(&mut guest, &target, (message, message_length), timeout_ms))
        },
    )?;
    linker.func_wrap(
        "env",
        "proxy_grpc_stream",
        |mut guest: Guest<'_>,
         upstream: u32,
         upstream_length: u32,
         service: u32,
         service_length: u32,
         method: u32,
         method_length: u32,
         metadata: u32,
         metadata_length: u32,
         id_at: u32| {
            let target = Target {
                upstream: (upstream, upstream_length),
                service: (service, service_length),
                method: (method, method_length),
                metadata: (metadata, metadata_length),
                id_at,
            };
            answer(stream(&mut guest, &target))
        },
    )?;
    Ok(())
}

/// A pointer and a length, as the guest passes them.
type Slice = (u32, u32);

/// The arguments that single calls and streams have in common.
struct Target {
    upstream: Slice,
    service: Slice,
    method: Slice,
    metadata: Slice,
    id_at: u32,
}

/// The longest answer of a single call.
const ANSWER_BYTES_MAX: usize = 4 << 20;

fn call(guest: &mut Guest<'_>, target: &Target, message: Slice, timeout_ms: u32) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, target.id_at, 4)?;
    let message = frame(read(memory, message.0, message.1)?);
    let (way, mut request) = prepare(memory, state, target, "proxy_grpc_call")?;
    if timeout_ms > 0 {
        request.timeout = timeout(timeout_ms);
    }
    let milliseconds = HeaderValue::from_str(&format!("{}m", request.timeout.as_millis()));
    request
        .request
        .headers_mut()
        .extend(milliseconds.ok().map(|timeout| (HeaderName::from_static("grpc-timeout"), timeout)));
    *request.request.body_mut() = message;
    let length = request.request.body().len();
    charge(state, length)?;
    has_room(state, length)?;
    let id = state.outside.ask(CallKind::GrpcCall, way, request, length);
    Ok(write_u32(memory, target.id_at, id)?)
}

fn stream(guest: &mut Guest<'_>, target: &Target) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, target.id_at, 4)?;
    let (way, request) = prepare(memory, state, target, "proxy_grpc_stream")?;
    has_room(state, 0)?;
    let id = state.outside.open_stream(way, request);
    Ok(write_u32(memory, target.id_at, id)?)
}

/// `envoy.config.core.v3.GrpcService`, as far as it says whom to ask and how.
#[derive(Clone, PartialEq, Message)]
struct GrpcService {
    #[prost(message, optional, tag = "1")]
    envoy: Option<EnvoyGrpc>,
    #[prost(message, optional, tag = "2")]
    google: Option<GoogleGrpc>,
    #[prost(message, optional, tag = "3")]
    timeout: Option<Lasting>,
    #[prost(message, repeated, tag = "5")]
    metadata: Vec<Entry>,
}

#[derive(Clone, PartialEq, Message)]
struct EnvoyGrpc {
    #[prost(string, tag = "1")]
    cluster: String,
    #[prost(string, tag = "2")]
    authority: String,
}

#[derive(Clone, PartialEq, Message)]
struct GoogleGrpc {
    #[prost(string, tag = "1")]
    target: String,
}

/// `google.protobuf.Duration`.
#[derive(Clone, PartialEq, Message)]
struct Lasting {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

impl GrpcService {
    /// The service that the bytes are, or name.
    fn of(bytes: &[u8]) -> Self {
        if let Ok(service) = Self::decode(bytes)
            && (service.envoy.is_some() || service.google.is_some())
        {
            return service;
        }
        let cluster = String::from_utf8_lossy(bytes).into_owned();
        Self { envoy: Some(EnvoyGrpc { cluster, authority: String::new() }), ..Self::default() }
    }

    /// The name by which it is found.
    fn name(&self) -> &str {
        match (&self.envoy, &self.google) {
            (Some(envoy), _) => &envoy.cluster,
            (None, Some(google)) => google.target.trim_start_matches("dns:///"),
            (None, None) => "",
        }
    }

    fn timeout(&self) -> Duration {
        let given = self.timeout.as_ref().map_or(0, |timeout| {
            timeout.seconds.saturating_mul(1000).saturating_add(i64::from(timeout.nanos) / 1_000_000)
        });
        timeout(u32::try_from(given.max(0)).unwrap_or(u32::MAX))
    }
}

/// The request without a message. Whatever is wrong with it is a failure to parse, which SDKs survive.
fn prepare(
    memory: &[u8],
    state: &State,
    target: &Target,
    function: &str,
) -> Result<(Way, CalloutRequest), Status> {
    let service = GrpcService::of(read(memory, target.upstream.0, target.upstream.1)?);
    let method = path(
        read(memory, target.service.0, target.service.1)?,
        read(memory, target.method.0, target.method.1)?,
    )?;
    let metadata = read(memory, target.metadata.0, target.metadata.1)?;
    let unreadable = |_| Status::ParseFailure;
    let (way, upstream) = find(state, function, service.name().as_bytes()).map_err(unreadable)?;
    let authority = match &service.envoy {
        Some(EnvoyGrpc { authority, .. }) if !authority.is_empty() => authority,
        _ => &*upstream.host,
    };
    let uri = Uri::builder().scheme("http").authority(authority).path_and_query(method);
    let mut request = Request::new(Bytes::new());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.build().map_err(|_| Status::ParseFailure)?;
    let headers = request.headers_mut();
    *headers = plain_headers(metadata).map_err(unreadable)?;
    add_metadata(headers, &service.metadata)?;
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    let request = CalloutRequest {
        host: upstream.host,
        namespace: None,
        port: upstream.port,
        http2: true,
        request,
        trailers: HeaderMap::new(),
        timeout: service.timeout(),
        answer_bytes_max: ANSWER_BYTES_MAX,
    };
    Ok((way, request))
}

/// `/service/method`.
fn path(service: &[u8], method: &[u8]) -> Result<String, Status> {
    let name = |bytes| std::str::from_utf8(bytes).ok().filter(|name| !name.is_empty());
    let (service, method) =
        (name(service).ok_or(Status::ParseFailure)?, name(method).ok_or(Status::ParseFailure)?);
    Ok(format!("/{service}/{method}"))
}

fn add_metadata(headers: &mut HeaderMap, entries: &[Entry]) -> Result<(), Status> {
    for entry in entries {
        let name = HeaderName::from_bytes(entry.key.as_bytes()).map_err(|_| Status::ParseFailure)?;
        let value = HeaderValue::from_str(&entry.value).map_err(|_| Status::ParseFailure)?;
        headers.try_append(name, value).map_err(|_| Status::ParseFailure)?;
    }
    Ok(())
}

fn send(guest: &mut Guest<'_>, id: u32, message: Slice, end: bool) -> Done {
    let (memory, state) = split(guest)?;
    let message = read(memory, message.0, message.1)?;
    charge(state, message.len())?;
    Ok(state.outside.send(id, frame(message), end)?)
}

/// The status of the gRPC call that is being delivered; zeros elsewhere, as in Envoy.
fn status(guest: &mut Guest<'_>, code_at: u32, (pointer_at, length_at): Slice) -> Done {
    let (memory, state) = split(guest)?;
    for at in [code_at, pointer_at, length_at] {
        check(memory, at, 4)?;
    }
    let (code, message) = state.outside.delivery.status.clone();
    hand_over(guest, pointer_at, length_at, message.as_bytes())?;
    let (memory, _) = split(guest)?;
    Ok(write_u32(memory, code_at, code)?)
}
