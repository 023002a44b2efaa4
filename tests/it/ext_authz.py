"""A provider of external authorization on the official gRPC library, with the protobuf messages of Envoy's API.

Serves at the address given until its standard input ends. Lets requests pass whose x-ext-authz says `allow` or `grpc`,
and connections of clients whose service account is `web`. Prints what it was asked, one line of JSON each.
"""

import json
import sys
from concurrent import futures

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from google.rpc import status_pb2

OK, PERMISSION_DENIED = 0, 7


class Authorization(external_auth_pb2_grpc.AuthorizationServicer):
    def Check(self, request, context):
        attributes = request.attributes
        http = attributes.request.http
        print(
            json.dumps(
                {
                    "source": attributes.source.principal,
                    "destination": attributes.destination.principal,
                    "address": attributes.source.address.socket_address.address,
                    "port": attributes.destination.address.socket_address.port_value,
                    "method": http.method,
                    "path": http.path,
                    "header": http.headers.get("x-ext-authz", ""),
                }
            ),
            flush=True,
        )
        if http.method:
            allowed = http.headers.get("x-ext-authz") in ("allow", "grpc")
        else:
            allowed = attributes.source.principal.endswith("/sa/web")
        header = lambda key, value: base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=key, value=value))
        if allowed:
            ok = external_auth_pb2.OkHttpResponse(
                headers=[header("x-checked-by", "grpc")],
                headers_to_remove=["x-secret"],
                response_headers_to_add=[header("x-passed", "grpc")],
            )
            return external_auth_pb2.CheckResponse(status=status_pb2.Status(code=OK), ok_response=ok)
        denied = external_auth_pb2.DeniedHttpResponse(headers=[header("x-why", "grpc says no")], body="denied by grpc")
        denied.status.code = 401
        return external_auth_pb2.CheckResponse(status=status_pb2.Status(code=PERMISSION_DENIED), denied_response=denied)


def main():
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    external_auth_pb2_grpc.add_AuthorizationServicer_to_server(Authorization(), server)
    if server.add_insecure_port(sys.argv[1]) == 0:
        sys.exit("cannot listen")
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.stop(None)


main()
