#!/usr/bin/env python3
"""Writes conf/envoy-*.yaml (JSON is YAML) for every Envoy variant used by run.sh."""
import json, os
from gen_cairn import CONFIG, MODULES
W = os.environ["BENCH_WORK"]
C = f"{W}/conf"
PLUG = os.environ.get("PLUG_WASM", f"{C}/hdr.wasm")
T = "type.googleapis.com/envoy.extensions."

def addr(p): return {"socket_address": {"address": "127.0.0.1", "port_value": p}}

def cluster(name, port, h1=True):
    return {"name": name, "type": "STATIC", "connect_timeout": "2s",
            "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}]},
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": addr(port)}}]}]}}

ROUTER = {"name": "envoy.filters.http.router", "typed_config": {"@type": T + "filters.http.router.v3.Router"}}

def jwt(cache):
    p = {"issuer": "https://issuer.example", "audiences": ["bench"], "forward": True, "payload_in_metadata": "p",
         "local_jwks": {"filename": f"{C}/jwks.json"}}
    if cache: p["jwt_cache_config"] = {"jwt_cache_size": 100}
    return {"name": "envoy.filters.http.jwt_authn", "typed_config": {
        "@type": T + "filters.http.jwt_authn.v3.JwtAuthentication", "providers": {"p": p},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}]}}

def rbac(claim):
    pr = {"or_ids": {"ids": [{"any": True}]}}
    if claim:
        pr = {"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": [{"key": "p"}, {"key": "sub"}],
                           "value": {"string_match": {"exact": "alice"}}}}
    pol = {}
    for i, pre in enumerate(["/admin", "/internal", "/metrics", "/debug"]):
        pol[f"p{i}"] = {"permissions": [{"and_rules": {"rules": [
            {"url_path": {"path": {"prefix": pre}}},
            {"header": {"name": ":method", "string_match": {"exact": "POST"}}}]}}], "principals": [{"any": True}]}
    pol["p9"] = {"permissions": [{"and_rules": {"rules": [
        {"url_path": {"path": {"prefix": "/"}}}, {"header": {"name": ":method", "string_match": {"exact": "GET"}}}]}}],
        "principals": [pr]}
    return {"name": "envoy.filters.http.rbac", "typed_config": {"@type": T + "filters.http.rbac.v3.RBAC",
            "rules": {"action": "ALLOW", "policies": pol}}}

def wasm(i, path, configuration=""):
    return {"name": f"wasm{i}", "typed_config": {"@type": T + "filters.http.wasm.v3.Wasm", "config": {
        "name": f"plug{i}", "root_id": f"plug{i}",
        "configuration": {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": configuration},
        "vm_config": {"vm_id": f"vm{i}", "runtime": "envoy.wasm.runtime.v8", "code": {"local": {"filename": path}}}}}}

def hcm(filters, prefix="in", routes=None, **kw):
    routes = routes or [{"match": {"prefix": "/"}, "route": {"cluster": "backend", "timeout": "0s"}}]
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": {
        "@type": T + "filters.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": prefix,
        "route_config": {"name": "r", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
        "http_filters": filters + [ROUTER], **kw}}

def tcp(c): return {"name": "envoy.filters.network.tcp_proxy", "typed_config": {
    "@type": T + "filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "t", "cluster": c}}

def plain(port, flt): return {"name": "plain", "address": addr(port), "filter_chains": [{"filters": [flt]}]}

def mtls():
    return {"name": "tls", "typed_config": {"@type": T + "transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True, "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{"certificate_chain": {"filename": f"{C}/waypoint.pem"}, "private_key": {"filename": f"{C}/waypoint.key"}}],
            "validation_context": {"trusted_ca": {"filename": f"{C}/ca.pem"},
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}]}}}}

def connect_term(port, cl, extra=None):
    # maps CONNECT streams to raw bytes into cluster cl (main_internal or the TCP backend)
    h = hcm([], "connect_terminate", routes=[{"match": {"connect_matcher": {}}, "route": {
        "cluster": cl, "timeout": "0s", "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}}],
        http2_protocol_options={"allow_connect": True, "max_concurrent_streams": 2000},
        upgrade_configs=[{"upgrade_type": "CONNECT"}])
    return {"name": "connect_terminate", "address": addr(port),
            "filter_chains": [{"transport_socket": mtls(), "filters": [h]}]}

INT = [{"name": "main_internal", "connect_timeout": "2s",
        "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}]},
        "load_assignment": {"cluster_name": "main_internal", "endpoints": [{"lb_endpoints": [{"endpoint": {
            "address": {"envoy_internal_address": {"server_listener_name": "main_internal"}}}}]}]},
        "transport_socket": {"name": "envoy.transport_sockets.internal_upstream", "typed_config": {
            "@type": T + "transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            "transport_socket": {"name": "raw", "typed_config": {"@type": T + "transport_sockets.raw_buffer.v3.RawBuffer"}}}}}]

def boot(name, listeners, clusters, adm):
    d = {"admin": {"address": addr(adm)}, "node": {"id": name, "cluster": "bench"},
         "static_resources": {"listeners": listeners, "clusters": clusters}}
    if any("internal_listener" in l for l in listeners):
        d["bootstrap_extensions"] = [{"name": "envoy.bootstrap.internal_listener", "typed_config": {
            "@type": T + "bootstrap.internal_listener.v3.InternalListener"}}]
    json.dump(d, open(f"{C}/{name}.yaml", "w"), indent=1)

BE = cluster("backend", 9000); BB = cluster("bulk", 9001)
def l7(name, port, filters): boot(name, [plain(port, hcm(filters))], [BE], port + 9000)
def internal(filters, **kw):
    return {"name": "main_internal", "internal_listener": {}, "filter_chains": [{"filters": [hcm(filters, "main", **kw)]}]}
def wp(name, port, filters, **kw):
    boot(name, [connect_term(port, "main_internal"), internal(filters, **kw)], [BE] + INT, port + 9000)
# Envoy's default line on standard output, for the comparison with access logs on.
LOG = [{"name": "log", "typed_config": {"@type": T + "access_loggers.stream.v3.StdoutAccessLog"}}]

boot("envoy-idle", [], [], 19000)
b = plain(10101, tcp("bulk")); b["name"] = "bulk"
boot("envoy-tcp", [plain(10001, tcp("backend")), b], [BE, BB], 19001)
l7("envoy-l7", 10002, [])
l7("envoy-l7-rbac", 10009, [rbac(False)])
l7("envoy-l7-auth", 10003, [jwt(False), rbac(True)])
l7("envoy-l7-jwtcache", 10004, [jwt(True), rbac(True)])
for n, p in ((1, 10005), (3, 10006)): l7(f"envoy-l7-wasm{n}", p, [wasm(i, PLUG) for i in range(n)])
for k, p in (("noop", 10007), ("hdr", 10008)):
    l7(f"envoy-l7-{k}1", p, [wasm(0, f"{C}/{k}.wasm")])
    l7(f"envoy-l7-{k}3", p + 20, [wasm(i, f"{C}/{k}.wasm") for i in range(3)])
b = connect_term(10111, "bulk"); b["name"] = "bulk"
boot("envoy-hbone-l4", [connect_term(10011, "backend"), b], [BE, BB], 19011)
wp("envoy-waypoint", 10012, [])
wp("envoy-waypoint-rbac", 10016, [rbac(False)])
wp("envoy-waypoint-rbac-log", 10017, [rbac(False)], access_log=LOG)
for port, name, count in ((10018, "hdr", 1), (10040, "hdr", 2), (10041, "noop", 1), (10042, "noop", 2), (10043, "tag", 1),
                          (10044, "tag", 2), (10045, "body", 1), (10046, "go", 1), (10047, "coraza", 1)):
    wp(f"envoy-waypoint-rbac-{name}{count}", port,
       [rbac(False)] + [wasm(i, MODULES[name], CONFIG.get(name, "")) for i in range(count)])
wp("envoy-waypoint-auth", 10013, [jwt(False), rbac(True)])
wp("envoy-waypoint-jwtcache", 10015, [jwt(True), rbac(True)])
wp("envoy-waypoint-auth-wasm1", 10014, [jwt(False), rbac(True), wasm(0, PLUG)])
