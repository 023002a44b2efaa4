//! HTTP calls of other services.

use super::Guest;
use super::memory::{charge, check, read, split, write_u32};
use crate::abi::{Done, Status, answer};
use crate::heads::refuse_injection;
use crate::metrics::Limit;
use crate::outside::{CALL_BYTES_MAX, CALLS_MAX, CallKind};
use crate::pairs::Pairs;
use crate::state::State;
use crate::upstream::{self, Upstream};
use bytes::Bytes;
use cairn_filter::{Callout, CalloutRequest};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Request, Uri, Version, uri};
use std::sync::Arc;
use std::time::Duration;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_http_call",
        |mut guest: Guest<'_>,
         upstream: u32,
         upstream_length: u32,
         headers: u32,
         headers_length: u32,
         body: u32,
         body_length: u32,
         trailers: u32,
         trailers_length: u32,
         timeout_ms: u32,
         id_at: u32| {
            let call = HttpCall {
                upstream: (upstream, upstream_length),
                headers: (headers, headers_length),
                body: (body, body_length),
                trailers: (trailers, trailers_length),
                timeout_ms,
                id_at,
            };
            answer(http_call(&mut guest, &call))
        },
    )?;
    Ok(())
}

/// The arguments of `proxy_http_call`; texts are a pointer and a length.
struct HttpCall {
    upstream: (u32, u32),
    headers: (u32, u32),
    body: (u32, u32),
    trailers: (u32, u32),
    timeout_ms: u32,
    id_at: u32,
}

/// The longest that a call may take, and what 0, Envoy's "for ever", means.
const TIMEOUT_MAX: Duration = Duration::from_secs(300);
/// The longest answer.
const ANSWER_BYTES_MAX: usize = 4 << 20;

fn http_call(guest: &mut Guest<'_>, call: &HttpCall) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, call.id_at, 4)?;
    let name = read(memory, call.upstream.0, call.upstream.1)?;
    let headers = read(memory, call.headers.0, call.headers.1)?;
    let body = read(memory, call.body.0, call.body.1)?;
    let trailers = read(memory, call.trailers.0, call.trailers.1)?;
    let length = headers.len() + body.len() + trailers.len();
    charge(state, length)?;
    let (callout, upstream) = find(state, "proxy_http_call", name)?;
    let request = CalloutRequest {
        http2: upstream.version == Version::HTTP_2,
        host: upstream.host,
        namespace: None,
        port: upstream.port,
        request: request(headers, body)?,
        trailers: plain_headers(trailers)?,
        timeout: timeout(call.timeout_ms),
        answer_bytes_max: ANSWER_BYTES_MAX,
    };
    has_room(state, length)?;
    let id = state.outside.ask(CallKind::Http, callout, request, length);
    Ok(write_u32(memory, call.id_at, id)?)
}

/// How the guest's calls travel: `None` is the worker's own way, which is not known here.
pub(super) type Way = Option<Arc<dyn Callout>>;

/// The service behind a name, and the way to it.
pub(super) fn find(state: &State, function: &str, name: &[u8]) -> Result<(Way, Upstream), Status> {
    let way = state.exchange().map(|exchange| Arc::clone(&exchange.connection.callout));
    let found = std::str::from_utf8(name).ok().and_then(|name| match &way {
        Some(callout) => upstream::find(&**callout, name, &state.facts.scope),
        // All workers know the same services.
        None => upstream::find(&*state.facts.environment.places.callout(0), name, &state.facts.scope),
    });
    let Some(upstream) = found else {
        let name = String::from_utf8_lossy(&name[..name.len().min(256)]);
        state.in_vain(&format!("{function} to `{}`: no service of the mesh", name.escape_default()));
        return Err(Status::BadArgument);
    };
    Ok((way, upstream))
}

/// Checks that one more call may be under way, with so many bytes.
pub(super) fn has_room(state: &State, bytes: usize) -> Result<(), Status> {
    if state.outside.has_room(bytes) {
        return Ok(());
    }
    state.facts.counters.hit(Limit::Calls);
    state
        .in_vain(&format!("more than {CALLS_MAX} calls, or {} MiB in them, at a time", CALL_BYTES_MAX >> 20));
    Err(Status::InternalFailure)
}

pub(super) fn timeout(milliseconds: u32) -> Duration {
    match milliseconds {
        0 => TIMEOUT_MAX,
        _ => Duration::from_millis(milliseconds.into()).min(TIMEOUT_MAX),
    }
}

/// The request that a serialised map and a body mean. Method, path and authority are needed, as in Envoy.
fn request(headers: &[u8], body: &[u8]) -> Result<Request<Bytes>, Status> {
    let pairs = Pairs::parse(headers).ok_or(Status::BadArgument)?;
    let needed = |name: &[u8]| pairs.find(name).filter(|value| !value.is_empty()).ok_or(Status::BadArgument);
    let uri = Uri::builder()
        .scheme(pairs.find(b":scheme").unwrap_or(b"http"))
        .authority(needed(b":authority")?)
        .path_and_query(path(needed(b":path")?)?)
        .build();
    let mut request = Request::new(Bytes::copy_from_slice(body));
    *request.uri_mut() = uri.map_err(|_| Status::BadArgument)?;
    *request.method_mut() = http::Method::from_bytes(needed(b":method")?).map_err(|_| Status::BadArgument)?;
    *request.headers_mut() = plain_headers(headers)?;
    Ok(request)
}

fn path(path: &[u8]) -> Result<uri::PathAndQuery, Status> {
    uri::PathAndQuery::try_from(path).map_err(|_| Status::BadArgument)
}

/// All headers of a serialised map but pseudo-headers and those that belong to one connection or say a length, which the
/// engine writes itself.
pub(super) fn plain_headers(map: &[u8]) -> Result<HeaderMap, Status> {
    let pairs = Pairs::parse(map).ok_or(Status::BadArgument)?;
    let mut headers = HeaderMap::new();
    for (name, value) in pairs.iter().filter(|(name, _)| !name.starts_with(b":")) {
        refuse_injection(name, value).map_err(|_| Status::BadArgument)?;
        let name = HeaderName::from_bytes(name).map_err(|_| Status::BadArgument)?;
        if ![HOST, CONTENT_LENGTH, CONNECTION, TRANSFER_ENCODING].contains(&name) {
            // At most 1024 pairs were parsed, which always fit.
            headers.append(name, HeaderValue::from_bytes(value).map_err(|_| Status::BadArgument)?);
        }
    }
    Ok(headers)
}
