//! What lines look like.

use super::*;
use crate::tcp_record::Direction;
use cairn_mesh::{Identity, Workload};
use std::sync::Arc;
use std::time::Duration;

fn at_millis(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

fn http_line(change: impl FnOnce(&mut HttpRecord<'_>)) -> String {
    let mut record = HttpRecord {
        duration: Duration::from_micros(12_900),
        upstream_duration: Some(Duration::from_millis(11)),
        request_id: Some(b"0a1b"),
        method: "GET",
        path: "/a?b=c",
        protocol: "HTTP/1.1",
        authority: "echo:80",
        user_agent: Some(b"curl/8"),
        status: 200,
        details: "via_upstream",
        response_body_bytes: 5,
        request_bytes: 100,
        response_bytes: 90,
        upstream: Some("10.0.0.2:8080".parse().unwrap()),
        cluster: "inbound-vip|80|http|echo",
        route: "default",
        ..HttpRecord::new(
            at_millis(1_767_225_599_007),
            "10.0.0.1:4000".parse().unwrap(),
            "10.96.0.1:80".parse().unwrap(),
        )
    };
    change(&mut record);
    let mut out = Vec::new();
    http(&mut out, &record);
    String::from_utf8(out).unwrap()
}

#[test]
fn an_exchange_is_written_as_istio_writes_it() {
    assert_eq!(
        http_line(|_| ()),
        "[2025-12-31T23:59:59.007Z] \"GET /a?b=c HTTP/1.1\" 200 - via_upstream - \"-\" 0 5 12 11 \"-\" \"curl/8\" \
         \"0a1b\" \"echo:80\" \"10.0.0.2:8080\" inbound-vip|80|http|echo - 10.96.0.1:80 10.0.0.1:4000 - default"
    );
}

#[test]
fn what_is_missing_is_a_dash() {
    let line = http_line(|record| {
        record.upstream = None;
        record.upstream_duration = None;
        record.cluster = "";
        record.route = "";
        record.details = "";
    });
    assert!(line.ends_with("200 - - - \"-\" 0 5 12 - \"-\" \"curl/8\" \"0a1b\" \"echo:80\" \"-\" - - 10.96.0.1:80 10.0.0.1:4000 - -"), "{line}");
}

#[test]
fn headers_are_written_as_they_came() {
    for (name, value, expected) in [
        ("none", None, &b"-"[..]),
        ("empty", Some(&b""[..]), b""),
        ("quotes, as Envoy has them", Some(b"a\" 200 \\"), b"a\" 200 \\"),
        ("UTF-8", Some("\u{e9}".as_bytes()), "\u{e9}".as_bytes()),
        ("Latin-1", Some(b"a\xffb"), b"a\xffb"),
        ("a tab", Some(b"a\tb"), b"a\tb"),
        ("what no header can hold", Some(b"a\nb\0"), b"a\\x0ab\\x00"),
    ] {
        let mut record =
            HttpRecord::new(at_millis(0), "10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap());
        record.user_agent = value;
        let mut out = Vec::new();
        http(&mut out, &record);
        let quoted = [&b"\"-\" \""[..], expected, b"\" \"-\" \"-\""].concat();
        assert!(out.windows(quoted.len()).any(|part| part == quoted), "{name}: {}", out.escape_ascii());
    }
}

#[test]
fn a_path_that_a_route_changed_is_logged_as_it_was() {
    let line = http_line(|record| record.original_path = "/before");
    assert!(line.contains("\"GET /before HTTP/1.1\""), "{line}");
}

#[test]
fn reasons_have_no_spaces() {
    let line = http_line(|record| (record.details, record.upstream_failure) = ("a b", "c d"));
    assert!(line.contains(" 200 - a_b - \"c_d\" "), "{line}");
}

#[test]
fn a_connection_is_written_as_ztunnel_writes_it() {
    let identity = Identity::new("cluster.local", "shop", "web").unwrap();
    let workload = Arc::new(Workload::new("u", "web-1", identity.clone()));
    let mut record = TcpRecord {
        started: at_millis(1_000),
        duration: Duration::from_micros(250_001),
        direction: Direction::Outbound,
        source: "10.0.0.1:4000".parse().unwrap(),
        source_workload: Some(&workload),
        source_identity: Some(&identity),
        destination: "10.0.0.2:15008".parse().unwrap(),
        hbone_authority: "10.0.0.2:80",
        service: None,
        destination_workload: None,
        destination_identity: None,
        bytes_sent: 18_446_744_073_709_551_615,
        bytes_received: 0,
        error: "",
        plan: "direct",
        decision: "",
        policy: "",
    };
    let mut last = 0;
    record.for_each_field(|name, _| {
        let place =
            TcpRecord::FIELDS.iter().position(|field| *field == name).expect("a field that is listed");
        assert!(name == "src.addr" || place > last, "{name} is out of order");
        last = place;
    });
    let line = |record: &TcpRecord<'_>| {
        let mut out = Vec::new();
        tcp(&mut out, record);
        String::from_utf8(out).unwrap()
    };
    let rest = "\taccess\tconnection complete\tsrc.addr=10.0.0.1:4000 src.workload=\"web-1\" src.namespace=\"shop\" \
         src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" src.cluster=\"Kubernetes\" dst.addr=10.0.0.2:15008 \
         dst.hbone_addr=10.0.0.2:80 direction=\"outbound\" bytes_sent=18446744073709551615 bytes_recv=0 \
         duration=\"250ms\"";
    assert_eq!(line(&record), format!("1970-01-01T00:00:01.250001Z\tinfo{rest}"));
    record.error = "connection refused";
    assert_eq!(
        line(&record),
        format!("1970-01-01T00:00:01.250001Z\terror{rest} error=\"connection refused\"")
    );
    let mut out = Vec::new();
    record.error = "connection \"refused\"";
    tcp_json(&mut out, &record);
    let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
    let expected = serde_json::json!({
        "level": "error",
        "time": "1970-01-01T00:00:01.250001Z",
        "scope": "access",
        "message": "connection complete",
        "src.addr": "10.0.0.1:4000",
        "src.workload": "web-1",
        "src.namespace": "shop",
        "src.identity": "spiffe://cluster.local/ns/shop/sa/web",
        "src.cluster": "Kubernetes",
        "dst.addr": "10.0.0.2:15008",
        "dst.hbone_addr": "10.0.0.2:80",
        "direction": "outbound",
        "bytes_sent": 18_446_744_073_709_551_615_u64,
        "bytes_recv": 0,
        "duration": "250ms",
        "error": "connection \"refused\"",
    });
    assert_eq!(json, expected);
}
