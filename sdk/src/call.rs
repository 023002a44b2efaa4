//! HTTP callouts that are awaited.

use crate::abi::Pairs;
use crate::task::{self, Arrival, Arriving, CallKind};
use crate::{HostError, sys};
use std::fmt;
use std::time::Duration;

/// How long a callout may take unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A request to another service. `cluster` is its name in the proxy: `outbound|80||auth.shop.svc.cluster.local` in a mesh, or a
/// cluster's name in Envoy's own configuration.
///
/// ```
/// use cairn_sdk::testing::{Proxy, TestRequest, TestResponse};
/// use cairn_sdk::{Call, Flow, Plugin, Reply, Request};
/// use std::time::Duration;
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
///         Flow::wait(allowed(request))
///     }
/// }
///
/// async fn allowed(request: Request) -> Flow {
///     let call = Call::get("auth", "/may-i").header("x-path", request.path());
///     match call.timeout(Duration::from_millis(500)).send().await {
///         Ok(answer) if answer.status() == 200 => {
///             request.set_header("x-user", answer.header("x-user").unwrap_or_default());
///             Flow::Continue
///         }
///         Ok(_) => Reply::empty(403).into(),
///         Err(error) => Reply::text(503, format!("auth: {error}")).into(),
///     }
/// }
///
/// let mut proxy = Proxy::<Ask>::new("").unwrap();
/// proxy.cluster("auth", |call| match call.header("x-path").as_deref() {
///     Some("/free") => TestResponse::new(200).header("x-user", "ada"),
///     Some("/slow") => TestResponse::new(200).after(Duration::from_secs(1)),
///     _ => TestResponse::failure(),
/// });
/// assert_eq!(proxy.send(TestRequest::get("/free")).upstream.unwrap().header("x-user"), Some("ada".to_owned()));
/// assert_eq!(proxy.send(TestRequest::get("/slow")).status, 403, "proxies answer 504 for one that is late");
/// assert_eq!(proxy.send(TestRequest::get("/broken")).text(), "auth: the call failed");
/// ```
#[derive(Clone, Debug)]
#[must_use = "a call is made by `send`"]
pub struct Call {
    cluster: String,
    headers: Pairs,
    body: Vec<u8>,
    timeout: Duration,
}

/// The answer to a [`Call`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The headers in order, `:status` first.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body.
    pub body: Vec<u8>,
    /// The trailers.
    pub trailers: Vec<(String, Vec<u8>)>,
}

/// Why a [`Call`] has no answer. A peer that cannot be reached or is late is, in most proxies, an [`Answer`] of 503 or 504.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallError {
    /// The proxy did not make it; [`HostError::BadArgument`] if it does not know the cluster.
    Refused(HostError),
    /// Too many are in flight.
    TooMany,
    /// It failed on its way.
    Failed,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => write!(f, "the proxy did not make the call: {error}"),
            Self::TooMany => f.write_str("too many calls are in flight"),
            Self::Failed => f.write_str("the call failed"),
        }
    }
}

impl std::error::Error for CallError {}

impl Call {
    /// A call with this method.
    pub fn new(method: &str, cluster: impl Into<String>, path: impl AsRef<[u8]>) -> Self {
        let cluster = cluster.into();
        // What stands before the host in Istio's names of clusters is no part of an authority.
        let authority = cluster.rsplit('|').next().unwrap_or_default().as_bytes().to_vec();
        let headers = vec![
            (":method".to_owned(), method.as_bytes().to_vec()),
            (":path".to_owned(), path.as_ref().to_vec()),
            (":authority".to_owned(), authority),
        ];
        Self { cluster, headers, body: Vec::new(), timeout: TIMEOUT }
    }

    /// A `GET`.
    pub fn get(cluster: impl Into<String>, path: impl AsRef<[u8]>) -> Self {
        Self::new("GET", cluster, path)
    }

    /// A `POST` of this body.
    pub fn post(cluster: impl Into<String>, path: impl AsRef<[u8]>, body: impl AsRef<[u8]>) -> Self {
        Self { body: body.as_ref().to_vec(), ..Self::new("POST", cluster, path) }
    }

    /// The same to this authority; otherwise it is the cluster's host.
    pub fn authority(mut self, authority: impl AsRef<[u8]>) -> Self {
        self.headers[2].1 = authority.as_ref().to_vec();
        self
    }

    /// The same with one more header.
    pub fn header(mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.into(), value.as_ref().to_vec()));
        self
    }

    /// The same with another time limit than 5 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.max(Duration::from_millis(1));
        self
    }

    /// Makes the call at once; the future is its answer. Several can be in flight, see [`crate::join`]. Dropping the future
    /// forgets the call.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn send(self) -> impl Future<Output = Result<Answer, CallError>> {
        let call = self.start();
        async move {
            match call?.await {
                Arrival::Http(answer) => answer.ok_or(CallError::Failed),
                Arrival::Grpc(_) => Err(CallError::Failed),
            }
        }
    }

    fn start(self) -> Result<Arriving, CallError> {
        if !task::may_call() {
            return Err(CallError::TooMany);
        }
        let timeout = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
        let id = sys::http_call(&self.cluster, &self.headers, &self.body, timeout);
        id.map(|id| Arriving::new(CallKind::Http, id)).map_err(CallError::Refused)
    }
}

impl Answer {
    /// The status; 0 if there is none.
    pub fn status(&self) -> u16 {
        let status = self.header(":status").unwrap_or_default();
        std::str::from_utf8(status).ok().and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        let mut same = self.headers.iter().filter(|(present, _)| present.eq_ignore_ascii_case(name));
        same.next().map(|(_, value)| value.as_slice())
    }

    /// The body as text, with what is not UTF-8 replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}
