//! A provider of external authorization that really listens, over HTTP and over gRPC, for both sides. What it answers is
//! what the request's header `x-decide` says, and its answer tells what it was asked.

use anyhow::{Context, Result};
use bytes::{BufMut, Bytes, BytesMut};
use cairn_filter::{Callout, CalloutAnswer, CalloutError, CalloutFuture, CalloutRequest};
use cairn_proto::ext_authz::{
    CheckRequest, CheckResponse, DeniedHttpResponse, HeaderAppendAction, HeaderValue, HeaderValueOption,
    HttpStatus, OkHttpResponse, QueryParameter, Status, address, check_response::HttpResponse,
    socket_address::PortSpecifier,
};
use http::{HeaderMap, HeaderName, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use prost::Message;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::LazyLock;
use tokio::net::TcpStream;

/// The header that says what is decided.
pub const DECIDE: &str = "x-decide";

/// What it may say. Anything else is a refusal.
pub const DECISIONS: [&str; 6] = ["allow", "allow", "deny", "found", "slowly", "fail"];

/// The headers of which the provider tells what it was told.
const TOLD: [&str; 5] = [DECIDE, "x-team", "x-from", "authorization", "x-envoy-auth-partial-body"];

static PROVIDER: LazyLock<SocketAddr> = LazyLock::new(|| serve().expect("a provider"));

/// Where the provider listens; it runs until the tests end.
pub fn address() -> SocketAddr {
    *PROVIDER
}

fn serve() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let at = listener.local_addr()?;
    // Each test has a runtime of its own; this provider is for all of them.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let server = auto::Builder::new(TokioExecutor::new());
                    // Whoever asks may go when it likes.
                    let _gone = server.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
                });
            }
        });
    });
    Ok(at)
}

type Body = StreamBody<futures_util::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

fn body(bytes: Bytes, trailers: Option<HeaderMap>) -> Body {
    let frames = [Frame::data(bytes)].into_iter().chain(trailers.map(Frame::trailers));
    StreamBody::new(futures_util::stream::iter(frames.map(Ok).collect::<Vec<_>>()))
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, hyper::Error> {
    let (head, incoming) = request.into_parts();
    let bytes = incoming.collect().await?.to_bytes();
    let is_grpc = head.headers.get("content-type").is_some_and(|kind| kind == "application/grpc")
        && head.uri.path() == "/envoy.service.auth.v3.Authorization/Check";
    Ok(if is_grpc { over_grpc(&bytes) } else { over_http(&head, &bytes) })
}

/// What is told of a question, in one line that a header can hold.
fn line(parts: impl IntoIterator<Item = String>) -> String {
    let text = parts.into_iter().collect::<Vec<_>>().join(" | ");
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect()
}

fn over_http(head: &http::request::Parts, bytes: &Bytes) -> Response<Body> {
    let header = |name: &str| {
        let values = head.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
        values.collect::<Vec<_>>().join(",")
    };
    let told = TOLD.map(|name| format!("{name}={}", header(name)));
    let asked = [head.method.to_string(), head.uri.to_string(), header("host"), header("content-length")];
    let told = line(asked.into_iter().chain(told).chain([String::from_utf8_lossy(bytes).into_owned()]));
    let decision = header(DECIDE);
    let status = match &*decision {
        "allow" => 200,
        "found" => 302,
        "slowly" => 429,
        "fail" => 503,
        _ => 403,
    };
    let mut response = Response::builder()
        .status(status)
        .header("x-set-a", "1")
        .header("x-set-a", "2")
        .header("x-seen", "by-provider")
        .header("x-other", "untold")
        .header("x-why", "because")
        .header("location", "/login")
        .header("set-cookie", "a=b")
        .header("x-envoy-auth-headers-to-remove", "x-remove, cookie");
    if status == 200 {
        response = response.header("x-user", &told);
    }
    response.body(body(told.into(), None)).expect("an answer")
}

fn over_grpc(bytes: &Bytes) -> Response<Body> {
    let asked = bytes.get(5..).and_then(|message| CheckRequest::decode(message).ok()).unwrap_or_default();
    let attributes = asked.attributes.unwrap_or_default();
    let address = |peer: &Option<cairn_proto::ext_authz::Peer>| {
        let at = peer.as_ref().and_then(|peer| peer.address.as_ref()?.address.as_ref());
        at.map_or_else(String::new, |address::Address::SocketAddress(at)| match at.port_specifier {
            Some(PortSpecifier::PortValue(port)) => format!("{}:{port}", at.address),
            _ => at.address.clone(),
        })
    };
    let (source, destination) = (address(&attributes.source), address(&attributes.destination));
    let http = attributes.request.and_then(|request| request.http).unwrap_or_default();
    let header = |name: &str| http.headers.get(name).cloned().unwrap_or_default();
    let told = TOLD.map(|name| format!("{name}={}", header(name)));
    let raw = String::from_utf8_lossy(&http.raw_body).into_owned();
    let asked = [source, destination, http.method.clone(), http.path.clone(), http.host.clone()];
    let pseudo = [header(":method"), header(":path"), header(":authority"), http.body.clone(), raw];
    let told = line(asked.into_iter().chain(told).chain(pseudo));
    let decision = header(DECIDE);
    if decision == "fail" {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", http::HeaderValue::from_static("14"));
        return grpc(Bytes::new(), trailers);
    }
    let message = decided(&decision, told).encode_to_vec();
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).expect("a short message"));
    framed.put_slice(&message);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    grpc(framed.freeze(), trailers)
}

fn grpc(bytes: Bytes, trailers: HeaderMap) -> Response<Body> {
    let response = Response::builder().header("content-type", "application/grpc");
    response.body(body(bytes, Some(trailers))).expect("an answer")
}

fn decided(decision: &str, told: String) -> CheckResponse {
    use HeaderAppendAction::{
        AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists, OverwriteIfExistsOrAdd as Overwrite,
    };
    let option =
        |key: &str, value: &str, append: Option<bool>, action: HeaderAppendAction| HeaderValueOption {
            header: Some(HeaderValue { key: key.into(), value: value.into(), raw_value: Vec::new() }),
            append,
            append_action: action.into(),
        };
    let plain = |key: &str, value: &str| option(key, value, None, AppendIfExistsOrAdd);
    if decision == "allow" {
        let parameter = |key: &str, value: &str| QueryParameter { key: key.into(), value: value.into() };
        let ok = OkHttpResponse {
            headers: vec![
                plain("x-user", &told),
                option("x-team", "more", Some(true), AppendIfExistsOrAdd),
                option("x-set-a", "absent", None, AddIfAbsent),
                option("x-set-b", "there", None, OverwriteIfExists),
                option("x-set-c", "always", None, Overwrite),
            ],
            headers_to_remove: vec!["x-remove".into(), "cookie".into()],
            response_headers_to_add: vec![
                plain("x-seen", "by-provider"),
                plain("x-seen", "again"),
                option("x-seen", "not", None, AddIfAbsent),
                option("x-absent", "absent", None, AddIfAbsent),
                option("x-none", "there", None, OverwriteIfExists),
                option("x-always", "always", None, Overwrite),
            ],
            query_parameters_to_set: vec![parameter("team", "red")],
            query_parameters_to_remove: vec!["gone".into()],
            ..OkHttpResponse::default()
        };
        return CheckResponse {
            status: Some(Status::default()),
            http_response: Some(HttpResponse::OkResponse(ok)),
            ..CheckResponse::default()
        };
    }
    let code = match decision {
        "found" => 302,
        "slowly" => 429,
        _ => 0,
    };
    let denied = DeniedHttpResponse {
        status: (code != 0).then_some(HttpStatus { code }),
        headers: vec![
            plain("x-why", "because"),
            plain("x-why", "of that"),
            option("location", "/login", Some(false), AppendIfExistsOrAdd),
        ],
        body: told,
    };
    CheckResponse {
        status: Some(Status { code: 7, ..Status::default() }),
        http_response: Some(HttpResponse::DeniedResponse(denied)),
        ..CheckResponse::default()
    }
}

/// How our side asks it.
#[derive(Debug)]
pub struct Asking;

impl Callout for Asking {
    fn call(&self, request: CalloutRequest) -> CalloutFuture {
        Box::pin(async move {
            tokio::time::timeout(request.timeout, ask(request.http2, request.request))
                .await
                .map_err(|_| CalloutError::Timeout(request.timeout))?
                .map_err(|error| CalloutError::Unreachable(format!("{error:#}")))
        })
    }
}

async fn ask(http2: bool, request: Request<Bytes>) -> Result<CalloutAnswer> {
    let stream = TcpStream::connect(address()).await?;
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO))?;
    let stream = TokioIo::new(stream);
    let mut request = request.map(Full::new);
    let response = if http2 {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
        tokio::spawn(connection);
        sender.send_request(request).await?
    } else {
        let authority = request.uri().authority().context("no host")?.to_string();
        let path = request.uri().path_and_query().context("no path")?.to_string();
        request.headers_mut().insert(HeaderName::from_static("host"), authority.parse()?);
        *request.uri_mut() = path.parse()?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
        tokio::spawn(connection);
        sender.send_request(request).await?
    };
    let (head, body) = response.into_parts();
    let body = body.collect().await?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    Ok(CalloutAnswer { response: Response::from_parts(head, body.to_bytes()), trailers })
}
