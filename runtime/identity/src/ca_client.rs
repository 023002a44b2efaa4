//! The mesh's CA over gRPC: `istio.v1.auth.IstioCertificateService/CreateCertificate`.

use crate::{IssueError, Issuer, Roots, Token};
use cairn_mesh::Identity;
use cairn_proto::ca::IstioCertificateRequest;
use cairn_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use parking_lot::Mutex;
use prost_types::{Struct, Value, value::Kind};
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tonic::Request;
use tonic::metadata::{Ascii, AsciiMetadataKey, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// Where the CA is, and who we are to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaSettings {
    /// `https://host:port`.
    pub address: String,
    /// The roots that the CA's own certificate chains to; read again at each call, so that they may be replaced.
    pub roots: Roots,
    /// The token that says who we are; read again at each call, since tokens expire. No token if unset.
    pub token: Option<Token>,
    /// The name that the CA's certificate is for, if that is not the address's.
    pub host: Option<String>,
    /// What each call carries beside the token.
    pub headers: Vec<(String, String)>,
    /// The cluster the token is of; sent as `ClusterID`.
    pub cluster_id: String,
    /// Ask in the name of the identity (`ImpersonatedIdentity`), as a ztunnel does for the workloads of its node.
    pub impersonate: bool,
}

/// How long a connection to the CA may take, and how long a call (facts: ztunnel gives a connection 5 s).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of the mesh's CA. It must be used within the runtime that owns the connection.
pub struct CaClient {
    shared: Arc<Shared>,
}

struct Shared {
    settings: CaSettings,
    /// The connection, and the roots it was made with.
    channel: Mutex<Option<(String, Channel)>>,
}

impl CaClient {
    /// A client that connects at its first call.
    pub fn new(settings: CaSettings) -> Self {
        Self { shared: Arc::new(Shared { settings, channel: Mutex::default() }) }
    }
}

impl Issuer for CaClient {
    fn issue(
        &self,
        identity: Identity,
        csr_pem: String,
        ttl: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<String>, IssueError>> + Send>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let call = shared.create_certificate(&identity, csr_pem, ttl);
            let answered = tokio::time::timeout(CALL_TIMEOUT, call).await;
            answered.unwrap_or(Err(IssueError::Timeout(CALL_TIMEOUT)))
        })
    }
}

impl Shared {
    async fn create_certificate(
        &self,
        identity: &Identity,
        csr_pem: String,
        ttl: Duration,
    ) -> Result<Vec<String>, IssueError> {
        let mut request = Request::new(IstioCertificateRequest {
            csr: csr_pem,
            validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: self.settings.impersonate.then(|| impersonated(identity)),
        });
        if let Some(token) = &self.settings.token {
            request
                .metadata_mut()
                .insert("authorization", bearer(&token.read().map_err(file(token.name()))?)?);
        }
        let cluster_id = self.settings.cluster_id.parse();
        let cluster_id = cluster_id.map_err(|_| IssueError::Settings { what: "the cluster's name" })?;
        request.metadata_mut().insert("clusterid", cluster_id);
        for (name, value) in &self.settings.headers {
            let wrong = || IssueError::Settings { what: "a header" };
            let name: AsciiMetadataKey = name.parse().map_err(|_| wrong())?;
            request.metadata_mut().insert(name, value.parse().map_err(|_| wrong())?);
        }
        let mut client = IstioCertificateServiceClient::new(self.channel()?);
        let response = client.create_certificate(request).await;
        Ok(response.map_err(|status| IssueError::Refused(Box::new(status)))?.into_inner().cert_chain)
    }

    /// The connection; a new one if the roots have changed.
    fn channel(&self) -> Result<Channel, IssueError> {
        let roots = self.settings.roots.read().map_err(file(self.settings.roots.name()))?;
        let mut known = self.channel.lock();
        if let Some((with, channel)) = &*known
            && *with == roots
        {
            return Ok(channel.clone());
        }
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&roots));
        if let Some(host) = &self.settings.host {
            tls = tls.domain_name(host.as_str());
        }
        let channel = Endpoint::from_shared(self.settings.address.clone())
            .map_err(IssueError::Connect)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(Some(Duration::from_secs(300)))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .tls_config(tls)
            .map_err(IssueError::Connect)?
            .connect_lazy();
        *known = Some((roots, channel.clone()));
        Ok(channel)
    }
}

fn impersonated(identity: &Identity) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(identity.to_string())) };
    Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() }
}

fn bearer(token: &str) -> Result<MetadataValue<Ascii>, IssueError> {
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {}", token.trim()).parse().map_err(|_| IssueError::Settings { what: "the token" })?;
    value.set_sensitive(true);
    Ok(value)
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> IssueError {
    let path = path.to_owned();
    move |source| IssueError::File { path, source }
}
