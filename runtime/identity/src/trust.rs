//! Whom a proxy believes beyond what its roots say: the names of its own trust domain, and what has been revoked.

use crate::Revocations;
use cairn_mesh::Identity;
use parking_lot::RwLock;
use std::sync::Arc;

/// What all certificates of a process go by when a peer proves who it is.
#[derive(Debug, Default)]
pub struct Trust {
    aliases: RwLock<Arc<[Arc<str>]>>,
    revocations: Option<Arc<Revocations>>,
}

impl Trust {
    /// A trust domain has its own name only, for now.
    pub fn new(revocations: Option<Arc<Revocations>>) -> Self {
        Self { aliases: RwLock::default(), revocations }
    }

    /// From now on these are further names of our own trust domain (`MeshConfig.trustDomainAliases`), and no others.
    pub fn set_aliases(&self, names: impl IntoIterator<Item = Arc<str>>) {
        *self.aliases.write() = names.into_iter().collect();
    }

    /// The lists of revoked certificates, if there are any.
    pub fn revocations(&self) -> Option<&Arc<Revocations>> {
        self.revocations.as_ref()
    }

    /// Whether `name` is a name of the trust domain `own`, which is ours.
    pub fn is_own(&self, own: &str, name: &str) -> bool {
        name == own || self.aliases.read().iter().any(|alias| **alias == *name)
    }

    /// Whether two identities are one, whichever names of our trust domain `own` they are written with.
    pub fn is_same(&self, own: &str, one: &Identity, other: &Identity) -> bool {
        let is_own = |identity: &Identity| self.is_own(own, identity.trust_domain());
        let is_alike =
            || one.namespace() == other.namespace() && one.service_account() == other.service_account();
        one == other || is_alike() && is_own(one) && is_own(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_written_with_an_alias_is_the_same_and_others_are_not() {
        let trust = Trust::default();
        let id = |domain: &str, account: &str| Identity::new(domain, "a", account).unwrap();
        let is_same =
            |one: &str, other: &str, account: &str| trust.is_same("corp", &id(one, "x"), &id(other, account));
        assert!(is_same("corp", "corp", "x"));
        assert!(!is_same("corp", "old", "x"));
        trust.set_aliases(["old".into(), "older".into()]);
        for (one, other, account, expected) in [
            ("corp", "old", "x", true),
            ("old", "corp", "x", true),
            ("older", "old", "x", true),
            ("old", "corp", "y", false),
            ("corp", "elsewhere", "x", false),
            ("elsewhere", "elsewhere", "x", true),
        ] {
            assert_eq!(is_same(one, other, account), expected, "{one} {other}/{account}");
        }
        assert!(trust.is_own("corp", "older") && !trust.is_own("corp", "elsewhere"));
        trust.set_aliases([]);
        assert!(!is_same("corp", "old", "x"), "they are no longer said to be one");
    }
}
