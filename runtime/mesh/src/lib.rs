//! The model of the mesh, its store, and the pure decisions on it.
//!
//! Every source of configuration is translated at the edge into [`Change`]s. One [`Store`] applies them and publishes
//! immutable [`Snapshot`]s. Two decisions are made on a snapshot: [`plan`] says where an outbound connection goes
//! next, [`decide`] whether an inbound one is allowed. Nothing here does I/O, reads a clock, or knows protobuf or
//! YAML; randomness is passed in.

mod arrive;
mod authentication;
mod authorization;
mod balance;
mod identity;
mod joined;
mod name;
mod path;
mod plan;
mod plugin;
mod policy;
mod provider;
mod request_principal;
mod resolve;
mod route;
mod service;
mod settings;
mod sharded;
mod snapshot;
mod store;
mod telemetry;
mod text_match;
mod trust_domains;
mod wanted;
mod workload;

pub use arrive::{Arrival, ArrivalTarget, Unwelcome, arrive};
pub use authentication::{ClaimHeader, JwtRule, KeyPlace, RequestAuthentication, TokenHeader, TokenPlaces};
pub use authorization::{Authorization, Clause, L4Match, L4Rule, PolicyAction, Scope};
pub use authorization::{Decision, DenyReason, L4Considered, L4Peer, L4Policies, Trial};
pub use authorization::{consider, decide, l4_policies, on_trial};
pub use balance::{Chooser, candidates, pick};
pub use identity::{Identity, IdentityError};
pub use joined::is_joined_header;
pub use name::{Kind, ResourceKey, ResourceName};
pub use path::normalize_path;
pub use plan::{
    Crossing, HBONE_PORT, OUTBOUND_PORT, OWN_PORTS, PLAINTEXT_PORT, Plan, Refusal, SOCKS_PORT, Tunnel, plan,
};
pub use plugin::{
    FailStrategy, Isolation, PluginKind, PluginLimits, PluginMode, PluginPhase, PullPolicy, PullSecret,
    WasmPlugin,
};
pub use policy::{
    AuthorizationPolicy, ClaimPath, Condition, CustomPolicy, HostMatch, IpMatch, MetadataKey, MetadataMatch,
    Operation, PathMatch, PolicyRule, PortMatch, ServiceAccount, Source, TargetKind, TargetRef,
    Unenforceable, Values,
};
pub use provider::{AuthorizationProvider, CheckBody, CheckProtocol, HttpCheck};
pub use request_principal::RequestPrincipal;
pub use resolve::resolve;
pub use route::{
    Backend, BackendKind, ClaimMatch, HeaderChange, HeaderChanges, HttpRoute, NameMatch, ParentRef,
    PathRewrite, PathRule, Precedence, Redirect, Rewrite, RouteFilter, RouteForm, RouteMatch, RouteRule,
    ValueMatch,
};
pub use service::{
    AppProtocol, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, NetworkBlock, RoutingScope,
    Service, ServicePort, Visibility, WeightedWaypoint,
};
pub use settings::{MeshSettings, PathNormalization};
pub use sharded::Sharded;
pub use snapshot::{Destination, Endpoint, L7, ServiceState, Snapshot};
pub use store::{Applied, Change, Store};
pub use telemetry::{
    AccessLogging, AlsLog, FileLog, GatewayTelemetry, LogFormat, LogPlan, LogTarget, LogValue, Metric,
    MetricOverride, MetricsChange, MetricsPlan, OtelLog, OtelTrace, OtelTransport, ProviderAddress, SpanTag,
    TagChange, TelemetryDefaults, TelemetryPlan, TelemetryPolicy, TelemetryProvider, TelemetryProviderKind,
    TracingChange, TracingPlan, ZipkinTrace,
};
pub use text_match::TextMatch;
pub use trust_domains::TrustDomains;
pub use wanted::{Wanted, wanted_inbound, wanted_outbound};
pub use workload::{
    ApplicationTunnel, GatewayAddress, GatewayTarget, Health, Locality, NetworkAddress, NetworkMode,
    PortMapping, TunnelHandover, TunnelProtocol, Workload, WorkloadKind,
};
