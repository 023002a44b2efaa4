//! Tests of the SDK as plugins and their tests see it; each feature's main use is an example in its documentation.

use super::*;
use crate::{Body, Call, Chunk, Flow, Properties, Reply, Request, Response, Trailers};
use crate::{join, shared, sleep, tick_every, timeout};
use std::time::Duration;

/// A plugin whose handlers are the words of its configuration; what they see is counted in `seen`.
struct Script {
    words: Vec<String>,
    seen: RefCell<Vec<String>>,
}

impl Script {
    fn has(&self, word: &str) -> bool {
        self.words.iter().any(|present| present == word)
    }

    fn see(&self, what: impl Into<String>) {
        self.seen.borrow_mut().push(what.into());
    }
}

impl Plugin for Script {
    type Config = Vec<String>;
    type Exchange = ();

    fn configure(words: Vec<String>) -> Result<Self, String> {
        if words.iter().any(|word| word == "tick") {
            tick_every(Duration::from_secs(1));
        }
        Ok(Self { words, seen: RefCell::default() })
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        self.see(format!("request {}", request.path()));
        if self.has("read") {
            return Flow::ReadBody;
        }
        if self.has("edit") {
            return Flow::EditBody;
        }
        if self.has("wait-then-read") {
            return Flow::wait(async {
                sleep(Duration::from_millis(20)).await;
                Flow::ReadBody
            });
        }
        if self.has("two") {
            return Flow::wait(two(request));
        }
        if self.has("impatient") {
            return Flow::wait(async {
                let call = Call::get("slow", "/").send();
                match timeout(Duration::from_millis(50), call).await {
                    Ok(_) => Flow::Continue,
                    Err(error) => Reply::text(504, error.to_string()).into(),
                }
            });
        }
        Flow::Continue
    }

    fn on_request_chunk(&self, _: Request, chunk: &mut Chunk, (): &mut ()) -> Result<(), Reply> {
        self.see(format!("chunk {} {}", String::from_utf8_lossy(&chunk.bytes()), chunk.is_last()));
        if self.has("double") {
            chunk.replace([chunk.bytes(), chunk.bytes()].concat());
        }
        Ok(())
    }

    fn on_request_body(&self, _: Request, body: Body, (): &mut ()) -> Flow {
        self.see(format!("body {}", String::from_utf8_lossy(&body.bytes())));
        if self.has("edit") {
            body.replace("other");
        }
        if self.has("refuse") {
            return Reply::json(422, "{}").with_details("no good").into();
        }
        Flow::Continue
    }

    fn on_request_trailers(&self, _: Request, trailers: Trailers, (): &mut ()) -> Flow {
        self.see(format!("trailers {}", trailers.all().len()));
        trailers.add("x-seen", "yes");
        Flow::Continue
    }

    fn on_response(&self, response: Response, (): &mut ()) -> Flow {
        self.see(format!("response {}", response.status()));
        if self.has("read-response") { Flow::EditBody } else { Flow::Continue }
    }

    fn on_response_body(&self, _: Response, body: Body, (): &mut ()) -> Flow {
        body.replace([b"<", body.bytes().as_slice(), b">"].concat());
        Flow::Continue
    }

    fn on_clone(&self) {
        self.see("clone");
    }

    fn on_tick(&self) {
        self.see("tick");
    }

    fn on_log(&self, properties: Properties, (): &mut ()) {
        self.see(format!("log {}", properties.response_code().unwrap_or(-1)));
    }
}

async fn two(request: Request) -> Flow {
    let calls = join(Call::get("a", "/").send(), Call::get("b", "/").send());
    let (a, b) = calls.await;
    request.set_header("x-a", a.map(|answer| answer.text()).unwrap_or_default());
    request.set_header("x-b", b.map(|answer| answer.text()).unwrap_or_default());
    Flow::Continue
}

fn proxy(words: &str) -> Proxy<Script> {
    let words: Vec<&str> = words.split_whitespace().collect();
    Proxy::new(&serde_json::to_string(&words).unwrap()).unwrap()
}

fn seen(proxy: &Proxy<Script>) -> Vec<String> {
    proxy.plugin().seen.take()
}

#[test]
fn handlers_are_called_in_order() {
    let request = || TestRequest::post("/p", "abcd").cut(3);
    let cases = [
        ("", request(), "request /p, chunk abc false, chunk d true, response 200, log -1"),
        ("read", request(), "request /p, body abcd, response 200, log -1"),
        ("read", TestRequest::get("/p"), "request /p, body , response 200, log -1"),
        ("read", request().trailer("t", "1"), "request /p, body abcd, trailers 1, response 200, log -1"),
        (
            "",
            request().trailer("t", "1"),
            "request /p, chunk abc false, chunk d false, trailers 1, response 200, log -1",
        ),
        ("wait-then-read", request(), "request /p, body abcd, response 200, log -1"),
        ("wait-then-read", TestRequest::get("/p"), "request /p, body , response 200, log -1"),
        ("read refuse", request(), "request /p, body abcd, response 422, log -1"),
    ];
    for (words, request, expected) in cases {
        let mut proxy = proxy(words);
        proxy.send(request);
        assert_eq!(seen(&proxy).join(", "), expected, "{words}");
    }
}

#[test]
fn bodies_are_replaced_whole_and_in_pieces() {
    let mut proxy = proxy("double");
    assert_eq!(proxy.send(TestRequest::post("/", "abc").cut(1)).upstream.unwrap().text(), "aabbcc");
    let mut proxy = self::proxy("edit read-response");
    proxy.upstream(|_| TestResponse::new(200).header("content-length", "5").body("hello").cut(2));
    let outcome = proxy.send(TestRequest::post("/", "abc").header("content-length", "3").trailer("t", "1"));
    assert_eq!((outcome.text(), outcome.header("content-length")), ("<hello>".to_owned(), None));
    let upstream = outcome.upstream.unwrap();
    assert_eq!((upstream.text(), upstream.header("content-length")), ("other".to_owned(), None));
    assert_eq!(upstream.trailers[1], ("x-seen".to_owned(), b"yes".to_vec()));
}

#[test]
fn a_clone_has_no_timer_of_the_plugins_and_its_futures_sleep() {
    let mut proxy = proxy("tick wait-then-read");
    proxy.advance(Duration::from_secs(2));
    assert_eq!(seen(&proxy), ["tick", "tick"]);
    proxy.become_clone();
    proxy.advance(Duration::from_secs(2));
    assert_eq!(seen(&proxy), ["clone"]);
    let outcome = proxy.send(TestRequest::get("/p"));
    assert!(outcome.took >= Duration::from_millis(20), "{:?}", outcome.took);
    assert_eq!(seen(&proxy), ["request /p", "body ", "response 200", "log -1"]);
}

#[test]
fn a_reply_ends_the_exchange_before_the_upstream() {
    let mut proxy = proxy("read refuse");
    let outcome = proxy.send_split(TestRequest::post("/", "abc"));
    assert_eq!((outcome.status, outcome.upstream, outcome.details.as_str()), (422, None, "no_good"));
    assert_eq!(outcome.headers[1], ("content-type".to_owned(), b"application/json".to_vec()));
}

#[test]
fn calls_run_side_by_side_and_may_fail() {
    let mut proxy = proxy("two");
    proxy.cluster("a", |_| TestResponse::new(200).body("from a").after(Duration::from_millis(300)));
    proxy.cluster("b", |_| TestResponse::new(200).body("from b").after(Duration::from_millis(200)));
    let outcome = proxy.send(TestRequest::get("/"));
    assert!(outcome.took < Duration::from_millis(310), "{:?}", outcome.took);
    let upstream = outcome.upstream.unwrap();
    assert_eq!(
        (upstream.header("x-a"), upstream.header("x-b")),
        (Some("from a".into()), Some("from b".into()))
    );
    let mut proxy = self::proxy("two");
    proxy.cluster("b", |_| TestResponse::failure());
    assert_eq!(proxy.send(TestRequest::get("/")).upstream.unwrap().header("x-a").as_deref(), Some(""));
}

#[test]
fn a_wait_that_nobody_needs_any_more_is_dropped() {
    let mut proxy = proxy("impatient");
    proxy.cluster("slow", |_| TestResponse::new(200).after(Duration::from_secs(3)));
    let outcome = proxy.send(TestRequest::get("/"));
    assert_eq!(outcome.text(), "it took too long");
    assert!(outcome.took < Duration::from_millis(70), "{:?}", outcome.took);
    // The late answer finds nobody; nor does one whose client has gone.
    let gone = proxy.start(TestRequest::get("/gone"));
    proxy.abort(gone);
    proxy.advance(Duration::from_secs(10));
    assert_eq!(proxy.outcome(gone), None);
    assert!(proxy.next_event().is_none(), "a timer still runs");
    assert!(proxy.logs().is_empty(), "{:?}", proxy.logs());
}

#[test]
fn exchanges_wait_side_by_side() {
    let mut proxy = proxy("two");
    proxy.cluster("a", |_| TestResponse::new(200).after(Duration::from_millis(100)));
    proxy.cluster("b", |_| TestResponse::new(200));
    let ids: Vec<_> = (0..5).map(|_| proxy.start(TestRequest::get("/"))).collect();
    proxy.advance(Duration::from_millis(50));
    assert!(ids.iter().all(|id| proxy.outcome(*id).is_none()));
    proxy.advance(Duration::from_millis(60));
    assert!(ids.iter().all(|id| proxy.outcome(*id).is_some()));
}

#[test]
fn no_status_of_a_host_function_ends_a_plugin() {
    let functions = [
        "proxy_set_tick_period_milliseconds",
        "proxy_continue_stream",
        "proxy_get_buffer_bytes",
        "proxy_set_buffer_bytes",
        "proxy_get_header_map_pairs",
        "proxy_get_header_map_value",
        "proxy_add_header_map_value",
        "proxy_replace_header_map_value",
        "proxy_remove_header_map_value",
        "proxy_get_property",
        "proxy_set_property",
        "proxy_send_local_response",
        "proxy_http_call",
    ];
    for function in functions {
        for status in [1, 2, 3, 6, 7, 10, 12, 99] {
            for words in ["edit read-response refuse", "two", "double", "wait-then-read"] {
                let mut proxy = proxy(words);
                proxy.cluster("a", |_| TestResponse::new(200));
                proxy.refuse(function, status);
                proxy.start(TestRequest::post("/", "abc").trailer("t", "1"));
                proxy.advance(Duration::from_secs(1));
            }
        }
    }
}

#[test]
fn shared_data_gives_up_when_others_are_always_faster() {
    let proxy = proxy("");
    let tries = Cell::new(0);
    let updated = shared::update("key", |_| {
        tries.set(tries.get() + 1);
        shared::set("key", "theirs").unwrap();
        (b"ours".to_vec(), ())
    });
    assert_eq!((updated, tries.get()), (Err(crate::HostError::CasMismatch), 64));
    assert_eq!(proxy.shared("key"), Some(b"theirs".to_vec()));
    assert_eq!(shared::update("new", |old| (b"1".to_vec(), old.is_none())), Ok(true));
}

#[test]
fn headers_behave_as_in_a_proxy() {
    struct Headers;
    impl Plugin for Headers {
        type Config = ();
        type Exchange = ();
        fn configure((): ()) -> Result<Self, String> {
            Ok(Self)
        }
        fn on_request(&self, request: Request, (): &mut ()) -> Flow {
            assert_eq!(request.header("x-A"), Some(b"1".to_vec()));
            assert_eq!(request.header_values("X-a"), [b"1".to_vec(), b"\xff".to_vec()]);
            request.set_header("X-a", "2");
            request.set_header("Host", "other");
            assert_eq!(request.authority(), "other");
            request.add_header("x-b", b"\xfe");
            request.remove_header("X-missing");
            Flow::Continue
        }
    }
    let mut proxy = Proxy::<Headers>::new("").unwrap();
    let outcome = proxy.send(TestRequest::get("/").header("X-A", "1").header("x-a", b"\xff"));
    let upstream = outcome.upstream.unwrap();
    assert_eq!(upstream.header_values("x-a"), ["2"]);
    assert_eq!(upstream.headers.last().unwrap().1, b"\xfe");
}

#[test]
fn properties_are_typed() {
    let mut proxy = proxy("");
    proxy.property(&["source", "address"], "10.0.0.1:5");
    proxy.property(&["filter_state", "downstream_peer", "workload"], "web");
    proxy.property(&["filter_state", "downstream_peer", "namespace"], "a");
    proxy.property(&["request", "time"], 1_000_000_000i64.to_le_bytes());
    proxy.property(&["connection", "mtls"], [1]);
    proxy.property(&["node", "metadata", "NAMESPACE"], "mesh");
    proxy.property(&["xds", "cluster_name"], "new");
    proxy.property(&["cluster_name"], "old");
    let known = Properties(());
    assert_eq!(known.source_address(), "10.0.0.1:5".parse().ok());
    assert_eq!(known.source_workload().map(|workload| workload.workload).as_deref(), Some("web"));
    assert_eq!(known.upstream_workload(), None);
    assert_eq!(known.request_time(), Some(std::time::UNIX_EPOCH + Duration::from_secs(1)));
    assert_eq!(
        (known.is_mutual_tls(), known.node(&["metadata", "NAMESPACE"])),
        (Some(true), Some("mesh".to_owned()))
    );
    assert_eq!(known.cluster().as_deref(), Some("new"));
    assert_eq!(known.number(&["source", "address"]), None);
}
