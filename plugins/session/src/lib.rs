//! Asks an authentication service whether a session is good, as OIDC proxies do, and remembers what it said.
//!
//! ```json
//! {
//!   "cookie": "session",
//!   "cluster": "outbound|80||auth.shop.svc.cluster.local", "path": "/check",
//!   "userHeaders": ["x-user", "x-groups"], "login": "https://login.shop.example/?back={url}",
//!   "open": ["/public"], "remember": 30
//! }
//! ```
//!
//! The service gets the cookie, the method and the path, and answers 2xx with headers that say who it is, or anything else.

use cairn_sdk::{
    Answer, Cache, Call, CallError, Counter, Flow, HeaderName, HeaderText, Plugin, Reply, Request,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// The longest session that is looked at, and how many verdicts are remembered.
const SESSION_BYTES_MAX: usize = 8192;
const REMEMBERED_MAX: usize = 10_000;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// The cookie that holds the session.
    cookie: String,
    /// The cluster of the authentication service.
    cluster: String,
    /// Its authority; default the cluster's host.
    authority: Option<HeaderText>,
    path: HeaderText,
    /// Headers of its answer that the upstream gets. What clients send in them is removed.
    #[serde(default)]
    user_headers: Vec<HeaderName>,
    /// Where browsers are sent to log in, with `{url}` for where they wanted to go. None answers 401.
    login: Option<HeaderText>,
    /// Prefixes of paths that need no session.
    #[serde(default)]
    open: Vec<String>,
    /// How long a good session is taken for good without asking, in seconds.
    #[serde(default = "default_remember")]
    remember: u64,
    #[serde(default = "default_timeout")]
    timeout_ms: u64,
}

fn default_remember() -> u64 {
    30
}

fn default_timeout() -> u64 {
    2000
}

/// The plugin.
pub struct Sessions(Rc<Shared>);

struct Shared {
    config: Config,
    good: RefCell<Cache<[u8; 32], Rc<User>>>,
    decisions: Counter,
}

/// What the service says of a user.
struct User(Vec<(String, Vec<u8>)>);

#[cairn_sdk::plugin]
impl Plugin for Sessions {
    type Config = Config;
    type Exchange = ();

    fn configure(config: Config) -> Result<Self, String> {
        if config.cookie.is_empty() || config.cluster.is_empty() {
            return Err("cookie, cluster: they have no default".to_owned());
        }
        if !config.path.as_str().starts_with('/') {
            return Err("path: it begins with a slash".to_owned());
        }
        let good = RefCell::new(Cache::new(REMEMBERED_MAX));
        let decisions = Counter::new("session_requests_total", &["decision"]);
        Ok(Self(Rc::new(Shared { config, good, decisions })))
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        for header in &self.0.config.user_headers {
            request.remove_header(header.as_str());
        }
        let path = request.path_alone();
        if self.0.config.open.iter().any(|prefix| path.starts_with(prefix.as_str())) {
            return Flow::Continue;
        }
        let session = request.cookie(&self.0.config.cookie).filter(|session| !session.is_empty());
        let Some(session) = session.filter(|session| session.len() <= SESSION_BYTES_MAX) else {
            return self.0.refuse(request, "none");
        };
        let key: [u8; 32] = Sha256::digest(&session).into();
        if let Some(user) = self.0.good.borrow_mut().get(&key) {
            self.0.decisions.add(1, &["remembered"]);
            return user.let_in(request);
        }
        let (shared, call) = (Rc::clone(&self.0), self.0.call(request, &session));
        Flow::wait(async move { shared.decide(request, key, call.send().await) })
    }
}

impl Shared {
    fn call(&self, request: Request, session: &str) -> Call {
        let config = &self.config;
        let mut call = Call::get(&config.cluster, config.path.as_str());
        if let Some(authority) = &config.authority {
            call = call.authority(authority.as_str());
        }
        let call = call.header("cookie", format!("{}={session}", config.cookie));
        let call =
            call.header("x-original-method", request.method()).header("x-original-path", request.path());
        call.timeout(Duration::from_millis(config.timeout_ms))
    }

    fn decide(&self, request: Request, key: [u8; 32], answer: Result<Answer, CallError>) -> Flow {
        match answer {
            Ok(answer) if (200..300).contains(&answer.status()) => {
                self.decisions.add(1, &["good"]);
                let user = Rc::new(self.user(&answer));
                let remember = Duration::from_secs(self.config.remember);
                self.good.borrow_mut().insert(key, Rc::clone(&user), 1, remember);
                user.let_in(request)
            }
            Ok(answer) if answer.status() < 500 => self.refuse(request, "bad"),
            // Whoever cannot be asked has not said yes.
            Ok(answer) => self.fail(&format!("status {}", answer.status())),
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn user(&self, answer: &Answer) -> User {
        let told =
            |name: &HeaderName| Some((name.as_str().to_owned(), answer.header(name.as_str())?.to_vec()));
        User(self.config.user_headers.iter().filter_map(told).collect())
    }

    fn fail(&self, why: &str) -> Flow {
        self.decisions.add(1, &["failed"]);
        cairn_sdk::log::warn!("the authentication service did not answer: {why}");
        Reply::text(503, "the session cannot be checked").with_details("session_check_failed").into()
    }

    fn refuse(&self, request: Request, decision: &str) -> Flow {
        self.decisions.add(1, &[decision]);
        // Only what a person looks at is worth a login page.
        let is_page = request.method() == "GET"
            && request.header_text("accept").is_some_and(|accept| accept.contains("text/html"));
        let reply = match self.config.login.as_ref().filter(|_| is_page) {
            Some(login) => {
                let url = format!("https://{}{}", request.authority(), request.path());
                Reply::empty(302).with_header("location", login.as_str().replace("{url}", &encode(&url)))
            }
            None => Reply::text(401, "a session is needed"),
        };
        reply.with_details("session").with_header("cache-control", "no-store").with_grpc_status(16).into()
    }
}

impl User {
    fn let_in(&self, request: Request) -> Flow {
        for (name, value) in &self.0 {
            request.set_header(name, value);
        }
        Flow::Continue
    }
}

/// Percent-encodes all but unreserved characters (RFC 3986 §2.3).
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte))
            }
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest, TestResponse};
    use std::cell::Cell;

    const CONFIG: &str = r#"{"cookie": "session", "cluster": "auth", "path": "/check", "userHeaders": ["X-User"],
        "login": "https://login.example/?back={url}", "open": ["/public"], "remember": 30}"#;

    fn proxy() -> (Proxy<Sessions>, Rc<Cell<usize>>) {
        let mut proxy = Proxy::new(CONFIG).unwrap();
        let asked = Rc::new(Cell::new(0));
        let count = Rc::clone(&asked);
        proxy.cluster("auth", move |call| {
            count.set(count.get() + 1);
            assert_eq!(call.header(":path").as_deref(), Some("/check"));
            match call.header("cookie").as_deref() {
                Some("session=good") => TestResponse::new(200).header("x-user", "ada"),
                Some("session=slow") => TestResponse::new(200).after(Duration::from_secs(3)),
                Some("session=broken") => TestResponse::failure(),
                _ => TestResponse::new(401),
            }
        });
        (proxy, asked)
    }

    fn request(session: &str) -> TestRequest {
        TestRequest::get("/a?b=c")
            .header("cookie", format!("x=y; session={session}"))
            .header("x-user", "root")
    }

    #[test]
    fn the_service_decides() {
        let (mut proxy, _) = proxy();
        for (session, status) in [("good", 200), ("stolen", 401), ("", 401), ("slow", 503), ("broken", 503)] {
            let outcome = proxy.send(request(session));
            assert_eq!(outcome.status, status, "{session}");
            let user = outcome.upstream.map(|upstream| upstream.header_values("x-user"));
            assert_eq!(user, (status == 200).then(|| vec!["ada".to_owned()]), "{session}");
        }
        assert_eq!(proxy.metric("decision=.=failed;.;session_requests_total"), Some(2));
    }

    #[test]
    fn good_sessions_are_remembered_for_a_while() {
        let (mut proxy, asked) = proxy();
        for _ in 0..5 {
            assert_eq!(
                proxy.send(request("good")).upstream.unwrap().header("x-user").as_deref(),
                Some("ada")
            );
            assert_eq!(proxy.send(request("stolen")).status, 401);
        }
        assert_eq!(asked.get(), 6, "bad ones are asked for each time");
        proxy.advance(Duration::from_secs(31));
        proxy.send(request("good"));
        assert_eq!(asked.get(), 7);
    }

    #[test]
    fn people_are_sent_to_log_in() {
        let (mut proxy, asked) = proxy();
        let outcome = proxy.send(TestRequest::get("/a?b=c").header("accept", "text/html,*/*"));
        assert_eq!(outcome.status, 302);
        let location = outcome.header("location");
        assert_eq!(location.as_deref(), Some("https://login.example/?back=https%3A%2F%2Ftest%2Fa%3Fb%3Dc"));
        assert_eq!(proxy.send(TestRequest::post("/a", "x").header("accept", "text/html")).status, 401);
        let open = proxy.send(TestRequest::get("/public/1").header("x-user", "root"));
        assert_eq!((open.status, open.upstream.unwrap().header("x-user")), (200, None));
        assert_eq!(asked.get(), 0);
    }

    #[test]
    fn a_client_that_goes_away_leaves_nothing() {
        let (mut proxy, _) = proxy();
        let gone = proxy.start(request("slow"));
        proxy.abort(gone);
        proxy.advance(Duration::from_secs(10));
        assert!(proxy.logs().is_empty(), "{:?}", proxy.logs());
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (r#"{"cookie": "", "cluster": "a", "path": "/"}"#, "configuration: cookie, cluster: "),
            (r#"{"cookie": "a", "cluster": "a", "path": "check"}"#, "configuration: path: "),
            (r#"{"cookie": "a", "cluster": "a"}"#, "configuration: missing field `path`"),
        ];
        for (json, error) in cases {
            let found = Proxy::<Sessions>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
