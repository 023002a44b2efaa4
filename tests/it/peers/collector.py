"""Collectors with the official packages' messages: OTLP over gRPC and HTTP, Zipkin, and Envoy's access log service.

Usage: collector.py. Prints `ports GRPC HTTP`, then one line of JSON for each span, log record and entry that arrives,
and ends when its standard input does.
"""

import json
import sys
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

LOCK = threading.Lock()


def say(kind, value):
    with LOCK:
        print(json.dumps({"kind": kind, **value}), flush=True)


def texts(attributes):
    return {one.key: MessageToDict(one.value) for one in attributes}


def say_spans(kind, request, metadata):
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                say(kind, {
                    "metadata": metadata,
                    "resource": texts(resource.resource.attributes),
                    "trace": span.trace_id.hex(),
                    "span": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "state": span.trace_state,
                    "name": span.name,
                    "server": span.kind == span.SPAN_KIND_SERVER,
                    "client": span.kind == span.SPAN_KIND_CLIENT,
                    "nanos": span.end_time_unix_nano - span.start_time_unix_nano,
                    "tags": texts(span.attributes),
                })


class Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request, context):
        say_spans("otlp-grpc", request, dict(context.invocation_metadata()))
        return trace_service_pb2.ExportTraceServiceResponse()


class Logs(logs_service_pb2_grpc.LogsServiceServicer):
    def Export(self, request, context):
        for resource in request.resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    say("otlp-log", {
                        "log": scope.scope.name,
                        "body": record.body.string_value,
                        "attributes": texts(record.attributes),
                        "trace": record.trace_id.hex(),
                    })
        return logs_service_pb2.ExportLogsServiceResponse()


class AccessLogs(als_pb2_grpc.AccessLogServiceServicer):
    def StreamAccessLogs(self, messages, context):
        identifier = {}
        for message in messages:
            if message.HasField("identifier"):
                identifier = {"log": message.identifier.log_name, "node": message.identifier.node.id}
            for entry in message.http_logs.log_entry:
                say("als-http", {**identifier, "entry": MessageToDict(entry)})
            for entry in message.tcp_logs.log_entry:
                say("als-tcp", {**identifier, "entry": MessageToDict(entry)})
        return als_pb2.StreamAccessLogsResponse()


class Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.path == "/v1/traces" and headers["content-type"] == "application/x-protobuf":
            say_spans("otlp-http", trace_service_pb2.ExportTraceServiceRequest.FromString(body), headers)
            status = 200
        elif self.path == "/api/v2/spans" and headers["content-type"] == "application/json":
            for span in json.loads(body):
                # `kind` is the receiver's word for which of them this is.
                say("zipkin", {"side": span.pop("kind"), **span, "headers": headers})
            status = 202
        else:
            status = 404
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def main():
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(Logs(), server)
    als_pb2_grpc.add_AccessLogServiceServicer_to_server(AccessLogs(), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Http)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    print(f"ports {grpc_port} {http.server_port}", flush=True)
    sys.stdin.read()
    server.stop(0)


main()
