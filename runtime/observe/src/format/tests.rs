//! What formats write, operator by operator, and which are refused.

use super::*;
use crate::json::JsonFormat;
use crate::testing::Exchange;
use cairn_mesh::LogValue;
use cairn_telemetry::HttpRecord;

fn bytes(format: &str, change: impl FnOnce(&mut HttpRecord<'_>)) -> Vec<u8> {
    let format = Format::parse(format).unwrap_or_else(|error| panic!("{format}: {error}"));
    let mut out = Vec::new();
    Exchange::new().with(change, |facts| format.write(&mut out, facts, false));
    out
}

fn written(format: &str, change: impl FnOnce(&mut HttpRecord<'_>)) -> String {
    String::from_utf8(bytes(format, change)).unwrap()
}

#[test]
fn istios_default_format_writes_the_default_line() {
    type Change = fn(&mut HttpRecord<'_>);
    let changes: [(&str, Change); 6] = [
        ("an answer", |_| ()),
        ("no connection", |record| {
            (record.flags, record.upstream_local) = ("URX,UF", None);
            record.upstream_failure = "delayed connect error: Connection refused";
        }),
        ("a failure", |record| {
            (record.upstream, record.upstream_duration, record.cluster) = (None, None, "");
            (record.status, record.flags) = (503, "UH");
            (record.user_agent, record.details) = (Some(&b"a\"b\n\xff\t"[..]), "a b");
        }),
        ("a changed path", |record| record.original_path = "/before"),
        ("empty headers", |record| {
            (record.user_agent, record.request_id, record.forwarded_for) =
                (Some(&b""[..]), Some(&b""[..]), Some(&b""[..]));
        }),
        ("a connection", |record| {
            *record = HttpRecord {
                http: false,
                ..HttpRecord::new(record.started, record.downstream, record.local)
            };
        }),
    ];
    for (name, change) in changes {
        let exchange = Exchange::new();
        let mut record = exchange.record();
        change(&mut record);
        let mut expected = Vec::new();
        cairn_telemetry::append_default_line(&mut expected, &record);
        expected.push(b'\n');
        let written = bytes(ISTIO, change);
        assert_eq!(written.escape_ascii().to_string(), expected.escape_ascii().to_string(), "{name}");
    }
}

#[test]
fn every_operator_has_its_value() {
    for (format, expected) in [
        ("plain 100%%", "plain 100%"),
        ("%START_TIME%", "2025-12-31T23:59:59.007Z"),
        ("%START_TIME(%Y/%m/%d %3f)%", "2025/12/31 007"),
        ("%REQ(X-Team)%", "blue"),
        ("%REQ(x-missing?x-team)%", "blue"),
        ("%REQ(x-missing)%", "-"),
        ("%REQ(x-long):3%", "abc"),
        ("%REQ(x-missing?x-long):3%", "abc"),
        ("%REQ(:SCHEME)%", "http"),
        ("%REQ_WITHOUT_QUERY(:PATH)%", "/a/b"),
        ("%RESP(X-Out)%", "1"),
        ("%RESP(:status)%", "200"),
        ("%TRAILER(X-End)%", "2"),
        ("%PROTOCOL%", "HTTP/1.1"),
        ("%RESPONSE_CODE%", "200"),
        ("%RESPONSE_FLAGS%", "-"),
        ("%RESPONSE_CODE_DETAILS%", "via_upstream"),
        ("%CONNECTION_TERMINATION_DETAILS%", "-"),
        ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", "-"),
        ("%BYTES_RECEIVED% %BYTES_SENT%", "3 5"),
        ("%DURATION% %RESPONSE_DURATION%", "12 10"),
        ("%UPSTREAM_HOST%", "10.0.0.2:8080"),
        ("%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%", "10.0.0.2 8080"),
        ("%UPSTREAM_CLUSTER% %UPSTREAM_CLUSTER_RAW%", "inbound-vip|80|http|cart inbound-vip|80|http|cart"),
        ("%UPSTREAM_LOCAL_ADDRESS% %UPSTREAM_LOCAL_PORT%", "10.0.0.9:50000 50000"),
        ("%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%", "10.0.0.9"),
        ("%RESPONSE_FLAGS_LONG%", "-"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "1"),
        ("%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_PORT%", "10.96.0.1:80 80"),
        ("%DOWNSTREAM_REMOTE_ADDRESS%", "10.0.0.1:4000"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "10.0.0.1"),
        ("%DOWNSTREAM_PEER_URI_SAN%", "spiffe://cluster.local/ns/shop/sa/web"),
        ("%DOWNSTREAM_LOCAL_URI_SAN%", "spiffe://cluster.local/ns/shop/sa/wp"),
        ("%REQUESTED_SERVER_NAME%", "-"),
        ("%ROUTE_NAME%", "shop/r/0"),
        ("%GRPC_STATUS%", "-"),
        ("%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload:iss)%", "me"),
        ("%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload:groups)%", "[\"a\",\"b\"]"),
        ("%METADATA(DYNAMIC:envoy.filters.http.jwt_authn:deep:n)%", "7"),
        ("%METADATA(ROUTE:com.example:x)%", "-"),
        ("%DYNAMIC_METADATA(com.example:x)%", "-"),
        ("%DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_allow_shadow_engine_result)%", "denied"),
        (
            "%DYNAMIC_METADATA(envoy.filters.http.rbac)%",
            "{\"istio_dry_run_allow_shadow_engine_result\":\"denied\"}",
        ),
        ("%CEL(request.path + '!')%", "/a/b?c=d!"),
        ("%CEL(request.headers['missing'])%", "-"),
        ("%FILTER_STATE(io.istio.peer_principal:PLAIN)%", "spiffe://cluster.local/ns/shop/sa/web"),
        ("%FILTER_STATE(upstream_peer:FIELD:workload)%", "cart"),
        ("%FILTER_STATE(something.else)%", "-"),
        ("%TRACE_ID%", "00000000000000000000000000000abc"),
        ("%HOSTNAME% %CONNECTION_ID%", "host 42"),
        ("%ENVIRONMENT(CAIRN_IS_NOT_SET)%", "-"),
    ] {
        assert_eq!(written(format, |_| ()), expected, "{format}");
    }
    assert!(written("%FILTER_STATE(downstream_peer)%", |_| ()).contains("workload"));
}

#[test]
fn an_exchange_that_failed_says_how() {
    type Change = fn(&mut HttpRecord<'_>);
    let refused: Change = |record| {
        (record.flags, record.upstream_local) = ("URX,UF", None);
        record.upstream_failure = "delayed connect error: Connection refused";
    };
    let denied: Change = |record| record.flags = "UAEX";
    for (format, change, expected) in [
        ("%RESPONSE_FLAGS%", refused, "URX,UF"),
        ("%RESPONSE_FLAGS_LONG%", refused, "UpstreamRetryLimitExceeded,UpstreamConnectionFailure"),
        ("%RESPONSE_FLAGS_LONG%", denied, "UnauthorizedExternalService"),
        ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", refused, "delayed_connect_error:_Connection_refused"),
        ("%CEL(upstream.transport_failure_reason)%", refused, "delayed connect error: Connection refused"),
        ("%UPSTREAM_LOCAL_ADDRESS%", refused, "-"),
        ("%UPSTREAM_LOCAL_PORT%", refused, "-"),
    ] {
        assert_eq!(written(format, change), expected, "{format}");
    }
}

#[test]
fn a_grpc_status_is_a_name_or_a_number() {
    for (format, status, expected) in [
        ("%GRPC_STATUS%", Some(0), "OK"),
        ("%GRPC_STATUS%", Some(7), "PermissionDenied"),
        ("%GRPC_STATUS(SNAKE_STRING)%", Some(7), "PERMISSION_DENIED"),
        ("%GRPC_STATUS(CAMEL_STRING)%", Some(1), "Canceled"),
        ("%GRPC_STATUS(NUMBER)%", Some(14), "14"),
        ("%GRPC_STATUS_NUMBER%", Some(14), "14"),
        ("%GRPC_STATUS%", Some(255), "255"),
        ("%GRPC_STATUS_NUMBER%", None, "-"),
    ] {
        assert_eq!(written(format, |record| record.grpc_status = status), expected, "{format} {status:?}");
    }
}

#[test]
fn headers_are_written_as_envoy_writes_them() {
    let mut headers = http::HeaderMap::new();
    for (name, value) in [
        ("x-quote", &b"a\"b\\c"[..]),
        ("x-latin", b"a\xffb"),
        ("x-utf8", "ü".as_bytes()),
        ("x-tab", b"a\tb"),
        ("x-empty", b""),
        ("x-two", b"1"),
        ("x-two", b"2"),
        ("via", b"1"),
        ("via", b"2"),
    ] {
        headers.append(name, http::HeaderValue::from_bytes(value).unwrap());
    }
    for (format, text, json) in [
        ("%REQ(x-quote)%", &b"a\"b\\c"[..], "\"a\\\"b\\\\c\""),
        ("%REQ(x-latin)%", b"a\xffb", "\"a\\u00ffb\""),
        ("%REQ(x-latin):2%", b"a\xff", "\"a\\u00ff\""),
        ("%REQ(x-utf8)%", "ü".as_bytes(), "\"ü\""),
        ("%REQ(x-utf8):1%", b"\xc3", "\"\\u00c3\""),
        ("%REQ(x-tab)%", b"a\tb", "\"a\\tb\""),
        ("%REQ(x-empty)%", b"", "\"\""),
        ("%REQ(x-missing?x-empty)%", b"", "\"\""),
        ("%REQ(x-missing)%", b"-", "null"),
        ("<%REQ(x-latin)%%REQ(x-missing)%>", b"<a\xffb->", "\"<a\\u00ffb->\""),
        ("%REQ(x-two)%", b"1", "\"1\""),
        ("%REQ(via)%", b"1,2", "\"1,2\""),
        ("%CEL(request.headers['x-two'])%", b"1,2", "\"1,2\""),
        ("%CEL(response.code)%", b"200", "\"200\""),
    ] {
        let parsed = Format::parse(format).unwrap();
        let (mut out, mut as_json) = (Vec::new(), Vec::new());
        let exchange = Exchange::new();
        let mut record = exchange.record();
        record.request_headers = Some(&headers);
        exchange.see(&record, |facts| {
            parsed.write(&mut out, facts, false);
            parsed.write_json(&mut as_json, facts, false);
        });
        assert_eq!(out.escape_ascii().to_string(), text.escape_ascii().to_string(), "{format}");
        assert_eq!(String::from_utf8(as_json).unwrap(), json, "{format}");
    }
}

#[test]
fn what_filters_say_cannot_end_a_line() {
    let said = serde_json::json!({"n": {"k": "a\nb\r\u{0}"}});
    let exchange = Exchange::new();
    let mut record = exchange.record();
    record.metadata = said.as_object();
    let mut out = Vec::new();
    let format = Format::parse("%DYNAMIC_METADATA(n:k)%").unwrap();
    exchange.see(&record, |facts| format.write(&mut out, facts, false));
    assert_eq!(out, b"a\\x0ab\\x0d\\x00");
}

#[test]
fn what_is_not_there_can_be_left_out() {
    let format = Format::parse("[%REQ(x-missing)%]").unwrap();
    let mut out = Vec::new();
    Exchange::new().with(|_| (), |facts| format.write(&mut out, facts, true));
    assert_eq!(out, b"[]");
}

#[test]
fn wrong_formats_are_refused_with_their_reason() {
    for (format, expected) in [
        ("%NOPE%", "there is no operator `%NOPE%`"),
        ("a % b", "`%` at byte 2 begins no operator"),
        ("%REQ%", "needs an argument"),
        ("%REQ()%", "needs an argument"),
        ("%REQ(a b)%", "cannot be the name of a header"),
        ("%REQ(a):x%", "the length must be a whole number"),
        ("%REQ(a)b%", "something follows the bracket"),
        ("%REQ(a%", "begins no operator"),
        ("%PROTOCOL(x)%", "takes no argument"),
        ("%START_TIME(%Q)%", "there is no specifier"),
        ("%CEL(request.nope)%", "there is no attribute"),
        ("%FILTER_STATE(upstream_peer:FIELD:shoe)%", "a peer has no field `shoe`"),
        ("%FILTER_STATE(a:B)%", "PLAIN, TYPED or FIELD"),
        ("%METADATA(x)%", "begins with one of"),
        ("%GRPC_STATUS(X)%", "CAMEL_STRING"),
    ] {
        let said = Format::parse(format).map(drop).unwrap_err().to_string();
        assert!(said.contains(expected), "{format}: {said}");
    }
    assert!(Format::parse(&"x".repeat(BYTES_MAX + 1)).is_err());
}

fn json(format: &JsonFormat) -> String {
    let mut out = Vec::new();
    Exchange::new().with(|_| (), |facts| format.write(&mut out, facts));
    String::from_utf8(out).unwrap()
}

#[test]
fn the_default_json_has_istios_keys() {
    assert_eq!(
        json(&JsonFormat::istio(false).unwrap()),
        "{\"authority\":\"cart:80\",\"bytes_received\":3,\"bytes_sent\":5,\"connection_termination_details\":null,\
         \"downstream_local_address\":\"10.96.0.1:80\",\"downstream_remote_address\":\"10.0.0.1:4000\",\"duration\":12,\
         \"method\":\"GET\",\"path\":\"/a/b?c=d\",\"protocol\":\"HTTP/1.1\",\"request_id\":\"0a1b\",\
         \"requested_server_name\":null,\"response_code\":200,\"response_code_details\":\"via_upstream\",\
         \"response_flags\":\"-\",\"route_name\":\"shop/r/0\",\"start_time\":\"2025-12-31T23:59:59.007Z\",\
         \"upstream_cluster\":\"inbound-vip|80|http|cart\",\"upstream_host\":\"10.0.0.2:8080\",\
         \"upstream_local_address\":\"10.0.0.9:50000\",\"upstream_service_time\":\"11\",\"upstream_transport_failure_reason\":null,\
         \"user_agent\":\"curl/8\",\"x_forwarded_for\":null}"
    );
    let omitted = json(&JsonFormat::istio(true).unwrap());
    assert!(!omitted.contains("null") && omitted.contains("\"duration\":12"), "{omitted}");
}

#[test]
fn json_of_ones_own_may_be_nested() {
    let text = |text: &str| LogValue::Text(text.into());
    let entries = [
        ("z".into(), text("%REQ(x-missing)%/%PROTOCOL%")),
        (
            "a".into(),
            LogValue::Map(vec![("code".into(), text("%RESPONSE_CODE%")), ("x".into(), text("%REQ(x)%"))]),
        ),
        ("list".into(), LogValue::List(vec![text("%REQ(x-missing)%"), LogValue::Literal("true".into())])),
    ];
    let format = |omit_empty| json(&JsonFormat::new(&entries, omit_empty).unwrap());
    assert_eq!(format(false), "{\"a\":{\"code\":200,\"x\":null},\"list\":[null,true],\"z\":\"-/HTTP/1.1\"}");
    assert_eq!(format(true), "{\"a\":{\"code\":200},\"list\":[true],\"z\":\"/HTTP/1.1\"}");
}

#[test]
fn json_keeps_the_parts_of_what_has_parts() {
    for (format, expected) in [
        ("%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload:groups)%", "[\"a\",\"b\"]"),
        ("%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:payload:iss)%", "\"me\""),
        ("%METADATA(DYNAMIC:envoy.filters.http.jwt_authn:deep)%", "{\"n\":7}"),
        ("%DYNAMIC_METADATA(com.example:x)%", "null"),
        ("%FILTER_STATE(upstream_peer:FIELD:workload)%", "\"cart\""),
    ] {
        let mut out = Vec::new();
        let parsed = Format::parse(format).unwrap();
        Exchange::new().with(|_| (), |facts| parsed.write_json(&mut out, facts, false));
        assert_eq!(String::from_utf8(out).unwrap(), expected, "{format}");
    }
    for (form, first) in [("", '{'), (":TYPED", '{'), (":PLAIN", '"')] {
        let parsed = Format::parse(&format!("%FILTER_STATE(downstream_peer{form})%")).unwrap();
        let mut out = Vec::new();
        Exchange::new().with(|_| (), |facts| parsed.write_json(&mut out, facts, false));
        assert!(out.starts_with(first.to_string().as_bytes()), "{form}");
    }
}

#[test]
fn a_map_of_which_nothing_is_left_is_left_out() {
    let missing = || LogValue::Text("%REQ(x-missing)%".into());
    let entries = [
        ("list".into(), LogValue::List(vec![missing()])),
        ("map".into(), LogValue::Map(vec![("k".into(), missing())])),
    ];
    let format = |omit_empty| json(&JsonFormat::new(&entries, omit_empty).unwrap());
    assert_eq!(format(true), "{\"list\":[]}");
    assert_eq!(format(false), "{\"list\":[null],\"map\":{\"k\":null}}");
}
