//! Tests of the cache as clients and upstreams see it.

use super::*;
use cairn_sdk::testing::{Outcome, Proxy, TestRequest, TestResponse};
use std::cell::Cell;

type Headers = &'static [(&'static str, &'static str)];

/// A proxy whose upstream counts and answers `body COUNT` with these headers.
fn proxy(config: &str, headers: Headers) -> Proxy<ResponseCache> {
    let mut proxy = Proxy::new(config).unwrap();
    let count = Cell::new(0);
    proxy.upstream(move |_| {
        count.set(count.get() + 1);
        let response = TestResponse::new(200).body(format!("body {}", count.get())).cut(3);
        headers.iter().fold(response, |response, (name, value)| response.header(name, value))
    });
    proxy
}

fn get(proxy: &mut Proxy<ResponseCache>, headers: &[(&str, &str)]) -> Outcome {
    let request = TestRequest::get("/static/a");
    proxy.send(headers.iter().fold(request, |request, (name, value)| request.header(name, value)))
}

const KEPT: Headers = &[("cache-control", "public, max-age=60"), ("content-type", "text/x")];

#[test]
fn what_may_be_kept_is() {
    let cases: [(&str, Headers, Headers, bool); 14] = [
        ("max-age", KEPT, &[], true),
        ("nothing said", &[], &[], false),
        ("private", &[("cache-control", "private, max-age=60")], &[], false),
        ("no-store", &[("cache-control", "max-age=60"), ("cache-control", "no-store")], &[], false),
        ("s-maxage wins", &[("cache-control", "s-maxage=0, max-age=60")], &[], false),
        ("a broken age", &[("cache-control", "max-age=soon")], &[], false),
        ("a cookie", &[("cache-control", "max-age=60"), ("set-cookie", "a=b")], &[], false),
        ("varies by a key", &[("cache-control", "max-age=60"), ("vary", "Accept")], &[], true),
        ("varies by more", &[("cache-control", "max-age=60"), ("vary", "accept, origin")], &[], false),
        ("varies by all", &[("cache-control", "max-age=60"), ("vary", "*")], &[], false),
        ("credentials", KEPT, &[("authorization", "Basic x")], false),
        ("a fresh one is wanted", KEPT, &[("cache-control", "no-cache")], false),
        ("a part is wanted", KEPT, &[("range", "bytes=0-1")], false),
        ("cut short", &[("cache-control", "max-age=60"), ("content-length", "9")], &[], false),
    ];
    for (name, response, request, is_kept) in cases {
        let mut proxy = proxy(r#"{"vary": ["accept"]}"#, response);
        assert_eq!(get(&mut proxy, request).text(), "body 1", "{name}");
        let second = get(&mut proxy, request);
        assert_eq!(second.text(), if is_kept { "body 1" } else { "body 2" }, "{name}");
        assert_eq!(second.upstream.is_none(), is_kept, "{name}");
    }
}

#[test]
fn what_is_kept_has_an_age_and_an_end() {
    let mut proxy = proxy("", KEPT);
    get(&mut proxy, &[]);
    proxy.advance(Duration::from_secs(59));
    let second = get(&mut proxy, &[]);
    assert_eq!(
        (second.text(), second.header("age"), second.header("content-type")),
        ("body 1".into(), Some("59".into()), Some("text/x".into()))
    );
    proxy.advance(Duration::from_secs(2));
    assert_eq!(get(&mut proxy, &[]).text(), "body 2");
    assert_eq!(proxy.metric("result=.=hit;.;response_cache_requests_total"), Some(1));
}

#[test]
fn tags_that_match_save_the_body() {
    for headers in
        [KEPT, &[("cache-control", "max-age=60"), ("etag", "W/\"v1\""), ("content-type", "text/x")]]
    {
        let mut proxy = proxy("", headers);
        get(&mut proxy, &[]);
        let etag = get(&mut proxy, &[]).header("etag").unwrap();
        for wanted in [format!("\"x\", {etag}"), "*".to_owned(), etag.replace("W/", "")] {
            let outcome = get(&mut proxy, &[("if-none-match", &wanted)]);
            assert_eq!(
                (outcome.status, outcome.text(), outcome.header("etag")),
                (304, String::new(), Some(etag.clone()))
            );
            assert_eq!(outcome.header("content-type"), None);
        }
        assert_eq!(get(&mut proxy, &[("if-none-match", "\"other\"")]).status, 200);
    }
}

#[test]
fn keys_keep_responses_apart() {
    let mut proxy = proxy(r#"{"vary": ["accept"], "paths": ["/static"]}"#, KEPT);
    let mut send = |method: &str, path: &str, authority: &str, accept: &str| {
        proxy.send(TestRequest::new(method, path).header("x-host", authority).header("accept", accept)).text()
    };
    assert_eq!(send("GET", "/static/a", "a", "x"), "body 1");
    assert_eq!(send("GET", "/static/a", "a", "x"), "body 1");
    assert_eq!(send("GET", "/static/a", "a", "y"), "body 2");
    assert_eq!(send("GET", "/static/a?b", "a", "x"), "body 3");
    assert_eq!(send("HEAD", "/static/a", "a", "x"), "");
    assert_eq!(send("POST", "/static/a", "a", "x"), "body 4");
    assert_eq!(send("GET", "/other", "a", "x"), "body 5");
    assert_eq!(send("GET", "/other", "a", "x"), "body 6");
}

#[test]
fn memory_is_bounded() {
    let mut proxy =
        Proxy::<ResponseCache>::new(r#"{"megabytes": 1, "entryKilobytes": 100, "ttl": 60}"#).unwrap();
    proxy.upstream(|request| {
        let size = if request.header(":path").as_deref() == Some("/large") { 101 } else { 90 };
        TestResponse::new(200).body(vec![b'x'; size << 10])
    });
    proxy.send(TestRequest::get("/large"));
    assert!(proxy.send(TestRequest::get("/large")).upstream.is_some(), "too large to be kept");
    for index in 0..30 {
        proxy.send(TestRequest::get(&format!("/{index}")));
    }
    assert!(proxy.send(TestRequest::get("/29")).upstream.is_none());
    assert!(proxy.send(TestRequest::get("/0")).upstream.is_some(), "the oldest went");
    assert!(proxy.plugin().kept.borrow().len() <= 11);
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    for (json, error) in [
        (r#"{"megabytes": 0}"#, "configuration: megabytes: "),
        (r#"{"megabytes": 1, "entryKilobytes": 2000}"#, "configuration: entryKilobytes: "),
        (r#"{"vary": ["a b"]}"#, "configuration: vary[0]: "),
    ] {
        let found = Proxy::<ResponseCache>::new(json).err().unwrap_or_default();
        assert!(found.starts_with(error), "{json}: {found}");
    }
}
