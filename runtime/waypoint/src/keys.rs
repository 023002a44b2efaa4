//! The keys that tokens are verified with, shared by all destinations whose rules name the same: those given with rules,
//! and those that are fetched from issuers.

mod fetch;
mod freshness;
mod issuer;
mod shelf;

use cairn_builtin::{KeySource, Keys, TokenCache, inline_keys};
use cairn_filter::Callout;
use cairn_mesh::{JwtRule, KeyPlace, ResourceName};
use fetch::{Fetcher, Place};
use issuer::Issuer;
use parking_lot::Mutex;
use shelf::Shelf;
use std::collections::HashMap;
use std::fmt::Write;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The keys of all issuers, and the tokens verified with them.
pub struct Keyring {
    /// Tokens verified lately.
    pub cache: Arc<TokenCache>,
    fetcher: Arc<Fetcher>,
    /// Where fetched keys are kept for the next start.
    shelf: Option<Arc<Shelf>>,
    /// Keys given with rules, as long as some destination uses them.
    inline: Mutex<HashMap<Arc<str>, Weak<dyn KeySource>>>,
    /// Keys that are fetched, as long as some destination uses them.
    fetched: Mutex<HashMap<(Place, Duration), Weak<Issuer>>>,
}

impl Keyring {
    /// Fetches keys of services that the mesh knows through `callout`, and others directly. Servers are to prove who they
    /// are by a certificate that chains to the system's roots or to those in the file `roots`. Tokens are remembered in
    /// `cache`.
    pub fn new(callout: Arc<dyn Callout>, roots: Option<PathBuf>, cache: TokenCache) -> Self {
        Self {
            cache: Arc::new(cache),
            fetcher: Arc::new(Fetcher::new(callout, roots)),
            shelf: None,
            inline: Mutex::default(),
            fetched: Mutex::default(),
        }
    }

    /// The same, but keys that are fetched are kept in `directory`, for when the proxy starts while their issuer is down.
    #[must_use]
    pub fn keeping(self, directory: PathBuf) -> Self {
        Self { shelf: Some(Arc::new(Shelf::new(directory))), ..self }
    }

    /// Where the keys of a rule are. Those of an issuer begin to be fetched; call it on a runtime that does that.
    pub fn source(&self, policy: &ResourceName, rule: &JwtRule, cluster_domain: &str) -> Arc<dyn KeySource> {
        let (uri, discovery) = match &rule.keys {
            KeyPlace::Inline(text) => return self.inline(text),
            KeyPlace::Uri(uri) => (uri, false),
            KeyPlace::Discovery => (&rule.issuer, true),
        };
        match Place::new(uri, discovery, &policy.namespace, cluster_domain) {
            Some(place) => self.fetched(place, rule.timeout),
            None => Arc::new(Nowhere),
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

    fn fetched(&self, place: Place, timeout: Duration) -> Arc<dyn KeySource> {
        let mut known = self.fetched.lock();
        let key = (place, timeout);
        if let Some(issuer) = known.get(&key).and_then(Weak::upgrade) {
            return issuer;
        }
        known.retain(|_, issuer| issuer.strong_count() > 0);
        let issuer = Issuer::start(key.0.clone(), timeout, &self.fetcher, self.shelf.clone());
        known.insert(key, Arc::downgrade(&issuer));
        issuer
    }

    /// What was fetched and what was remembered, in the Prometheus text format.
    pub fn encode_metrics(&self) -> String {
        let mut issuers: Vec<Arc<Issuer>> = self.fetched.lock().values().filter_map(Weak::upgrade).collect();
        issuers.sort_by(|a, b| a.name().cmp(b.name()));
        issuers.dedup_by(|a, b| a.name() == b.name());
        let (hits, misses) = self.cache.counts();
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, f64)>| {
            // Writing to a text cannot fail.
            let _written = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            for (labels, value) in samples {
                let _written = writeln!(text, "{name}{labels} {value}");
            }
        };
        let each = |value: &dyn Fn(&Issuer) -> Option<f64>| -> Vec<(String, f64)> {
            let sample = |issuer: &Arc<Issuer>| {
                Some((format!("{{source=\"{}\"}}", escaped(issuer.name())), value(issuer)?))
            };
            issuers.iter().filter_map(sample).collect()
        };
        let fetches = each(&|issuer| Some(issuer.fetches() as f64));
        family("cairn_jwks_fetches_total", "counter", "Key sets asked for.", fetches);
        let failures = each(&|issuer| Some(issuer.failures() as f64));
        family("cairn_jwks_fetch_failures_total", "counter", "Key sets asked for and not got.", failures);
        let refused = each(&|issuer| Some(issuer.refused() as f64));
        let help = "Times that an unknown key did not lead to asking, for that had been done too often.";
        family("cairn_jwks_refreshes_refused_total", "counter", help, refused);
        let ages = each(&|issuer| issuer.age().map(|age| age.as_secs_f64()));
        family("cairn_jwks_age_seconds", "gauge", "Time since a key set was last got.", ages);
        let found = vec![
            ("{result=\"hit\"}".to_owned(), hits as f64),
            ("{result=\"miss\"}".to_owned(), misses as f64),
        ];
        let help = "Tokens looked for among those verified lately.";
        family("cairn_token_cache_lookups_total", "counter", help, found);
        text
    }
}

/// A label's value in the Prometheus text format.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Keys of an issuer that says nowhere where they are.
struct Nowhere;

impl KeySource for Nowhere {
    fn keys(&self) -> Keys {
        Keys::Missing
    }

    fn renew(&self, _key_id: &str) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        None
    }
}

#[cfg(test)]
#[path = "keys/tests.rs"]
mod tests;
