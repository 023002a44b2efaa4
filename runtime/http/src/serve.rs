//! Serving one connection: find out what it speaks, then HTTP or a copy, until it ends, idles too long, or drains.

use crate::sniff::{PREFACE, Sniffed, sniff, sniff_no_more};
use crate::stream::Rewound;
use crate::{SiteHandle, Worker, exchange, tcp};
use bytes::{Bytes, BytesMut};
use cairn_filter::Connection;
use cairn_mesh::AppProtocol;
use cairn_net::Drain;
use cairn_telemetry::{HttpScope, PeerLabels};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

/// What the exchanges of one connection share.
pub(crate) struct Served {
    pub(crate) connection: Arc<Connection>,
    pub(crate) site: SiteHandle,
    pub(crate) worker: Arc<Worker>,
    pub(crate) scope: HttpScope,
    pub(crate) drain: Drain,
    active: AtomicUsize,
    began: AtomicU64,
}

impl Served {
    pub(crate) fn exchange_began(&self) {
        self.active.fetch_add(1, Relaxed);
        self.began.fetch_add(1, Relaxed);
    }

    pub(crate) fn exchange_ended(&self) {
        self.active.fetch_sub(1, Relaxed);
    }

    /// Whether nothing has happened since `began` was what it is in `seen`, which is brought up to date.
    fn is_idle_since(&self, seen: &mut u64) -> bool {
        let before = std::mem::replace(seen, self.began.load(Relaxed));
        self.active.load(Relaxed) == 0 && before == *seen
    }
}

/// As much as is read to find out what a connection speaks.
const SNIFF_BYTES_MAX: usize = 4096;

/// Streams of one downstream HTTP/2 connection, as servers usually allow.
const STREAMS_MAX: u32 = 100;

/// HTTP/2 flow control windows: enough for a fast peer across a zone, and a bound on what one stream may buffer.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Serves `stream`, a connection addressed to `site`, until it is over. When `drain` starts, HTTP finishes the
/// exchanges that are in progress; a copy goes on until its ends close.
pub async fn serve<S>(
    stream: S,
    connection: Arc<Connection>,
    site: SiteHandle,
    worker: Arc<Worker>,
    drain: Drain,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let _held = drain.hold();
    let protocol = site.load().protocol;
    let outcome = match protocol {
        AppProtocol::Tcp | AppProtocol::Tls => {
            tcp::serve(stream, &connection, &site, &worker).await;
            return;
        }
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => {
            tokio::select! {
                biased;
                outcome = declared(stream, worker.settings.downstream_idle) => outcome,
                // It has not asked for anything yet.
                () = drain.started() => return,
            }
        }
        AppProtocol::Unknown => {
            let filtered = !site.load().chain.is_empty();
            undeclared(stream, worker.settings.sniff_wait, filtered).await
        }
    };
    let (sniffed, stream) = match outcome {
        Ok(sniffed) => sniffed,
        Err(error) => {
            debug!(%error, source = %connection.source.address, "connection ended before it said anything");
            return;
        }
    };
    if sniffed == Sniffed::Other {
        tcp::serve(stream, &connection, &site, &worker).await;
        return;
    }
    let labels = PeerLabels::of(connection.source.workload.as_ref(), connection.source.identity.as_ref());
    let scope = HttpScope::new(&worker.telemetry().metrics, labels, connection.service.clone());
    let active = AtomicUsize::new(0);
    let began = AtomicU64::new(0);
    let served = Arc::new(Served { connection, site, worker, scope, drain, active, began });
    if sniffed == Sniffed::Http2 {
        serve_http2(stream, served).await
    } else {
        serve_http1(stream, served).await
    }
}

/// Reads until HTTP/2 with prior knowledge can be told from HTTP/1, on a port that carries HTTP.
async fn declared<S: AsyncRead + Unpin>(
    mut stream: S,
    idle_max: Duration,
) -> io::Result<(Sniffed, Rewound<S>)> {
    let mut read = BytesMut::with_capacity(SNIFF_BYTES_MAX);
    loop {
        let count = timeout(idle_max, stream.read_buf(&mut read)).await??;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let could_be_preface = PREFACE.starts_with(&read) || read.starts_with(PREFACE);
        if !could_be_preface {
            return Ok((Sniffed::Http1, Rewound::new(read.freeze(), stream)));
        }
        if read.starts_with(PREFACE) {
            return Ok((Sniffed::Http2, Rewound::new(read.freeze(), stream)));
        }
    }
}

/// How long a client may be silent where filters must know what it speaks (Envoy's listener filter timeout).
const FILTERED_SILENCE_MAX: Duration = Duration::from_secs(15);

/// Reads until HTTP can be told from anything else. A client that is silent, or stops, waits for the server to speak;
/// but not where the destination has filters: a client that speaks HTTP late would go round them.
async fn undeclared<S: AsyncRead + Unpin>(
    mut stream: S,
    wait: Duration,
    filtered: bool,
) -> io::Result<(Sniffed, Rewound<S>)> {
    let deadline = Instant::now() + if filtered { FILTERED_SILENCE_MAX } else { wait };
    let mut read = BytesMut::with_capacity(SNIFF_BYTES_MAX);
    let sniffed = loop {
        let count = match tokio::time::timeout_at(deadline, stream.read_buf(&mut read)).await {
            Ok(count) => count?,
            Err(_elapsed) => 0,
        };
        let sniffed = match (count, sniff(&read)) {
            (0, Sniffed::Undecided) if filtered => return Err(io::ErrorKind::TimedOut.into()),
            (0, _) => sniff_no_more(&read),
            (_, sniffed) => sniffed,
        };
        if sniffed != Sniffed::Undecided {
            break sniffed;
        }
    };
    let read: Bytes = read.freeze();
    Ok((sniffed, Rewound::new(read, stream)))
}

async fn serve_http1<S>(stream: Rewound<S>, served: Arc<Served>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let of_service = Arc::clone(&served);
    let service = service_fn(move |request| exchange::run(Arc::clone(&of_service), request));
    let mut builder = http1::Builder::new();
    // A client may be silent for as long as it likes between requests; `downstream_idle` bounds that.
    // Answers of pipelined requests are not gathered: hyper would also keep back, for ever, the 400 to bytes that are none.
    builder.header_read_timeout(None);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
    let mut watch = Watch::new(&served);
    let mut ending = false;
    loop {
        tokio::select! {
            biased;
            result = connection.as_mut() => break ended(result, &served),
            () = watch.time_to_end(), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

async fn serve_http2<S>(stream: Rewound<S>, served: Arc<Served>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let of_service = Arc::clone(&served);
    let service = service_fn(move |request| exchange::run(Arc::clone(&of_service), request));
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut watch = Watch::new(&served);
    let mut ending = false;
    loop {
        tokio::select! {
            biased;
            result = connection.as_mut() => break ended(result, &served),
            () = watch.time_to_end(), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

fn ended(result: Result<(), hyper::Error>, served: &Served) {
    if let Err(error) = result {
        debug!(%error, source = %served.connection.source.address, "connection ended");
    }
}

/// Tells when a connection is to be ended: at a drain, or after it has idled for a whole interval.
struct Watch<'a> {
    served: &'a Served,
    deadline: Instant,
    seen: u64,
}

impl<'a> Watch<'a> {
    fn new(served: &'a Served) -> Self {
        Self { served, deadline: Instant::now() + served.worker.settings.downstream_idle, seen: 0 }
    }

    async fn time_to_end(&mut self) {
        loop {
            tokio::select! {
                () = self.served.drain.started() => return,
                () = sleep_until(self.deadline) => {}
            }
            if self.served.is_idle_since(&mut self.seen) {
                return;
            }
            self.deadline = Instant::now() + self.served.worker.settings.downstream_idle;
        }
    }
}
