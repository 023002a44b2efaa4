//! Asking a provider over HTTP: a request like the one that it is asked about, to which 200 means that it may pass.

use super::headers::{HeaderChange, How, is_free, is_named};
use super::{ANSWER_BYTES_MAX, Changes, DENIED, Decision};
use bytes::Bytes;
use cairn_filter::{BodyRead, CalloutAnswer, CalloutRequest, LocalReply, RequestHead};
use cairn_mesh::{AuthorizationProvider, HttpCheck};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION, WWW_AUTHENTICATE};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri};
use std::sync::Arc;

/// Whether the body that a provider is told is cut short.
const PARTIAL_BODY: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");
/// By this header of its answer a provider names headers that are to be removed from the request.
const TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";

/// The question. Method, path and host are the request's own.
pub(super) fn question(
    provider: &AuthorizationProvider,
    check: &HttpCheck,
    head: &RequestHead,
    body: Option<&BodyRead>,
) -> Result<CalloutRequest, String> {
    let authority = Authority::try_from(head.authority.as_bytes())
        .or_else(|_| Authority::try_from(&*provider.host))
        .map_err(|_| "its host is no authority".to_owned())?;
    let uri = Uri::builder()
        .scheme(Scheme::HTTP)
        .authority(authority)
        .path_and_query(format!("{}{}", check.path_prefix, head.path))
        .build()
        .map_err(|_| "the path cannot be asked about".to_owned())?;
    let mut request = Request::new(body.map(|body| body.bytes.clone()).unwrap_or_default());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = uri;
    *request.headers_mut() = headers(check, head, body);
    Ok(CalloutRequest {
        host: Arc::clone(&provider.host),
        namespace: provider.namespace.clone(),
        port: provider.port,
        http2: false,
        request,
        trailers: HeaderMap::new(),
        timeout: provider.timeout,
        answer_bytes_max: ANSWER_BYTES_MAX,
    })
}

fn headers(check: &HttpCheck, head: &RequestHead, body: Option<&BodyRead>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in &head.headers {
        // Envoy tells credentials whatever the list says.
        if is_free(name) && (*name == AUTHORIZATION || is_named(&check.request_headers, name)) {
            headers.append(name, value.clone());
        }
    }
    // Of the question, not of the request: Envoy says it even where there is no body.
    headers.insert(CONTENT_LENGTH, body.map_or(0, |body| body.bytes.len()).into());
    if let Some(body) = body {
        headers.insert(PARTIAL_BODY, HeaderValue::from_static(if body.is_whole { "false" } else { "true" }));
    }
    for (name, value) in &check.additional_headers {
        if let Ok(change) = HeaderChange::new(name, value.as_bytes(), How::Overwrite) {
            change.apply(&mut headers);
        }
    }
    headers
}

/// What the answer means. A provider that fails has not decided.
pub(super) fn decision(check: &HttpCheck, answer: &CalloutAnswer) -> Result<Decision, String> {
    let (status, headers) = (answer.response.status(), answer.response.headers());
    if status.is_server_error() {
        return Err(format!("its status is {}", status.as_u16()));
    }
    if status == StatusCode::OK {
        return Ok(Decision::Allow(Box::new(changes(check, headers))));
    }
    let all = check.downstream_on_deny.is_empty();
    let always = |name: &HeaderName| *name == WWW_AUTHENTICATE || *name == LOCATION;
    let mut told = HeaderMap::new();
    for (name, value) in headers {
        if is_free(name) && (all || always(name) || is_named(&check.downstream_on_deny, name)) {
            told.append(name, value.clone());
        }
    }
    Ok(Decision::Deny(Box::new(LocalReply {
        headers: told,
        ..LocalReply::text(status, Bytes::clone(answer.response.body()), DENIED)
    })))
}

fn changes(check: &HttpCheck, headers: &HeaderMap) -> Changes {
    let mut changes = Changes::default();
    for (name, value) in headers.iter().filter(|(name, _)| is_free(name)) {
        let change = |how| HeaderChange { name: name.clone(), value: value.clone(), how };
        if is_named(&check.upstream_on_allow, name) {
            changes.request.push(change(How::Overwrite));
        }
        if is_named(&check.downstream_on_allow, name) {
            changes.response.push(change(How::Append));
        }
    }
    for value in headers.get_all(TO_REMOVE) {
        let names = value.to_str().unwrap_or_default().split(',');
        let names = names.filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok());
        changes.removed.extend(names.filter(is_free));
    }
    changes
}
