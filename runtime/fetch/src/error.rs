//! Why a module was not got, or not brought to a registry.

use crate::credentials::CredentialsError;
use crate::digest::Digest;
use crate::source::SourceError;
use cairn_net::NetError;
use http::StatusCode;
use std::path::PathBuf;
use std::time::Duration;

/// Why a module was not got, or not brought to a registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Its URL names nothing that can be fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Its file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its path is that of something else.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    /// It, or what it is packed in, is too large.
    #[error("the module has more than {bytes_max} bytes, which is all that is read")]
    TooLarge {
        /// The limit.
        bytes_max: u64,
    },
    /// The server's name has no address.
    #[error("`{host}` cannot be resolved")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The server's addresses are none that may be asked.
    #[error("`{0}` is at no address that may be asked")]
    Address(String),
    /// The server cannot be connected to.
    #[error("cannot connect to `{host}`")]
    Connect {
        /// The server.
        host: String,
        /// Why.
        #[source]
        source: NetError,
    },
    /// The server's name cannot stand in a certificate.
    #[error("`{0}` is not a name that a certificate can have")]
    Name(String),
    /// The file of root certificates is not readable.
    #[error("the file of root certificates cannot be read")]
    Roots(#[source] rustls::pki_types::pem::Error),
    /// TLS does not work on this machine.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
    /// The server did not prove who it is, or does not speak TLS.
    #[error("TLS with `{host}` failed")]
    Tls {
        /// The server.
        host: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection ended or what came is not HTTP.
    #[error("HTTP with `{host}` failed")]
    Http {
        /// The server.
        host: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// The server was silent for too long.
    #[error("`{host}` was silent for {after:?}")]
    Silent {
        /// The server.
        host: String,
        /// How long.
        after: Duration,
    },
    /// All together took too long.
    #[error("it took longer than {0:?}")]
    Timeout(Duration),
    /// A redirect leads nowhere, or there are too many of them.
    #[error("the server's redirect cannot be followed: {0}")]
    Redirect(&'static str),
    /// The server answered with something else.
    #[error("`{host}` answered {status}{}", code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default())]
    Status {
        /// The server.
        host: String,
        /// Its answer.
        status: StatusCode,
        /// The error's code, from registries.
        code: Option<String>,
    },
    /// The registry asks for a proof that cannot be given.
    #[error("the registry cannot be logged in to: {0}")]
    Login(&'static str),
    /// The pull secret cannot be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// What the registry calls a manifest is none, or none of a module.
    #[error("the image holds no module: {0}")]
    Image(String),
    /// What was read is no WebAssembly module.
    #[error("what was read is no WebAssembly module, nor one that is packed by gzip or tar")]
    NotAModule,
    /// An archive or its compression is damaged.
    #[error("what the module is packed in cannot be read")]
    Packing(#[source] std::io::Error),
    /// It is not what was pinned.
    #[error("its sha256 is {actual}, {wanted} is wanted")]
    Digest {
        /// What came.
        actual: Digest,
        /// What was asked for.
        wanted: Digest,
    },
    /// It cannot be kept.
    #[error("the store of modules cannot be used: {}", path.display())]
    Store {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl FetchError {
    /// Whether it may work a moment later: the network or the server failed, rather than said no (facts: Istio's agent
    /// tries again after errors of transport and statuses from 500, but for 501, 505 and 511).
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Resolve { .. }
            | Self::Connect { .. }
            | Self::Tls { .. }
            | Self::Http { .. }
            | Self::Silent { .. }
            | Self::Timeout(_) => true,
            Self::Status { status, .. } => match status.as_u16() {
                408 | 429 => true,
                501 | 505 | 511 => false,
                other => other >= 500,
            },
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_failed_at_is_tried_again() {
        for (status, expected) in [
            (400, false),
            (401, false),
            (403, false),
            (404, false),
            (408, true),
            (429, true),
            (500, true),
            (501, false),
            (502, true),
            (503, true),
            (504, true),
            (505, false),
            (511, false),
            (599, true),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = FetchError::Status { host: "host".into(), status, code: None };
            assert_eq!(error.is_transient(), expected, "{status}");
        }
        assert!(FetchError::Timeout(Duration::ZERO).is_transient());
        assert!(!FetchError::NotAModule.is_transient());
    }
}
