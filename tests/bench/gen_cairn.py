#!/usr/bin/env python3
"""Writes conf/cairn/*.yaml: the manifests of the mesh in which our own proxies are measured, equivalent to Envoy's.

One service per waypoint, all in front of the same backend outside the mesh, and one pod for the ztunnel. Each waypoint
enforces what `rbac` in gen_envoy.py does: five ALLOW rules, of which the last matches. Two of them verify the client's token
as `jwt` does there, and the rule that matches asks whom it speaks for."""
import json, os

B = os.path.dirname(os.path.abspath(__file__))
W = os.environ["BENCH_WORK"]
ROOT = os.path.dirname(os.path.dirname(B))
# name → (address of its pod, address of its service, plugin)
WAYPOINTS = {
    "plain": ("127.0.0.4", "127.0.0.104", None),
    "log": ("127.0.0.5", "127.0.0.105", None),
    "hdr1": ("127.0.0.6", "127.0.0.106", f"{W}/conf/hdr.wasm"),
    "tag1": ("127.0.0.7", "127.0.0.107", f"{ROOT}/target/plugins/tag.wasm"),
    "auth": ("127.0.0.8", "127.0.0.108", None),
    "jwtcache": ("127.0.0.9", "127.0.0.109", None),
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
metadata: {{ name: {name}, namespace: default }}
spec:
  targetRefs: [{{ group: gateway.networking.k8s.io, kind: Gateway, name: {name} }}]
  url: file://{plugin}
  pluginConfig: {config}
"""

# What each plugin is told: hdr.wasm takes nothing, tag.wasm which headers to set.
CONFIG = {
    "hdr1": "{}",
    "tag1": '{ request: [{ header: x-wasm, value: "1" }], response: [{ header: x-wasm-resp, value: "1" }] }',
}

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
            file.write(PLUGIN.format(name=name, plugin=plugin, config=CONFIG[name]))
