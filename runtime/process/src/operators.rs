//! The HTTP servers for operators: readiness (15021), metrics (15020) and admin (15000).

use crate::{Liveness, Readiness};
use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use cairn_net::ListenOptions;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tower_http::compression::CompressionLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::{DefaultOnFailure, TraceLayer};

/// Answers of operators' servers take at most this long to make.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// A pause after a failed accept, so that running out of descriptors is not a hot loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Operators send small requests.
const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// Why an operators' server did not start or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// The port cannot be had.
    #[error("cannot listen on {address} for {what}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the port is for.
        what: &'static str,
        /// Why.
        #[source]
        source: cairn_net::NetError,
    },
}

/// What is served to operators, and where.
pub struct Operators {
    /// `/healthz/ready` and `/healthz/live`; Istio's port is 15021.
    pub readiness_address: SocketAddr,
    /// `/metrics` and `/stats/prometheus`; Istio's port is 15020.
    pub metrics_address: SocketAddr,
    /// The same once more, where scrapers expect it of a waypoint; Istio's port is 15090.
    pub metrics_address_too: Option<SocketAddr>,
    /// The binary's own routes, `/debug/memory` and `/debug/pprof/profile`; Istio's port is 15000, on loopback only.
    pub admin_address: SocketAddr,
    /// What readiness waits for.
    pub readiness: Readiness,
    /// Whether the process still does its work.
    pub liveness: Liveness,
    /// Renders the metrics in Prometheus' text format.
    pub metrics: Text,
    /// The binary's own routes.
    pub admin: Router,
}

/// Renders a text when asked.
pub type Text = Arc<dyn Fn() -> String + Send + Sync>;

/// Opens a port for operators.
pub type Open<'a> = &'a dyn Fn(SocketAddr) -> Result<Arc<TcpListener>, cairn_net::NetError>;

/// Servers for operators that run. Dropping this lets them.
pub struct Serving(Vec<AbortHandle>);

impl Serving {
    /// Closes the ports; whoever is connected is answered still.
    pub fn close(self) {
        for server in self.0 {
            server.abort();
        }
    }
}

impl Operators {
    /// Binds all ports and serves them on the current runtime until it ends.
    ///
    /// # Errors
    /// When a port cannot be had.
    pub fn start(self) -> Result<(), OperatorError> {
        let open = |address| cairn_net::listen(address, &ListenOptions::default()).map(Arc::new);
        self.start_at(&open).map(drop)
    }

    /// Serves on ports that come from elsewhere.
    ///
    /// # Errors
    /// When a port cannot be had.
    pub fn start_at(self, open: Open<'_>) -> Result<Serving, OperatorError> {
        let (readiness, liveness) = (self.readiness, self.liveness);
        let ready = Router::new()
            .route("/healthz/ready", get(move || std::future::ready(answer_ready(&readiness))))
            .route("/healthz/live", get(move || std::future::ready(answer_live(&liveness))));
        let metrics = self.metrics;
        let render = move |headers: HeaderMap| std::future::ready(answer_metrics(&headers, metrics()));
        let metrics =
            Router::new().route("/metrics", get(render.clone())).route("/stats/prometheus", get(render));
        let serve = |address, what, router| serve(open, address, what, router);
        let mut servers = vec![serve(self.readiness_address, "readiness", ready)?];
        if let Some(address) = self.metrics_address_too {
            servers.push(serve(address, "metrics", metrics.clone())?);
        }
        servers.push(serve(self.metrics_address, "metrics", metrics)?);
        let admin = self.admin.merge(debug());
        servers.push(serve(self.admin_address, "admin", admin)?);
        Ok(Serving(servers))
    }
}

/// What the process itself is asked about, whichever it is.
fn debug() -> Router {
    Router::new()
        .route("/debug/memory", get(crate::memory::memory))
        .route("/debug/pprof/profile", get(crate::profile::profile))
}

/// The layers every operators' server has: tracing, a time limit, a size limit, compression.
pub fn admin_layers(router: Router) -> Router {
    router
        .layer(CompressionLayer::new())
        .layer(RequestBodyLimitLayer::new(REQUEST_BYTES_MAX))
        .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, ANSWER_MAX))
        // Not ready yet is a 500 that probes see again and again; it is nothing to act on.
        .layer(TraceLayer::new_for_http().on_failure(DefaultOnFailure::new().level(tracing::Level::DEBUG)))
}

fn serve(
    open: Open<'_>,
    address: SocketAddr,
    what: &'static str,
    router: Router,
) -> Result<AbortHandle, OperatorError> {
    let listener = open(address).map_err(|source| OperatorError::Listen { address, what, source })?;
    let router = admin_layers(router);
    let server = tokio::spawn(async move {
        if let Err(error) = axum::serve(Shared(listener), router).await {
            tracing::error!(%address, what, %error, "operators' server ended");
        }
    });
    Ok(server.abort_handle())
}

/// A listener that others may hold as well.
struct Shared(Arc<TcpListener>);

impl axum::serve::Listener for Shared {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => {
                    tracing::debug!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

fn answer_ready(readiness: &Readiness) -> Response {
    let pending = readiness.pending();
    if pending.is_empty() {
        return (StatusCode::OK, "ready\n").into_response();
    }
    let text = format!("not ready, pending: {}\n", pending.join(", "));
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

fn answer_live(liveness: &Liveness) -> Response {
    let stuck = liveness.stuck();
    if stuck.is_empty() {
        return (StatusCode::OK, "live\n").into_response();
    }
    let names: Vec<String> = stuck.iter().map(|number| format!("worker-{number}")).collect();
    let text = format!("stuck: {}\n", names.join(", "));
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

/// In the form that the scraper asks for: OpenMetrics, or Prometheus' older text.
fn answer_metrics(headers: &HeaderMap, text: String) -> Response {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let is_open = accepted.flat_map(|value| value.split(',')).any(|range| {
        let kind = range.split(';').next().unwrap_or_default();
        kind.trim().eq_ignore_ascii_case("application/openmetrics-text")
    });
    let (kind, text) = match is_open {
        true => ("application/openmetrics-text; version=1.0.0; charset=utf-8", open_metrics(&text)),
        false => ("text/plain; version=0.0.4; charset=utf-8", text),
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// Prometheus' text as OpenMetrics: a counter's family is named without the `_total` of its samples, what has no type is
/// `unknown`, and there is an end mark.
fn open_metrics(text: &str) -> String {
    let mut open = String::with_capacity(text.len() + 8);
    // The help of a family stands before its type, which says how the family is called.
    let mut help = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or((rest, "untyped"));
            let (family, kind) = match (name.strip_suffix("_total"), kind) {
                (Some(family), "counter") => (family, "counter"),
                // Without that ending it is no counter to OpenMetrics.
                (None, "counter") | (_, "untyped") => (name, "unknown"),
                (_, other) => (name, other),
            };
            if let Some((_, help)) = help.take() {
                open.extend(["# HELP ", family, " ", help, "\n"]);
            }
            open.extend(["# TYPE ", family, " ", kind, "\n"]);
        } else if !line.starts_with('#') && !line.is_empty() {
            open.extend([line, "\n"]);
        }
    }
    open + "# EOF\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn scrapers_get_the_form_that_they_ask_for() {
        const TEXT: &str = "# HELP a_total All of it\n# TYPE a_total counter\na_total{x=\"1\"} 2\n\
             # HELP b Now\n# TYPE b gauge\nb 1\n# TYPE c counter\nc 3\n# TYPE d untyped\nd 4\n";
        const OPEN: &str = "# HELP a All of it\n# TYPE a counter\na_total{x=\"1\"} 2\n\
             # HELP b Now\n# TYPE b gauge\nb 1\n# TYPE c unknown\nc 3\n# TYPE d unknown\nd 4\n# EOF\n";
        assert_eq!(open_metrics(TEXT), OPEN);
        for (accept, expected) in [
            (None, "text/plain"),
            (Some("text/plain"), "text/plain"),
            (Some("*/*"), "text/plain"),
            (
                Some(
                    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5",
                ),
                "application/openmetrics-text",
            ),
        ] {
            let accept = accept.map(|accept| (header::ACCEPT, accept.parse().unwrap()));
            let answer = answer_metrics(&accept.into_iter().collect(), TEXT.to_owned());
            let kind = answer.headers()[header::CONTENT_TYPE].to_str().unwrap();
            assert!(kind.starts_with(expected), "{kind}");
        }
    }

    async fn ask(address: SocketAddr) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address).await?;
        let request = "GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    fn operators(address: SocketAddr, who: &'static str) -> Operators {
        let readiness = Readiness::default();
        // Never done.
        let _pending = readiness.wait_for(who);
        Operators {
            readiness_address: address,
            metrics_address: address,
            metrics_address_too: None,
            admin_address: address,
            readiness,
            liveness: Liveness::watch(&[]),
            metrics: Arc::new(String::new),
            admin: Router::new(),
        }
    }

    #[tokio::test]
    async fn ports_that_are_closed_are_another_processs_from_then_on() {
        let any = "127.0.0.1:0".parse().unwrap();
        let listen = |address| cairn_net::listen(address, &ListenOptions::default()).map(Arc::new);
        let ready = listen(any).unwrap();
        let at = ready.local_addr().unwrap();
        let open = |address: SocketAddr| if address == at { Ok(Arc::clone(&ready)) } else { listen(any) };
        let start = |who| {
            let readiness_address = at;
            Operators { readiness_address, ..operators(any, who) }.start_at(&open).unwrap()
        };
        let first = start("first");
        assert!(ask(at).await.unwrap().contains("pending: first"));
        first.close();
        let _second = start("second");
        for _ in 0..8 {
            assert!(ask(at).await.unwrap().contains("pending: second"));
        }
    }
}
