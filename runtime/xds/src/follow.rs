//! The client: keeps a [`Mesh`] in step with a control plane, for ever.
//!
//! Two halves talk over bounded channels: [`Connector`] owns the network (connect, read, back off), and the loop in
//! [`follow`] owns the state (session, gate, store) and its deadlines, which run on while there is no connection.

use crate::counts::Termination;
use crate::demand::{Demand, Order};
use crate::kept::{self, KeepSettings, Keeper};
use crate::mesh::{Mesh, Writer};
use crate::object::value_to_proto;
use crate::session::{ObjectDecoder, Received, Session};
use cairn_identity::{Roots, Token};
use cairn_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use cairn_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use prost::Message;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, AsciiMetadataKey, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status, Streaming};
use tracing::{debug, info, warn};

/// The largest response that is read, as a ztunnel's.
const RESPONSE_BYTES_MAX: usize = 200 << 20;
/// Responses that wait for the state to take them.
const RESPONSES_MAX: usize = 4;
/// Requests that wait for the network: the subscriptions, and one answer per response.
const REQUESTS_MAX: usize = 256;
/// Names that are asked for in one request.
const ORDERS_TOGETHER_MAX: usize = 1024;
/// How long a connection may take, as a ztunnel's.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How much a server may send ahead: the first state of a large mesh is tens of megabytes.
const STREAM_WINDOW: u32 = 4 << 20;
/// A connection that lived so long was a good one: the next attempt is immediate.
const GOOD_CONNECTION: Duration = Duration::from_secs(1);

/// Where the control plane is, who we are, and what we want.
#[derive(Clone, Debug)]
pub struct FollowSettings {
    /// `https://host:port`.
    pub address: String,
    /// The roots of the server's certificate; read at each connect.
    pub roots: Roots,
    /// The bearer token; read at each connect.
    pub token: Option<Token>,
    /// The name that the server's certificate is for, if that is not the address's.
    pub host: Option<String>,
    /// What the call carries beside the token.
    pub headers: Vec<(String, String)>,
    /// Sent as `clusterid` with each call, unless empty.
    pub cluster_id: String,
    /// The node's id, `<type>~<ip>~<pod>.<namespace>~<domain>`.
    pub node_id: String,
    /// The node's metadata.
    pub node_metadata: Vec<(String, serde_json::Value)>,
    /// The types of objects to subscribe to beside workloads and L4 policies, `<group>/<version>/<Kind>`.
    pub object_types: Vec<String>,
    /// The first delay before a new attempt; it doubles up to `backoff_max`, each time with up to half of it
    /// added at random. Default 10 ms.
    pub backoff_min: Duration,
    /// The longest delay. Default 15 s.
    pub backoff_max: Duration,
    /// Whether and where the last state is kept on disk, for a start without the control plane. Default: nowhere.
    pub keep: Option<KeepSettings>,
}

impl FollowSettings {
    /// Settings with defaults for all but where and who.
    pub fn new(address: impl Into<String>, roots: impl Into<Roots>, node_id: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            roots: roots.into(),
            token: None,
            host: None,
            headers: Vec::new(),
            cluster_id: String::new(),
            node_id: node_id.into(),
            node_metadata: Vec::new(),
            object_types: Vec::new(),
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_secs(15),
            keep: None,
        }
    }

    fn node(&self) -> Node {
        let fields =
            self.node_metadata.iter().map(|(key, value)| (key.clone(), value_to_proto(value))).collect();
        Node {
            id: self.node_id.clone(),
            cluster: String::new(),
            metadata: Some(prost_types::Struct { fields }),
        }
    }
}

/// Why a connection to the control plane ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// The address is not `https://host:port`.
    #[error("`{address}` is not https://host:port")]
    Address {
        /// The address.
        address: String,
    },
    /// It did not come about: TCP, TLS or HTTP/2 failed.
    #[error("cannot connect")]
    Connect(#[from] tonic::transport::Error),
    /// The file of roots or of the token could not be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The token or cluster id cannot be sent.
    #[error("`{what}` holds characters that a header cannot")]
    Header {
        /// Which.
        what: &'static str,
    },
    /// The server ended the call, or never answered it.
    #[error("the call ended")]
    Call(#[source] Box<Status>),
    /// The server ended the call in order.
    #[error("the server closed the stream")]
    Closed,
    /// The server reads too slowly.
    #[error("the server does not take our answers")]
    Stuck,
}

enum Event {
    /// A connection is being made; requests go here.
    Connected(mpsc::Sender<DeltaDiscoveryRequest>),
    Response(Box<DeltaDiscoveryResponse>),
}

/// Follows the control plane until `drain` resolves, reconnecting for ever. Of a mesh on demand only policies are
/// followed, and nothing of it is kept on disk.
pub async fn follow(
    settings: FollowSettings,
    decoder: Option<ObjectDecoder>,
    mesh: Arc<Mesh>,
    drain: impl Future<Output = ()>,
) {
    let mut session = Session::new(settings.node(), settings.object_types.iter().cloned());
    let mut writer = Writer::new(Arc::clone(&mesh), session.subscription_count());
    let orders = mesh.demand().and_then(Demand::orders);
    if mesh.is_on_demand()
        && let Some(index) = session.ask_by_name()
    {
        writer.expect_nothing_of(index);
    }
    let keep = settings.keep.clone().filter(|_| !mesh.is_on_demand());
    let (events, received) = mpsc::channel(RESPONSES_MAX);
    let connector = Connector { settings, mesh: Arc::clone(&mesh), events };
    let state =
        State { session, writer, decoder, mesh, keeper: None, requests: None, orders, answered: Vec::new() };
    tokio::select! {
        () = drain => {}
        () = connector.run() => {}
        () = state.run(keep, received) => {}
    }
}

/// The half that owns the state.
struct State {
    session: Session,
    writer: Writer,
    decoder: Option<ObjectDecoder>,
    mesh: Arc<Mesh>,
    keeper: Option<Keeper>,
    /// The connection's.
    requests: Option<mpsc::Sender<DeltaDiscoveryRequest>>,
    /// What is to be asked for by name.
    orders: Option<mpsc::Receiver<Order>>,
    /// Names about which something was said that is not shown yet.
    answered: Vec<(String, bool)>,
}

impl State {
    async fn run(mut self, keep: Option<KeepSettings>, mut events: mpsc::Receiver<Event>) {
        if let Some(keep) = keep {
            self.restore(keep).await;
        }
        loop {
            let due = self.keeper.as_ref().and_then(Keeper::deadline);
            let event = tokio::select! {
                event = events.recv() => event,
                order = next_order(&mut self.orders) => {
                    self.send_orders(order);
                    continue;
                }
                () = sleep_until(self.writer.deadline()) => {
                    self.writer.tick(Instant::now());
                    self.tell_answered();
                    continue;
                }
                () = sleep_until(due) => {
                    self.keep();
                    continue;
                }
            };
            match event {
                None => return,
                Some(Event::Connected(sender)) => {
                    self.writer.reconnected();
                    let waiting = self.mesh.demand().map(Demand::reconnected).unwrap_or_default();
                    let subscriptions = self.session.connect(&waiting);
                    let sent = subscriptions.into_iter().all(|request| sender.try_send(request).is_ok());
                    self.requests = sent.then_some(sender);
                }
                Some(Event::Response(response)) => {
                    let received = self.session.receive(*response, self.decoder.as_ref());
                    self.send(received.answer.clone());
                    self.take(received);
                }
            }
        }
    }

    /// Sends a request, if there is a connection. A full queue means a server that does not read: without its sender the
    /// connection ends.
    fn send(&mut self, request: DeltaDiscoveryRequest) {
        self.requests = self.requests.take().filter(|sender| sender.try_send(request).is_ok());
    }

    /// Asks for what connections wait for, all that has come together in one request.
    fn send_orders(&mut self, first: Order) {
        if let Some(demand) = self.mesh.demand() {
            demand.expire(&self.mesh.snapshot(), Instant::now());
        }
        let (mut asked, mut given_up) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        while let Some(order) = next {
            match order {
                Order::Ask(wanted) => asked.push(wanted.to_string()),
                Order::GiveUp(wanted) => given_up.push(wanted.to_string()),
            }
            let room = asked.len() + given_up.len() < ORDERS_TOGETHER_MAX;
            next = self.orders.as_mut().filter(|_| room).and_then(|orders| orders.try_recv().ok());
        }
        // What is given up and asked for again since is asked for.
        given_up.retain(|name| !asked.contains(name));
        // Without a connection it is asked for with the next one: it waits.
        let request = self.session.ask(asked, given_up);
        self.send(request);
    }

    /// Tells those who wait that what they asked for is shown.
    fn tell_answered(&mut self) {
        if self.answered.is_empty() || !self.writer.is_settled() {
            return;
        }
        if let Some(demand) = self.mesh.demand() {
            let now = Instant::now();
            for (name, is_there) in std::mem::take(&mut self.answered) {
                demand.answered(&name, is_there, now);
            }
        }
    }

    /// Begins with what was kept, and keeps what comes.
    async fn restore(&mut self, keep: KeepSettings) {
        self.session.hold_records();
        let kept = kept::load(&keep).await;
        let now = Instant::now();
        if let Some(kept) = kept {
            let received = self.session.restore(kept.resources, self.decoder.as_ref());
            self.writer.restore(received, kept.written, now + keep.wait);
        }
        self.keeper = Some(Keeper::new(keep, now));
    }

    fn take(&mut self, mut received: Received) {
        let now = Instant::now();
        self.answered.append(&mut received.answered);
        self.writer.take(received, now);
        self.tell_answered();
        if let (Some(keeper), true) = (&mut self.keeper, self.writer.is_live()) {
            keeper.changed(now);
        }
    }

    fn keep(&mut self) {
        let is_connected = self.requests.as_ref().is_some_and(|sender| !sender.is_closed());
        if let Some(keeper) = &mut self.keeper {
            keeper.write(self.session.records(), is_connected, &self.mesh, Instant::now());
        }
    }
}

async fn next_order(orders: &mut Option<mpsc::Receiver<Order>>) -> Order {
    let next = match orders {
        Some(orders) => orders.recv().await,
        None => None,
    };
    match next {
        Some(order) => order,
        // Nothing is asked for, or nobody is left to ask.
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// The half that owns the network.
struct Connector {
    settings: FollowSettings,
    /// Counts what happens.
    mesh: Arc<Mesh>,
    events: mpsc::Sender<Event>,
}

impl Connector {
    async fn run(self) {
        let mut delay = self.settings.backoff_min;
        loop {
            let started = Instant::now();
            let ended = self.connection().await;
            let lived = started.elapsed();
            if let Err(error) = &ended {
                self.mesh.counts().ended(termination(error));
            }
            match ended {
                Ok(()) => return,
                Err(error) if is_routine(&error) => info!(error = %Chain(&error), "control plane reconnects"),
                Err(error) => warn!(error = %Chain(&error), ?delay, "control plane is not reachable"),
            }
            if lived >= GOOD_CONNECTION {
                delay = self.settings.backoff_min;
            }
            tokio::time::sleep(delay.mul_f64(1.0 + fastrand::f64() / 2.0)).await;
            delay = (delay * 2).min(self.settings.backoff_max);
        }
    }

    /// One connection from its beginning to its end; `Ok` when nobody wants to hear of it any more.
    async fn connection(&self) -> Result<(), FollowError> {
        let channel = self.channel().await?;
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX);
        let (sender, requests) = mpsc::channel(REQUESTS_MAX);
        let stuck = sender.downgrade();
        // The state queues the subscriptions before the call begins: some servers answer only after the first.
        if self.events.send(Event::Connected(sender)).await.is_err() {
            return Ok(());
        }
        let request = self.request(ReceiverStream::new(requests))?;
        let call = client.delta_aggregated_resources(request);
        let mut responses: Streaming<DeltaDiscoveryResponse> = call.await.map_err(call_error)?.into_inner();
        debug!(address = %self.settings.address, "control plane connected");
        loop {
            let Some(response) = responses.message().await.map_err(call_error)? else {
                return Err(FollowError::Closed);
            };
            self.mesh.counts().received(&response.type_url, response.encoded_len());
            if stuck.upgrade().is_none() {
                return Err(FollowError::Stuck);
            }
            if self.events.send(Event::Response(Box::new(response))).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn channel(&self) -> Result<Channel, FollowError> {
        let roots = &self.settings.roots;
        let roots = Certificate::from_pem(roots.read().map_err(file(roots.name()))?);
        let mut tls = ClientTlsConfig::new().ca_certificate(roots);
        if let Some(host) = &self.settings.host {
            tls = tls.domain_name(host.as_str());
        }
        let channel = Endpoint::from_shared(https(&self.settings.address)?)?
            .tls_config(tls)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(Some(Duration::from_secs(300)))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(2 * STREAM_WINDOW);
        Ok(channel.connect().await?)
    }

    fn request<T>(&self, body: T) -> Result<Request<T>, FollowError> {
        let mut request = Request::new(body);
        let header =
            |what, text: &str| text.parse::<MetadataValue<Ascii>>().map_err(|_| FollowError::Header { what });
        if let Some(token) = &self.settings.token {
            let text = token.read().map_err(file(token.name()))?;
            let mut bearer = header("token", &format!("Bearer {text}"))?;
            bearer.set_sensitive(true);
            request.metadata_mut().insert("authorization", bearer);
        }
        if !self.settings.cluster_id.is_empty() {
            request.metadata_mut().insert("clusterid", header("cluster id", &self.settings.cluster_id)?);
        }
        for (name, value) in &self.settings.headers {
            let name: AsciiMetadataKey =
                name.parse().map_err(|_| FollowError::Header { what: "a header's name" })?;
            request.metadata_mut().insert(name, header("a header", value)?);
        }
        Ok(request)
    }
}

/// The address with its scheme; what names another scheme is refused, since a token goes there.
fn https(address: &str) -> Result<String, FollowError> {
    match address.split_once("://") {
        None => Ok(format!("https://{address}")),
        Some(("https", _)) => Ok(address.to_owned()),
        Some(_) => Err(FollowError::Address { address: address.to_owned() }),
    }
}

fn file(path: &Path) -> impl FnOnce(std::io::Error) -> FollowError {
    let path = path.to_owned();
    move |source| FollowError::File { path, source }
}

fn call_error(status: Status) -> FollowError {
    FollowError::Call(Box::new(status))
}

/// Whether the end of a connection is an everyday one: servers close streams from time to time to spread their load.
fn is_routine(error: &FollowError) -> bool {
    use tonic::Code;
    let status = match error {
        FollowError::Closed => return true,
        FollowError::Call(status) => status,
        _ => return false,
    };
    matches!(status.code(), Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable)
}

fn termination(error: &FollowError) -> Termination {
    match error {
        FollowError::Closed => Termination::Complete,
        FollowError::Call(_) if is_routine(error) => Termination::Reconnect,
        FollowError::Call(_) | FollowError::Stuck => Termination::Error,
        FollowError::Address { .. }
        | FollowError::Connect(_)
        | FollowError::File { .. }
        | FollowError::Header { .. } => Termination::ConnectionError,
    }
}

/// An error with its sources, on one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
