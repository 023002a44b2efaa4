//! The keys that tokens are verified with, shared by all destinations whose rules name the same.

use cairn_builtin::{KeySource, TokenCache, inline_keys};
use cairn_mesh::{JwtRule, KeyPlace, ResourceName};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

/// The keys of all issuers, and the tokens verified with them.
#[derive(Default)]
pub struct Keyring {
    /// Tokens verified lately.
    pub cache: Arc<TokenCache>,
    /// Keys given with rules, as long as some destination uses them.
    inline: Mutex<HashMap<Arc<str>, Weak<dyn KeySource>>>,
}

impl Keyring {
    /// Where the keys of a rule are.
    pub fn source(&self, _policy: &ResourceName, rule: &JwtRule) -> Arc<dyn KeySource> {
        match &rule.keys {
            KeyPlace::Inline(text) => self.inline(text),
            // The decoder refuses these until keys are fetched; no key verifies no token.
            KeyPlace::Uri(_) | KeyPlace::Discovery => inline_keys(""),
        }
    }

    fn inline(&self, text: &Arc<str>) -> Arc<dyn KeySource> {
        let mut known = self.inline.lock();
        if let Some(source) = known.get(text).and_then(Weak::upgrade) {
            return source;
        }
        known.retain(|_, source| source.strong_count() > 0);
        let source = inline_keys(text);
        known.insert(Arc::clone(text), Arc::downgrade(&source));
        source
    }
}
