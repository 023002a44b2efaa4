//! Streams: every phase of an exchange.

// Exported functions have fixed names.
#![allow(unsafe_code)]

use crate::abi::{self, add, log, remove, replace, set_buffer};
use crate::connection;
use crate::lines::{buffer, entries, map, phase, property, value};

/// What is asked for in the request's phase.
const PROPERTIES: &[&str] = &[
    "request.path",
    "request.url_path",
    "request.host",
    "request.scheme",
    "request.method",
    "request.headers",
    "request.headers.x-dup",
    "request.headers.:path",
    "request.referer",
    "request.useragent",
    "request.time",
    "request.id",
    "request.protocol",
    "request.query",
    "request.duration",
    "request.size",
    "request.total_size",
    "response.code",
    "response.code_details",
    "response.flags",
    "response.grpc_status",
    "response.headers",
    "response.trailers",
    "response.size",
    "response.total_size",
    "response.backend_latency",
    "connection.id",
    "connection_id",
    "connection.mtls",
    "connection.requested_server_name",
    "connection.tls_version",
    "connection.termination_details",
    "connection.transport_failure_reason",
    "connection.subject_peer_certificate",
    "source.address",
    "source.port",
    "destination.address",
    "destination.port",
    "upstream.address",
    "upstream.port",
    "upstream.local_address",
    "upstream.locality",
    "upstream.transport_failure_reason",
    "upstream.request_attempt_count",
    "upstream.cx_pool_ready_duration",
    "upstream.tls_version",
    "xds.node",
    "xds.node.id",
    "xds.node.metadata.LABELS.app",
    "xds.cluster_name",
    "xds.cluster_metadata",
    "xds.route_name",
    "xds.route_metadata",
    "xds.virtual_host_name",
    "xds.virtual_host_metadata",
    "xds.upstream_host_metadata",
    "xds.filter_chain_name",
    "xds.listener_metadata",
    "xds.listener_direction",
    "node.id",
    "node.cluster",
    "node.metadata.LABELS.app",
    "node.metadata.PORT",
    "node.metadata.LIST",
    "node.metadata.LIST.1",
    "node.metadata.FLAG",
    "node.metadata.NUM",
    "node.locality.region",
    "cluster_name",
    "cluster_metadata",
    "route_name",
    "route_metadata",
    "listener_direction",
    "listener_metadata",
    "upstream_host_metadata",
    "plugin_name",
    "plugin_root_id",
    "plugin_vm_id",
    "metadata",
    "metadata.filter_metadata.test|ns.k",
    "filter_state",
    "filter_state.wasm|myprop",
    "myprop",
    "upstream_filter_state",
    "nosuch",
    "request",
    "request.nosuch",
    "connection",
    "wasm|myprop",
];

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(context: u32, count: u32, end: u32) -> u32 {
    log(&format!("CB request_headers({context},{count},{end})"));
    let (_, headers, _) = entries(0);
    log(&format!("HDRS {headers:?}"));
    let path =
        headers.into_iter().find(|(name, _)| name == ":path").map(|(_, path)| path).unwrap_or_default();
    if let Some(action) = special(&path) {
        return action;
    }
    log(&format!("SETPROP st={}", abi::set_property("myprop", b"\x01\x02raw")));
    PROPERTIES.iter().for_each(|path| property(path));
    phase("reqhdr");
    log(&format!(
        "DUP get(x-dup) {} get(X-Dup) {} get(host) {} get(:authority) {}",
        value(0, "x-dup"),
        value(0, "X-Dup"),
        value(0, "host"),
        value(0, ":authority")
    ));
    log(&format!("EMPTY get(x-empty) {}", value(0, "x-empty")));
    change_headers();
    if path.contains("setmap") {
        set_maps(path.contains("junk"));
    }
    0
}

/// What the path asks for in place of the usual; the action then.
fn special(path: &str) -> Option<u32> {
    if path.contains("local") {
        let headers = map(&[
            ("X-Local", "1"),
            ("x-local", "2"),
            ("content-type", "application/json"),
            (":status", "299"),
        ]);
        let grpc = if path.contains("grpc") { 7 } else { -1 };
        log(&format!("LOCAL st={}", abi::reply(418, "my details x", "teapot", &headers, grpc)));
        return Some(u32::from(!path.contains("cont")));
    }
    if path.contains("pause") {
        return Some(1);
    }
    if path.contains("close") {
        log(&format!("CLOSE st={}", abi::close_stream(0)));
        return Some(1);
    }
    path.contains("bigaction").then_some(7)
}

fn change_headers() {
    log(&format!(
        "MUT add={} addUpper={} repDup={} rep-new={} rem-missing={} rep:path={} rep:authority={} add:path=0 rem:method=0 addSame={}",
        add(0, "x-added", "1"),
        add(0, "X-Upper", "2"),
        replace(0, "x-dup", "only"),
        replace(0, "x-new", "n"),
        remove(0, "zzz"),
        replace(0, ":path", "/rewritten?y=2"),
        replace(0, ":authority", "newhost"),
        add(0, "x-added", "again")
    ));
    log(&format!("HDRS2 {:?}", entries(0).1));
    log(&format!(
        "MUTRESP add-to-respmap={} trailers={} setpairs resp={}",
        add(2, "x", "y"),
        add(1, "t", "v"),
        abi::set_pairs(2, &map(&[("a", "b")]))
    ));
}

fn set_maps(junk: bool) {
    let headers = map(&[
        (":method", "GET"),
        (":path", "/fromsetmap"),
        (":authority", "setmap.host"),
        (":scheme", "http"),
        ("x-one", "1"),
        ("x-one", "2"),
    ]);
    log(&format!("SETMAP st={}", abi::set_pairs(0, &headers)));
    log(&format!("HDRS3 {:?}", entries(0).1));
    if junk {
        log(&format!("SETMAP junk st={}", abi::set_pairs(0, &[1, 0, 0, 0, 9, 9])));
        log(&format!("HDRS4 {:?}", entries(0).1));
    }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_body(context: u32, size: u32, end: u32) -> u32 {
    log(&format!("CB request_body({context},{size},{end}) {}", buffer(0, 0, 60)));
    log(&format!(
        "REQBODY hdr-get {} hdr-add={} path={}",
        value(0, "x-new"),
        add(0, "late", "1"),
        value(0, ":path")
    ));
    if end == 0 {
        return 1;
    }
    log(&format!(
        "BODYRANGE overflow(start=0,max=usize)={} start>len={} mid={}",
        buffer(0, 0, usize::MAX),
        buffer(0, 9999, 5),
        buffer(0, 2, 3)
    ));
    log(&format!(
        "SETBUF prepend={} append={} mid(2,1)={} replace0-3={}",
        set_buffer(0, 0, 0, "PRE"),
        set_buffer(0, usize::MAX, 0, "POST"),
        set_buffer(0, 2, 1, "X"),
        set_buffer(0, 0, 3, "pre")
    ));
    log(&format!("AFTER {}", buffer(0, 0, 200)));
    log(&format!("REPLACEALL={} {}", set_buffer(0, 0, usize::MAX, "REPLACED"), buffer(0, 0, 99)));
    log(&format!("ADDTRAILER={}", add(1, "x-trail", "t1")));
    0
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_trailers(context: u32, count: u32) -> u32 {
    log(&format!("CB request_trailers({context},{count}) {:?}", entries(1)));
    0
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(context: u32, count: u32, end: u32) -> u32 {
    log(&format!("CB response_headers({context},{count},{end}) {:?}", entries(2).1));
    for path in [
        "response.code",
        "response.code_details",
        "response.flags",
        "response.headers",
        "upstream.address",
        "upstream.port",
        "upstream.local_address",
        "cluster_name",
        "xds.cluster_name",
        "xds.upstream_host_metadata",
        "route_name",
        "xds.route_name",
        "xds.virtual_host_name",
        "request.duration",
        "upstream.request_attempt_count",
        "upstream.cx_pool_ready_duration",
        "request.path",
        "request.host",
    ] {
        property(path);
    }
    phase("resphdr");
    let changed = entries(2).1.iter().any(|(name, _)| name == "x-change-status");
    log(&format!(
        "RESPMUT status-rep={} rem-cl={} add={}",
        if changed { replace(2, ":status", "207") } else { 99 },
        remove(2, "content-length"),
        add(2, "set-cookie", "a=1")
    ));
    0
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_body(context: u32, size: u32, end: u32) -> u32 {
    log(&format!("CB response_body({context},{size},{end}) {}", buffer(1, 0, 60)));
    if end == 0 {
        return 1;
    }
    log(&format!("RESPSET={}", set_buffer(1, 0, usize::MAX, "new-response-body")));
    0
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_trailers(context: u32, count: u32) -> u32 {
    log(&format!("CB response_trailers({context},{count})"));
    0
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_done(context: u32) -> u32 {
    log(&format!("CB done({context})"));
    1
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_log(context: u32) {
    log(&format!("CB log({context})"));
    if context <= 1 {
        return;
    }
    if connection::is_asked() {
        return connection::ended(context);
    }
    phase("log");
    for path in [
        "request.duration",
        "request.size",
        "request.total_size",
        "response.code",
        "response.code_details",
        "response.flags",
        "response.size",
        "response.total_size",
        "response.backend_latency",
        "response.grpc_status",
        "request.path",
        "upstream.address",
        "myprop",
        "connection.id",
        "response.headers.x-up",
        "connection.termination_details",
    ] {
        property(path);
    }
    log(&format!("LOGMUT add={}", add(2, "x", "y")));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_delete(context: u32) {
    log(&format!("CB delete({context})"));
}
