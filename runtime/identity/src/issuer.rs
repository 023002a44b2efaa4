//! Where certificates come from.

use crate::{ChainError, SignError};
use cairn_mesh::Identity;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

/// Signs certificate requests.
pub trait Issuer: Send + Sync {
    /// Asks for a certificate of `identity` for the PEM request `csr_pem`, valid for about `ttl`. Returns the chain in
    /// PEM: the leaf, intermediates if any, and last the root or roots.
    fn issue(
        &self,
        identity: Identity,
        csr_pem: String,
        ttl: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<String>, IssueError>> + Send>>;
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The key or the request could not be made.
    #[error("cannot make a certificate request")]
    Request(#[source] rcgen::Error),
    /// A file needed to reach the CA cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file: roots or token.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The CA's address, roots or the token are not usable.
    #[error("the connection to the CA is not configured well: {what}")]
    Settings {
        /// What is wrong.
        what: &'static str,
    },
    /// The CA cannot be reached.
    #[error("cannot connect to the CA")]
    Connect(#[source] tonic::transport::Error),
    /// The CA said no, or the call failed.
    #[error("the CA did not sign")]
    Refused(#[source] Box<tonic::Status>),
    /// The embedded CA said no.
    #[error("the embedded CA did not sign")]
    Sign(#[source] SignError),
    /// What the CA signed is not usable.
    #[error("the CA's answer is not usable")]
    Chain(#[source] ChainError),
    /// The CA did not answer.
    #[error("the CA did not answer within {0:?}")]
    Timeout(Duration),
}
