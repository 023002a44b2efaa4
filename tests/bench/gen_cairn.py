#!/usr/bin/env python3
"""Writes conf/cairn/*.yaml: the manifests of the mesh in which our own proxies are measured, equivalent to Envoy's.

One service per waypoint, all in front of the same backend outside the mesh, and one pod for the ztunnel. Each waypoint
enforces what `rbac` in gen_envoy.py does: five ALLOW rules, of which the last matches. Two of them verify the client's token
as `jwt` does there, and the rule that matches asks whom it speaks for. Others have plugins, one or several."""
import json, os

B = os.path.dirname(os.path.abspath(__file__))
W = os.environ["BENCH_WORK"]
ROOT = os.path.dirname(os.path.dirname(B))
MODULES = {
    "noop": f"{W}/conf/noop.wasm",
    "hdr": f"{W}/conf/hdr.wasm",
    "body": f"{W}/conf/body.wasm",
    "tag": f"{ROOT}/target/plugins/tag.wasm",
    "go": f"{ROOT}/target/modules/go016_http_headers.wasm",
    "coraza": f"{ROOT}/target/modules/go_coraza.wasm",
}
# name → (address of its pod, address of its service, plugin and how many of it)
WAYPOINTS = {
    "plain": ("127.0.0.4", "127.0.0.104", None),
    "log": ("127.0.0.5", "127.0.0.105", None),
    "hdr1": ("127.0.0.6", "127.0.0.106", ("hdr", 1)),
    "tag1": ("127.0.0.7", "127.0.0.107", ("tag", 1)),
    "auth": ("127.0.0.8", "127.0.0.108", None),
    "jwtcache": ("127.0.0.9", "127.0.0.109", None),
    "noop1": ("127.0.0.10", "127.0.0.110", ("noop", 1)),
    "noop2": ("127.0.0.11", "127.0.0.111", ("noop", 2)),
    "hdr2": ("127.0.0.12", "127.0.0.112", ("hdr", 2)),
    "tag2": ("127.0.0.13", "127.0.0.113", ("tag", 2)),
    "body1": ("127.0.0.14", "127.0.0.114", ("body", 1)),
    "go1": ("127.0.0.15", "127.0.0.115", ("go", 1)),
    "coraza1": ("127.0.0.16", "127.0.0.116", ("coraza", 1)),
    "tag20": ("127.0.0.17", "127.0.0.117", ("tag", 20)),
    # Twenty modules that differ, as those of twenty authors do.
    "mix20": ("127.0.0.18", "127.0.0.118", ("mix", 20)),
}
# Those that verify tokens.
WITH_TOKENS = ("auth", "jwtcache")

MESH = """\
apiVersion: v1
kind: Pod
metadata: { name: backend, namespace: default, labels: { app: backend } }
spec: { containers: [{ name: a, image: a, ports: [{ containerPort: 9000 }] }] }
status: { podIP: 127.0.0.1 }
---
apiVersion: v1
kind: Pod
metadata: { name: meshed, namespace: default, labels: { istio.io/dataplane-mode: ambient } }
spec: { nodeName: node, containers: [{ name: a, image: a, ports: [{ containerPort: 9000 }] }] }
status: { podIP: 127.0.0.3 }
"""

WAYPOINT = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{ name: {name}, namespace: default, labels: {{ istio.io/waypoint-for: service }} }}
spec: {{ gatewayClassName: istio-waypoint, listeners: [{{ name: mesh, port: 15008, protocol: HBONE }}] }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, namespace: default, labels: {{ gateway.networking.k8s.io/gateway-name: {name} }} }}
spec: {{ serviceAccountName: {name}, containers: [{{ name: a, image: a }}] }}
status: {{ podIP: {pod} }}
---
apiVersion: v1
kind: Service
metadata: {{ name: to-{name}, namespace: default, labels: {{ istio.io/use-waypoint: {name} }} }}
spec: {{ clusterIP: {service}, selector: {{ app: backend }}, ports: [{{ name: http, port: 9000, targetPort: 9000 }}] }}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: {name}, namespace: default }}
spec:
  parentRefs: [{{ group: "", kind: Service, name: to-{name} }}]
  rules:
    - matches: [{{ path: {{ type: PathPrefix, value: / }} }}]
      backendRefs: [{{ name: to-{name}, port: 9000 }}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: {name}, namespace: default }}
spec:
  targetRefs: [{{ group: gateway.networking.k8s.io, kind: Gateway, name: {name} }}]
  action: ALLOW
  rules:
    - to: [{{ operation: {{ paths: ["/admin*"], methods: [POST] }} }}]
    - to: [{{ operation: {{ paths: ["/internal*"], methods: [POST] }} }}]
    - to: [{{ operation: {{ paths: ["/metrics*"], methods: [POST] }} }}]
    - to: [{{ operation: {{ paths: ["/debug*"], methods: [POST] }} }}]
    - to: [{{ operation: {{ paths: ["/*"], methods: [GET] }} }}]
{sources}"""

TOKENS = """\
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{ name: {name}, namespace: default }}
spec:
  targetRefs: [{{ group: gateway.networking.k8s.io, kind: Gateway, name: {name} }}]
  jwtRules:
    - issuer: https://issuer.example
      audiences: [bench]
      forwardOriginalToken: true
      jwks: {keys}
"""

PLUGIN = """\
---
apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {{ name: {name}-{number}, namespace: default }}
spec:
  targetRefs: [{{ group: gateway.networking.k8s.io, kind: Gateway, name: {name} }}]
  url: file://{plugin}
  pluginConfig: {config}
"""

TAGS = '{"request":[{"header":"x-wasm","value":"1"}],"response":[{"header":"x-wasm-resp","value":"1"}]}'
# What plugins are told that take anything; gen_envoy.py tells its own the same.
CONFIG = {
    "tag": TAGS,
    "mix": TAGS,
    "coraza": json.dumps({"directives_map": {"all": ["Include @demo-conf", "Include @crs-setup-conf",
                                                     "Include @owasp_crs/*.conf"]}, "default_directives": "all"}),
}


def module(plugin, number):
    """Where the module is; those of `mix` are `tag` with a section that nobody reads."""
    if plugin != "mix":
        return MODULES[plugin]
    path = f"{W}/conf/mix{number}.wasm"
    section = b"\x03mix" + bytes([number])
    with open(MODULES["tag"], "rb") as tag, open(path, "wb") as file:
        file.write(tag.read() + b"\x00" + bytes([len(section)]) + section)
    return path


def plugins(name, plugin, count):
    for number in range(count):
        config = CONFIG.get(plugin, "{}")
        yield PLUGIN.format(name=name, number=number, plugin=module(plugin, number), config=config)


if __name__ == "__main__":
    os.makedirs(f"{W}/conf/cairn", exist_ok=True)
    with open(f"{W}/conf/cairn/mesh.yaml", "w") as file:
        file.write(MESH)
    for name, (pod, service, plugin) in WAYPOINTS.items():
        with open(f"{W}/conf/cairn/{name}.yaml", "w") as file:
            sources = ""
            if name in WITH_TOKENS:
                sources = "      from: [{ source: { requestPrincipals: [https://issuer.example/alice] } }]\n"
            file.write(WAYPOINT.format(name=name, pod=pod, service=service, sources=sources))
            if name in WITH_TOKENS:
                file.write(TOKENS.format(name=name, keys=json.dumps(open(f"{W}/conf/jwks.json").read())))
            if plugin:
                file.writelines(plugins(name, *plugin))
    with open(f"{W}/conf/waypoints", "w") as file:
        print(*WAYPOINTS, file=file)
