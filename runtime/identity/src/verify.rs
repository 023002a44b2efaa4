//! Who is at the other end: a chain to our own roots and a SPIFFE identity in the leaf. Host names play no part.

use cairn_mesh::Identity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use std::sync::Arc;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyUsage};
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

/// The identity a peer has proven with `certificates`, its leaf first: the leaf's first URI name that is one.
pub fn peer_identity(certificates: &[CertificateDer<'_>]) -> Option<Identity> {
    identities(certificates.first()?).into_iter().next()
}

/// All identities among the URI names of a certificate, in order.
pub(crate) fn identities(certificate: &CertificateDer<'_>) -> Vec<Identity> {
    let Ok((_, parsed)) = parse_x509_certificate(certificate) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => uri.parse().ok(),
        _ => None,
    };
    names.value.general_names.iter().filter_map(uri).collect()
}

/// Which peers are welcome.
#[derive(Debug)]
pub(crate) enum Accept {
    /// Everyone of this trust domain.
    TrustDomain(Arc<str>),
    /// Exactly these.
    OneOf(Box<[Identity]>),
}

impl Accept {
    fn accepts(&self, certificate: &CertificateDer<'_>) -> Result<(), WrongPeer> {
        let found = identities(certificate);
        let welcome = match self {
            // Only the first counts: it is the one that policies will see.
            Self::TrustDomain(own) => found.first().is_some_and(|peer| peer.trust_domain() == &**own),
            Self::OneOf(expected) => found.iter().any(|peer| expected.contains(peer)),
        };
        if welcome { Ok(()) } else { Err(WrongPeer { found, expected: self.to_string() }) }
    }
}

impl std::fmt::Display for Accept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TrustDomain(own) => write!(f, "an identity of {own}"),
            Self::OneOf(expected) => write!(f, "one of {expected:?}"),
        }
    }
}

/// The chain is good, and the peer is someone else.
#[derive(Debug, thiserror::Error)]
#[error("the peer is {found:?}, expected {expected}")]
struct WrongPeer {
    found: Vec<Identity>,
    expected: String,
}

/// Verifies peers against the roots that came with our own certificate.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    pub(crate) roots: Arc<[TrustAnchor<'static>]>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
    pub(crate) accept: Accept,
}

impl PeerVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: impl ExtendedKeyUsageValidator,
    ) -> Result<(), Error> {
        EndEntityCert::try_from(leaf)
            .and_then(|end_entity| {
                let algorithms = self.algorithms.all;
                end_entity.verify_for_usage(
                    algorithms,
                    &self.roots,
                    intermediates,
                    now,
                    usage,
                    None,
                    None,
                )?;
                Ok(())
            })
            .map_err(chain_error)?;
        self.accept
            .accepts(leaf)
            .map_err(|wrong| CertificateError::Other(OtherError(Arc::new(wrong))))
            .map_err(Error::InvalidCertificate)
    }
}

fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    Error::InvalidCertificate(match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertExpired { .. } => CertificateError::Expired,
        E::CertNotValidYet { .. } => CertificateError::NotValidYet,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
