//! Who is at the other end: a chain to our own roots and a SPIFFE identity in the leaf. Host names play no part.

use crate::Trust;
use crate::revocation::Lists;
use cairn_mesh::Identity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use std::sync::Arc;
use webpki::{EndEntityCert, KeyUsage, RevocationOptions, RevocationOptionsBuilder, UnknownStatusPolicy};
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

/// The identity a peer has proven with `certificates`, its leaf first: the leaf's first URI name that is one.
pub fn peer_identity(certificates: &[CertificateDer<'_>]) -> Option<Identity> {
    identities(certificates.first()?).into_iter().next()
}

/// Whether the leaf of `certificates` is valid at this time. A resumed session skips the look at that, and may itself be
/// resumed again and again.
pub fn is_in_force(certificates: &[CertificateDer<'_>]) -> bool {
    let leaf = certificates.first().map(|leaf| parse_x509_certificate(leaf));
    leaf.is_some_and(|leaf| leaf.is_ok_and(|(_, leaf)| leaf.validity().is_valid()))
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
#[derive(Clone, Debug)]
pub(crate) enum Accept {
    /// Everyone of our trust domain.
    TrustDomain,
    /// Exactly these.
    OneOf(Box<[Identity]>),
}

impl Accept {
    fn accepts(&self, certificate: &CertificateDer<'_>, own: &str, trust: &Trust) -> Result<(), WrongPeer> {
        let found = identities(certificate);
        let welcome = match self {
            // Only the first counts: it is the one that policies will see.
            Self::TrustDomain => found.first().is_some_and(|peer| trust.is_own(own, peer.trust_domain())),
            Self::OneOf(expected) => {
                let is_expected = |peer| expected.iter().any(|expected| trust.is_same(own, expected, peer));
                found.iter().any(is_expected)
            }
        };
        let expected = || match self {
            Self::TrustDomain => format!("an identity of {own}"),
            Self::OneOf(expected) => format!("one of {expected:?}"),
        };
        if welcome { Ok(()) } else { Err(WrongPeer { found, expected: expected() }) }
    }
}

/// The chain is good, and the peer is someone else.
#[derive(Debug, thiserror::Error)]
#[error("the peer is {found:?}, expected {expected}")]
struct WrongPeer {
    found: Vec<Identity>,
    expected: String,
}

/// Which end of a connection a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// It connects to us.
    Client,
    /// We connect to it.
    Server,
}

/// What a chain must lead to.
#[derive(Clone, Debug)]
pub(crate) struct Verification {
    pub(crate) roots: Arc<[TrustAnchor<'static>]>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

impl Verification {
    /// Whether a peer's chain, its leaf first, leads to a root and no list revokes a part of it. A certificate whose issuer
    /// has no list is not revoked, and a list that is overdue still counts (facts: Istio's ztunnel does the same). One
    /// whose list is not signed by its issuer is refused.
    pub(crate) fn check(
        &self,
        peer: Peer,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        lists: &Lists,
    ) -> Result<(), webpki::Error> {
        let end_entity = EndEntityCert::try_from(leaf)?;
        let mut is_verified = false;
        for round in lists.rounds() {
            // A round always has a list.
            let Ok(options) = RevocationOptionsBuilder::new(&round) else { continue };
            let options = options.with_status_policy(UnknownStatusPolicy::Allow).build();
            self.find_path(peer, &end_entity, intermediates, now, Some(options))?;
            is_verified = true;
        }
        if is_verified { Ok(()) } else { self.find_path(peer, &end_entity, intermediates, now, None) }
    }

    fn find_path(
        &self,
        peer: Peer,
        end_entity: &EndEntityCert<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        revocation: Option<RevocationOptions<'_>>,
    ) -> Result<(), webpki::Error> {
        let usage = match peer {
            Peer::Client => KeyUsage::client_auth(),
            Peer::Server => KeyUsage::server_auth(),
        };
        let (algorithms, roots) = (self.algorithms.all, &self.roots);
        end_entity.verify_for_usage(algorithms, roots, intermediates, now, usage, revocation, None).map(drop)
    }
}

/// Verifies peers against the roots that came with our own certificate.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    pub(crate) verification: Verification,
    pub(crate) accept: Accept,
    /// Our own trust domain.
    pub(crate) own: Arc<str>,
    pub(crate) trust: Arc<Trust>,
}

impl PeerVerifier {
    fn verify(
        &self,
        peer: Peer,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let lists = self.trust.revocations().map(|revocations| revocations.lists()).unwrap_or_default();
        let checked = self.verification.check(peer, leaf, intermediates, now, &lists);
        checked.map_err(|error| {
            if let Some(revocations) = self.trust.revocations()
                && is_about_revocation(&error)
            {
                revocations.count_refused(peer);
            }
            chain_error(error)
        })?;
        self.accept
            .accepts(leaf, &self.own, &self.trust)
            .map_err(|wrong| CertificateError::Other(OtherError(Arc::new(wrong))))
            .map_err(Error::InvalidCertificate)
    }
}

/// Whether a chain is refused for a list of revoked certificates.
fn is_about_revocation(error: &webpki::Error) -> bool {
    use webpki::Error as E;
    matches!(
        error,
        E::CertRevoked
            | E::UnknownRevocationStatus
            | E::IssuerNotCrlSigner
            | E::InvalidCrlSignatureForPublicKey
            | E::UnsupportedCrlSignatureAlgorithmContext(_)
            | E::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_)
    )
}

fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    Error::InvalidCertificate(match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertExpired { .. } => CertificateError::Expired,
        E::CertNotValidYet { .. } => CertificateError::NotValidYet,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::CertRevoked => CertificateError::Revoked,
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
        self.verify(Peer::Server, end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.verification.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.verification.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verification.algorithms.supported_schemes()
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
        self.verify(Peer::Client, end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.verification.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.verification.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verification.algorithms.supported_schemes()
    }
}
