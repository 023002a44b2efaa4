//! Tests of external authorization: what a provider is told, and what becomes of its answer.

use super::*;
use ::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, Version};
use bytes::{BufMut, Bytes, BytesMut};
use cairn_filter::{
    Body, BodyBroken, Callout, CalloutFuture, Chain, NoBody, Outcome, Peer, Piece, Protocol, Running,
};
use cairn_mesh::{
    CheckBody, Condition, HttpCheck, Identity, MeshSettings, Operation, PathMatch, PolicyAction, PolicyRule,
    ResourceName, TextMatch, Values,
};
use cairn_proto::ext_authz::{
    CheckRequest, CheckResponse, DeniedHttpResponse, HeaderAppendAction, HeaderValueOption, HttpStatus,
    OkHttpResponse, QueryParameter, Status, check_response::HttpResponse,
};
use prost::Message;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

/// A provider that gives one answer, and keeps what it was asked.
#[derive(Debug)]
struct Scripted {
    answer: Result<CalloutAnswer, CalloutError>,
    asked: Mutex<Vec<CalloutRequest>>,
}

impl Callout for Scripted {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        self.asked.lock().unwrap().push(request);
        let answer = self.answer.clone();
        Box::pin(async move {
            tokio::task::yield_now().await;
            answer
        })
    }
}

fn answer(
    status: u16,
    headers: &[(&'static str, &str)],
    body: impl Into<Bytes>,
) -> Result<CalloutAnswer, CalloutError> {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    for (name, value) in headers {
        response.headers_mut().append(HeaderName::from_static(name), value.parse().unwrap());
    }
    Ok(CalloutAnswer { response, trailers: HeaderMap::new() })
}

fn grpc_answer(message: &CheckResponse) -> Result<CalloutAnswer, CalloutError> {
    let message = message.encode_to_vec();
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(&message);
    let mut answer = answer(200, &[], framed.freeze())?;
    answer.trailers.insert("grpc-status", HeaderValue::from_static("0"));
    Ok(answer)
}

fn status(code: i32) -> Option<Status> {
    Some(Status { code, ..Status::default() })
}

fn unreachable() -> Result<CalloutAnswer, CalloutError> {
    Err(CalloutError::Unreachable("the endpoint cannot be reached".to_owned()))
}

fn provider(protocol: CheckProtocol) -> AuthorizationProvider {
    AuthorizationProvider {
        name: "p".into(),
        host: "authz.shop.svc.cluster.local".into(),
        namespace: Some("shop".into()),
        port: 9000,
        timeout: Duration::from_secs(3),
        fail_open: false,
        status_on_error: 403,
        body: None,
        protocol,
    }
}

fn over_http() -> AuthorizationProvider {
    provider(CheckProtocol::Http(HttpCheck::default()))
}

fn over_grpc() -> AuthorizationProvider {
    provider(CheckProtocol::Grpc)
}

/// What is asked about: paths that begin with `/ask`, and connections.
fn policies() -> Vec<Arc<CustomPolicy>> {
    let paths = Values { any: vec![PathMatch::Text(TextMatch::parse("/ask*"))], none: Vec::new() };
    let to = vec![Operation { paths, ..Operation::default() }];
    let policy = AuthorizationPolicy {
        name: ResourceName::new("shop", "custom"),
        targets: Vec::new(),
        action: PolicyAction::Deny,
        rules: vec![PolicyRule { to, ..PolicyRule::default() }],
        dry_run: false,
    };
    vec![Arc::new(CustomPolicy { provider: "p".into(), policy })]
}

const RULE: &str = "ns[shop]-policy[custom]-rule[0]";

fn factory(provider: Option<AuthorizationProvider>) -> Arc<dyn Factory> {
    let domains = MeshSettings::default().trust_domains();
    external_authorization("p", provider.map(Arc::new), &policies(), &domains)
}

fn head(path: &str) -> RequestHead {
    let mut headers = HeaderMap::new();
    for (name, value) in
        [("x-team", "red"), ("x-team", "blue"), ("authorization", "secret"), ("x-other", "1")]
    {
        headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    RequestHead {
        method: Method::PUT,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop.example:8080"),
        path: path.parse().unwrap(),
        headers,
        version: Version::HTTP_11,
    }
}

fn connection(callout: Arc<Scripted>) -> Arc<Connection> {
    let identity = |account: &str| Identity::new("cluster.local", "shop", account).ok();
    Arc::new(Connection {
        id: 1,
        worker: 0,
        source: Peer { address: ([10, 0, 0, 1], 40000).into(), identity: identity("web"), workload: None },
        destination: ([10, 96, 0, 10], 80).into(),
        service: None,
        local: identity("waypoint"),
        callout,
    })
}

/// What came of one request.
struct Run {
    exchange: Exchange,
    head: RequestHead,
    reply: Option<LocalReply>,
    response: HeaderMap,
    asked: Vec<CalloutRequest>,
}

impl Run {
    fn status(&self) -> u16 {
        self.reply.as_ref().map_or(0, |reply| reply.status.as_u16())
    }

    fn reason(&self) -> &str {
        self.exchange.denial.as_ref().map_or("", |denial| &denial.reason)
    }

    fn notes(&self) -> Vec<&str> {
        self.exchange.notes.iter().map(|note| &*note.text).collect()
    }

    /// What a provider over gRPC was asked.
    fn message(&self) -> CheckRequest {
        CheckRequest::decode(&self.asked[0].request.body()[5..]).unwrap()
    }
}

async fn run(factory: Arc<dyn Factory>, answer: Result<CalloutAnswer, CalloutError>) -> Run {
    run_with(factory, answer, head("/ask?a=b"), None).await
}

async fn run_with(
    factory: Arc<dyn Factory>,
    answer: Result<CalloutAnswer, CalloutError>,
    mut head: RequestHead,
    body: Option<&mut dyn Body>,
) -> Run {
    let scripted = Arc::new(Scripted { answer, asked: Mutex::default() });
    let connection = connection(Arc::clone(&scripted));
    let mut exchange = Exchange::new(connection, Protocol::Http11, Instant::now(), SystemTime::UNIX_EPOCH);
    let mut running: Running = Chain::new(vec![factory]).start(&exchange);
    let ends = body.is_none();
    let mut none = NoBody;
    let body = body.unwrap_or(&mut none);
    let reply = match running.request_headers(&mut exchange, &mut head, ends, body).await {
        Outcome::Continue => None,
        Outcome::Reply(reply) => Some(*reply),
        Outcome::Reset | Outcome::TooLarge | Outcome::BodyBroken => panic!("it answers or lets pass"),
    };
    let mut response = ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() };
    let outcome = running.response_headers(&mut exchange, &mut response, true, &mut NoBody).await;
    assert!(matches!(outcome, Outcome::Continue));
    let asked = std::mem::take(&mut *scripted.asked.lock().unwrap());
    Run { exchange, head, reply, response: response.headers, asked }
}

/// A body of ten bytes.
struct Ten;

impl Body for Ten {
    fn poll_piece(&mut self, _: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        Poll::Ready(Ok(Piece::Data { bytes: Bytes::from_static(b"0123456789"), end_of_stream: true }))
    }
}

#[tokio::test]
async fn only_what_matches_is_asked_about() {
    for (path, asked) in [("/ask", 1), ("/ask/more", 1), ("/health", 0)] {
        let run = run_with(factory(Some(over_http())), answer(200, &[], ""), head(path), None).await;
        assert_eq!((run.asked.len(), run.status()), (asked, 0), "{path}");
    }
}

#[tokio::test]
async fn an_answer_over_http_decides() {
    for (name, answered, status, details, reason) in [
        ("200", answer(200, &[], "yes"), 0, "", ""),
        ("401", answer(401, &[], "no"), 401, "ext_authz_denied", "provider p answered 401"),
        ("another success is none", answer(204, &[], ""), 204, "ext_authz_denied", "provider p answered 204"),
        ("a redirect", answer(302, &[], ""), 302, "ext_authz_denied", "provider p answered 302"),
        (
            "a failure is no answer",
            answer(503, &[], ""),
            500,
            "ext_authz_error",
            "provider p did not answer: its status is 503",
        ),
        (
            "no answer",
            unreachable(),
            500,
            "ext_authz_error",
            "provider p did not answer: the endpoint did not answer: the endpoint cannot be reached",
        ),
    ] {
        let asked = AuthorizationProvider { status_on_error: 500, ..over_http() };
        let run = run(factory(Some(asked)), answered).await;
        assert_eq!((run.status(), run.reason()), (status, reason), "{name}");
        if let Some(reply) = &run.reply {
            assert_eq!(reply.details, details, "{name}");
            assert_eq!(run.exchange.denial.as_ref().unwrap().policy, RULE, "{name}");
        }
    }
}

#[tokio::test]
async fn without_an_answer_it_passes_only_where_that_is_said() {
    for (asked, answered) in [(over_http(), answer(500, &[], "")), (over_grpc(), unreachable())] {
        let open = AuthorizationProvider { fail_open: true, ..asked.clone() };
        let run_open = run(factory(Some(open.clone())), answered.clone()).await;
        assert_eq!(run_open.status(), 0);
        assert!(run_open.notes()[0].ends_with("it passes, as failOpen says"), "{:?}", run_open.notes());
        assert_eq!(run(factory(Some(asked)), answered).await.status(), 403);
        let denied = run(factory(Some(open)), answer(403, &[], "")).await;
        assert_eq!(denied.status(), if denied.asked[0].http2 { 0 } else { 403 });
    }
}

#[tokio::test]
async fn a_provider_over_http_is_told_what_its_lists_name() {
    let check = HttpCheck {
        path_prefix: "/check".into(),
        request_headers: vec![TextMatch::parse("x-te*")],
        additional_headers: vec![("x-from".into(), "mesh".into()), ("x-team".into(), "fixed".into())],
        ..HttpCheck::default()
    };
    let run = run(factory(Some(provider(CheckProtocol::Http(check)))), answer(200, &[], "")).await;
    let CalloutRequest { host, namespace, port, http2, request, timeout, .. } = &run.asked[0];
    assert_eq!((&**host, namespace.as_deref(), *port), ("authz.shop.svc.cluster.local", Some("shop"), 9000));
    assert_eq!((*http2, *timeout), (false, Duration::from_secs(3)));
    assert_eq!((request.method().as_str(), request.uri().path()), ("PUT", "/check/ask"));
    assert_eq!(request.uri().query(), Some("a=b"));
    assert_eq!(request.uri().authority().unwrap(), "shop.example:8080", "the request's own host");
    let mut names: Vec<String> =
        request.headers().iter().map(|(n, v)| format!("{n}: {}", v.to_str().unwrap())).collect();
    names.sort();
    assert_eq!(names, ["authorization: secret", "content-length: 0", "x-from: mesh", "x-team: fixed"]);
}

#[tokio::test]
async fn headers_of_an_answer_over_http_go_where_the_lists_say() {
    let check = HttpCheck {
        upstream_on_allow: vec![TextMatch::parse("x-user")],
        downstream_on_allow: vec![TextMatch::parse("x-seen*")],
        downstream_on_deny: vec![TextMatch::parse("x-why")],
        ..HttpCheck::default()
    };
    let headers = [
        ("x-user", "me"),
        ("x-seen-by", "p"),
        ("x-why", "because"),
        ("location", "/login"),
        ("content-length", "2"),
        ("x-envoy-auth-headers-to-remove", "x-other, host"),
    ];
    let asked = || factory(Some(provider(CheckProtocol::Http(check.clone()))));
    let allowed = run(asked(), answer(200, &headers, "")).await;
    assert_eq!(allowed.head.headers["x-user"], "me");
    assert!(!allowed.head.headers.contains_key("x-other"));
    assert_eq!(allowed.response.len(), 1);
    assert_eq!(allowed.response["x-seen-by"], "p");
    let denied = run(asked(), answer(403, &headers, "no")).await;
    let reply = denied.reply.unwrap();
    let mut names: Vec<&str> = reply.headers.keys().map(HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!((names, &*reply.body), (vec!["location", "x-why"], &b"no"[..]));
    let denied = run(factory(Some(over_http())), answer(403, &headers, "")).await;
    assert_eq!(denied.reply.unwrap().headers.len(), 5, "without a list, all but the length");
}

#[tokio::test]
async fn a_provider_over_grpc_is_told_who_and_what() {
    let run = run(factory(Some(over_grpc())), grpc_answer(&CheckResponse::default())).await;
    assert_eq!(run.status(), 0);
    let request = &run.asked[0].request;
    assert!(run.asked[0].http2);
    assert_eq!(request.uri().path(), "/envoy.service.auth.v3.Authorization/Check");
    assert_eq!(request.headers()["content-type"], "application/grpc");
    let told = run.message().attributes.unwrap();
    let (source, destination) = (told.source.unwrap(), told.destination.unwrap());
    assert_eq!(source.principal, "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(destination.principal, "spiffe://cluster.local/ns/shop/sa/waypoint");
    assert!(format!("{source:?}").contains("10.0.0.1"), "{source:?}");
    assert!(format!("{destination:?}").contains("10.96.0.10"), "{destination:?}");
    let http = told.request.unwrap().http.unwrap();
    assert_eq!((&*http.method, &*http.path, &*http.host), ("PUT", "/ask?a=b", "shop.example:8080"));
    assert_eq!((&*http.protocol, http.size), ("HTTP/1.1", 0));
    assert_eq!((&*http.headers["x-team"], &*http.headers[":path"]), ("red,blue", "/ask?a=b"));
}

fn option(key: &str, value: &str, append: Option<bool>, action: HeaderAppendAction) -> HeaderValueOption {
    let header =
        cairn_proto::ext_authz::HeaderValue { key: key.into(), value: value.into(), raw_value: Vec::new() };
    HeaderValueOption { header: Some(header), append, append_action: action.into() }
}

#[tokio::test]
async fn an_answer_over_grpc_decides_and_changes_headers() {
    use HeaderAppendAction::{AddIfAbsent, AppendIfExistsOrAdd as Unset, OverwriteIfExists};
    let ok = OkHttpResponse {
        headers: vec![
            option("x-other", "2", None, Unset),
            option("x-team", "green", Some(true), Unset),
            option("x-new", "n", Some(false), Unset),
            option("x-new", "m", None, AddIfAbsent),
            option("x-none", "o", Some(true), Unset),
            option(":path", "/admin", None, Unset),
            option("content-length", "1", None, Unset),
        ],
        headers_to_remove: vec!["authorization".into(), "host".into()],
        response_headers_to_add: vec![
            option("x-seen", "p", None, Unset),
            option("x-seen", "q", None, AddIfAbsent),
            option("x-unseen", "p", None, OverwriteIfExists),
        ],
        dynamic_metadata: Some(said("old", "1")),
        query_parameters_to_set: vec![
            QueryParameter { key: "team".into(), value: "red".into() },
            QueryParameter { key: "a&b".into(), value: "c".into() },
        ],
        query_parameters_to_remove: vec!["a".into()],
    };
    let message = CheckResponse {
        status: status(0),
        http_response: Some(HttpResponse::OkResponse(ok)),
        dynamic_metadata: Some(said("level", "2")),
    };
    let run = run(factory(Some(over_grpc())), grpc_answer(&message)).await;
    assert_eq!(run.status(), 0);
    let values = |name: &str| -> Vec<&str> {
        run.head.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
    };
    assert_eq!(values("x-other"), ["2"], "what is unset replaces");
    assert_eq!(values("x-team"), ["red,green", "blue"]);
    assert_eq!(values("x-new"), ["m"], "what stands in append_action says nothing of requests");
    assert_eq!((values("x-none").len(), values("authorization").len()), (0, 0));
    assert_eq!(run.head.path, "/ask?team=red");
    let metadata = serde_json::json!({ "envoy.filters.http.ext_authz": { "old": "1", "level": "2" } });
    assert_eq!(run.exchange.metadata.all().map(|all| Value::Object(all.clone())), Some(metadata));
    assert_eq!(run.response.len(), 1);
    assert_eq!(run.response["x-seen"], "p");
    let expected = [
        "provider p let it pass",
        "not done for provider p: header :path",
        "not done for provider p: header content-length",
        "not done for provider p: removal of header host",
        "not done for provider p: query parameter a&b",
    ];
    assert_eq!(run.notes(), expected);
}

#[tokio::test]
async fn a_refusal_over_grpc_is_the_providers_own() {
    let denied = DeniedHttpResponse {
        status: Some(HttpStatus { code: 429 }),
        headers: ["5", "6"]
            .map(|value| option("retry-after", value, None, HeaderAppendAction::AppendIfExistsOrAdd))
            .into(),
        body: "slowly".into(),
    };
    let with =
        |response| CheckResponse { status: status(7), http_response: response, dynamic_metadata: None };
    let refused =
        run(factory(Some(over_grpc())), grpc_answer(&with(Some(HttpResponse::DeniedResponse(denied))))).await;
    assert_eq!((refused.status(), refused.reason()), (429, "provider p answered 429"));
    let reply = refused.reply.unwrap();
    assert_eq!((&*reply.body, reply.headers.get_all("retry-after").iter().count()), (&b"slowly"[..], 2));
    let plain = run(factory(Some(over_grpc())), grpc_answer(&with(None))).await;
    assert_eq!(plain.status(), 403);
    let allowing = with(Some(HttpResponse::OkResponse(OkHttpResponse::default())));
    assert_eq!(
        run(factory(Some(over_grpc())), grpc_answer(&allowing)).await.status(),
        403,
        "the status decides"
    );
}

/// Metadata with one text.
fn said(key: &str, value: &str) -> prost_types::Struct {
    let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(value.to_owned())) };
    prost_types::Struct { fields: [(key.to_owned(), value)].into() }
}

#[tokio::test]
async fn a_provider_that_reports_an_error_has_not_decided() {
    let error = |code| CheckResponse {
        // Whatever it says beside: it could not decide.
        status: status(0),
        http_response: Some(HttpResponse::ErrorResponse(DeniedHttpResponse {
            status: code,
            body: "try later".into(),
            ..DeniedHttpResponse::default()
        })),
        dynamic_metadata: None,
    };
    for (name, fail_open, code, expected) in [
        ("its own status", false, Some(HttpStatus { code: 503 }), 503),
        ("none of its own", false, None, 403),
        ("fail open", true, Some(HttpStatus { code: 503 }), 0),
    ] {
        let provider = AuthorizationProvider { fail_open, ..over_grpc() };
        let run = run(factory(Some(provider)), grpc_answer(&error(code))).await;
        assert_eq!(run.status(), expected, "{name}");
        if expected != 0 {
            assert_eq!(run.reason(), "provider p did not answer: it reports an error", "{name}");
            let reply = run.reply.unwrap();
            assert_eq!((&*reply.body, &*reply.details), (&b"try later"[..], "ext_authz_error"), "{name}");
        }
    }
}

#[tokio::test]
async fn what_is_no_grpc_answer_is_none() {
    let mut refused = answer(200, &[], "").unwrap();
    refused.trailers.insert("grpc-status", HeaderValue::from_static("14"));
    let mut cut = grpc_answer(&CheckResponse { status: status(0), ..CheckResponse::default() }).unwrap();
    let body = cut.response.body().slice(..6);
    *cut.response.body_mut() = body;
    for (name, answered, reason) in [
        ("status", answer(404, &[], ""), "its status is 404"),
        ("trailers only", answer(200, &[("grpc-status", "12")], ""), "its gRPC status is 12"),
        ("trailers", Ok(refused), "its gRPC status is 14"),
        ("no trailers", answer(200, &[], "12345"), "its gRPC status is missing"),
        ("cut", Ok(cut), "its message cannot be read"),
    ] {
        let run = run(factory(Some(over_grpc())), answered).await;
        assert_eq!(run.reason(), format!("provider p did not answer: {reason}"), "{name}");
        assert_eq!(run.status(), 403, "{name}");
    }
}

#[tokio::test]
async fn a_body_is_told_as_far_as_is_allowed() {
    for (bytes_max, allow_partial, status, told) in [
        (10, false, 0, Some(("0123456789", "false"))),
        (4, true, 0, Some(("0123", "true"))),
        (4, false, 413, None),
    ] {
        for (asked, answered) in
            [(over_http(), answer(200, &[], "")), (over_grpc(), grpc_answer(&CheckResponse::default()))]
        {
            let body = Some(CheckBody { bytes_max, allow_partial, as_bytes: false });
            let asked = AuthorizationProvider { body, ..asked };
            let run = run_with(factory(Some(asked.clone())), answered, head("/ask"), Some(&mut Ten)).await;
            assert_eq!(run.status(), status, "{bytes_max} {allow_partial}");
            let found = run.asked.first().map(|asked| match asked.http2 {
                false => {
                    let partial =
                        asked.request.headers()["x-envoy-auth-partial-body"].to_str().unwrap().to_owned();
                    (String::from_utf8(asked.request.body().to_vec()).unwrap(), partial)
                }
                true => {
                    let http = run.message().attributes.unwrap().request.unwrap().http.unwrap();
                    (http.body, http.headers["x-envoy-auth-partial-body"].clone())
                }
            });
            assert_eq!(found, told.map(|(body, partial)| (body.to_owned(), partial.to_owned())));
        }
    }
    let body = Some(CheckBody { bytes_max: 10, allow_partial: false, as_bytes: true });
    let asked = AuthorizationProvider { body, ..over_grpc() };
    let answered = grpc_answer(&CheckResponse::default());
    let run = run_with(factory(Some(asked)), answered, head("/ask"), Some(&mut Ten)).await;
    let http = run.message().attributes.unwrap().request.unwrap().http.unwrap();
    assert_eq!((&*http.raw_body, &*http.body), (&b"0123456789"[..], ""));
}

#[tokio::test]
async fn a_provider_that_cannot_be_used_refuses_what_would_ask_it() {
    let denied = run(factory(None), unreachable()).await;
    assert_eq!((denied.status(), denied.asked.len()), (403, 0));
    assert_eq!(
        denied.reply.unwrap().details,
        "rbac_access_denied_matched_policy[istio-ext-authz-p-ns[shop]-policy[custom]-rule[0]-deny-due-to-bad-CUSTOM-action]"
    );
    let other = run_with(factory(None), unreachable(), head("/health"), None).await;
    assert_eq!(other.status(), 0);
}

#[tokio::test]
async fn connections_are_asked_about_over_grpc_only() {
    let allow = grpc_answer(&CheckResponse::default());
    let deny = grpc_answer(&CheckResponse { status: status(7), ..CheckResponse::default() });
    let open = AuthorizationProvider { fail_open: true, ..over_grpc() };
    for (name, asked, answered, passes, count) in [
        ("allowed", Some(over_grpc()), allow.clone(), true, 1),
        ("denied", Some(over_grpc()), deny, false, 1),
        ("no answer", Some(over_grpc()), unreachable(), false, 1),
        ("no answer, fail open", Some(open), unreachable(), true, 1),
        ("http", Some(over_http()), allow.clone(), true, 0),
        ("unknown", None, allow, false, 0),
    ] {
        let scripted = Arc::new(Scripted { answer: answered, asked: Mutex::default() });
        let connection = connection(Arc::clone(&scripted));
        let chain = Chain::new(vec![factory(asked)]);
        let admission = match chain.admit(&connection) {
            Admission::Pass(_) => chain.ask(&connection).await,
            refused => refused,
        };
        assert_eq!(matches!(admission, Admission::Pass(_)), passes, "{name}: {admission:?}");
        let asked = scripted.asked.lock().unwrap();
        assert_eq!(asked.len(), count, "{name}");
        if let Some(request) = asked.first() {
            let told = CheckRequest::decode(&request.request.body()[5..]).unwrap().attributes.unwrap();
            assert_eq!(told.source.unwrap().principal, "spiffe://cluster.local/ns/shop/sa/web", "{name}");
            assert!(told.request.is_none(), "{name}");
        }
    }
}

#[test]
fn a_rule_that_asks_for_a_header_is_asked_by_it() {
    let when = vec![Condition::RequestHeader(
        "x-a".into(),
        Values { any: vec![TextMatch::Present], none: Vec::new() },
    )];
    let mut custom = CustomPolicy::clone(&policies()[0]);
    custom.policy.rules = vec![PolicyRule { when, ..PolicyRule::default() }];
    let domains = MeshSettings::default().trust_domains();
    let factory = external_authorization("p", None, &[Arc::new(custom)], &domains);
    let scripted = Arc::new(Scripted { answer: unreachable(), asked: Mutex::default() });
    let refused = matches!(factory.admit(&connection(scripted)), Admission::Refuse(_));
    assert!(
        refused,
        "on a connection the question about the request is left out, and it is asked about more"
    );
}
