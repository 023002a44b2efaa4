//! Changes headers of requests and responses, and paths and queries of requests.
//!
//! ```json
//! {
//!   "request": {
//!     "rename": [{"from": "x-old", "to": "x-new"}],
//!     "remove": ["x-secret"], "set": [{"name": "x-env", "value": "prod"}], "add": [{"name": "via", "value": "cairn"}],
//!     "rewrite": [{"name": "referer", "pattern": "^http:", "with": "https:"}],
//!     "path": [{"pattern": "^/v1/([^?]*)", "with": "/api/$1"}]
//!   },
//!   "response": {"remove": ["server", "x-powered-by"]}
//! }
//! ```
//!
//! Within one object the order is rename, remove, set, add, rewrite, path, however they are written.

use cairn_sdk::{Flow, HeaderName, HeaderText, Plugin, Reply, Request, Response};
use regex_lite::Regex;
use serde::Deserialize;

/// The longest path that comes of a rewrite.
const PATH_BYTES_MAX: usize = 16 * 1024;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(default)]
    request: RequestConfig,
    #[serde(default)]
    response: ResponseConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RequestConfig {
    rename: Vec<Rename>,
    remove: Vec<HeaderName>,
    set: Vec<Value>,
    add: Vec<Value>,
    rewrite: Vec<Rewrite>,
    path: Vec<Replace>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ResponseConfig {
    rename: Vec<Rename>,
    remove: Vec<HeaderName>,
    set: Vec<Value>,
    add: Vec<Value>,
    rewrite: Vec<Rewrite>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rename {
    from: HeaderName,
    to: HeaderName,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Value {
    name: HeaderName,
    value: HeaderText,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rewrite {
    name: HeaderName,
    pattern: Pattern,
    with: HeaderText,
}

/// A regular expression and what takes the place of each match; `$1` is its first group.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replace {
    pattern: Pattern,
    with: HeaderText,
}

#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Pattern(Regex);

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Regex::new(&text).map(Self).map_err(|error| format!("`{text}`: {error}"))
    }
}

/// The changes of one half.
struct Changes {
    rename: Vec<Rename>,
    remove: Vec<HeaderName>,
    set: Vec<Value>,
    add: Vec<Value>,
    rewrite: Vec<Rewrite>,
}

/// The plugin.
pub struct Transform {
    request: Changes,
    path: Vec<Replace>,
    response: Changes,
}

/// What both halves have.
trait Headers {
    fn values(&self, name: &str) -> Vec<Vec<u8>>;
    fn put(&self, name: &str, value: &[u8]);
    fn append(&self, name: &str, value: &[u8]);
    fn take_away(&self, name: &str);
}

macro_rules! headers {
    ($($half:ty),*) => {
        $(impl Headers for $half {
            fn values(&self, name: &str) -> Vec<Vec<u8>> {
                self.header_values(name)
            }

            fn put(&self, name: &str, value: &[u8]) {
                self.set_header(name, value);
            }

            fn append(&self, name: &str, value: &[u8]) {
                self.add_header(name, value);
            }

            fn take_away(&self, name: &str) {
                self.remove_header(name);
            }
        })*
    };
}

headers!(Request, Response);

#[cairn_sdk::plugin]
impl Plugin for Transform {
    type Config = Config;
    type Exchange = ();

    fn configure(config: Config) -> Result<Self, String> {
        let RequestConfig { rename, remove, set, add, rewrite, path } = config.request;
        let request = Changes { rename, remove, set, add, rewrite };
        let ResponseConfig { rename, remove, set, add, rewrite } = config.response;
        Ok(Self { request, path, response: Changes { rename, remove, set, add, rewrite } })
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        self.request.apply(&request);
        if self.path.is_empty() {
            return Flow::Continue;
        }
        let old = request.path();
        let mut path = old.clone();
        for replace in &self.path {
            path = replace.pattern.0.replace_all(&path, replace.with.as_str()).into_owned();
            if path.len() > PATH_BYTES_MAX {
                return Reply::text(414, "the rewritten path is too long").with_details("transform").into();
            }
        }
        if path != old {
            request.set_header(":path", if path.starts_with('/') { path } else { format!("/{path}") });
        }
        Flow::Continue
    }

    fn on_response(&self, response: Response, (): &mut ()) -> Flow {
        self.response.apply(&response);
        Flow::Continue
    }
}

impl Changes {
    fn apply(&self, headers: &impl Headers) {
        for Rename { from, to } in &self.rename {
            let values = headers.values(from.as_str());
            headers.take_away(from.as_str());
            values.iter().for_each(|value| headers.append(to.as_str(), value));
        }
        self.remove.iter().for_each(|name| headers.take_away(name.as_str()));
        for Value { name, value } in &self.set {
            headers.put(name.as_str(), value.as_str().as_bytes());
        }
        for Value { name, value } in &self.add {
            headers.append(name.as_str(), value.as_str().as_bytes());
        }
        for rewrite in &self.rewrite {
            rewrite.apply(headers);
        }
    }
}

impl Rewrite {
    /// Values that are not UTF-8 stay as they are.
    fn apply(&self, headers: &impl Headers) {
        let name = self.name.as_str();
        let old = headers.values(name);
        let replace = |value: &Vec<u8>| match std::str::from_utf8(value) {
            Ok(text) => self.pattern.0.replace_all(text, self.with.as_str()).into_owned().into_bytes(),
            Err(_) => value.clone(),
        };
        let new: Vec<Vec<u8>> = old.iter().map(replace).collect();
        if new != old {
            headers.take_away(name);
            new.iter().for_each(|value| headers.append(name, value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest, TestResponse};

    #[test]
    fn headers_change_in_order() {
        let config = r#"{"request": {
            "rename": [{"from": "X-Old", "to": "x-new"}],
            "remove": ["x-secret"],
            "set": [{"name": "x-env", "value": "prod"}],
            "add": [{"name": "x-new", "value": "3"}],
            "rewrite": [{"name": "x-new", "pattern": "^(.)$", "with": "<$1>"}]
        }}"#;
        let mut proxy = Proxy::<Transform>::new(config).unwrap();
        let request =
            TestRequest::get("/").header("x-old", "1").header("x-old", b"\xff").header("x-secret", "s");
        let upstream = proxy.send(request.header("x-env", "a").header("x-env", "b")).upstream.unwrap();
        assert_eq!(upstream.header_values("x-new"), ["<1>", "\u{fffd}", "<3>"]);
        assert_eq!(upstream.header_values("x-env"), ["prod"]);
        assert_eq!((upstream.header("x-old"), upstream.header("x-secret")), (None, None));
    }

    #[test]
    fn responses_change_too() {
        let config = r#"{"response": {"remove": ["server"], "add": [{"name": "x", "value": "2"}]}}"#;
        let mut proxy = Proxy::<Transform>::new(config).unwrap();
        proxy.upstream(|_| TestResponse::new(200).header("server", "s").header("x", "1"));
        let outcome = proxy.send(TestRequest::get("/"));
        assert_eq!(
            (outcome.header("server"), outcome.header_values("x")),
            (None, vec!["1".into(), "2".into()])
        );
    }

    #[test]
    fn paths_are_rewritten() {
        let config = r#"{"request": {"path": [
            {"pattern": "^/v1/([^?]*)", "with": "/api/$1"},
            {"pattern": "[?&]debug=[^&]*", "with": ""},
            {"pattern": "^/gone", "with": ""}
        ]}}"#;
        let cases = [
            ("/v1/items", "/api/items"),
            ("/v1/items?a=1&debug=2", "/api/items?a=1"),
            ("/v2/items", "/v2/items"),
            ("/gone", "/"),
        ];
        let mut proxy = Proxy::<Transform>::new(config).unwrap();
        for (path, expected) in cases {
            let upstream = proxy.send(TestRequest::get(path)).upstream.unwrap();
            assert_eq!(upstream.header(":path").as_deref(), Some(expected), "{path}");
        }
        let mut proxy =
            Proxy::<Transform>::new(r#"{"request": {"path": [{"pattern": "", "with": "0123456789"}]}}"#)
                .unwrap();
        assert_eq!(proxy.send(TestRequest::get(&"/".repeat(4000))).status, 414);
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (
                r#"{"request": {"path": [{"pattern": "(", "with": ""}]}}"#,
                "configuration: request.path[0].pattern: `(`: ",
            ),
            (r#"{"response": {"path": []}}"#, "configuration: response.path: unknown field"),
            (r#"{"request": {"remove": ["a b"]}}"#, "configuration: request.remove[0]: `a b` is not"),
            (
                r#"{"request": {"set": [{"name": "a", "value": "\n"}]}}"#,
                "configuration: request.set[0].value: ",
            ),
        ];
        for (json, error) in cases {
            let found = Proxy::<Transform>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
