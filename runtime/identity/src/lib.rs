//! Keys and certificates: CSR, CA client, the embedded CA, rotation, SPIFFE verification, TLS configurations.
//!
//! A proxy holds one [`Certificates`]; it asks an [`Issuer`] (the mesh's CA through [`CaClient`], or an [`Authority`]
//! in this process) and hands out [`WorkloadCertificate`]s, which know the TLS configurations made from them.

mod authority;
mod ca_client;
mod certificate;
mod certificates;
mod compliance;
mod issuer;
mod material;
mod pem;
mod revocation;
mod sessions;
mod trust;
mod verify;

pub use authority::{Authority, AuthorityError, SignError};
pub use ca_client::{CaClient, CaSettings};
pub use certificate::{CertificateView, ChainError, WorkloadCertificate};
pub use certificates::{CertificateError, CertificateSettings, CertificateState, Certificates};
pub use compliance::{Compliance, TooLate, UnknownPolicy};
pub use issuer::{IssueError, Issuer};
pub use material::{Roots, Token};
pub use revocation::{PeerWatch, RevocationCounts, RevocationError, Revocations};
pub use trust::Trust;
pub use verify::{is_in_force, peer_identity};

#[cfg(test)]
mod tests;
