//! Typed access to what the proxy knows about an exchange.

use crate::sys;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The properties of the exchange at hand. Whatever the proxy does not know is `None`. Where proxies have renamed a property
/// (`xds.route_name` was `route_name`), both names are tried.
///
/// ```
/// use cairn_sdk::{Flow, Plugin, Request};
/// # use cairn_sdk::testing::{Proxy, TestRequest};
///
/// struct Who;
///
/// #[cairn_sdk::plugin]
/// impl Plugin for Who {
///     type Config = ();
///     type Exchange = ();
/// #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
///
///     fn on_request(&self, request: Request, _: &mut ()) -> Flow {
///         let known = request.properties();
///         request.set_header("x-client", known.source_principal().unwrap_or_default());
///         request.set_header("x-route", known.route().unwrap_or_default());
///         known.set(&["who", "done"], "yes");
///         Flow::Continue
///     }
/// }
/// # let mut proxy = Proxy::<Who>::new("").unwrap();
/// # proxy.property(&["connection", "uri_san_peer_certificate"], "spiffe://cluster.local/ns/a/sa/b");
/// # proxy.property(&["route_name"], "old");
/// # let upstream = proxy.send(TestRequest::get("/")).upstream.unwrap();
/// # assert_eq!(upstream.header("x-client").as_deref(), Some("cluster.local/ns/a/sa/b"));
/// # assert_eq!(upstream.header("x-route").as_deref(), Some("old"));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Properties(pub(crate) ());

/// A workload of the mesh, as the proxy knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The name of what controls the pod, such as its Deployment.
    pub workload: String,
    /// Its namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// Its canonical service.
    pub service: String,
}

/// Properties that are text: getter, its documentation, and the paths to try.
macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident: $($path:expr),+;)*) => {
        $($(#[$doc])*
        pub fn $name(&self) -> Option<String> {
            self.first(&[$(&$path),+])
        })*
    };
}

/// Properties that are numbers.
macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident: $path:expr;)*) => {
        $($(#[$doc])*
        pub fn $name(&self) -> Option<i64> {
            self.number(&$path)
        })*
    };
}

impl Properties {
    /// The raw bytes of any property.
    pub fn bytes(&self, path: &[&str]) -> Option<Vec<u8>> {
        sys::property(path).ok()
    }

    /// A property that is text, read leniently.
    pub fn text(&self, path: &[&str]) -> Option<String> {
        self.bytes(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A property that is a number.
    pub fn number(&self, path: &[&str]) -> Option<i64> {
        self.bytes(path)?.try_into().ok().map(i64::from_le_bytes)
    }

    /// A property that is true or false.
    pub fn flag(&self, path: &[&str]) -> Option<bool> {
        self.bytes(path)?.first().map(|byte| *byte != 0)
    }

    /// A property that is a time.
    pub fn time(&self, path: &[&str]) -> Option<SystemTime> {
        let nanos = u64::try_from(self.number(path)?).ok()?;
        UNIX_EPOCH.checked_add(Duration::from_nanos(nanos))
    }

    /// A property that is a span of time.
    pub fn duration(&self, path: &[&str]) -> Option<Duration> {
        u64::try_from(self.number(path)?).ok().map(Duration::from_nanos)
    }

    /// Sets a property of the exchange, for this plugin or later ones to read. Returns whether the proxy took it.
    pub fn set(&self, path: &[&str], value: impl AsRef<[u8]>) -> bool {
        sys::set_property(path, value.as_ref()).is_ok()
    }

    /// The client's address.
    pub fn source_address(&self) -> Option<SocketAddr> {
        self.text(&["source", "address"])?.parse().ok()
    }

    /// Where the client meant to go.
    pub fn destination_address(&self) -> Option<SocketAddr> {
        self.text(&["destination", "address"])?.parse().ok()
    }

    /// Where the exchange was sent, once an upstream was chosen.
    pub fn upstream_address(&self) -> Option<SocketAddr> {
        self.text(&["upstream", "address"])?.parse().ok()
    }

    /// The client's identity without `spiffe://`, as Istio's policies write principals.
    pub fn source_principal(&self) -> Option<String> {
        let identity = self.source_identity()?;
        identity.strip_prefix("spiffe://").map(str::to_owned)
    }

    /// The client's workload.
    pub fn source_workload(&self) -> Option<Workload> {
        self.workload("downstream_peer")
    }

    /// The upstream's workload, once one was chosen.
    pub fn upstream_workload(&self) -> Option<Workload> {
        self.workload("upstream_peer")
    }

    /// What the proxy was told about itself, such as `["metadata", "NAMESPACE"]`.
    pub fn node(&self, path: &[&str]) -> Option<String> {
        let under = |root: &[&str]| self.text(&[root, path].concat());
        under(&["xds", "node"]).or_else(|| under(&["node"]))
    }

    texts! {
        /// The client's identity, `spiffe://…`, as its certificate proves it.
        source_identity: ["connection", "uri_san_peer_certificate"];
        /// The name that the client asked for in TLS.
        requested_server_name: ["connection", "requested_server_name"];
        /// The version of TLS towards the client.
        tls_version: ["connection", "tls_version"];
        /// The id of the request, `x-request-id`.
        request_id: ["request", "id"];
        /// The version of HTTP, such as `HTTP/1.1`.
        protocol: ["request", "protocol"];
        /// Why the response is what it is, such as `via_upstream`.
        response_details: ["response", "code_details"];
        /// The name of the route in force.
        route: ["xds", "route_name"], ["route_name"];
        /// The name of the upstream's cluster, once one was chosen.
        cluster: ["xds", "cluster_name"], ["cluster_name"];
        /// The name of the plugin.
        plugin_name: ["plugin_name"];
        /// The name of the plugin's root.
        plugin_root: ["plugin_root_id"];
    }

    numbers! {
        /// The length of the request's body as far as it is known.
        request_size: ["request", "size"];
        /// The response's status, once there is one.
        response_code: ["response", "code"];
        /// The bits of Envoy's response flags.
        response_flags: ["response", "flags"];
        /// The length of the response's body, at the end.
        response_size: ["response", "size"];
        /// The status of gRPC, at the end.
        grpc_status: ["response", "grpc_status"];
    }

    /// When the request arrived.
    pub fn request_time(&self) -> Option<SystemTime> {
        self.time(&["request", "time"])
    }

    /// How long the exchange took, at its end.
    pub fn request_duration(&self) -> Option<Duration> {
        self.duration(&["request", "duration"])
    }

    /// Whether the client has proved its identity.
    pub fn is_mutual_tls(&self) -> Option<bool> {
        self.flag(&["connection", "mtls"])
    }

    fn first(&self, paths: &[&[&str]]) -> Option<String> {
        paths.iter().find_map(|path| self.text(path))
    }

    fn workload(&self, peer: &str) -> Option<Workload> {
        let field = |name: &str| self.text(&["filter_state", peer, name]);
        Some(Workload {
            workload: field("workload")?,
            namespace: field("namespace")?,
            name: field("name").unwrap_or_default(),
            service: field("service").unwrap_or_default(),
        })
    }
}
