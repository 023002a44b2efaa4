//! Cross-origin resource sharing: answers preflights, and tells browsers which pages may read responses.
//!
//! ```json
//! {
//!   "allowOrigins": ["https://shop.example", "https://*.shop.example"],
//!   "allowMethods": ["GET", "PUT"], "allowHeaders": ["x-team"], "exposeHeaders": ["x-request-id"],
//!   "allowCredentials": true, "maxAge": 600
//! }
//! ```
//!
//! The rules are those of the Fetch standard, §3.2 (CORS protocol).

use cairn_sdk::{Flow, HeaderName, Plugin, Reply, Request, Response};
use serde::Deserialize;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Origins, with `*` for one or more labels of a host, or `*` alone for all.
    allow_origins: Vec<String>,
    /// Methods beside GET, HEAD and POST, which are always allowed.
    #[serde(default)]
    allow_methods: Vec<String>,
    #[serde(default)]
    allow_headers: Vec<HeaderName>,
    #[serde(default)]
    expose_headers: Vec<HeaderName>,
    #[serde(default)]
    allow_credentials: bool,
    /// How long browsers remember a preflight, in seconds.
    max_age: Option<u32>,
    /// Whether requests from other origins are refused with 403 instead of going unread by the page.
    #[serde(default)]
    refuse_others: bool,
}

/// The plugin.
pub struct Cors {
    origins: Vec<Origin>,
    methods: String,
    headers: String,
    exposed: String,
    credentials: bool,
    max_age: Option<String>,
    refuse_others: bool,
}

/// The origin to allow, and whether the request came from any, for the response.
#[derive(Default)]
pub struct Asked {
    allowed: Option<String>,
}

enum Origin {
    Any,
    Exact(String),
    /// What is before and behind the star.
    Under(String, String),
}

#[cairn_sdk::plugin]
impl Plugin for Cors {
    type Config = Config;
    type Exchange = Asked;

    fn configure(config: Config) -> Result<Self, String> {
        let origins: Vec<Origin> =
            config.allow_origins.iter().map(|origin| Origin::parse(origin)).collect::<Result<_, _>>()?;
        if config.allow_credentials && origins.iter().any(|origin| matches!(origin, Origin::Any)) {
            return Err("allowCredentials: not for every origin; list them".to_owned());
        }
        let is_method = |method: &&String| {
            !method.is_empty() && method.chars().all(|c| c.is_ascii_alphabetic() || c == '-')
        };
        if let Some(method) = config.allow_methods.iter().find(|method| !is_method(method)) {
            return Err(format!("allowMethods: `{method}` is no method"));
        }
        let mut methods = vec!["GET".to_owned(), "HEAD".to_owned(), "POST".to_owned()];
        methods.extend(config.allow_methods.into_iter().map(|method| method.to_ascii_uppercase()));
        Ok(Self {
            origins,
            methods: methods.join(", "),
            headers: join(&config.allow_headers),
            exposed: join(&config.expose_headers),
            credentials: config.allow_credentials,
            max_age: config.max_age.map(|seconds| seconds.to_string()),
            refuse_others: config.refuse_others,
        })
    }

    fn on_request(&self, request: Request, asked: &mut Asked) -> Flow {
        let Some(origin) = request.header_text("origin") else { return Flow::Continue };
        asked.allowed = self.allow(&origin);
        let is_preflight =
            request.method() == "OPTIONS" && request.header("access-control-request-method").is_some();
        if asked.allowed.is_none() && self.refuse_others {
            return Reply::text(403, "not for this origin").with_details("cors").into();
        }
        // What a preflight may not do is told by what its answer does not say.
        if is_preflight { self.preflight(asked.allowed.is_some()) } else { Flow::Continue }
    }

    fn on_response(&self, response: Response, asked: &mut Asked) -> Flow {
        // Caches must not show one origin's answer to another.
        if !self.is_for_all() {
            response.add_header("vary", "Origin");
        }
        // Only one of us may speak of it.
        for name in [
            "access-control-allow-origin",
            "access-control-allow-credentials",
            "access-control-expose-headers",
        ] {
            response.remove_header(name);
        }
        let Some(origin) = &asked.allowed else { return Flow::Continue };
        response.set_header("access-control-allow-origin", origin);
        if self.credentials {
            response.set_header("access-control-allow-credentials", "true");
        }
        if !self.exposed.is_empty() {
            response.set_header("access-control-expose-headers", &self.exposed);
        }
        Flow::Continue
    }
}

impl Cors {
    fn is_for_all(&self) -> bool {
        self.origins.iter().any(|origin| matches!(origin, Origin::Any))
    }

    /// What to tell a browser that asks from this origin.
    fn allow(&self, origin: &str) -> Option<String> {
        if self.is_for_all() {
            return Some("*".to_owned());
        }
        self.origins.iter().any(|allowed| allowed.matches(origin)).then(|| origin.to_owned())
    }

    fn preflight(&self, is_allowed: bool) -> Flow {
        let mut reply = Reply::empty(204).with_details("cors_preflight");
        if is_allowed {
            reply = reply.with_header("access-control-allow-methods", &self.methods);
            if !self.headers.is_empty() {
                reply = reply.with_header("access-control-allow-headers", &self.headers);
            }
            if let Some(seconds) = &self.max_age {
                reply = reply.with_header("access-control-max-age", seconds);
            }
        }
        reply.into()
    }
}

impl Origin {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let error = |why: &str| format!("allowOrigins: `{text}` {why}");
        let (scheme, host) = text.split_once("://").ok_or_else(|| error("is not `scheme://host`"))?;
        if scheme.is_empty() || host.is_empty() || host.contains(['/', '?', '#', '@']) {
            return Err(error("is not `scheme://host` and nothing more"));
        }
        let text = text.to_ascii_lowercase();
        match text.split_once('*') {
            None => Ok(Self::Exact(text)),
            Some((before, after))
                if before.ends_with("://") && after.starts_with('.') && !after.contains('*') =>
            {
                Ok(Self::Under(before.to_owned(), after.to_owned()))
            }
            Some(_) => Err(error("may have a star only in place of its first labels")),
        }
    }

    fn matches(&self, origin: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => origin == exact,
            Self::Under(before, after) => {
                let labels =
                    origin.strip_prefix(before.as_str()).and_then(|rest| rest.strip_suffix(after.as_str()));
                let is_label = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
                labels.is_some_and(|labels| !labels.is_empty() && labels.chars().all(is_label))
            }
        }
    }
}

fn join(names: &[HeaderName]) -> String {
    names.iter().map(HeaderName::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest, TestResponse};

    const CONFIG: &str = r#"{"allowOrigins": ["https://shop.example", "https://*.shop.example"], "allowMethods": ["put"],
        "allowHeaders": ["X-Team"], "exposeHeaders": ["x-id"], "allowCredentials": true, "maxAge": 600}"#;

    #[test]
    fn origins_are_told_apart() {
        let cases = [
            ("https://shop.example", true),
            ("https://a.shop.example", true),
            ("https://a.b.shop.example", true),
            ("http://shop.example", false),
            ("https://shop.example.evil", false),
            ("https://.shop.example", false),
            ("https://evil/.shop.example", false),
            ("https://shop.example:444", false),
            ("null", false),
        ];
        let mut proxy = Proxy::<Cors>::new(CONFIG).unwrap();
        proxy.upstream(|_| TestResponse::new(200).header("access-control-allow-origin", "*"));
        for (origin, is_allowed) in cases {
            let outcome = proxy.send(TestRequest::get("/").header("origin", origin));
            let expected: &[&str] = if is_allowed { &[origin] } else { &[] };
            assert_eq!(outcome.header_values("access-control-allow-origin"), expected, "{origin}");
            assert_eq!(outcome.header("vary").as_deref(), Some("Origin"));
            assert_eq!(outcome.header("access-control-expose-headers").is_some(), is_allowed);
        }
    }

    #[test]
    fn preflights_never_reach_the_upstream() {
        let preflight = |origin: &str| {
            TestRequest::new("OPTIONS", "/")
                .header("origin", origin)
                .header("access-control-request-method", "PUT")
        };
        let mut proxy = Proxy::<Cors>::new(CONFIG).unwrap();
        let outcome = proxy.send(preflight("https://shop.example"));
        assert_eq!((outcome.status, outcome.upstream.is_none()), (204, true));
        for (name, value) in [
            ("access-control-allow-origin", "https://shop.example"),
            ("access-control-allow-methods", "GET, HEAD, POST, PUT"),
            ("access-control-allow-headers", "x-team"),
            ("access-control-allow-credentials", "true"),
            ("access-control-max-age", "600"),
        ] {
            assert_eq!(outcome.header_values(name), [value], "{name}");
        }
        let outcome = proxy.send(preflight("https://evil.example"));
        assert_eq!((outcome.status, outcome.header("access-control-allow-methods")), (204, None));
        assert!(
            proxy
                .send(TestRequest::new("OPTIONS", "/").header("origin", "https://shop.example"))
                .upstream
                .is_some()
        );
        let refusing = CONFIG.replace("\"maxAge\": 600", "\"refuseOthers\": true");
        let mut proxy = Proxy::<Cors>::new(&refusing).unwrap();
        assert_eq!(proxy.send(TestRequest::get("/").header("origin", "https://evil.example")).status, 403);
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (r#"{"allowOrigins": ["*"], "allowCredentials": true}"#, "configuration: allowCredentials: "),
            (r#"{"allowOrigins": ["shop.example"]}"#, "configuration: allowOrigins: `shop.example` is not"),
            (r#"{"allowOrigins": ["https://a.*.b"]}"#, "configuration: allowOrigins: "),
            (r#"{"allowOrigins": ["https://a/"]}"#, "configuration: allowOrigins: "),
            (r#"{"allowOrigins": [], "allowMethods": ["a b"]}"#, "configuration: allowMethods: "),
        ];
        for (json, error) in cases {
            let found = Proxy::<Cors>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
