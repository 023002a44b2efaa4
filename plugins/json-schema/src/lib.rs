//! Validates JSON bodies of requests against JSON Schema (2020-12, the keywords listed in `schema.rs`).
//!
//! ```json
//! {
//!   "routes": [{
//!     "methods": ["POST"], "path": "/orders",
//!     "schema": {"type": "object", "required": ["item"], "properties": {"item": {"type": "string", "maxLength": 40}}}
//!   }],
//!   "bodyKilobytes": 64, "explain": true
//! }
//! ```

mod schema;

use cairn_sdk::{Body, Counter, Flow, Plugin, Reply, Request};
use schema::Schema;
use serde::Deserialize;
use std::rc::Rc;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// The first that fits a request counts; requests that none fits pass.
    routes: Vec<RouteConfig>,
    #[serde(default = "default_body_kilobytes")]
    body_kilobytes: usize,
    /// Whether the answer says what is wrong.
    #[serde(default)]
    explain: bool,
    #[serde(default = "default_status")]
    status: u16,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RouteConfig {
    /// None is POST, PUT and PATCH.
    #[serde(default)]
    methods: Vec<String>,
    /// The prefix of paths.
    #[serde(default)]
    path: String,
    schema: serde_json::Value,
}

fn default_body_kilobytes() -> usize {
    256
}

fn default_status() -> u16 {
    400
}

/// The plugin.
pub struct JsonSchema {
    routes: Vec<Route>,
    body_bytes_max: usize,
    explain: bool,
    status: u16,
    requests: Counter,
}

struct Route {
    methods: Vec<String>,
    path: String,
    schema: Rc<Schema>,
}

/// The schema for the body that is to come.
#[derive(Default)]
pub struct Awaited(Option<Rc<Schema>>);

#[cairn_sdk::plugin]
impl Plugin for JsonSchema {
    type Config = Config;
    type Exchange = Awaited;

    fn configure(config: Config) -> Result<Self, String> {
        if !(1..=1024).contains(&config.body_kilobytes) {
            return Err("bodyKilobytes: it is 1 to 1024".to_owned());
        }
        if !(400..500).contains(&config.status) {
            return Err("status: it is 400 to 499".to_owned());
        }
        let route = |(index, route): (usize, RouteConfig)| {
            let schema =
                Schema::compile(&route.schema).map_err(|error| format!("routes[{index}].schema{error}"))?;
            let usual = ["POST", "PUT", "PATCH"].map(str::to_owned).to_vec();
            let methods = if route.methods.is_empty() { usual } else { route.methods };
            Ok(Route { methods, path: route.path, schema: Rc::new(schema) })
        };
        Ok(Self {
            routes: config.routes.into_iter().enumerate().map(route).collect::<Result<_, String>>()?,
            body_bytes_max: config.body_kilobytes << 10,
            explain: config.explain,
            status: config.status,
            requests: Counter::new("json_schema_requests_total", &["result"]),
        })
    }

    fn on_request(&self, request: Request, awaited: &mut Awaited) -> Flow {
        let (method, path) = (request.method(), request.path());
        let fits = |route: &&Route| path.starts_with(&route.path) && route.methods.contains(&method);
        let Some(route) = self.routes.iter().find(fits) else { return Flow::Continue };
        let length = request.header_text("content-length").and_then(|length| length.parse::<usize>().ok());
        if length.is_some_and(|length| length > self.body_bytes_max) {
            return self.refuse(413, "the body is too large");
        }
        let kind = request.header_text("content-type").unwrap_or_default().to_ascii_lowercase();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if kind != "application/json" && !kind.ends_with("+json") {
            return self.refuse(415, "the content type is not JSON");
        }
        // An encoding would have to be undone to be looked at.
        if request.header_text("content-encoding").is_some_and(|encoding| encoding != "identity") {
            return self.refuse(415, "the body is encoded");
        }
        awaited.0 = Some(Rc::clone(&route.schema));
        Flow::ReadBody
    }

    fn on_request_body(&self, _: Request, body: Body, awaited: &mut Awaited) -> Flow {
        let Some(schema) = awaited.0.take() else { return Flow::Continue };
        let Ok(bytes) = body.read() else { return self.refuse(503, "the body cannot be looked at") };
        if bytes.len() > self.body_bytes_max {
            return self.refuse(413, "the body is too large");
        }
        let found = match serde_json::from_slice(&bytes) {
            Ok(value) => schema.check(&value),
            Err(error) => Err(format!("it is not JSON: {error}")),
        };
        match found {
            Ok(()) => {
                self.requests.add(1, &["valid"]);
                Flow::Continue
            }
            Err(error) => self.refuse(self.status, &error),
        }
    }
}

impl JsonSchema {
    fn refuse(&self, status: u16, why: &str) -> Flow {
        self.requests.add(1, &["refused"]);
        let mut problem = serde_json::json!({"title": "the request is not valid", "status": status});
        if self.explain {
            problem["detail"] = why.into();
        }
        let reply =
            Reply::text(status, problem.to_string()).with_header("content-type", "application/problem+json");
        reply.with_details("json_schema").with_grpc_status(3).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest};

    const CONFIG: &str = r#"{"routes": [{"path": "/orders", "schema": {"type": "object", "required": ["item"],
        "properties": {"item": {"type": "string"}, "count": {"type": "integer", "minimum": 1}}}}],
        "bodyKilobytes": 1, "explain": true}"#;

    fn order(body: &str) -> TestRequest {
        TestRequest::post("/orders", body).header("content-type", "application/json; charset=utf-8")
    }

    #[test]
    fn bodies_are_held_to_the_schema() {
        let large = format!(r#"{{"item": "{}"}}"#, "a".repeat(1100));
        let cases = [
            (r#"{"item": "a", "count": 2}"#, 200, ""),
            (r#"{"count": 2}"#, 400, "item: it is missing"),
            (r#"{"item": "a", "count": 0}"#, 400, "count: it is below 1"),
            (r#"{"item": "a""#, 400, "it is not JSON: EOF while parsing an object at line 1 column 12"),
            (large.as_str(), 413, "the body is too large"),
        ];
        let mut proxy = Proxy::<JsonSchema>::new(CONFIG).unwrap();
        for (body, status, detail) in cases {
            let outcome = proxy.send_split(order(body));
            assert_eq!(outcome.status, status, "{body}");
            match outcome.upstream {
                Some(upstream) => assert_eq!(upstream.text(), body),
                None => {
                    let problem: serde_json::Value = serde_json::from_slice(&outcome.body).unwrap();
                    assert_eq!(problem["detail"], detail, "{body}");
                }
            }
        }
        assert_eq!(proxy.send(TestRequest::get("/orders")).status, 200);
        assert_eq!(proxy.send(TestRequest::post("/other", "x")).status, 200);
    }

    #[test]
    fn what_cannot_be_looked_at_is_refused() {
        let mut proxy = Proxy::<JsonSchema>::new(&CONFIG.replace("true", "false")).unwrap();
        let outcome = proxy.send(TestRequest::post("/orders", "{}").header("content-type", "text/plain"));
        assert_eq!(
            (outcome.status, outcome.text()),
            (415, r#"{"title":"the request is not valid","status":415}"#.into())
        );
        assert_eq!(proxy.send(order("{}").header("content-encoding", "gzip")).status, 415);
        assert_eq!(proxy.send(order("{}").header("content-length", "9999")).status, 413);
        let empty = TestRequest::new("POST", "/orders").header("content-type", "application/json");
        assert_eq!(proxy.send(empty).status, 400);
        proxy.refuse("proxy_get_buffer_bytes", 10);
        assert_eq!(proxy.send(order("{}")).status, 503);
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (
                r#"{"routes": [{"schema": {"properties": {"a": {"typ": "x"}}}}]}"#,
                "configuration: routes[0].schema.properties.a.typ: ",
            ),
            (r#"{"routes": [], "status": 200}"#, "configuration: status: "),
            (r#"{"routes": [], "bodyKilobytes": 5000}"#, "configuration: bodyKilobytes: "),
            (r#"{"routes": [{}]}"#, "configuration: routes[0]: missing field `schema`"),
        ];
        for (json, error) in cases {
            let found = Proxy::<JsonSchema>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
