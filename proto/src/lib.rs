//! The protobuf messages Cairn speaks, and their generated types.
//!
//! The `.proto` files beside this crate's manifest hold only the messages and fields that we read or write; numbers
//! are those of the wire. Nothing but the edge crates sees these types: they become `cairn-mesh` types on arrival.
//!
//! [`discovery`] is delta aggregated discovery (xDS), [`workload`] and [`security`] are the resources a ztunnel
//! subscribes to, [`ca`] is about certificates, and [`mcp`] is the envelope of Kubernetes resources between our
//! server and our waypoints. [`ext_authz`] is how a waypoint asks a service whether a request may pass,
//! [`opentelemetry`] and [`accesslog`] are what telemetry is sent as. [`zds`] is how istio-cni tells a ztunnel its pods.
//!
//! Maps are sorted, so that equal messages have equal bytes.

#[allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cairn_proto.rs"));
}

pub use generated::envoy::accesslog;
pub use generated::istio::mcp::v1alpha1 as mcp;
pub use generated::istio::v1::auth as ca;
pub use generated::istio::workload::zds;
pub use generated::istio::{security, workload};
pub use generated::opentelemetry;

/// Delta aggregated discovery: `envoy.service.discovery.v3` with what it uses of other packages.
pub mod discovery {
    pub use crate::generated::envoy::config::core::v3::Node;
    pub use crate::generated::envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, aggregated_discovery_service_client,
        aggregated_discovery_service_server,
    };
    pub use crate::generated::google::rpc::{BadRequest, Status, bad_request};
}

/// Asking whether a request or connection may pass: `envoy.service.auth.v3` with what it uses of other packages.
pub mod ext_authz {
    pub use crate::generated::envoy::config::core::v3::header_value_option::HeaderAppendAction;
    pub use crate::generated::envoy::config::core::v3::{
        Address, HeaderValue, HeaderValueOption, QueryParameter, SocketAddress, address, socket_address,
    };
    pub use crate::generated::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request};
    pub use crate::generated::envoy::service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
        authorization_server, check_response,
    };
    pub use crate::generated::envoy::r#type::v3::HttpStatus;
    pub use crate::generated::google::rpc::Status;
}

#[cfg(test)]
mod tests;
