//! What is known of modules by their names: those of the official SDKs' examples, and of others that are compared.
//!
//! A name is the SDK's language (or its version, where several are built), and the example's own name. What an author
//! expects is taken from the module's documentation, and asked of our host: Envoy is held to it by the comparison.

use crate::ask::{
    Ask,
    Expected::{Logged, NotUpstream, UpstreamBody},
    LARGE,
};
use std::time::Duration;

/// What is known of a module.
#[derive(Clone, Debug)]
pub struct Known {
    /// The root id under which it registers itself.
    pub root: &'static str,
    pub config: String,
    /// Whether it has a part in requests.
    pub serves: bool,
    /// What it is asked beside what all are asked.
    pub asks: Vec<Ask>,
    /// What lines contain that come whenever they come: from timers, or as often as a body was read from.
    pub loose: Vec<&'static str>,
    /// It changes pieces of bodies as they come, so that its work shows where a host's reads end.
    pub cuts: bool,
    /// It sends a request's headers, `content-length` included, to a service, and no body: Envoy waits for the service,
    /// which waits for the body. Only requests without a body are compared.
    pub promises_bodies: bool,
    /// How long the longest body is that it is sent.
    pub large: usize,
    /// The longest that one call of it may take here, where 100 ms are too short for it.
    pub deadline: Option<Duration>,
    /// Why it is not compared, if it is not.
    pub skipped: Option<&'static str>,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            root: "",
            config: String::new(),
            serves: true,
            asks: Vec::new(),
            loose: Vec::new(),
            cuts: false,
            promises_bodies: false,
            large: LARGE,
            deadline: None,
            skipped: None,
        }
    }
}

/// What is known of the module with this name.
pub fn known(name: &str) -> Known {
    let (language, example) = name.split_once('_').unwrap_or(("", name));
    match (language, example) {
        ("go", _) => go(example),
        ("go016", _) => go_016(example),
        ("cpp", _) => cpp(example),
        ("as", _) => assembly_script(example),
        _ => rust(language, example),
    }
}

fn config(text: &str) -> Known {
    Known { config: text.to_owned(), ..Known::default() }
}

fn asked(asks: Vec<Ask>) -> Known {
    Known { asks, ..Known::default() }
}

/// A module that does its work by the clock.
fn timer(loose: &[&'static str]) -> Known {
    Known { loose: loose.to_vec(), ..Known::default() }
}

/// The Rust SDK's; `language` is its version, or `rs` for what is not released yet.
fn rust(language: &str, example: &str) -> Known {
    let redacted = match language {
        "rs" => "Original message body (16 bytes) redacted.\n",
        _ => "Original message body (16 bytes) redacted.",
    };
    let grpc = |status| {
        let ask = Ask::post("/grpc/Service/Method", "\0\0\0\0\u{3}abc").http2().header("te", "trailers");
        ask.header("content-type", "application/grpc").grpc_service(status)
    };
    match example {
        "hello_world" => Known { serves: false, ..timer(&["It's "]) },
        "http_auth_random" => asked(vec![
            Ask::get("/echo").service(200, "0").expect_status(200).expect_header("powered-by", "proxy-wasm"),
            Ask::get("/echo").service(200, "1").expect_status(403).expect_body("Access forbidden.\n"),
            Ask::get("/echo").service(200, "").expect_status(403).expect(NotUpstream),
            Ask::post("/echo", "x").service(500, "1").expect_status(403),
            Ask::post("/echo", "x").service(500, "0").expect(UpstreamBody("x")),
        ]),
        "http_body" => asked(vec![
            Ask::get("/secret").expect_body(redacted),
            Ask::get("/secret").http2().expect_body(redacted),
            Ask::post("/echo", "no such word").expect_body("no such word"),
        ]),
        "http_config" => Known {
            asks: vec![Ask::get("/echo").expect_header("custom-header", "from the configuration")],
            ..config("from the configuration")
        },
        "http_headers" => {
            let hello = |ask: Ask| ask.expect_body("Hello, World!\n").expect(NotUpstream);
            asked(vec![
                hello(Ask::get("/hello")),
                hello(Ask::post("/hello", "x")),
                hello(Ask::post("/hello", "").pieces(&["a body ", "in pieces ", "that is not read"])),
                hello(Ask::get("/hello").http2()),
            ])
        }
        "grpc_auth_random" => asked(vec![
            Ask::get("/echo").expect_status(503).expect_body("Service accessible only to gRPC clients.\n"),
            grpc(0).expect_header("powered-by", "proxy-wasm").expect(Logged("Access granted.")),
            grpc(7).expect_header("grpc-status", "10").expect(NotUpstream),
        ]),
        _ => Known::default(),
    }
}

/// Those that version 0.16 of the Go SDK had, where they differ from later ones.
fn go_016(example: &str) -> Known {
    match example {
        "http_headers" => Known::default(),
        "http_routing" => Known { skipped: Some("it throws dice"), ..go(example) },
        "postpone_requests" => Known { loose: vec!["resume request with contextID"], ..Known::default() },
        _ => go(example),
    }
}

/// The Go SDK's, and others written with it.
fn go(example: &str) -> Known {
    let no_requests = |known| Known { serves: false, ..known };
    match example {
        "coraza" => coraza(),
        "dispatch_call_on_tick" => {
            no_requests(timer(&["called ", "response header for the dispatched call: "]))
        }
        "foreign_call_on_tick" => no_requests(timer(&["foreign function (compress) called: "])),
        "helloworld" => timer(&["It's ", "OnTick called"]),
        "http_auth_random" => Known {
            promises_bodies: true,
            ..asked(vec![
                Ask::get("/echo").service(200, "1").expect_status(200).expect(Logged("access granted")),
                Ask::get("/echo").service(200, "0").expect_status(403).expect_body("access forbidden"),
            ])
        },
        "http_body" => asked(go_http_body()),
        "http_body_chunk" => Known {
            asks: vec![
                Ask::post("/echo", "there is a pattern here")
                    .expect_status(403)
                    .expect_body("pattern found in chunk: 1"),
            ],
            loose: vec!["OnHttpRequestBody called", "read chunk size"],
            ..Known::default()
        },
        "http_headers" => Known {
            asks: vec![
                Ask::get("/echo")
                    .expect_header("x-configured", "yes")
                    .expect_header("x-proxy-wasm-go-sdk-example", "http_headers"),
            ],
            ..config(r#"{"header": "x-configured", "value": "yes"}"#)
        },
        "http_routing" => config("0"),
        "json_validation" => json_validation(),
        "metrics" => {
            asked(["a", "b", "a"].map(|value| Ask::get("/echo").header("my-custom-header", value)).to_vec())
        }
        "multiple_dispatches" => asked(vec![Ask::get("/echo").expect_header("total-dispatched", "10")]),
        "network" => Known {
            skipped: Some("it is a filter of connections, and these tests are of requests"),
            ..Known::default()
        },
        "shared_data" => asked(vec![Ask::get("/echo").expect(Logged("shared value: "))]),
        "shared_queue_receiver" => no_requests(config("http_request_headers")),
        // It queues once for each piece of a body.
        "shared_queue_sender" => Known { loose: vec!["error queueing: "], ..config("http") },
        "vm_plugin_configuration" => Known { serves: false, ..config(r#"{"name": "plugin configuration"}"#) },
        _ => Known::default(),
    }
}

fn go_http_body() -> Vec<Ask> {
    let with = |operation: &str| Ask::post("/echo", "[original body]").header("buffer-operation", operation);
    let response = |operation: &str| with(operation).header("buffer-replace-at", "response");
    vec![
        with("append").expect(UpstreamBody("[original body][this is appended body]")),
        with("prepend").expect(UpstreamBody("[this is prepended body][original body]")),
        with("replace").expect(UpstreamBody("[this is replaced body]")),
        response("append").expect_body("[original body][this is appended body]"),
        response("prepend").expect_body("[this is prepended body][original body]"),
        response("replace").expect_body("[this is replaced body]"),
        Ask::get("/echo").expect_status(400).expect_body("content must be provided").expect(NotUpstream),
    ]
}

fn json_validation() -> Known {
    let post = |body: &'static str| Ask::post("/echo", body).header("content-type", "application/json");
    Known {
        asks: vec![
            post(r#"{"id": "x", "token": "y"}"#).expect_status(200),
            post(r#"{"id": "x"}"#).expect_status(403).expect_body("invalid payload"),
            post("not JSON").expect_status(403).expect(NotUpstream),
            post("").pieces(&[r#"{"id": "#, r#""x", "tok"#, r#"en": "y"}"#]).expect_status(200),
            Ask::get("/echo").expect_status(403).expect_body("content-type must be provided"),
        ],
        ..config(r#"{"requiredKeys": ["id", "token"]}"#)
    }
}

/// The web application firewall, with its core rule set.
fn coraza() -> Known {
    let form = |body: &'static str| {
        Ask::post("/echo", body).header("content-type", "application/x-www-form-urlencoded")
    };
    let browser = |ask: Ask| ask.header("user-agent", "Mozilla/5.0").header("accept", "*/*");
    // Requests without a body are judged when they are answered.
    let blocked = |ask: Ask| browser(ask).expect_status(403);
    Known {
        asks: vec![
            browser(Ask::get("/echo?q=a+clean+request")).expect_status(200),
            browser(form("name=value&other=another")).expect_status(200),
            blocked(Ask::get("/echo?id=1%27%20OR%20%271%27%3D%271%27%20--%20")),
            blocked(Ask::get("/echo?q=%3Cscript%3Ealert(1)%3C/script%3E")),
            blocked(Ask::get("/echo?file=../../../../etc/passwd")),
            blocked(form("id=1' UNION SELECT username, password FROM users--")),
        ],
        // Its rules look at each byte of a body many times: with 300 KB they take 10 s in Envoy, and longer here, where one call
        // may not take as long.
        large: 16 << 10,
        deadline: Some(Duration::from_secs(10)),
        ..config(
            r#"{"directives_map": {"all": ["Include @demo-conf", "Include @crs-setup-conf",
                "SecDefaultAction \"phase:3,log,auditlog,pass\"", "SecDefaultAction \"phase:4,log,auditlog,pass\"",
                "SecDefaultAction \"phase:5,log,auditlog,pass\"", "SecDebugLogLevel 3",
                "Include @owasp_crs/*.conf"]}, "default_directives": "all",
                "metric_labels": {"owner": "coraza"}}"#,
        )
    }
}

/// The C++ SDK's.
fn cpp(example: &str) -> Known {
    match example {
        "http_wasm_example" => Known {
            asks: vec![
                Ask::get("/secret")
                    .expect_header("x-wasm-custom", "FOO")
                    .expect_header("content-type", "text/plain; charset=utf-8"),
            ],
            loose: vec!["onTick()", "onRequestBody()"],
            cuts: true,
            ..Known::default()
        },
        _ => Known::default(),
    }
}

/// The AssemblyScript SDK's.
fn assembly_script(example: &str) -> Known {
    match example {
        // What the SDK's packages show. The older one crashes without a configuration, in Envoy, too.
        "hello" | "hello-2" => Known {
            root: "add_header",
            asks: vec![Ask::get("/echo").expect_header("hello", "from the configuration")],
            ..config("from the configuration")
        },
        "addheader" => Known {
            root: "add_header",
            asks: vec![Ask::get("/echo").expect_header("hello", "world!")],
            ..Known::default()
        },
        "auth" => Known {
            root: "auth",
            asks: vec![
                Ask::get("/echo").service(200, "yes").expect_status(200).expect_header("hello", "wasm!"),
                Ask::get("/echo").service(403, "no").expect_status(401).expect(NotUpstream),
            ],
            promises_bodies: true,
            ..config("httpbin")
        },
        "remove-headers" => Known { root: "remove_headers", ..config("x-up,content-type") },
        "singleton" => Known {
            root: "auth",
            asks: vec![Ask::get("/echo").header("x-auth", "wrong").expect_status(401)],
            ..Known::default()
        },
        _ => Known::default(),
    }
}
