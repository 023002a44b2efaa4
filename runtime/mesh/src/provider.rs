//! Services that are asked whether a request may pass (`MeshConfig.extensionProviders`, the kinds `envoyExtAuthzGrpc`
//! and `envoyExtAuthzHttp`).

use crate::TextMatch;
use std::sync::Arc;
use std::time::Duration;

/// One such service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationProvider {
    /// The name by which policies with action CUSTOM ask it.
    pub name: Arc<str>,
    /// Its hostname.
    pub host: Arc<str>,
    /// The namespace in which the hostname is meant; `None`: wherever there is one.
    pub namespace: Option<Arc<str>>,
    /// Its port.
    pub port: u16,
    /// How long it may take. Default: 600 s.
    pub timeout: Duration,
    /// A request may pass when it does not answer. Default: no.
    pub fail_open: bool,
    /// The status of the answer to a request that is not let pass because it did not answer. Default: 403.
    pub status_on_error: u16,
    /// How much of the request's body it is told; `None`: nothing.
    pub body: Option<CheckBody>,
    /// How it is asked.
    pub protocol: CheckProtocol,
}

/// How much of a request's body a provider is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckBody {
    /// The most bytes.
    pub bytes_max: usize,
    /// A longer body is cut; otherwise its request is refused as too large.
    pub allow_partial: bool,
    /// Over gRPC, it is sent as bytes rather than as text.
    pub as_bytes: bool,
}

/// How a provider is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckProtocol {
    /// `envoy.service.auth.v3.Authorization` over gRPC.
    Grpc,
    /// A request like the one that it is asked about.
    Http(HttpCheck),
}

/// What of a request a provider is told over HTTP, and what of its answer counts. Names of headers are in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HttpCheck {
    /// What the path begins with, before the request's own.
    pub path_prefix: Arc<str>,
    /// The request's headers that it is told.
    pub request_headers: Vec<TextMatch>,
    /// Further headers, by name.
    pub additional_headers: Vec<(Arc<str>, Arc<str>)>,
    /// The headers of its answer that the request takes along when it passes.
    pub upstream_on_allow: Vec<TextMatch>,
    /// The headers of its answer that the client gets when the request does not pass; none: all of them.
    pub downstream_on_deny: Vec<TextMatch>,
    /// The headers of its answer that the client gets when the request passes.
    pub downstream_on_allow: Vec<TextMatch>,
}
