//! Tests of bodies on their way through filters: who sees which piece when, and what holding, waiting and changing do.

use super::*;
use crate::{BodyBroken, Chain, Chunk, Connection, Factory, Hold, NoCallout, Part, Peer, Protocol, WhenFull};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::{Instant, SystemTime};
use tokio::sync::Notify;

type OnPart = Arc<dyn Fn(Part<'_>) -> Verdict + Send + Sync>;
type OnHead = Arc<dyn Fn() -> Verdict + Send + Sync>;
type Log = Arc<Mutex<Vec<String>>>;

/// A filter made of closures, which writes down what it sees.
#[derive(Clone)]
struct Scripted {
    name: &'static str,
    phases: Phases,
    on_head: OnHead,
    on_body: OnPart,
    on_trailers: OnPart,
    on_resumed: OnPart,
    log: Log,
}

fn filter(name: &'static str, log: &Log) -> Scripted {
    let pass = || Arc::new(|_: Part<'_>| Verdict::Continue);
    Scripted {
        name,
        phases: Phases::all(),
        on_head: Arc::new(|| Verdict::Continue),
        on_body: pass(),
        on_trailers: pass(),
        on_resumed: pass(),
        log: Arc::clone(log),
    }
}

impl Scripted {
    fn head(mut self, on_head: impl Fn() -> Verdict + Send + Sync + 'static) -> Self {
        self.on_head = Arc::new(on_head);
        self
    }

    fn body(mut self, on_body: impl Fn(Part<'_>) -> Verdict + Send + Sync + 'static) -> Self {
        self.on_body = Arc::new(on_body);
        self
    }

    fn trailers(mut self, on_trailers: impl Fn(Part<'_>) -> Verdict + Send + Sync + 'static) -> Self {
        self.on_trailers = Arc::new(on_trailers);
        self
    }

    fn say(&self, what: String) {
        self.log.lock().unwrap().push(format!("{} {what}", self.name));
    }
}

impl Factory for Scripted {
    fn name(&self) -> &str {
        self.name
    }

    fn phases(&self) -> Phases {
        self.phases
    }

    fn start(&self, _exchange: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(self.clone()))
    }
}

impl Filter for Scripted {
    fn request_headers(&mut self, _: &mut Exchange, _: &mut RequestHead, _: bool) -> Verdict {
        self.say("head".to_owned());
        (self.on_head)()
    }

    fn request_read(&mut self, _: &mut Exchange, _: &mut RequestHead, body: &BodyRead) -> Verdict {
        self.say(format!("read {} {}", text(&body.bytes), body.is_whole));
        Verdict::Continue
    }

    fn response_headers(&mut self, _: &mut Exchange, _: &mut ResponseHead, _: bool) -> Verdict {
        self.say("head".to_owned());
        (self.on_head)()
    }

    fn body(&mut self, _: &mut Exchange, part: Part<'_>) -> Verdict {
        let held = if part.head.is_some() { " with its head" } else { "" };
        let end = if part.chunk.end_of_stream { " end" } else { "" };
        self.say(format!("{}{end}{held}", text(&part.chunk.bytes)));
        (self.on_body)(part)
    }

    fn trailers(&mut self, _: &mut Exchange, part: Part<'_>) -> Verdict {
        self.say(format!("{} trailers", text(&part.chunk.bytes)));
        (self.on_trailers)(part)
    }

    fn resumed(&mut self, _: &mut Exchange, part: Part<'_>) -> Verdict {
        self.say(format!("{} resumed", text(&part.chunk.bytes)));
        (self.on_resumed)(part)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A body of which as much is here as was put in.
#[derive(Default)]
struct Sent(VecDeque<Piece>);

impl Body for Sent {
    fn poll_piece(&mut self, _: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        self.0.pop_front().map_or(Poll::Pending, |piece| Poll::Ready(Ok(piece)))
    }
}

fn data(text: &'static str) -> Piece {
    Piece::Data { bytes: Bytes::from_static(text.as_bytes()), end_of_stream: false }
}

fn last(text: &'static str) -> Piece {
    Piece::Data { bytes: Bytes::from_static(text.as_bytes()), end_of_stream: true }
}

fn trailers(value: &'static str) -> Piece {
    Piece::Trailers(trailer_map(value))
}

fn trailer_map(value: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(http::HeaderName::from_static("x-t"), HeaderValue::from_static(value))])
}

fn sent(pieces: impl IntoIterator<Item = Piece>) -> Sent {
    Sent(pieces.into_iter().collect())
}

fn exchange() -> Exchange {
    let address = SocketAddr::from(([10, 0, 0, 1], 1));
    let connection = Connection {
        id: 1,
        worker: 0,
        source: Peer { address, identity: None, workload: None },
        destination: address,
        service: None,
        local: None,
        callout: Arc::new(NoCallout),
    };
    Exchange::new(Arc::new(connection), Protocol::Http11, Instant::now(), SystemTime::now())
}

fn request() -> RequestHead {
    RequestHead {
        method: Method::POST,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop"),
        path: http::uri::PathAndQuery::from_static("/"),
        headers: HeaderMap::new(),
        version: Version::HTTP_11,
    }
}

/// The filters at work on one exchange, polled by hand.
struct Run {
    running: Running,
    exchange: Exchange,
    source: Sent,
    log: Log,
}

impl Run {
    fn new(log: &Log, filters: impl IntoIterator<Item = Scripted>, source: Sent) -> Self {
        let filters = filters.into_iter().map(|filter| Arc::new(filter) as Arc<dyn Factory>);
        let exchange = exchange();
        let running = Chain::new(filters.collect()).start(&exchange);
        Self { running, exchange, source, log: Arc::clone(log) }
    }

    fn head(&mut self) -> Poll<Outcome> {
        let mut cx = Context::from_waker(Waker::noop());
        let Self { running, exchange, source, .. } = self;
        running.poll_request_headers(&mut cx, exchange, &mut request(), false, source)
    }

    fn response_head(&mut self) -> Poll<Outcome> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut head = ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() };
        let Self { running, exchange, source, .. } = self;
        running.poll_response_headers(&mut cx, exchange, &mut head, false, source)
    }

    fn next(&mut self, side: Side) -> Poll<Result<Piece, Outcome>> {
        let mut cx = Context::from_waker(Waker::noop());
        let Self { running, exchange, source, .. } = self;
        match side {
            Side::Request => running.poll_request_body(&mut cx, exchange, source),
            Side::Response => running.poll_response_body(&mut cx, exchange, source),
        }
    }

    /// What comes out, in words, until the end or until more must come.
    fn out(&mut self, side: Side) -> Vec<String> {
        let mut out = Vec::new();
        loop {
            let (piece, is_last) = match self.next(side) {
                Poll::Pending => ("pending".to_owned(), true),
                Poll::Ready(Err(outcome)) => (format!("{outcome:?}"), true),
                Poll::Ready(Ok(Piece::Trailers(map))) => {
                    (format!("trailers {}", map["x-t"].to_str().unwrap()), true)
                }
                Poll::Ready(Ok(Piece::Data { bytes, end_of_stream })) => {
                    (format!("{}{}", text(&bytes), if end_of_stream { " end" } else { "" }), end_of_stream)
                }
            };
            out.push(piece);
            if is_last {
                return out;
            }
        }
    }

    /// What was seen since the last time.
    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

fn append(letter: &'static str) -> impl Fn(Part<'_>) -> Verdict + Send + Sync {
    move |part| {
        if !part.chunk.bytes.is_empty() {
            part.chunk.bytes = [&part.chunk.bytes, letter.as_bytes()].concat().into();
            part.chunk.is_changed = true;
        }
        Verdict::Continue
    }
}

/// Holds until the end.
fn hold(part: Part<'_>) -> Verdict {
    if part.chunk.end_of_stream { Verdict::Continue } else { Verdict::Hold(Hold::default()) }
}

#[test]
fn requests_flow_forwards_and_responses_backwards() {
    for (side, expected) in
        [(Side::Request, ["1ab", "2ab", " end"]), (Side::Response, ["1ba", "2ba", " end"])]
    {
        let log = Log::default();
        let filters = [filter("a", &log).body(append("a")), filter("b", &log).body(append("b"))];
        let mut run = Run::new(&log, filters, sent([data("1"), data("2"), Piece::end()]));
        assert!(run.head().is_ready());
        assert!(side == Side::Request || run.response_head().is_ready());
        assert_eq!(run.out(side), expected);
        assert!(run.running.is_body_changed(side));
    }
}

#[test]
fn nobody_is_shown_what_it_does_not_want() {
    let log = Log::default();
    let heads = Scripted { phases: Phases::REQUEST_HEADERS, ..filter("heads", &log) };
    let mut other = Scripted { phases: Phases::RESPONSE_BODY, ..filter("other", &log) };
    let mut run = Run::new(&log, [heads.clone(), other.clone()], sent([last("x")]));
    assert!(!run.running.wants_body(Side::Request) && run.running.wants_body(Side::Response));
    assert!(run.head().is_ready());
    assert_eq!(
        (run.out(Side::Request), run.seen()),
        (vec!["x end".to_owned()], vec!["heads head".to_owned()])
    );

    other.phases = Phases::REQUEST_TRAILERS;
    let mut run = Run::new(&log, [heads, other], sent([data("x"), trailers("1")]));
    assert!(run.running.wants_body(Side::Request) && run.head().is_ready());
    assert_eq!(run.out(Side::Request), ["x", "trailers 1"]);
    assert_eq!(run.seen(), ["heads head", "other  trailers"]);
}

#[test]
fn who_holds_is_shown_all_of_it_again() {
    let log = Log::default();
    let filters = [filter("a", &log).body(hold), filter("b", &log)];
    let mut run = Run::new(&log, filters, sent([data("1")]));
    assert_eq!(run.out(Side::Request), ["pending"]);
    run.source = sent([data("2"), last("3")]);
    assert_eq!(run.out(Side::Request), ["123 end"]);
    assert_eq!(run.seen(), ["a 1", "a 12", "a 123 end", "b 123 end"]);
    assert!(!run.running.is_body_changed(Side::Request));
}

#[test]
fn what_is_held_at_the_end_with_nothing_to_wait_for_goes_on() {
    let log = Log::default();
    let held = filter("a", &log).body(|_| Verdict::Hold(Hold::default()));
    assert_eq!(Run::new(&log, [held], sent([data("1"), last("2")])).out(Side::Request), ["12 end"]);
}

#[test]
fn holding_is_bounded() {
    let log = Log::default();
    let fails = filter("a", &log).body(hold);
    let mut run = Run::new(&log, [fails], sent([data("123"), data("4"), data("5")]));
    run.running.hold_at_most(4);
    assert_eq!(run.out(Side::Request), ["TooLarge"]);

    let waits = |_: Part<'_>| Verdict::Hold(Hold { when_full: WhenFull::Wait, ..Hold::default() });
    let mut run = Run::new(&log, [filter("a", &log).body(waits)], sent([data("123"), data("4"), data("5")]));
    run.running.hold_at_most(4);
    assert_eq!((run.out(Side::Request), run.source.0.len()), (vec!["pending".to_owned()], 1));

    // What a filter keeps itself counts too.
    let keeps = |part: Part<'_>| {
        let kept = std::mem::take(&mut part.chunk.bytes).len() * 2;
        Verdict::Hold(Hold { kept, ..Hold::default() })
    };
    let mut run = Run::new(&log, [filter("a", &log).body(keeps)], sent([data("123")]));
    run.running.hold_at_most(4);
    assert_eq!(run.out(Side::Request), ["TooLarge"]);
}

fn until(notify: &Arc<Notify>) -> Until {
    let notify = Arc::clone(notify);
    Box::pin(async move { notify.notified().await })
}

#[test]
fn waiting_reads_nothing_and_asks_the_same_again() {
    let (log, notify) = (Log::default(), Arc::new(Notify::new()));
    let (asked, told) = (Arc::new(Mutex::new(false)), Arc::clone(&notify));
    let waits = filter("a", &log).body(move |_| match std::mem::replace(&mut *asked.lock().unwrap(), true) {
        false => Verdict::Wait(until(&told)),
        true => Verdict::Continue,
    });
    let mut run = Run::new(&log, [waits], sent([data("1"), last("2")]));
    assert_eq!((run.out(Side::Request), run.source.0.len()), (vec!["pending".to_owned()], 1));
    notify.notify_one();
    assert_eq!(run.out(Side::Request), ["1", "2 end"]);
    assert_eq!(run.seen(), ["a 1", "a 1", "a 2 end"]);
}

#[test]
fn who_is_resumed_lets_go_without_being_shown_again() {
    let (log, notify) = (Log::default(), Arc::new(Notify::new()));
    let told = Arc::clone(&notify);
    let holds =
        filter("a", &log).body(move |_| Verdict::Hold(Hold { until: Some(until(&told)), ..Hold::default() }));
    let mut run = Run::new(&log, [holds], sent([data("1"), data("2")]));
    assert_eq!(run.out(Side::Request), ["pending"]);
    notify.notify_one();
    assert_eq!(run.out(Side::Request), ["12", "pending"]);
    run.source = sent([last("3")]);
    assert_eq!(run.out(Side::Request), ["pending"]);
    notify.notify_one();
    assert_eq!(run.out(Side::Request), ["3 end"]);
    assert_eq!(run.seen(), ["a 1", "a 12", "a 12 resumed", "a 3 end", "a 3 resumed"]);
}

#[test]
fn trailers_take_along_what_is_held() {
    let log = Log::default();
    let filters = [filter("a", &log).body(hold), filter("b", &log)];
    let mut run = Run::new(&log, filters, sent([data("1"), trailers("t")]));
    assert_eq!(run.out(Side::Request), ["1", "trailers t"]);
    assert_eq!(run.seen(), ["a 1", "a 1 trailers", "b 1", "b  trailers"]);

    let drops = filter("a", &log).body(hold).trailers(|part| {
        part.chunk.bytes = Bytes::new();
        part.chunk.trailers = None;
        part.chunk.end_of_stream = true;
        Verdict::Continue
    });
    assert_eq!(Run::new(&log, [drops], sent([data("1"), trailers("t")])).out(Side::Request), [" end"]);
}

#[test]
fn trailers_can_be_added_at_the_end() {
    let log = Log::default();
    let adds = filter("a", &log).body(|part| {
        if part.chunk.end_of_stream {
            part.chunk.trailers = Some(trailer_map("new"));
        }
        Verdict::Continue
    });
    let mut run = Run::new(&log, [adds, filter("b", &log)], sent([data("1"), last("2")]));
    assert_eq!(run.out(Side::Request), ["1", "2", "trailers new"]);
    assert_eq!(run.seen(), ["a 1", "b 1", "a 2 end", "b 2", "b  trailers"]);
}

#[test]
fn a_head_can_be_held_while_the_body_is_looked_at() {
    let log = Log::default();
    let holds = || filter("a", &log).head(|| Verdict::Hold(Hold::default())).body(hold);
    let mut run = Run::new(&log, [holds(), filter("b", &log)], sent([data("1")]));
    assert!(run.head().is_pending());
    assert_eq!(run.seen(), ["a head", "a 1 with its head"]);
    run.source = sent([last("2")]);
    assert!(matches!(run.head(), Poll::Ready(Outcome::Continue)));
    assert_eq!(run.seen(), ["a 12 end with its head", "b head"]);
    assert_eq!(run.out(Side::Request), ["12 end"]);
    assert_eq!(run.seen(), ["b 12 end"]);

    let filters = [filter("b", &log), holds(), filter("c", &log)];
    let mut run = Run::new(&log, filters, sent([data("1"), last("2")]));
    assert!(matches!(run.response_head(), Poll::Ready(Outcome::Continue)));
    assert_eq!(
        run.seen(),
        ["c head", "a head", "c 1", "a 1 with its head", "c 2 end", "a 12 end with its head", "b head"]
    );
    assert_eq!(run.out(Side::Response), ["12 end"]);
    assert_eq!(run.seen(), ["b 12 end"]);
}

#[test]
fn a_head_that_is_held_goes_on_when_its_filter_is_resumed() {
    let (log, notify) = (Log::default(), Arc::new(Notify::new()));
    let told = Arc::clone(&notify);
    let holds =
        filter("a", &log).head(move || Verdict::Hold(Hold { until: Some(until(&told)), ..Hold::default() }));
    let mut run = Run::new(&log, [holds, filter("b", &log)], Sent::default());
    assert!(run.head().is_pending());
    notify.notify_one();
    assert!(matches!(run.head(), Poll::Ready(Outcome::Continue)));
    run.source = sent([last("1")]);
    assert_eq!(run.out(Side::Request), ["1 end"]);
    assert_eq!(run.seen(), ["a head", "a  resumed", "b head", "a 1 end", "b 1 end"]);
}

#[test]
fn who_reads_behind_others_reads_what_they_let_pass() {
    let log = Log::default();
    let first = filter("a", &log).body(append("a"));
    let reads = filter("b", &log).head(|| Verdict::ReadBody { bytes_max: 3 }).body(append("b"));
    let mut run = Run::new(&log, [first, reads], sent([data("1"), data("2"), last("3")]));
    assert!(matches!(run.head(), Poll::Ready(Outcome::Continue)));
    assert_eq!(run.out(Side::Request), ["1ab", "2ab", "3ab end"]);
    assert_eq!(run.seen()[..5], ["a head", "b head", "a 1", "a 2", "b read 1a2 false"]);
}

#[test]
fn what_ends_a_body_ends_it() {
    let reply = || Verdict::Reply(Box::new(LocalReply::access_denied("test")));
    let log = Log::default();
    for (name, on_body, expected) in [
        ("reply", Arc::new(move |_: Part<'_>| reply()) as OnPart, "Reply"),
        ("reset", Arc::new(|_: Part<'_>| Verdict::Reset), "Reset"),
    ] {
        let stops = Scripted { on_body, ..filter("a", &log) };
        let out = Run::new(&log, [stops, filter("b", &log)], sent([last("1")])).out(Side::Request);
        assert!(out[0].starts_with(expected), "{name}: {out:?}");
    }
    assert!(!run_saw(&log, "b"), "nobody behind it sees anything");
}

fn run_saw(log: &Log, name: &str) -> bool {
    log.lock().unwrap().iter().any(|line| line.starts_with(name))
}

#[test]
fn chunks_grow_in_place() {
    let mut chunk = Chunk::default();
    for text in ["a", "", "b", "c"] {
        chunk.add(data(text));
    }
    assert_eq!((&*chunk.bytes, chunk.is_last()), (&b"abc"[..], false));
    chunk.add(Piece::end());
    assert!(chunk.is_last());
}
