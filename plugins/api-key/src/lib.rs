//! Asks for an API key and tells the upstream whose it is.
//!
//! ```json
//! {
//!   "keys": [{"client": "billing", "sha256": "2bb80d53…"}],
//!   "from": [{"header": "x-api-key"}, "bearer", {"query": "key"}],
//!   "clientHeader": "x-client"
//! }
//! ```
//!
//! Keys are kept as hashes. They are random and long, unlike passwords, so a plain hash is good enough, and looking one up by
//! its hash tells a client nothing by the time it takes.

use cairn_sdk::{Counter, Flow, HeaderName, HeaderText, Plugin, Reply, Request};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    keys: Vec<Key>,
    /// Where a key may stand; the first that is there counts. Default the header `x-api-key`.
    #[serde(default = "default_sources")]
    from: Vec<Source>,
    /// Prefixes of paths that are guarded; none guards all.
    #[serde(default)]
    paths: Vec<String>,
    /// The header that tells the upstream the client. What a client sent in it is removed.
    client_header: Option<HeaderName>,
    /// Whether the upstream gets the key, if it is in a header.
    #[serde(default)]
    forward_key: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    client: HeaderText,
    /// SHA-256 of the key, in hexadecimal.
    sha256: String,
    /// Prefixes of paths that the key is good for; none is all.
    #[serde(default)]
    paths: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
enum Source {
    Header(HeaderName),
    /// `authorization: Bearer …`.
    Bearer,
    /// A parameter of the query. It ends up in logs: avoid it.
    Query(String),
}

fn default_sources() -> Vec<Source> {
    HeaderName::try_from("x-api-key".to_owned()).map(Source::Header).into_iter().collect()
}

struct Client {
    name: String,
    paths: Vec<String>,
}

/// The plugin.
pub struct ApiKey {
    clients: BTreeMap<[u8; 32], Client>,
    from: Vec<Source>,
    paths: Vec<String>,
    client_header: Option<HeaderName>,
    forward_key: bool,
    requests: Counter,
}

#[cairn_sdk::plugin]
impl Plugin for ApiKey {
    type Config = Config;
    type Exchange = ();

    fn configure(config: Config) -> Result<Self, String> {
        let mut clients = BTreeMap::new();
        for (index, key) in config.keys.into_iter().enumerate() {
            let hash = from_hex(&key.sha256)
                .ok_or_else(|| format!("keys[{index}].sha256: it is not 64 hexadecimal digits"))?;
            let client = Client { name: key.client.as_str().to_owned(), paths: key.paths };
            if clients.insert(hash, client).is_some() {
                return Err(format!("keys[{index}].sha256: the key is there twice"));
            }
        }
        if config.from.is_empty() {
            return Err("from: there is nowhere to look for keys".to_owned());
        }
        Ok(Self {
            clients,
            from: config.from,
            paths: config.paths,
            client_header: config.client_header,
            forward_key: config.forward_key,
            requests: Counter::new("api_key_requests_total", &["client", "decision"]),
        })
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        if let Some(header) = &self.client_header {
            request.remove_header(header.as_str());
        }
        let path = request.path_alone();
        if !is_under(&path, &self.paths) {
            return Flow::Continue;
        }
        let Some(key) = self.from.iter().find_map(|source| source.read(request)) else {
            return self.refuse("unknown", 401, "an API key is needed");
        };
        let hash: [u8; 32] = Sha256::digest(&key).into();
        let Some(client) = self.clients.get(&hash) else {
            return self.refuse("unknown", 401, "the API key is not known");
        };
        if !is_under(&path, &client.paths) {
            return self.refuse(&client.name, 403, "the API key is not good for this path");
        }
        self.requests.add(1, &[&client.name, "allow"]);
        if !self.forward_key {
            self.from.iter().for_each(|source| source.strip(request));
        }
        if let Some(header) = &self.client_header {
            request.set_header(header.as_str(), &client.name);
        }
        Flow::Continue
    }
}

impl ApiKey {
    fn refuse(&self, client: &str, status: u16, why: &str) -> Flow {
        self.requests.add(1, &[client, "deny"]);
        let reply = Reply::text(status, why).with_details("api_key");
        let reply = reply.with_grpc_status(if status == 401 { 16 } else { 7 });
        if status == 401 { reply.with_header("www-authenticate", "ApiKey").into() } else { reply.into() }
    }
}

impl Source {
    fn read(&self, request: Request) -> Option<Vec<u8>> {
        match self {
            Self::Header(name) => request.header(name.as_str()),
            Self::Bearer => {
                let value = request.header("authorization")?;
                let (scheme, key) = value.split_at_checked(7)?;
                scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii().to_vec())
            }
            Self::Query(name) => request.query_value(name),
        }
        .filter(|key| !key.is_empty())
    }

    fn strip(&self, request: Request) {
        match self {
            Self::Header(name) => request.remove_header(name.as_str()),
            Self::Bearer => request.remove_header("authorization"),
            Self::Query(_) => {}
        }
    }
}

fn is_under(path: &str, prefixes: &[String]) -> bool {
    prefixes.is_empty() || prefixes.iter().any(|prefix| path.starts_with(prefix.as_str()))
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let bytes: Vec<u8> =
        digits?.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    (text.len() == 64).then(|| bytes.try_into().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest};

    fn proxy() -> Proxy<ApiKey> {
        let hash =
            |key: &str| Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let config = serde_json::json!({
            "keys": [
                {"client": "billing", "sha256": hash("k1")},
                {"client": "reader", "sha256": hash("k2"), "paths": ["/read"]},
            ],
            "from": [{"header": "X-Key"}, "bearer", {"query": "key"}],
            "paths": ["/read", "/write"],
            "clientHeader": "x-client",
        });
        Proxy::new(&config.to_string()).unwrap()
    }

    #[test]
    fn a_key_opens_what_it_is_good_for() {
        let cases = [
            ("/write", "x-key", "k1", 200, Some("billing")),
            ("/write", "authorization", "Bearer k1", 200, Some("billing")),
            ("/write?key=k1", "x", "y", 200, Some("billing")),
            ("/read/1?a=b", "x-key", "k2", 200, Some("reader")),
            ("/write", "x-key", "k2", 403, None),
            ("/write", "x-key", "k3", 401, None),
            ("/write", "x-key", "", 401, None),
            ("/write", "authorization", "Basic k1", 401, None),
            ("/write?key=", "x-client", "billing", 401, None),
            ("/open", "x-client", "billing", 200, None),
        ];
        let mut proxy = proxy();
        for (path, header, value, status, client) in cases {
            let outcome = proxy.send(TestRequest::get(path).header(header, value));
            assert_eq!(outcome.status, status, "{path} {header}: {value}");
            let upstream = outcome.upstream.unwrap_or_default();
            assert_eq!(upstream.header("x-client").as_deref(), client, "{path} {header}: {value}");
            assert_eq!((upstream.header("x-key"), upstream.header("authorization")), (None, None));
        }
        assert_eq!(proxy.metric("client=.=reader;.;decision=.=deny;.;api_key_requests_total"), Some(1));
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let twice = format!(
            r#"{{"keys": [{0}, {0}]}}"#,
            format_args!(r#"{{"client": "a", "sha256": "{}"}}"#, "a".repeat(64))
        );
        let cases = [
            (r#"{"keys": [{"client": "a", "sha256": "xyz"}]}"#, "configuration: keys[0].sha256: it is not"),
            (twice.as_str(), "configuration: keys[1].sha256: the key is there twice"),
            (r#"{"keys": [], "from": []}"#, "configuration: from: "),
            (r#"{"keys": [], "from": [{"cookie": "a"}]}"#, "configuration: from[0]"),
        ];
        for (json, error) in cases {
            let found = Proxy::<ApiKey>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
