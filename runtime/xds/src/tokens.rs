//! Who may ask our server for what: bearer tokens and the roles behind them.

use cairn_mesh::{Identity, ResourceName};
use parking_lot::RwLock;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::Arc;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// What the holder of a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The proxy of a node: it may have certificates for the workloads on it.
    Ztunnel {
        /// The node.
        node: String,
    },
    /// The proxy of a Gateway: it may have its own certificate, and the objects meant for it.
    Waypoint {
        /// The Gateway.
        gateway: ResourceName,
        /// Its own identity.
        identity: Identity,
    },
}

/// The tokens that are valid now; clones share them. Only their digests are kept, so looking one up tells nothing
/// by its duration.
#[derive(Clone, Default)]
pub struct Tokens {
    roles: Arc<RwLock<HashMap<[u8; 32], Role>>>,
}

impl Tokens {
    /// No tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a token valid. Calls that begin from now on may use it.
    pub fn insert(&self, token: String, role: Role) {
        self.roles.write().insert(digest(&token), role);
    }

    /// Makes a token invalid for calls that begin from now on.
    pub fn remove(&self, token: &str) {
        self.roles.write().remove(&digest(token));
    }

    /// The role of a caller.
    pub(crate) fn role(&self, metadata: &MetadataMap) -> Result<Role, Status> {
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let token = header.and_then(|value| value.strip_prefix("Bearer "));
        let role = token.and_then(|token| self.roles.read().get(&digest(token)).cloned());
        role.ok_or_else(|| Status::unauthenticated("no valid bearer token"))
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}
