//! Connections whose destination has filters that look at bytes: what each side sends goes through them, piece by piece,
//! before it goes on.

use crate::endpoint::Chosen;
use bytes::{Bytes, BytesMut};
use cairn_filter::{
    Chain, Closer, Connection, ConnectionFilter, Exchange, Measures, Passage, Protocol, Side, Wakers, append,
};
use cairn_net::{ByteCounts, HALF_CLOSED_MAX};
use parking_lot::Mutex;
use std::future::{Future, pending};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// As much as is read at a time.
const READ_BYTES: usize = 16 << 10;

/// What filters may hold of one side before nothing more of it is read (Envoy's buffer limit of a connection).
const HELD_BYTES_MAX: usize = 1 << 20;

/// How long the client may take to read the end of a connection that a filter closed.
const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// The filters of one connection at work.
pub(crate) struct Filters {
    state: Mutex<State>,
    wakers: Wakers,
}

struct State {
    exchange: Exchange,
    stages: Vec<Stage>,
    /// The side that ended last.
    last: Option<Side>,
}

struct Stage {
    filter: Box<dyn ConnectionFilter>,
    /// Of what the client sends, and of what the server does.
    held: [Held; 2],
}

/// What a filter holds of one side.
#[derive(Default)]
struct Held {
    /// For how long it may; `None`: it holds nothing.
    patience: Option<Duration>,
    kept: usize,
    /// It was shown the end.
    has_ended: bool,
}

/// What goes on.
#[derive(Default)]
struct Passed {
    bytes: Bytes,
    end: bool,
}

/// How a connection ended before its time.
pub(crate) enum End {
    Client(io::Error),
    Server(io::Error),
    Filter(String),
}

impl End {
    pub(crate) fn by(&self) -> Closer {
        match self {
            Self::Client(_) => Closer::Client,
            Self::Server(_) | Self::Filter(_) => Closer::Here,
        }
    }

    pub(crate) fn into_reason(self) -> String {
        match self {
            Self::Client(error) | Self::Server(error) => error.to_string(),
            Self::Filter(reason) => reason,
        }
    }
}

impl Filters {
    /// The filters that look at the bytes of this connection, if there are any.
    pub(crate) fn start(
        chain: &Chain,
        connection: &Arc<Connection>,
        started: (Instant, SystemTime),
    ) -> Option<Self> {
        let mut exchange = Exchange::new(Arc::clone(connection), Protocol::Tcp, started.0, started.1);
        exchange.measures = Some(Measures { flags: "-", ..Measures::default() });
        let wakers = Wakers::default();
        let filters = chain.connect(&exchange, &wakers);
        if filters.is_empty() {
            return None;
        }
        let stages = filters.into_iter().map(|filter| Stage { filter, held: Default::default() }).collect();
        Some(Self { state: Mutex::new(State { exchange, stages, last: None }), wakers })
    }

    /// Tells the filters of the connection, one after the other, before an endpoint is chosen.
    pub(crate) async fn opened(&self) -> Result<(), End> {
        let count = self.state.lock().stages.len();
        for index in 0..count {
            let mut passage = self.state.lock().with(index, |filter, exchange| filter.opened(exchange));
            loop {
                match passage {
                    Passage::Pass(_) => break,
                    Passage::Close(reason) => return Err(End::Filter(reason)),
                    Passage::Hold { patience, .. } => {
                        let woken = self.wakers.of(Side::Request).notified();
                        let in_time = tokio::time::timeout(patience, woken).await.is_ok();
                        passage = self.state.lock().with(index, |filter, exchange| match in_time {
                            true => filter.opened(exchange),
                            false => given_up(filter.overdue(exchange, Side::Request)),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// Tells of the endpoint.
    pub(crate) fn connected(&self, chosen: &Chosen) {
        let exchange = &mut self.state.lock().exchange;
        exchange.upstream = Some(chosen.active.host().address);
        exchange.upstream_workload = Some(Arc::clone(&chosen.workload));
        let service = exchange.connection.service.as_ref();
        let port = exchange.connection.destination.port();
        exchange.cluster =
            service.map(|service| format!("inbound-vip|{port}|tcp|{}", service.hostname).into());
        if let Some(measures) = &mut exchange.measures {
            measures.attempts = 1;
        }
    }

    /// Copies both ways until both sides have ended; who ended last.
    pub(crate) async fn copy<A, B>(
        &self,
        client: &mut A,
        server: &mut B,
        counts: &ByteCounts,
    ) -> Result<Closer, End>
    where
        A: AsyncRead + AsyncWrite + Unpin + Send,
        B: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let ended = {
            let (from_client, to_client) = tokio::io::split(&mut *client);
            let (from_server, to_server) = tokio::io::split(server);
            let mut up = pin!(self.flow(Side::Request, from_client, to_server, &counts.received));
            let mut down = pin!(self.flow(Side::Response, from_server, to_client, &counts.sent));
            tokio::select! {
                ended = &mut up => match ended {
                    Ok(()) => unless_silent(down, counts).await,
                    Err(end) => Err(end),
                },
                ended = &mut down => match ended {
                    Ok(()) => unless_silent(up, counts).await,
                    Err(end) => Err(end),
                },
            }
        };
        match ended {
            Ok(()) => Ok(match self.state.lock().last {
                Some(Side::Request) => Closer::Client,
                _ => Closer::Here,
            }),
            Err(end) => {
                if matches!(end, End::Filter(_)) {
                    // What was sent before is read to its end, if that is soon.
                    drop(tokio::time::timeout(GOODBYE_MAX, client.shutdown()).await);
                }
                Err(end)
            }
        }
    }

    /// One way, to its end.
    async fn flow<R, W>(&self, side: Side, mut from: R, mut to: W, count: &AtomicU64) -> Result<(), End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let [read_failed, write_failed] = match side {
            Side::Request => [End::Client, End::Server],
            Side::Response => [End::Server, End::Client],
        };
        let mut read = BytesMut::new();
        let mut has_ended = false;
        // Since when filters hold something to which nothing more can come.
        let mut stuck: Option<tokio::time::Instant> = None;
        loop {
            let (has_room, patience) = self.state.lock().holds(side);
            let may_read = has_room && !has_ended;
            if may_read {
                stuck = None;
            }
            let until =
                patience.map(|patience| *stuck.get_or_insert_with(tokio::time::Instant::now) + patience);
            let passed = tokio::select! {
                result = read_some(&mut from, &mut read), if may_read => {
                    has_ended = result.map_err(read_failed)? == 0;
                    self.state.lock().data(side, read.split().freeze(), has_ended)
                }
                () = self.wakers.of(side).notified() => self.state.lock().woken(side),
                () = reached(until), if !may_read => self.state.lock().overdue(side),
            };
            let Passed { bytes, end } = passed.map_err(End::Filter)?;
            if !bytes.is_empty() {
                stuck = None;
                to.write_all(&bytes).await.map_err(write_failed)?;
                to.flush().await.map_err(write_failed)?;
                count.fetch_add(bytes.len() as u64, Relaxed);
                self.state.lock().written(side, bytes.len() as u64);
            }
            if end {
                match to.shutdown().await {
                    // The receiver is gone already: nothing to tell it.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                    other => other.map_err(write_failed)?,
                }
                self.state.lock().last = Some(side);
                return Ok(());
            }
        }
    }

    /// Tells the filters that the connection is over.
    pub(crate) fn closed(&self, by: Closer) {
        let State { exchange, stages, .. } = &mut *self.state.lock();
        stages.iter_mut().for_each(|stage| stage.filter.closed(exchange, by));
    }
}

async fn read_some<R: AsyncRead + Unpin>(from: &mut R, read: &mut BytesMut) -> io::Result<usize> {
    read.reserve(READ_BYTES);
    from.read_buf(read).await
}

async fn reached(until: Option<tokio::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => pending().await,
    }
}

/// A filter that would hold on for ever has ended the connection.
fn given_up(passage: Passage) -> Passage {
    match passage {
        Passage::Hold { .. } => Passage::Close("a filter held the connection for too long".to_owned()),
        other => other,
    }
}

fn number_of(side: Side) -> usize {
    match side {
        Side::Request => 0,
        Side::Response => 1,
    }
}

/// Waits for the side that has not ended, as long as it is not silent for too long.
async fn unless_silent<F>(mut flow: F, counts: &ByteCounts) -> Result<(), End>
where
    F: Future<Output = Result<(), End>> + Unpin,
{
    let moved = || counts.received.load(Relaxed) + counts.sent.load(Relaxed);
    loop {
        let before = moved();
        match tokio::time::timeout(HALF_CLOSED_MAX, &mut flow).await {
            Ok(ended) => return ended,
            Err(_) if moved() == before => return Err(End::Client(io::ErrorKind::TimedOut.into())),
            Err(_) => {}
        }
    }
}

impl State {
    fn with(
        &mut self,
        index: usize,
        call: impl FnOnce(&mut dyn ConnectionFilter, &mut Exchange) -> Passage,
    ) -> Passage {
        match self.stages.get_mut(index) {
            Some(stage) => call(&mut *stage.filter, &mut self.exchange),
            None => Passage::Pass(Bytes::new()),
        }
    }

    /// Whether more of a side may be read, and for how long what is held may be where not.
    fn holds(&self, side: Side) -> (bool, Option<Duration>) {
        let held = || self.stages.iter().filter_map(|stage| stage.held.get(number_of(side)));
        let kept: usize = held().map(|held| held.kept).sum();
        (kept < HELD_BYTES_MAX, held().filter_map(|held| held.patience).min())
    }

    fn written(&mut self, side: Side, count: u64) {
        if let (Side::Response, Some(measures)) = (side, &mut self.exchange.measures) {
            measures.response_body_bytes += count;
            measures.response_bytes += count;
        }
    }

    /// More bytes of a side, or its end.
    fn data(&mut self, side: Side, bytes: Bytes, end: bool) -> Result<Passed, String> {
        if let (Side::Request, Some(measures)) = (side, &mut self.exchange.measures) {
            measures.request_body_bytes += bytes.len() as u64;
            measures.request_bytes += bytes.len() as u64;
        }
        let mut passed = Passed::default();
        self.feed(side, 0, Passed { bytes, end }, &mut passed)?;
        Ok(passed)
    }

    /// Shows bytes to the filters from a place on, and collects what all of them let pass.
    fn feed(&mut self, side: Side, from: usize, shown: Passed, out: &mut Passed) -> Result<(), String> {
        let Passed { mut bytes, mut end } = shown;
        for position in from..self.stages.len() {
            if bytes.is_empty() && !end {
                return Ok(());
            }
            let index = self.index(side, position);
            let passage = self.with(index, |filter, exchange| filter.data(exchange, side, bytes, end));
            match self.settle(side, index, passage, end)? {
                Some(passed) => Passed { bytes, end } = passed,
                None => return Ok(()),
            }
        }
        append(&mut out.bytes, bytes);
        out.end |= end;
        Ok(())
    }

    /// Asks the filters whether they let go of what they hold, the one that holds the oldest bytes first.
    fn woken(&mut self, side: Side) -> Result<Passed, String> {
        let mut out = Passed::default();
        for position in (0..self.stages.len()).rev() {
            let index = self.index(side, position);
            let passage = self.with(index, |filter, exchange| filter.woken(exchange, side));
            if let Some(passed) = self.settle(side, index, passage, false)? {
                self.feed(side, position + 1, passed, &mut out)?;
            }
        }
        Ok(out)
    }

    /// Has the filters that hold something let go of it, or end the connection.
    fn overdue(&mut self, side: Side) -> Result<Passed, String> {
        let mut out = Passed::default();
        for position in (0..self.stages.len()).rev() {
            let index = self.index(side, position);
            if self.held(side, index).is_none_or(|held| held.patience.is_none()) {
                continue;
            }
            let passage = self.with(index, |filter, exchange| given_up(filter.overdue(exchange, side)));
            if let Some(passed) = self.settle(side, index, passage, false)? {
                self.feed(side, position + 1, passed, &mut out)?;
            }
        }
        Ok(out)
    }

    /// Notes what a filter made of what it was shown. What goes on, with the end if it was shown that now or while it held.
    fn settle(
        &mut self,
        side: Side,
        index: usize,
        passage: Passage,
        end: bool,
    ) -> Result<Option<Passed>, String> {
        let Some(held) = self.held(side, index) else { return Ok(None) };
        held.has_ended |= end;
        match passage {
            Passage::Pass(bytes) => {
                let end = (held.patience.take().is_some() || end) && held.has_ended;
                held.kept = 0;
                Ok(Some(Passed { bytes, end }))
            }
            Passage::Hold { kept, patience } => {
                (held.kept, held.patience) = (kept, Some(patience));
                Ok(None)
            }
            Passage::Close(reason) => Err(reason),
        }
    }

    fn held(&mut self, side: Side, index: usize) -> Option<&mut Held> {
        self.stages.get_mut(index)?.held.get_mut(number_of(side))
    }

    /// What the server sends meets the filters in reverse.
    fn index(&self, side: Side, position: usize) -> usize {
        match side {
            Side::Request => position,
            Side::Response => self.stages.len() - 1 - position,
        }
    }
}

#[cfg(test)]
#[path = "filtered/tests.rs"]
mod tests;
