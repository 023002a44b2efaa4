//! One workload's certificate, and the TLS configurations made from it.

use crate::compliance::mesh_provider;
use crate::pem;
use crate::sessions::Sessions;
use crate::verify::{Accept, Peer, PeerVerifier, Verification, identities};
use crate::{IssueError, Issuer, PeerWatch, Trust};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cairn_mesh::Identity;
use parking_lot::Mutex;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, TrustAnchor};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::parse_x509_certificate;

/// TLS as the mesh speaks it.
pub(crate) static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(mesh_provider);

/// The only application protocol between proxies.
pub(crate) const ALPN_H2: &[u8] = b"h2";

/// How many sets of expected peers keep their configuration. A set is one workload or service, so a node rarely
/// reaches this; then all are built anew.
const CLIENT_CONFIGS_MAX: usize = 1024;

/// How many servers of one set of expected peers a client keeps sessions of.
const CLIENT_SESSIONS_MAX: usize = 64;

/// Why a chain is not a certificate of ours.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// It is not PEM.
    #[error("the chain is not PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// It needs a leaf and a root.
    #[error("the chain has no {0}")]
    Missing(&'static str),
    /// The leaf is not X.509.
    #[error("the leaf cannot be read")]
    Leaf,
    /// A root is not X.509.
    #[error("a root cannot be read")]
    Root(#[source] webpki::Error),
    /// It was issued to someone else.
    #[error("the certificate is for {found:?}, asked for {asked}")]
    Identity {
        /// Who was asked for.
        asked: Identity,
        /// Who it is for.
        found: Vec<Identity>,
    },
    /// It has expired, or its life has not begun: one of the clocks is wrong.
    #[error("the certificate is not valid now")]
    NotValidNow,
    /// The key does not belong to the leaf, or TLS cannot use it.
    #[error("TLS cannot use the certificate")]
    Tls(#[source] rustls::Error),
}

/// A certificate of a workload, with its key, its roots and the TLS configurations made from them.
pub struct WorkloadCertificate {
    /// Whose it is.
    pub identity: Identity,
    /// From when it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
    /// The chain in PEM: leaf, intermediates, roots.
    pub chain_pem: String,
    /// The serial number in lower-case hexadecimal.
    pub serial: String,
    /// Where the roots begin in `chain_pem`.
    roots_at: usize,
    server: Arc<ServerConfig>,
    /// Accepts no server until given whom to expect.
    client: ClientConfig,
    clients: Mutex<HashMap<Box<[Identity]>, Arc<ClientConfig>>>,
    verification: Verification,
    trust: Arc<Trust>,
}

/// What operators are shown of one certificate of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateView {
    /// The certificate as PEM, and that in base64 (as Istio's ztunnel shows it).
    pub pem_base64: String,
    /// The serial number, in decimal.
    pub serial: String,
    /// From when it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

impl CertificateView {
    fn of(certificate: &CertificateDer<'static>) -> Option<Self> {
        let (_, parsed) = parse_x509_certificate(certificate).ok()?;
        let validity = parsed.validity();
        Some(Self {
            pem_base64: STANDARD.encode(pem::encode(certificate)),
            serial: parsed.serial.to_string(),
            not_before: system_time(validity.not_before.timestamp()),
            not_after: system_time(validity.not_after.timestamp()),
        })
    }
}

impl WorkloadCertificate {
    /// Makes a key and has `issuer` sign it for `identity`. Peers are believed as its roots say.
    ///
    /// # Errors
    /// When the issuer does not sign, or signs something else.
    pub async fn request(
        issuer: &dyn Issuer,
        identity: &Identity,
        ttl: Duration,
    ) -> Result<Self, IssueError> {
        Self::request_with(issuer, identity, ttl, Arc::default()).await
    }

    /// The same; peers are believed as its roots and `trust` say.
    ///
    /// # Errors
    /// As of [`WorkloadCertificate::request`].
    pub async fn request_with(
        issuer: &dyn Issuer,
        identity: &Identity,
        ttl: Duration,
        trust: Arc<Trust>,
    ) -> Result<Self, IssueError> {
        let (key, csr_pem) = request(identity).map_err(IssueError::Request)?;
        let chain = issuer.issue(identity.clone(), csr_pem, ttl).await?;
        Self::new(identity, &key, &chain, trust).map_err(IssueError::Chain)
    }

    /// Joins a key and the chain issued for it. The last text of `chain` holds the root or roots.
    fn new(
        identity: &Identity,
        key: &KeyPair,
        chain: &[String],
        trust: Arc<Trust>,
    ) -> Result<Self, ChainError> {
        let [sent @ .., roots] = chain else { return Err(ChainError::Missing("root")) };
        let sent = pem::certificates(&sent.concat()).map_err(ChainError::Pem)?;
        let leaf = sent.first().ok_or(ChainError::Missing("leaf"))?;
        let found = identities(leaf);
        if !matches!(found.as_slice(), [only] if only == identity) {
            return Err(ChainError::Identity { asked: identity.clone(), found });
        }
        let (_, parsed) = parse_x509_certificate(leaf).map_err(|_| ChainError::Leaf)?;
        let validity = parsed.validity();
        let (not_before, not_after) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        let serial = parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();

        let algorithms = PROVIDER.signature_verification_algorithms;
        let verification = Verification { roots: trust_anchors(roots)?, algorithms };
        let own = certified_key(sent.clone(), key).map_err(ChainError::Tls)?;
        let verifier = |accept| {
            let (verification, trust) = (verification.clone(), Arc::clone(&trust));
            Arc::new(PeerVerifier { verification, accept, own: identity.trust_domain().into(), trust })
        };
        let server = server_config(&own, verifier(Accept::TrustDomain)).map_err(ChainError::Tls)?;
        let nobody = Accept::OneOf(Box::default());
        let client = client_config(&own, verifier(nobody)).map_err(ChainError::Tls)?;
        Ok(Self {
            identity: identity.clone(),
            not_before: system_time(not_before),
            not_after: system_time(not_after),
            chain_pem: chain.concat(),
            roots_at: chain.iter().rev().skip(1).map(String::len).sum(),
            serial,
            server: Arc::new(server),
            client,
            clients: Mutex::default(),
            verification,
            trust,
        })
    }

    /// TLS for accepting: HTTP/2 only, and the client must prove an identity of our trust domain.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// TLS for connecting: HTTP/2 only, and the server must prove one of the identities `expected`.
    pub fn client_config(&self, expected: &[Identity]) -> Arc<ClientConfig> {
        let mut clients = self.clients.lock();
        if let Some(known) = clients.get(expected) {
            return Arc::clone(known);
        }
        if clients.len() >= CLIENT_CONFIGS_MAX {
            clients.clear();
        }
        let verifier = self.verifier(expected);
        let mut config = self.client.clone();
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        // Sessions are kept with this configuration only: they end with this certificate, and no other expectation of
        // who the server is can be met by one.
        config.resumption = Resumption::in_memory_sessions(CLIENT_SESSIONS_MAX);
        let config = Arc::new(config);
        clients.insert(expected.into(), Arc::clone(&config));
        config
    }

    /// Verifies servers, which must be one of `expected`.
    fn verifier(&self, expected: &[Identity]) -> PeerVerifier {
        PeerVerifier {
            verification: self.verification.clone(),
            accept: Accept::OneOf(expected.into()),
            own: self.identity.trust_domain().into(),
            trust: Arc::clone(&self.trust),
        }
    }

    /// Whether a client of this identity is welcome now: one of our trust domain. A handshake asks that itself, but for
    /// a session that is resumed.
    pub fn welcomes(&self, client: &Identity) -> bool {
        self.trust.is_own(self.identity.trust_domain(), client.trust_domain())
    }

    /// Watches over a client that has just connected with [`WorkloadCertificate::server_config`]; `None` when nobody
    /// says what is revoked.
    pub fn watch_client(&self) -> Option<PeerWatch> {
        self.watch(Peer::Client)
    }

    /// Watches over a server that was just connected to with [`WorkloadCertificate::client_config`].
    pub fn watch_server(&self) -> Option<PeerWatch> {
        self.watch(Peer::Server)
    }

    fn watch(&self, peer: Peer) -> Option<PeerWatch> {
        let revocations = self.trust.revocations()?;
        Some(PeerWatch::new(revocations, self.verification.clone(), peer))
    }

    /// Verifies the first certificate of `chain_pem` as a server of our own identity.
    #[cfg(test)]
    pub(crate) fn check_server(&self, chain_pem: &str) -> Result<(), rustls::Error> {
        use rustls::client::danger::ServerCertVerifier;
        let verifier = self.verifier(std::slice::from_ref(&self.identity));
        let chain = pem::certificates(chain_pem).unwrap();
        let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let now = rustls_pki_types::UnixTime::now();
        verifier.verify_server_cert(&chain[0], &[], &name, &[], now).map(drop)
    }

    /// What operators are shown of the leaf and its intermediates.
    pub fn chain_views(&self) -> Vec<CertificateView> {
        self.views(..self.roots_at)
    }

    /// What operators are shown of the roots.
    pub fn root_views(&self) -> Vec<CertificateView> {
        self.views(self.roots_at..)
    }

    fn views(&self, part: impl std::slice::SliceIndex<str, Output = str>) -> Vec<CertificateView> {
        // It was read before, when the certificate came.
        let certificates = self.chain_pem.get(part).map(pem::certificates);
        let certificates = certificates.and_then(Result::ok).unwrap_or_default();
        certificates.iter().filter_map(CertificateView::of).collect()
    }

    /// Whether it is valid at `now`.
    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// A new P-256 key and a request for it: no subject, one URI name, critical since it is all there is.
fn request(identity: &Identity) -> Result<(KeyPair, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
    let csr_pem = params.serialize_request(&key)?.pem()?;
    Ok((key, csr_pem))
}

pub(crate) fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key: &KeyPair,
) -> Result<Arc<CertifiedKey>, rustls::Error> {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    CertifiedKey::from_der(chain, key, &PROVIDER).map(Arc::new)
}

fn trust_anchors(pem_text: &str) -> Result<Arc<[TrustAnchor<'static>]>, ChainError> {
    let certificates = pem::certificates(pem_text).map_err(ChainError::Pem)?;
    if certificates.is_empty() {
        return Err(ChainError::Missing("root"));
    }
    let anchor = |certificate| webpki::anchor_from_trusted_cert(certificate).map(|anchor| anchor.to_owned());
    certificates.iter().map(anchor).collect::<Result<_, _>>().map_err(ChainError::Root)
}

fn server_config(
    own: &Arc<CertifiedKey>,
    verifier: Arc<PeerVerifier>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(own))));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // Sessions are kept with this certificate and end with it. Each holds the chain that the client proved itself by; who
    // accepts must look whether that is in force still ([`crate::is_in_force`]).
    config.session_storage = Arc::new(Sessions::default());
    config.send_tls13_tickets = 1;
    Ok(config)
}

fn client_config(
    own: &Arc<CertifiedKey>,
    verifier: Arc<PeerVerifier>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(own))));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn system_time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
}
