//! The embedded CA: one root, kept in a directory or brought along, that signs workloads' certificates.

use crate::certificate::{ALPN_H2, PROVIDER, certified_key};
use crate::{IssueError, Issuer, pem};
use cairn_mesh::{Identity, IdentityError};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::ServerConfig;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls_pki_types::CertificateDer;
use std::fs::{self, DirBuilder, OpenOptions};
use std::future::{Future, ready};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use x509_parser::parse_x509_certificate;

/// The longest life of a workload's certificate.
const TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Certificates begin this much before they are signed, for peers whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// The life of a root made here: ten years.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

const ROOT_CERTIFICATE_FILE: &str = "root-cert.pem";
const ROOT_KEY_FILE: &str = "root-key.pem";

/// Why there is no CA.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// A file or directory cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificate or the key is not usable.
    #[error("the CA's certificate or key is not usable")]
    Unusable(#[source] rcgen::Error),
    /// The certificates are not PEM.
    #[error("the CA's certificate is not PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// The certificate may not sign others.
    #[error("the certificate is not a CA's")]
    NotAnAuthority,
    /// The key belongs to another certificate.
    #[error("the key is not that of the certificate")]
    KeyMismatch,
    /// TLS cannot use what was signed.
    #[error("cannot make a TLS configuration")]
    Tls(#[source] rustls::Error),
    /// There are no random numbers.
    #[error("no random numbers")]
    Random,
}

/// Why a request is not signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// It is no request, or its signature is wrong.
    #[error("not a certificate request")]
    Request(#[source] rcgen::Error),
    /// It must name exactly one URI and nothing else.
    #[error("the request must have exactly one name, a URI")]
    Names,
    /// The name is not a workload's.
    #[error("the name is not a workload's identity")]
    Identity(#[source] IdentityError),
    /// The identity is not of our trust domain.
    #[error("{identity} is not of the trust domain {trust_domain}")]
    TrustDomain {
        /// The identity.
        identity: Identity,
        /// Ours.
        trust_domain: String,
    },
    /// The request is for someone else than it is said to be.
    #[error("the request is for {found}, not for {asked}")]
    OtherIdentity {
        /// Who was asked for.
        asked: Identity,
        /// Who is in the request.
        found: Identity,
    },
    /// The CA itself has expired.
    #[error("the CA's own certificate has expired")]
    Expired,
    /// Signing failed.
    #[error("cannot sign")]
    Sign(#[source] rcgen::Error),
    /// There are no random numbers.
    #[error("no random numbers")]
    Random,
}

/// A CA in this process.
pub struct Authority {
    issuer: rcgen::Issuer<'static, KeyPair>,
    /// What follows a leaf: intermediates if any, and last the root.
    chain_pem: Vec<String>,
    chain: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
    /// `None` signs for every trust domain.
    trust_domain: Option<String>,
}

impl Authority {
    /// Opens the CA kept in `dir`, which is made (0700) with a new root for `trust_domain` if there is none. It signs
    /// only identities of `trust_domain`.
    ///
    /// # Errors
    /// When the directory cannot be used or holds something else.
    pub fn open(dir: &Path, trust_domain: &str) -> Result<Self, AuthorityError> {
        let certificate = dir.join(ROOT_CERTIFICATE_FILE);
        let key = dir.join(ROOT_KEY_FILE);
        // The certificate is written last, so when it is there, all is there.
        if !certificate.exists() {
            create(dir, &certificate, &key, trust_domain)?;
        }
        Ok(Self { trust_domain: Some(trust_domain.to_owned()), ..Self::from_files(&certificate, &key)? })
    }

    /// Uses the CA certificate of `cert` and its key. `cert` may go on with the certificates above it, the root last.
    ///
    /// # Errors
    /// When a file cannot be read, or is not a CA's.
    pub fn from_files(cert: &Path, key: &Path) -> Result<Self, AuthorityError> {
        let chain = pem::certificates(&read(cert)?).map_err(AuthorityError::Pem)?;
        let key = KeyPair::from_pem(&read(key)?).map_err(AuthorityError::Unusable)?;
        let own = chain.first().ok_or(AuthorityError::NotAnAuthority)?;
        let (_, parsed) = parse_x509_certificate(own).map_err(|_| AuthorityError::NotAnAuthority)?;
        if !parsed.is_ca() {
            return Err(AuthorityError::NotAnAuthority);
        }
        if *parsed.public_key().raw != key.subject_public_key_info() {
            return Err(AuthorityError::KeyMismatch);
        }
        let not_after = SystemTime::from(parsed.validity().not_after.to_datetime());
        let issuer = rcgen::Issuer::from_ca_cert_der(own, key).map_err(AuthorityError::Unusable)?;
        let chain_pem = chain.iter().map(pem::encode).collect();
        Ok(Self { issuer, chain_pem, chain, not_after, trust_domain: None })
    }

    /// The root, in PEM: what others must trust.
    pub fn roots_pem(&self) -> &str {
        self.chain_pem.last().map_or("", String::as_str)
    }

    /// Who a request is for.
    ///
    /// # Errors
    /// When it is not a request for exactly one workload's identity, signed with its own key.
    pub fn csr_identity(csr_pem: &str) -> Result<Identity, SignError> {
        Ok(parse_request(csr_pem)?.0)
    }

    /// Signs a request: the leaf, then what is above it, the root last. Of the request only the key and the one URI
    /// name count. The certificate lives for `ttl` from `now`, at most a day and not longer than the CA, and begins
    /// a minute before.
    ///
    /// # Errors
    /// When the request is not for one identity of our trust domain.
    pub fn sign(&self, csr_pem: &str, ttl: Duration, now: SystemTime) -> Result<Vec<String>, SignError> {
        let (identity, request) = parse_request(csr_pem)?;
        if let Some(trust_domain) = &self.trust_domain
            && identity.trust_domain() != trust_domain
        {
            return Err(SignError::TrustDomain { identity, trust_domain: trust_domain.clone() });
        }
        if now >= self.not_after {
            return Err(SignError::Expired);
        }
        let mut params = CertificateParams::default();
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = self.not_after.min(now + ttl.min(TTL_MAX)).into();
        params.serial_number = Some(serial_number().ok_or(SignError::Random)?);
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = request.params.subject_alt_names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&request.public_key, &self.issuer).map_err(SignError::Sign)?;
        Ok(std::iter::once(leaf.pem()).chain(self.chain_pem.iter().cloned()).collect())
    }

    /// TLS for the control plane's own port: HTTP/2, no client certificate, good for `names` (DNS names or IP
    /// addresses) for as long as the CA is.
    ///
    /// # Errors
    /// When a name cannot be in a certificate.
    pub fn server_tls(&self, names: &[String]) -> Result<Arc<ServerConfig>, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Unusable)?;
        let mut params = CertificateParams::new(names).map_err(AuthorityError::Unusable)?;
        params.not_before = (SystemTime::now() - CLOCK_SKEW).into();
        params.not_after = self.not_after.into();
        params.serial_number = Some(serial_number().ok_or(AuthorityError::Random)?);
        params.distinguished_name = DistinguishedName::new();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &self.issuer).map_err(AuthorityError::Unusable)?;
        let chain = std::iter::once(leaf.der().clone()).chain(self.chain.iter().cloned()).collect();
        let own = certified_key(chain, &key).map_err(AuthorityError::Tls)?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&[&TLS13])
            .map_err(AuthorityError::Tls)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(own)));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        Ok(Arc::new(config))
    }
}

impl Issuer for Authority {
    fn issue(
        &self,
        identity: Identity,
        csr_pem: String,
        ttl: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<String>, IssueError>> + Send>> {
        let signed = Self::csr_identity(&csr_pem).and_then(|found| {
            if found == identity {
                self.sign(&csr_pem, ttl, SystemTime::now())
            } else {
                Err(SignError::OtherIdentity { asked: identity, found })
            }
        });
        Box::pin(ready(signed.map_err(IssueError::Sign)))
    }
}

fn parse_request(csr_pem: &str) -> Result<(Identity, CertificateSigningRequestParams), SignError> {
    let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(SignError::Request)?;
    let [SanType::URI(uri)] = request.params.subject_alt_names.as_slice() else {
        return Err(SignError::Names);
    };
    let identity = uri.as_str().parse().map_err(SignError::Identity)?;
    Ok((identity, request))
}

/// 127 random bits: positive, and never the same twice (RFC 5280 §4.1.2.2).
fn serial_number() -> Option<SerialNumber> {
    let mut bytes = [0; 16];
    PROVIDER.secure_random.fill(&mut bytes).ok()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Some(SerialNumber::from_slice(&bytes))
}

fn create(dir: &Path, certificate: &Path, key: &Path, trust_domain: &str) -> Result<(), AuthorityError> {
    let failed = |source| AuthorityError::File { path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    let root_key = KeyPair::generate().map_err(AuthorityError::Unusable)?;
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = OffsetDateTime::from(now + ROOT_TTL);
    params.serial_number = Some(serial_number().ok_or(AuthorityError::Random)?);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root = params.self_signed(&root_key).map_err(AuthorityError::Unusable)?;
    write(key, &root_key.serialize_pem(), 0o600)?;
    write(certificate, &root.pem(), 0o644)
}

/// Writes a whole file or none.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    let failed = |source| AuthorityError::File { path: path.to_owned(), source };
    let partial = path.with_extension("partial");
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(&partial).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&partial, path).map_err(failed)
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|source| AuthorityError::File { path: path.to_owned(), source })
}
