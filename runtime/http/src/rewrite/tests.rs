//! The Gateway API's tables for rewrites and redirects.

use super::*;
use cairn_mesh::{HeaderChange, Rewrite};
use http::{Method, Version};

fn head(authority: &str, path: &str) -> RequestHead {
    RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_str(authority).unwrap(),
        path: path.parse().unwrap(),
        headers: HeaderMap::new(),
        version: Version::HTTP_11,
    }
}

#[test]
fn a_prefix_is_replaced_by_whole_segments() {
    for (prefix, replacement, path, expected) in [
        ("/foo", "/xyz", "/foo/bar", "/xyz/bar"),
        ("/foo", "/xyz", "/foo/", "/xyz/"),
        ("/foo", "/xyz", "/foo", "/xyz"),
        ("/foo/", "/xyz", "/foo/bar", "/xyz/bar"),
        ("/foo/", "/xyz", "/foo", "/xyz"),
        ("/foo", "/xyz/", "/foo/bar", "/xyz/bar"),
        ("/foo", "", "/foo/bar", "/bar"),
        ("/foo", "", "/foo", "/"),
        ("/foo", "/", "/foo/bar", "/bar"),
        ("/foo/", "/", "/foo/", "/"),
        ("/foo", "/", "/foo", "/"),
        ("/", "/xyz", "/bar", "/xyz/bar"),
        ("/foo", "/xyz", "/foo/bar?q=%2F", "/xyz/bar?q=%2F"),
    ] {
        let rewrite = Rewrite { hostname: None, path: Some(PathRewrite::Prefix(replacement.into())) };
        let mut head = head("a", path);
        HostAndPath::compile(&rewrite).unwrap().apply(&mut head, Some(prefix.trim_end_matches('/')));
        assert_eq!(head.path.as_str(), expected, "{prefix} by {replacement:?} in {path}");
    }
}

#[test]
fn a_full_path_and_a_host_are_replaced_and_the_query_stays() {
    let rewrite = Rewrite { hostname: Some("b".into()), path: Some(PathRewrite::Full("/new/path".into())) };
    let mut head = head("a", "/foo?key=value");
    HostAndPath::compile(&rewrite).unwrap().apply(&mut head, None);
    assert_eq!((head.path.as_str(), head.authority.to_str().unwrap()), ("/new/path?key=value", "b"));
}

fn location(change: impl FnOnce(&mut Redirect), port: u16, authority: &str, path: &str) -> String {
    let mut redirect = Redirect { scheme: None, hostname: None, path: None, port: None, status: 302 };
    change(&mut redirect);
    let reply = redirect_reply(&redirect, &head(authority, path), Some("/foo"), port);
    assert_eq!(reply.status.as_u16(), redirect.status);
    reply.headers[http::header::LOCATION].to_str().unwrap().to_owned()
}

#[test]
fn a_redirect_has_the_port_that_the_gateway_api_says() {
    type Change = fn(&mut Redirect);
    let nothing: Change = |_| ();
    let https: Change = |redirect| redirect.scheme = Some("https".into());
    for (name, change, port, authority, path, expected) in [
        ("the request's, 80 unsaid", nothing, 80, "b", "/foo", "http://b/foo"),
        ("the request's, said when it is another", nothing, 85, "b", "/foo", "http://b:85/foo"),
        ("the host's port is replaced by the request's", nothing, 85, "b:1", "/foo", "http://b:85/foo"),
        ("a scheme brings its own", https, 8080, "b:8080", "/foo?a=b", "https://b/foo?a=b"),
        ("the rule's", |redirect| redirect.port = Some(8443), 80, "b", "/foo", "http://b:8443/foo"),
        (
            "443 of https unsaid",
            |redirect| {
                redirect.scheme = Some("https".into());
                redirect.port = Some(443);
            },
            80,
            "b",
            "/",
            "https://b/",
        ),
        (
            "443 of http said",
            |redirect| {
                redirect.scheme = Some("http".into());
                redirect.port = Some(443);
            },
            80,
            "b",
            "/",
            "http://b:443/",
        ),
        ("an IPv6 host", nothing, 80, "[::1]", "/", "http://[::1]/"),
        (
            "host and prefix",
            |redirect| {
                redirect.hostname = Some("c.example".into());
                redirect.path = Some(PathRewrite::Prefix("/new".into()));
                redirect.status = 301;
            },
            80,
            "b",
            "/foo/x?key=value",
            "http://c.example/new/x?key=value",
        ),
    ] {
        assert_eq!(location(change, port, authority, path), expected, "{name}");
    }
}

#[test]
fn header_changes_set_then_add_then_remove() {
    let change = |name: &str, value: &str| HeaderChange { name: name.into(), value: value.into() };
    let changes = HeaderChanges {
        set: vec![change("x-set", "new"), change("host", "other"), change(":path", "/evil")],
        add: vec![change("x-add", "2")],
        remove: vec!["x-gone".into()],
    };
    let mut ops = HeaderOps::default();
    ops.extend(&changes).unwrap();
    let mut head = head("a", "/p");
    for (name, value) in [("x-set", "old"), ("x-add", "1"), ("x-gone", "x")] {
        head.headers.insert(name, HeaderValue::from_static(value));
    }
    ops.apply_to_request(&mut head);
    assert_eq!(head.authority, "other");
    assert_eq!(head.path.as_str(), "/p");
    assert_eq!(head.headers["x-set"], "new");
    assert_eq!(head.headers.get_all("x-add").iter().collect::<Vec<_>>(), ["1", "2"]);
    assert!(!head.headers.contains_key("x-gone") && !head.headers.contains_key("host"));
}
