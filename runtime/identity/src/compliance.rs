//! What the TLS of a process is restricted to (Istio's `COMPLIANCE_POLICY`).

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use serde::Deserialize;
use std::str::FromStr;
use std::sync::Arc;

/// A rule that all TLS of a process keeps, with peers, the control plane and whomever it fetches from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Compliance {
    /// None: what the provider offers.
    #[default]
    Unrestricted,
    /// `pqc`: keys are exchanged by X25519MLKEM768 only, over TLS 1.3 with AES-GCM, so that what is recorded today is
    /// not read by a quantum computer. Who cannot do that is not talked to.
    PostQuantum,
}

/// A policy that is not kept here; it fails a start, for less than what was asked for would be kept.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("COMPLIANCE_POLICY `{0}` is not one that can be kept here; there is `pqc`")]
pub struct UnknownPolicy(String);

impl FromStr for Compliance {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        match text.trim() {
            "" => Ok(Self::Unrestricted),
            "pqc" => Ok(Self::PostQuantum),
            other => Err(UnknownPolicy(other.to_owned())),
        }
    }
}

impl TryFrom<String> for Compliance {
    type Error = UnknownPolicy;

    fn try_from(text: String) -> Result<Self, UnknownPolicy> {
        text.parse()
    }
}

/// Another provider of TLS was in use before the policy was known.
#[derive(Debug, thiserror::Error)]
#[error("this process has a provider of TLS already")]
pub struct TooLate;

impl Compliance {
    /// Restricts all TLS of this process from now on. Once, before any is spoken.
    ///
    /// # Errors
    /// When another provider is the process's already.
    pub fn enforce(self) -> Result<(), TooLate> {
        match self {
            Self::Unrestricted => Ok(()),
            Self::PostQuantum => self.provider().install_default().map_err(|_| TooLate),
        }
    }

    fn provider(self) -> CryptoProvider {
        let default = aws_lc_rs::default_provider();
        match self {
            Self::Unrestricted => default,
            Self::PostQuantum => CryptoProvider {
                cipher_suites: suites(),
                kx_groups: vec![kx_group::X25519MLKEM768],
                ..default
            },
        }
    }
}

/// TLS as the mesh speaks it: two suites, the stronger first, and keys exchanged as the process's policy says.
pub(crate) fn mesh_provider() -> Arc<CryptoProvider> {
    let provider =
        CryptoProvider::get_default().map_or_else(aws_lc_rs::default_provider, |own| (**own).clone());
    Arc::new(CryptoProvider { cipher_suites: suites(), ..provider })
}

fn suites() -> Vec<rustls::SupportedCipherSuite> {
    vec![cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_AES_128_GCM_SHA256]
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::NamedGroup;

    fn groups(policy: Compliance) -> Vec<NamedGroup> {
        policy.provider().kx_groups.iter().map(|group| group.name()).collect()
    }

    #[test]
    fn a_policy_is_known_by_its_name_and_no_other_passes_for_one() {
        assert_eq!("".parse(), Ok(Compliance::Unrestricted));
        assert_eq!(" pqc ".parse(), Ok(Compliance::PostQuantum));
        for other in ["PQC", "fips-140-2", "none"] {
            assert_eq!(other.parse::<Compliance>(), Err(UnknownPolicy(other.to_owned())));
        }
    }

    #[test]
    fn the_post_quantum_policy_leaves_one_way_to_exchange_keys() {
        assert_eq!(groups(Compliance::PostQuantum), [NamedGroup::X25519MLKEM768]);
        assert!(groups(Compliance::Unrestricted).contains(&NamedGroup::X25519));
        let tls12 =
            |policy: Compliance| policy.provider().cipher_suites.iter().any(|suite| suite.tls13().is_none());
        assert!(!tls12(Compliance::PostQuantum) && tls12(Compliance::Unrestricted));
    }
}
