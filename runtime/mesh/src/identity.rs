//! SPIFFE identities of workloads.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A workload's identity, `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`: exactly these segments.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    text: Arc<str>,
    /// Lengths of trust domain and namespace in `text`.
    trust_domain_len: u16,
    namespace_len: u16,
}

const SCHEME: &str = "spiffe://";
const NAMESPACE: &str = "/ns/";
const SERVICE_ACCOUNT: &str = "/sa/";

/// Why a text is not the identity of a workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
pub struct IdentityError {
    /// The text.
    pub text: String,
}

impl Identity {
    /// The identity of `service_account` in `namespace` of `trust_domain`.
    ///
    /// # Errors
    /// When a part is empty, holds a `/`, or the whole is longer than 2,048 bytes (SPIFFE ID §2.3).
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, IdentityError> {
        let text = format!("{SCHEME}{trust_domain}{NAMESPACE}{namespace}{SERVICE_ACCOUNT}{service_account}");
        let bad = |part: &str| part.is_empty() || part.contains('/');
        if bad(trust_domain) || bad(namespace) || bad(service_account) || text.len() > 2048 {
            return Err(IdentityError { text });
        }
        Ok(Self {
            trust_domain_len: trust_domain.len() as u16,
            namespace_len: namespace.len() as u16,
            text: text.into(),
        })
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..SCHEME.len() + self.trust_domain_len as usize]
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        let start = SCHEME.len() + self.trust_domain_len as usize + NAMESPACE.len();
        &self.text[start..start + self.namespace_len as usize]
    }

    /// The service account.
    pub fn service_account(&self) -> &str {
        let before = SCHEME.len() + self.trust_domain_len as usize + NAMESPACE.len();
        &self.text[before + self.namespace_len as usize + SERVICE_ACCOUNT.len()..]
    }

    /// The whole, with its scheme.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The whole without `spiffe://`, as policies write principals.
    pub fn principal(&self) -> &str {
        &self.text[SCHEME.len()..]
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let error = || IdentityError { text: text.chars().take(256).collect() };
        let rest = text.strip_prefix(SCHEME).ok_or_else(error)?;
        let mut segments = rest.split('/');
        let parts = [segments.next(), segments.next(), segments.next(), segments.next(), segments.next()];
        let [Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(service_account)] = parts
        else {
            return Err(error());
        };
        if segments.next().is_some() {
            return Err(error());
        }
        Self::new(trust_domain, namespace, service_account)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_has_exactly_five_segments() {
        let identity: Identity = "spiffe://cluster.local/ns/a/sa/x".parse().unwrap();
        assert_eq!(identity.trust_domain(), "cluster.local");
        assert_eq!(identity.namespace(), "a");
        assert_eq!(identity.service_account(), "x");
        assert_eq!(identity.principal(), "cluster.local/ns/a/sa/x");
        assert_eq!(identity, Identity::new("cluster.local", "a", "x").unwrap());
        for bad in [
            "cluster.local/ns/a/sa/x",
            "spiffe://cluster.local/ns/a/sa/x/y",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe:///ns/a/sa/x",
            "spiffe://td/ns/a",
            "spiffe://td/sa/a/ns/x",
            "",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }
}
