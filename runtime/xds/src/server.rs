//! Our own control plane's wire side: delta ADS, and the certificate service over the embedded CA.

use crate::accept::incoming;
use crate::published::{Published, Served};
use crate::subscriber::{Heard, Subscriber};
use crate::tokens::{Role, Tokens};
use cairn_identity::Authority;
use cairn_mesh::Identity;
use cairn_proto::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use cairn_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use cairn_proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use cairn_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use futures_util::stream::{Stream, unfold};
use parking_lot::Mutex;
use prost_types::value::Kind;
use rustls::ServerConfig;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

/// The largest request that is read: a reconnecting client names everything it holds, some 100 bytes each.
const REQUEST_BYTES_MAX: usize = 64 << 20;
/// A certificate's lifetime when its request does not say one.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// At most so many refusals are kept; further ones are only logged.
const REJECTIONS_MAX: usize = 1000;

/// Why the server stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The HTTP/2 server failed.
    #[error("the control plane's listener failed")]
    Transport(#[from] tonic::transport::Error),
}

/// A resource that a client refused and still does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The client's node id.
    pub node: String,
    /// The resource's type.
    pub type_url: String,
    /// The resource's name; `""` when the client did not say which.
    pub name: String,
    /// The client's reason.
    pub reason: String,
}

/// Stream, type and name: what a stream refused goes when it ends.
type RejectionKey = (u64, Arc<str>, String);

/// The server: what it serves, to whom, and what its clients think of it.
pub struct Server {
    authority: Arc<Authority>,
    tokens: Tokens,
    published: watch::Sender<Arc<Published>>,
    rejections: Mutex<BTreeMap<RejectionKey, Rejection>>,
    streams: AtomicU64,
}

impl Server {
    /// A server that has nothing to serve yet: clients wait until the first [`Self::publish`].
    pub fn new(authority: Arc<Authority>, tokens: Tokens) -> Arc<Self> {
        Arc::new(Self {
            authority,
            tokens,
            published: watch::Sender::new(Arc::default()),
            rejections: Mutex::default(),
            streams: AtomicU64::new(0),
        })
    }

    /// Serves this from now on: clients are told the differences, as one generation.
    pub fn publish(&self, served: Served) {
        self.published.send_modify(|published| *published = Arc::new(published.next(served)));
    }

    /// What clients that are connected refuse at the moment.
    pub fn rejections(&self) -> Vec<Rejection> {
        self.rejections.lock().values().cloned().collect()
    }

    /// Accepts clients until `shutdown` resolves; then ends their streams and returns.
    ///
    /// # Errors
    /// When the listener's HTTP/2 server fails.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: Arc<ServerConfig>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let (closing, closed) = watch::channel(false);
        let discovery = Discovery { server: Arc::clone(&self), closed };
        let shutdown = async move {
            shutdown.await;
            closing.send_replace(true);
        };
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .add_service(
                AggregatedDiscoveryServiceServer::new(discovery).max_decoding_message_size(REQUEST_BYTES_MAX),
            )
            .add_service(IstioCertificateServiceServer::new(Certificates { server: self }))
            .serve_with_incoming_shutdown(incoming(listener, tls), shutdown)
            .await?;
        Ok(())
    }

    /// Notes what a client said of a response.
    fn note(&self, stream: u64, node: &str, heard: Heard) {
        let Heard::Answer { type_url, refused, taken } = heard else { return };
        let mut rejections = self.rejections.lock();
        // A refusal without a name was of a whole response; one that is accepted ends it.
        let unnamed = refused.is_empty().then(String::new);
        for name in taken.into_iter().chain(unnamed) {
            rejections.remove(&(stream, Arc::clone(&type_url), name));
        }
        for (name, reason) in refused {
            warn!(%node, %type_url, %name, %reason, "a client refused a resource");
            if rejections.len() < REJECTIONS_MAX {
                let rejection = Rejection {
                    node: node.to_owned(),
                    type_url: type_url.to_string(),
                    name: name.clone(),
                    reason,
                };
                rejections.insert((stream, Arc::clone(&type_url), name), rejection);
            }
        }
    }

    /// Forgets what a stream refused.
    fn forget(&self, stream: u64) {
        self.rejections.lock().retain(|(of, _, _), _| *of != stream);
    }

    /// Whether the holder of this role may have a certificate for this identity.
    fn may_have(&self, role: &Role, wanted: &Identity) -> bool {
        match role {
            Role::Ztunnel { node } => self.published.borrow().runs_on(wanted, node),
            Role::Waypoint { identity, .. } => identity == wanted,
        }
    }
}

struct Discovery {
    server: Arc<Server>,
    closed: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let role = self.server.tokens.role(request.metadata())?;
        info!(?role, peer = ?request.remote_addr(), "a client subscribes");
        let mut published = self.server.published.subscribe();
        let now = Arc::clone(&published.borrow_and_update());
        let stream = ClientStream {
            number: self.server.streams.fetch_add(1, Ordering::Relaxed),
            node: String::new(),
            subscriber: Subscriber::new(role, now),
            requests: request.into_inner(),
            published,
            closed: self.closed.clone(),
            server: Arc::clone(&self.server),
        };
        let responses = unfold(stream, |mut stream| async move {
            let response = stream.next().await?;
            Some((response, stream))
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

/// One client's stream. It has no task of its own: it runs when the connection asks for its next response, so a
/// client that does not read makes no work.
struct ClientStream {
    number: u64,
    node: String,
    subscriber: Subscriber,
    requests: Streaming<DeltaDiscoveryRequest>,
    published: watch::Receiver<Arc<Published>>,
    closed: watch::Receiver<bool>,
    server: Arc<Server>,
}

impl ClientStream {
    async fn next(&mut self) -> Option<Result<DeltaDiscoveryResponse, Status>> {
        loop {
            if self.subscriber.is_told() {
                self.subscriber.advance(Arc::clone(&self.published.borrow_and_update()));
            }
            if let Some(response) = self.subscriber.next() {
                return Some(Ok(response));
            }
            tokio::select! {
                () = closing(&mut self.closed) => return None,
                changed = self.published.changed(), if self.subscriber.is_told() => changed.ok()?,
                request = self.requests.message() => match request {
                    Ok(Some(request)) => {
                        if let Err(status) = self.hear(request) {
                            return Some(Err(status));
                        }
                    }
                    Ok(None) => return None,
                    Err(status) => {
                        debug!(node = %self.node, %status, "a client is gone");
                        return None;
                    }
                },
            }
        }
    }

    fn hear(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let (true, Some(node)) = (self.node.is_empty(), &request.node) {
            self.node.clone_from(&node.id);
        }
        match self.subscriber.hear(request) {
            Heard::TooMany => Err(Status::resource_exhausted("too many types or names")),
            heard => {
                self.server.note(self.number, &self.node, heard);
                Ok(())
            }
        }
    }
}

/// Resolves when the server closes.
async fn closing(closed: &mut watch::Receiver<bool>) {
    // An error means that the server is gone altogether, which is the same here.
    let _ = closed.wait_for(|closed| *closed).await;
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        self.server.forget(self.number);
    }
}

struct Certificates {
    server: Arc<Server>,
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let role = self.server.tokens.role(request.metadata())?;
        let request = request.into_inner();
        let invalid = |error: &dyn std::error::Error| Status::invalid_argument(error.to_string());
        let wanted = Authority::csr_identity(&request.csr).map_err(|error| invalid(&error))?;
        if impersonated(&request).is_some_and(|identity| identity != wanted.as_str()) {
            return Err(Status::invalid_argument("the request is for another identity than its CSR"));
        }
        if !self.server.may_have(&role, &wanted) {
            warn!(?role, identity = %wanted, "certificate refused");
            return Err(Status::permission_denied("not an identity of the caller"));
        }
        let seconds = u64::try_from(request.validity_duration).unwrap_or(0);
        let ttl = if seconds == 0 { DEFAULT_TTL } else { Duration::from_secs(seconds) };
        let chain = self.server.authority.sign(&request.csr, ttl, SystemTime::now());
        let cert_chain = chain.map_err(|error| invalid(&error))?;
        debug!(?role, identity = %wanted, "certificate issued");
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// The identity that the caller says it asks for, beside the one in its CSR.
fn impersonated(request: &IstioCertificateRequest) -> Option<&str> {
    match &request.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?.kind {
        Some(Kind::StringValue(text)) => Some(text),
        _ => None,
    }
}
