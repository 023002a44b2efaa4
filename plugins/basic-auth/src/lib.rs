//! Asks for a name and a password (RFC 7617) and tells the upstream who it is.
//!
//! ```json
//! {
//!   "realm": "shop",
//!   "users": ["ada:{SSHA256}eF8vk…", "bob:$pbkdf2-sha256$20000$c2FsdA==$hNQ…"],
//!   "paths": ["/admin"],
//!   "userHeader": "x-user"
//! }
//! ```

mod password;

use cairn_sdk::{Cache, Counter, Flow, HeaderName, Plugin, Reply, Request};
use password::Password;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

/// How many good credentials are remembered, so that slow hashes are computed once in a while, and for how long.
const REMEMBERED_MAX: usize = 1000;
const REMEMBERED_FOR: Duration = Duration::from_secs(300);

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// What browsers show.
    #[serde(default = "default_realm")]
    realm: String,
    /// `name:hash`, see `password.rs`.
    users: Vec<String>,
    /// Prefixes of paths that are guarded; none guards all.
    #[serde(default)]
    paths: Vec<String>,
    /// The header that tells the upstream the name. What a client sent in it is removed.
    user_header: Option<HeaderName>,
    /// Whether the upstream gets the `authorization` header.
    #[serde(default)]
    forward_credentials: bool,
}

fn default_realm() -> String {
    "restricted".to_owned()
}

/// The plugin.
pub struct BasicAuth {
    challenge: String,
    users: BTreeMap<String, Password>,
    paths: Vec<String>,
    user_header: Option<HeaderName>,
    forward_credentials: bool,
    remembered: RefCell<Cache<[u8; 32], String>>,
    decisions: Counter,
}

#[cairn_sdk::plugin]
impl Plugin for BasicAuth {
    type Config = Config;
    type Exchange = ();

    fn configure(config: Config) -> Result<Self, String> {
        if config.realm.chars().any(|c| c.is_control() || c == '"' || c == '\\') {
            return Err("realm: no quotes, backslashes or control characters".to_owned());
        }
        let mut users = BTreeMap::new();
        for (index, line) in config.users.iter().enumerate() {
            let at = |error: &str| format!("users[{index}]: {error}");
            let (name, hash) = line.split_once(':').ok_or_else(|| at("it is not `name:hash`"))?;
            let password = Password::parse(hash).map_err(|error| at(&error))?;
            if users.insert(name.to_owned(), password).is_some() {
                return Err(at("the name is there twice"));
            }
        }
        Ok(Self {
            challenge: format!("Basic realm=\"{}\", charset=\"UTF-8\"", config.realm),
            users,
            paths: config.paths,
            user_header: config.user_header,
            forward_credentials: config.forward_credentials,
            remembered: RefCell::new(Cache::new(REMEMBERED_MAX)),
            decisions: Counter::new("basic_auth_requests_total", &["decision"]),
        })
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        if let Some(header) = &self.user_header {
            request.remove_header(header.as_str());
        }
        if !self.guards(&request.path()) {
            return Flow::Continue;
        }
        let credentials = request.header("authorization");
        let Some(user) = credentials.and_then(|credentials| self.user(&credentials)) else {
            self.decisions.add(1, &["deny"]);
            let reply = Reply::text(401, "a name and a password are needed").with_details("basic_auth");
            return reply.with_header("www-authenticate", &self.challenge).with_grpc_status(16).into();
        };
        self.decisions.add(1, &["allow"]);
        if let Some(header) = &self.user_header {
            request.set_header(header.as_str(), user);
        }
        if !self.forward_credentials {
            request.remove_header("authorization");
        }
        Flow::Continue
    }
}

impl BasicAuth {
    fn guards(&self, path: &str) -> bool {
        self.paths.is_empty() || self.paths.iter().any(|prefix| path.starts_with(prefix.as_str()))
    }

    /// Who has sent these credentials, if they are good. Takes as long for an unknown name as for a wrong password, as far as
    /// all users have the same kind of hash.
    fn user(&self, credentials: &[u8]) -> Option<String> {
        let digest: [u8; 32] = Sha256::digest(credentials).into();
        if let Some(user) = self.remembered.borrow_mut().get(&digest) {
            return Some(user.clone());
        }
        let (name, given) = read(credentials)?;
        let known = self.users.get(&name);
        let compared = known.or_else(|| self.users.values().next())?;
        let is_good = compared.is(&given) & known.is_some();
        if is_good {
            self.remembered.borrow_mut().insert(digest, name.clone(), 1, REMEMBERED_FOR);
        }
        is_good.then_some(name)
    }
}

/// The name and the password of an `authorization` header.
fn read(credentials: &[u8]) -> Option<(String, Vec<u8>)> {
    let (scheme, encoded) = credentials.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"basic ") {
        return None;
    }
    let decoded = password::decode(encoded.trim_ascii())?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let name = String::from_utf8(decoded[..colon].to_vec()).ok()?;
    // It may end up in a header.
    (!name.chars().any(char::is_control)).then(|| (name, decoded[colon + 1..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest};

    /// `ada:secret` and `bob:hunter2`; see the README for how they were made.
    const USERS: &str = r#"["ada:{SSHA256}+E+iFJ27Yu1ODPH1UNKUmzOmUT06dwfghQJRHHnMsO5zYWx0",
        "bob:$pbkdf2-sha256$1000$c2FsdA==$6bR+qvB+EfiWifJvLhLUslIy4Ocqg4PNHECwdKqh4ho="]"#;

    fn proxy(more: &str) -> Proxy<BasicAuth> {
        Proxy::new(&format!("{{\"users\": {USERS}{more}}}")).unwrap()
    }

    fn basic(credentials: &str) -> String {
        format!("Basic {}", password::encode(credentials.as_bytes()))
    }

    #[test]
    fn who_knows_the_password_passes() {
        let cases = [
            ("ada:secret", 200),
            ("bob:hunter2", 200),
            ("ada:hunter2", 401),
            ("eve:secret", 401),
            ("ada:", 401),
            ("ada", 401),
            ("", 401),
            ("a\nda:secret", 401),
        ];
        let mut proxy = proxy(r#", "userHeader": "X-User""#);
        for _ in ["computed", "remembered"] {
            for (credentials, status) in cases {
                let request = TestRequest::get("/")
                    .header("authorization", basic(credentials))
                    .header("x-user", "root");
                let outcome = proxy.send(request);
                assert_eq!(outcome.status, status, "{credentials}");
                if let Some(upstream) = outcome.upstream {
                    assert_eq!(upstream.header("x-user"), credentials.split(':').next().map(str::to_owned));
                    assert_eq!(upstream.header("authorization"), None);
                }
            }
        }
        assert_eq!(proxy.metric("decision=.=allow;.;basic_auth_requests_total"), Some(4));
    }

    #[test]
    fn who_sends_none_is_asked() {
        let mut proxy = proxy(r#", "realm": "shop", "paths": ["/admin"]"#);
        for header in ["", "Bearer x", "Basic ???", "Basic", "basic"] {
            let outcome = proxy.send(TestRequest::get("/admin/x").header("authorization", header));
            assert_eq!(
                outcome.header("www-authenticate").as_deref(),
                Some("Basic realm=\"shop\", charset=\"UTF-8\"")
            );
        }
        assert_eq!(proxy.send(TestRequest::get("/")).status, 200);
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (r#"{"users": ["ada"]}"#, "configuration: users[0]: it is not `name:hash`"),
            (r#"{"users": ["ada:secret"]}"#, "configuration: users[0]: the hash is neither"),
            (r#"{"users": ["a:{SSHA256}eA=="]}"#, "configuration: users[0]: "),
            (r#"{"users": [], "realm": "a\"b"}"#, "configuration: realm: "),
            ("{}", "configuration: missing field `users`"),
        ];
        for (json, error) in cases {
            let found = Proxy::<BasicAuth>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
