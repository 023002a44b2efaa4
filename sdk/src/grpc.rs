//! Unary gRPC callouts that are awaited. Messages are bytes: bring your own protobuf.

use crate::abi::Pairs;
use crate::task::{self, Arrival, Arriving, CallKind};
use crate::{CallError, sys};
use std::fmt;
use std::time::Duration;

/// How long a call may take unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A unary call of a gRPC service.
///
/// ```
/// use cairn_sdk::testing::{Proxy, TestRequest};
/// use cairn_sdk::{Flow, GrpcCall, Plugin, Reply, Request};
///
/// struct Ask;
///
/// #[cairn_sdk::plugin]
/// impl Plugin for Ask {
///     type Config = ();
///     type Exchange = ();
/// #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
///
///     fn on_request(&self, request: Request, _: &mut ()) -> Flow {
///         let call = GrpcCall::new("limits", "limits.v1.Limits", "Count").message(request.path());
///         Flow::wait(async move {
///             match call.send().await {
///                 Ok(_) => Flow::Continue,
///                 Err(error) if error.code == 8 => Reply::text(429, error.message).into(),
///                 Err(_) => Reply::empty(503).into(),
///             }
///         })
///     }
/// }
///
/// let mut proxy = Proxy::<Ask>::new("").unwrap();
/// proxy.grpc("limits", |call| match call.body.as_slice() {
///     b"/often" => Err((8, "too often")),
///     _ => Ok(Vec::new()),
/// });
/// assert_eq!(proxy.send(TestRequest::get("/")).status, 200);
/// let outcome = proxy.send(TestRequest::get("/often"));
/// assert_eq!((outcome.status, outcome.text()), (429, "too often".to_owned()));
/// ```
#[derive(Clone, Debug)]
#[must_use = "a call is made by `send`"]
pub struct GrpcCall {
    cluster: String,
    service: String,
    method: String,
    metadata: Pairs,
    message: Vec<u8>,
    timeout: Duration,
}

/// A gRPC status other than OK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcError {
    /// The status; 14, unavailable, if the call could not be made.
    pub code: u32,
    /// Its message.
    pub message: String,
}

impl fmt::Display for GrpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gRPC status {}: {}", self.code, self.message)
    }
}

impl std::error::Error for GrpcError {}

impl From<CallError> for GrpcError {
    fn from(error: CallError) -> Self {
        const UNAVAILABLE: u32 = 14;
        Self { code: UNAVAILABLE, message: error.to_string() }
    }
}

impl GrpcCall {
    /// A call of a service's method, such as `grpc.health.v1.Health` and `Check`.
    pub fn new(cluster: impl Into<String>, service: impl Into<String>, method: impl Into<String>) -> Self {
        Self {
            cluster: cluster.into(),
            service: service.into(),
            method: method.into(),
            metadata: Pairs::new(),
            message: Vec::new(),
            timeout: TIMEOUT,
        }
    }

    /// The same with this message, encoded.
    pub fn message(mut self, message: impl AsRef<[u8]>) -> Self {
        self.message = message.as_ref().to_vec();
        self
    }

    /// The same with one more entry of metadata.
    pub fn metadata(mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
        self.metadata.push((name.into(), value.as_ref().to_vec()));
        self
    }

    /// The same with another time limit than 5 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.max(Duration::from_millis(1));
        self
    }

    /// Makes the call at once; the future is the answer's message.
    ///
    /// # Errors
    /// The status of the call.
    pub fn send(self) -> impl Future<Output = Result<Vec<u8>, GrpcError>> {
        let call = self.start();
        async move {
            match call?.await {
                Arrival::Grpc(answer) => answer,
                Arrival::Http(_) => Err(CallError::Failed.into()),
            }
        }
    }

    fn start(self) -> Result<Arriving, CallError> {
        if !task::may_call() {
            return Err(CallError::TooMany);
        }
        let timeout = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
        let method = [self.service.as_str(), self.method.as_str()];
        let id = sys::grpc_call(&self.cluster, method, &self.metadata, &self.message, timeout);
        id.map(|id| Arriving::new(CallKind::Grpc, id)).map_err(CallError::Refused)
    }
}
