//! What the tests of the hub stand on: a small mesh, upstreams on real sockets, and clients on in-memory streams.

use crate::{RouteTable, Site, SiteHandle, Worker, WorkerSettings, serve};
use arc_swap::ArcSwap;
use bytes::Bytes;
use cairn_filter::{
    Chain, Connection, Exchange, Factory, Filter, LocalReply, Part, Peer, Phases, RequestHead, ResponseHead,
    Verdict,
};
use cairn_mesh::{
    AppProtocol, Change, HttpRoute, Identity, LoadBalancing, NetworkAddress, PathNormalization, PortMapping,
    ResourceName, Service, ServicePort, Store, Workload,
};
use cairn_net::{Drain, DrainTrigger, drain};
use cairn_telemetry::{HttpExplanation, Observe, Telemetry, TelemetrySettings};
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tokio::io::DuplexStream;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

pub(crate) const HOST: &str = "cart.shop.svc.cluster.local";
pub(crate) const PORT: u16 = 80;

pub(crate) type Body = BoxBody<Bytes, hyper::Error>;

pub(crate) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).map_err(|never| match never {}).boxed()
}

/// A plain HTTP server, both versions, and how many connections it has accepted.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    pub(crate) accepted: Arc<AtomicUsize>,
}

impl Upstream {
    pub(crate) async fn start<F>(answer: F) -> Self
    where
        F: Fn(Request<Incoming>) -> BoxFuture<'static, Response<Body>> + Clone + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Relaxed);
                let answer = answer.clone();
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, hyper::Error>(answer.await) }
                });
                tokio::spawn(async move {
                    let mut first = [0; 3];
                    let count = stream.peek(&mut first).await.unwrap();
                    let stream = TokioIo::new(stream);
                    let ended = if first[..count] == *b"PRI" {
                        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        builder.serve_connection(stream, service).await
                    } else {
                        hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await
                    };
                    // A client that goes away is no concern of the upstream's.
                    drop(ended);
                });
            }
        });
        Self { address, accepted }
    }

    /// An upstream that says what it saw, one line per thing.
    pub(crate) async fn telling() -> Self {
        Self::start(|request| Box::pin(async move { tell(request).await })).await
    }

    /// An upstream that sends back the body as it comes.
    pub(crate) async fn echo() -> Self {
        Self::start(|request| Box::pin(async move { Response::new(request.into_body().boxed()) })).await
    }

    pub(crate) fn connections(&self) -> usize {
        self.accepted.load(Relaxed)
    }
}

async fn tell(request: Request<Incoming>) -> Response<Body> {
    let mut text = format!("{} {} {:?}\n", request.method(), request.uri(), request.version());
    for (name, value) in request.headers() {
        text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
    }
    let body = request.into_body().collect().await.unwrap().to_bytes();
    text.push_str(&String::from_utf8_lossy(&body));
    Response::builder()
        .header("server", "the-app")
        .header("connection", "x-hop")
        .header("x-hop", "1")
        .header("x-end", "2")
        .body(full(text))
        .unwrap()
}

/// An address where nobody listens.
pub(crate) async fn closed_port() -> SocketAddr {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    // Bound, and not listening, as long as the tests run: nobody else is given the port, and who connects is refused.
    std::mem::forget(socket);
    address
}

/// A mesh with one service, and the worker that serves it.
pub(crate) struct Mesh {
    pub(crate) worker: Arc<Worker>,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) site: SiteHandle,
    pub(crate) trigger: DrainTrigger,
    pub(crate) drain: Drain,
    service: Arc<Service>,
}

/// What a test wants of its mesh.
pub(crate) struct Plan {
    pub(crate) endpoints: Vec<SocketAddr>,
    pub(crate) protocol: AppProtocol,
    pub(crate) filters: Vec<Arc<dyn Factory>>,
    pub(crate) routes: Vec<Arc<HttpRoute>>,
    pub(crate) settings: WorkerSettings,
    pub(crate) observer: Option<Arc<dyn Observe>>,
}

impl Plan {
    pub(crate) fn to(endpoint: SocketAddr) -> Self {
        Self::to_all(&[endpoint])
    }

    pub(crate) fn to_all(endpoints: &[SocketAddr]) -> Self {
        Self {
            endpoints: endpoints.to_vec(),
            protocol: AppProtocol::Http11,
            filters: Vec::new(),
            routes: Vec::new(),
            settings: WorkerSettings::default(),
            observer: None,
        }
    }
}

impl Mesh {
    pub(crate) fn new(plan: Plan) -> Self {
        let key = ResourceName::new("shop", HOST);
        let service = Service {
            name: "cart".into(),
            namespace: "shop".into(),
            hostname: HOST.into(),
            vips: vec![NetworkAddress { network: "".into(), address: "10.96.0.1".parse().unwrap() }],
            ports: vec![ServicePort { port: PORT, target_port: 0, protocol: plan.protocol }],
            subject_alt_names: Vec::new(),
            waypoint: None,
            load_balancing: LoadBalancing::default(),
            canonical: true,
            ..Service::default()
        };
        let mut store = Store::new();
        let endpoints = plan.endpoints.iter().enumerate().map(|(index, endpoint)| {
            let identity = Identity::new("cluster.local", "shop", "cart").unwrap();
            let port = PortMapping { service_port: PORT, target_port: endpoint.port() };
            Change::Workload(Workload {
                addresses: vec![endpoint.ip()],
                services: vec![(key.clone(), vec![port])],
                ..Workload::new(format!("uid-{index}"), format!("cart-{index}"), identity)
            })
        });
        store.apply(endpoints.chain([Change::Service(service.clone())]));
        let service = Arc::new(service);
        let telemetry = Telemetry::new("test", "0", &TelemetrySettings::default(), std::io::sink());
        let site = Site {
            chain: Chain::new(plan.filters),
            routes: RouteTable::compile(&plan.routes, Some(&service), PORT, "cluster.local"),
            service: Some(Arc::clone(&service)),
            port: PORT,
            protocol: plan.protocol,
            normalization: PathNormalization::Base,
            explain_to: Arc::default(),
            viewpoint: None,
            observer: plan.observer,
        };
        let snapshot = Arc::new(ArcSwap::from_pointee(store.snapshot()));
        let worker = Worker::new(plan.settings, snapshot, None, Arc::clone(&telemetry));
        let (trigger, drain) = drain();
        Self { worker, telemetry, site: Arc::new(ArcSwap::from_pointee(site)), trigger, drain, service }
    }

    /// A new connection from a client: the bytes of its tunnel.
    pub(crate) fn connect(&self) -> DuplexStream {
        let identity = Identity::new("cluster.local", "shop", "web").unwrap();
        let connection = Connection {
            id: 1,
            worker: 0,
            source: Peer {
                address: "10.0.0.1:4000".parse().unwrap(),
                identity: Some(identity.clone()),
                workload: Some(Arc::new(Workload::new("web-uid", "web-1", identity))),
            },
            destination: "10.96.0.1:80".parse().unwrap(),
            service: Some(Arc::clone(&self.service)),
            local: None,
            callout: Arc::new(cairn_filter::NoCallout),
        };
        let (client, server) = tokio::io::duplex(64 << 10);
        let (site, worker) = (Arc::clone(&self.site), Arc::clone(&self.worker));
        tokio::spawn(serve(server, Arc::new(connection), site, worker, self.drain.clone()));
        client
    }

    pub(crate) async fn http1(&self) -> http1::SendRequest<Body> {
        let (sender, connection) = http1::handshake(TokioIo::new(self.connect())).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    pub(crate) async fn http2(&self) -> http2::SendRequest<Body> {
        let stream = TokioIo::new(self.connect());
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    /// One request on a connection of its own.
    pub(crate) async fn request(&self, request: Request<Body>) -> (http::response::Parts, String) {
        let response = self.http1().await.send_request(request).await.unwrap();
        text_of(response).await
    }

    pub(crate) async fn get(&self, path: &str) -> (http::response::Parts, String) {
        self.request(get(path)).await
    }

    /// The record of the last exchange. It is finished when its client has the whole response.
    pub(crate) fn last(&self) -> HttpExplanation {
        self.telemetry.exchanges.list().into_iter().next().unwrap()
    }
}

pub(crate) fn get(path: &str) -> Request<Body> {
    Request::builder().uri(path).header("host", "cart").body(full("")).unwrap()
}

pub(crate) async fn text_of(response: Response<Incoming>) -> (http::response::Parts, String) {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (parts, String::from_utf8(body.to_vec()).unwrap())
}

type OnRequest = Arc<dyn Fn(&mut RequestHead) -> Verdict + Send + Sync>;
type OnResponse = Arc<dyn Fn(&mut ResponseHead) -> Verdict + Send + Sync>;
type OnBody = Arc<dyn Fn(Part<'_>) -> Verdict + Send + Sync>;

/// A filter made of closures. It notes what it sees, and tells when it is finished.
#[derive(Clone)]
pub(crate) struct Scripted {
    name: Arc<str>,
    on_request: OnRequest,
    on_response: OnResponse,
    on_body: Option<OnBody>,
    finished: Option<mpsc::UnboundedSender<u16>>,
}

impl Scripted {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            on_request: Arc::new(|_| Verdict::Continue),
            on_response: Arc::new(|_| Verdict::Continue),
            on_body: None,
            finished: None,
        }
    }

    pub(crate) fn on_request(
        mut self,
        on_request: impl Fn(&mut RequestHead) -> Verdict + Send + Sync + 'static,
    ) -> Self {
        self.on_request = Arc::new(on_request);
        self
    }

    pub(crate) fn on_response(
        mut self,
        on_response: impl Fn(&mut ResponseHead) -> Verdict + Send + Sync + 'static,
    ) -> Self {
        self.on_response = Arc::new(on_response);
        self
    }

    /// What it does with bodies and their trailers, on both sides, and when it is resumed.
    pub(crate) fn on_body(mut self, on_body: impl Fn(Part<'_>) -> Verdict + Send + Sync + 'static) -> Self {
        self.on_body = Some(Arc::new(on_body));
        self
    }

    /// The statuses of finished exchanges.
    pub(crate) fn finished(&mut self) -> mpsc::UnboundedReceiver<u16> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.finished = Some(sender);
        receiver
    }

    pub(crate) fn replies(status: u16) -> Self {
        let status = StatusCode::from_u16(status).unwrap();
        Self::new("replier")
            .on_request(move |_| Verdict::Reply(Box::new(LocalReply::text(status, "said no", "scripted"))))
    }
}

impl Factory for Scripted {
    fn name(&self) -> &str {
        &self.name
    }

    fn phases(&self) -> Phases {
        let heads = Phases::REQUEST_HEADERS | Phases::RESPONSE_HEADERS | Phases::FINISH;
        if self.on_body.is_some() { Phases::all() } else { heads }
    }

    fn start(&self, _: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(self.clone()))
    }
}

impl Filter for Scripted {
    fn request_headers(&mut self, exchange: &mut Exchange, head: &mut RequestHead, _: bool) -> Verdict {
        exchange.note(&self.name, "request");
        (self.on_request)(head)
    }

    fn response_headers(&mut self, exchange: &mut Exchange, head: &mut ResponseHead, _: bool) -> Verdict {
        exchange.note(&self.name, "response");
        (self.on_response)(head)
    }

    fn body(&mut self, _: &mut Exchange, part: Part<'_>) -> Verdict {
        self.on_body.as_ref().map_or(Verdict::Continue, |on_body| on_body(part))
    }

    fn trailers(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.body(exchange, part)
    }

    fn resumed(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        self.body(exchange, part)
    }

    fn finish(&mut self, exchange: &mut Exchange) {
        if let Some(finished) = &self.finished {
            finished.send(exchange.status.map_or(0, |status| status.as_u16())).unwrap();
        }
    }
}
