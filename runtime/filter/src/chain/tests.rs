//! Tests of the chain: in which order filters run, who sees what after a reply, and that everyone is told the end.

use super::*;
use crate::exchange::NOTES_MAX;
use crate::{
    AdmissionFuture, Body, BodyBroken, BodyRead, Denial, Filter, LocalReply, NoBody, Outcome, Peer, Piece,
    Protocol, RequestHead, ResponseHead, Verdict,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

/// What a filter does in a phase.
#[derive(Clone, Copy)]
enum Step {
    Continue,
    Reply,
    Reset,
    /// Waits once for a signal, then continues.
    Wait,
}

/// A filter that follows a script and writes down what it is asked.
struct Scripted {
    name: &'static str,
    phases: Phases,
    request: Step,
    response: Step,
    wanted: bool,
    log: Log,
}

type Log = Arc<Mutex<Vec<String>>>;

fn scripted(name: &'static str, log: &Log) -> Scripted {
    Scripted {
        name,
        phases: Phases::all(),
        request: Step::Continue,
        response: Step::Continue,
        wanted: true,
        log: Arc::clone(log),
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
        let instance = Instance {
            name: self.name,
            request: self.request,
            response: self.response,
            waited: false,
            log: Arc::clone(&self.log),
        };
        self.wanted.then(|| Box::new(instance) as Box<dyn Filter>)
    }
}

struct Instance {
    name: &'static str,
    request: Step,
    response: Step,
    waited: bool,
    log: Log,
}

impl Instance {
    fn say(&self, what: &str) {
        self.log.lock().unwrap().push(format!("{} {what}", self.name));
    }

    fn step(&mut self, phase: &str, step: Step) -> Verdict {
        self.say(phase);
        match step {
            Step::Wait if !self.waited => {
                self.waited = true;
                // Pending once, so that the chain really suspends.
                Verdict::Wait(Box::pin(tokio::task::yield_now()))
            }
            Step::Continue | Step::Wait => Verdict::Continue,
            Step::Reset => Verdict::Reset,
            Step::Reply => Verdict::Reply(Box::new(LocalReply::access_denied("test"))),
        }
    }
}

impl Filter for Instance {
    fn request_headers(&mut self, _: &mut Exchange, _: &mut RequestHead, _: bool) -> Verdict {
        self.step("request", self.request)
    }

    fn response_headers(&mut self, _: &mut Exchange, _: &mut ResponseHead, _: bool) -> Verdict {
        self.step("response", self.response)
    }

    fn finish(&mut self, _: &mut Exchange) {
        self.say("finish");
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.say("drop");
    }
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
        callout: Arc::new(crate::NoCallout),
    };
    Exchange::new(Arc::new(connection), Protocol::Http11, Instant::now(), SystemTime::now())
}

fn request() -> RequestHead {
    RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop"),
        path: http::uri::PathAndQuery::from_static("/"),
        headers: HeaderMap::new(),
        version: Version::HTTP_11,
    }
}

fn response() -> ResponseHead {
    ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() }
}

/// Runs an exchange as the engine does: request phase; unless reset, response phase; finish. Returns what was asked
/// of whom, and what the request phase came to.
async fn run(factories: Vec<Scripted>) -> (Vec<String>, &'static str) {
    let log = Arc::clone(&factories[0].log);
    let chain = Chain::new(factories.into_iter().map(|f| Arc::new(f) as Arc<dyn Factory>).collect());
    let mut exchange = exchange();
    let mut running = chain.start(&exchange);
    let outcome = match running.request_headers(&mut exchange, &mut request(), true, &mut NoBody).await {
        Outcome::Continue => "continue",
        Outcome::Reply(reply) => {
            assert_eq!(reply.status, StatusCode::FORBIDDEN);
            "reply"
        }
        Outcome::Reset => "reset",
        Outcome::TooLarge | Outcome::BodyBroken => "neither",
    };
    if outcome != "reset" {
        running.response_headers(&mut exchange, &mut response(), true, &mut NoBody).await;
    }
    running.finish(&mut exchange);
    running.finish(&mut exchange);
    drop(running);
    let log = log.lock().unwrap().clone();
    (log, outcome)
}

/// The log without drops.
fn asked(log: &[String]) -> Vec<&str> {
    log.iter().map(String::as_str).filter(|line| !line.ends_with("drop")).collect()
}

#[tokio::test]
async fn requests_run_forwards_and_responses_backwards() {
    let log = Log::default();
    let (log, outcome) = run(vec![scripted("a", &log), scripted("b", &log), scripted("c", &log)]).await;
    assert_eq!(outcome, "continue");
    let expected = ["a request", "b request", "c request", "c response", "b response", "a response"];
    assert_eq!(asked(&log)[..6], expected);
    assert_eq!(asked(&log)[6..], ["a finish", "b finish", "c finish"]);
}

#[tokio::test]
async fn a_reply_ends_the_filters_behind_it_before_anything_else() {
    let log = Log::default();
    let b = Scripted { request: Step::Reply, ..scripted("b", &log) };
    let (log, outcome) = run(vec![scripted("a", &log), b, scripted("c", &log), scripted("d", &log)]).await;
    assert_eq!(outcome, "reply");
    let expected = [
        "a request",
        "b request",
        "c finish",
        "d finish",
        "b response",
        "a response",
        "a finish",
        "b finish",
    ];
    assert_eq!(asked(&log), expected);
}

#[tokio::test]
async fn a_reset_runs_nothing_more_but_the_end() {
    let log = Log::default();
    let a = Scripted { request: Step::Reset, ..scripted("a", &log) };
    let (log, outcome) = run(vec![a, scripted("b", &log)]).await;
    assert_eq!(outcome, "reset");
    assert_eq!(asked(&log), ["a request", "a finish", "b finish"]);
}

#[tokio::test]
async fn waiting_calls_the_same_phase_of_the_same_filter_again() {
    let log = Log::default();
    let b = Scripted { request: Step::Wait, ..scripted("b", &log) };
    let c = Scripted { response: Step::Wait, ..scripted("c", &log) };
    let (log, _) = run(vec![scripted("a", &log), b, c]).await;
    let expected = [
        "a request",
        "b request",
        "b request",
        "c request",
        "c response",
        "c response",
        "b response",
        "a response",
    ];
    assert_eq!(asked(&log)[..8], expected);
}

#[tokio::test]
async fn a_reply_in_the_response_phase_goes_to_the_filters_before_it() {
    let log = Log::default();
    let b = Scripted { response: Step::Reply, ..scripted("b", &log) };
    let chain = Chain::new(vec![Arc::new(scripted("a", &log)), Arc::new(b), Arc::new(scripted("c", &log))]);
    let mut exchange = exchange();
    let mut running = chain.start(&exchange);
    let first = running.response_headers(&mut exchange, &mut response(), true, &mut NoBody).await;
    assert!(matches!(first, Outcome::Reply(reply) if reply.status == StatusCode::FORBIDDEN));
    assert_eq!(asked(&log.lock().unwrap()), ["c response", "b response"]);
    let again = running.response_headers(&mut exchange, &mut response(), true, &mut NoBody).await;
    assert!(matches!(again, Outcome::Continue));
    assert_eq!(asked(&log.lock().unwrap()), ["c response", "b response", "a response"]);
    running.finish(&mut exchange);
}

#[tokio::test]
async fn phases_not_asked_for_are_not_run() {
    let log = Log::default();
    let a = Scripted { phases: Phases::REQUEST_HEADERS, ..scripted("a", &log) };
    let b = Scripted { phases: Phases::RESPONSE_HEADERS, ..scripted("b", &log) };
    let c = Scripted { phases: Phases::FINISH, ..scripted("c", &log) };
    let d = Scripted { wanted: false, ..scripted("d", &log) };
    let (log, _) = run(vec![a, b, c, d]).await;
    assert_eq!(asked(&log), ["a request", "b response", "c finish"]);
}

#[tokio::test]
async fn an_exchange_abandoned_while_waiting_still_ends_every_filter_once() {
    let log = Log::default();
    let b = Scripted { request: Step::Wait, ..scripted("b", &log) };
    let chain = Chain::new(vec![Arc::new(scripted("a", &log)), Arc::new(b), Arc::new(scripted("c", &log))]);
    let mut exchange = exchange();
    let mut running = chain.start(&exchange);
    {
        let (mut head, mut body) = (request(), NoBody);
        let phase = running.request_headers(&mut exchange, &mut head, true, &mut body);
        // The client goes away while `b` waits: the future is polled once and dropped.
        assert!(futures_util::FutureExt::now_or_never(phase).is_none());
    }
    running.finish(&mut exchange);
    drop(running);
    let log = log.lock().unwrap();
    assert_eq!(asked(&log), ["a request", "b request", "a finish", "b finish", "c finish"]);
    let mut ends: HashMap<&str, usize> = HashMap::new();
    for line in log.iter().filter(|line| line.ends_with("drop")) {
        *ends.entry(line).or_default() += 1;
    }
    assert_eq!(ends, HashMap::from([("a drop", 1), ("b drop", 1), ("c drop", 1)]));
}

/// A filter that asks for two bytes of the body, then for four, and then says what it was given.
struct Reader(Log);

impl Factory for Reader {
    fn name(&self) -> &str {
        "reader"
    }

    fn phases(&self) -> Phases {
        Phases::REQUEST_HEADERS
    }

    fn start(&self, _exchange: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(Reader(Arc::clone(&self.0))))
    }
}

impl Filter for Reader {
    fn request_headers(&mut self, _: &mut Exchange, _: &mut RequestHead, _: bool) -> Verdict {
        Verdict::ReadBody { bytes_max: 2 }
    }

    fn request_read(&mut self, _: &mut Exchange, _: &mut RequestHead, body: &BodyRead) -> Verdict {
        let mut log = self.0.lock().unwrap();
        log.push(format!("{} {}", String::from_utf8_lossy(&body.bytes), body.is_whole));
        if log.len() == 1 { Verdict::ReadBody { bytes_max: 4 } } else { Verdict::Continue }
    }
}

/// A body of three bytes, or one that the client breaks off.
struct Three {
    broken: bool,
    waited: bool,
}

impl Body for Three {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, BodyBroken>> {
        // Pending once, so that the chain really suspends.
        if !std::mem::replace(&mut self.waited, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let piece = Piece::Data { bytes: Bytes::from_static(b"abc"), end_of_stream: true };
        Poll::Ready(if self.broken { Err(BodyBroken) } else { Ok(piece) })
    }
}

#[tokio::test]
async fn a_filter_reads_as_much_of_the_body_as_it_asks_for() {
    for (broken, outcome, said) in
        [(false, "continue", &["ab false", "abc true", "after request"][..]), (true, "gone", &[])]
    {
        let log = Log::default();
        let after = Arc::new(scripted("after", &log));
        let chain = Chain::new(vec![Arc::new(Reader(Arc::clone(&log))), after]);
        let mut exchange = exchange();
        let mut running = chain.start(&exchange);
        let mut body = Three { broken, waited: false };
        let found = running.request_headers(&mut exchange, &mut request(), false, &mut body).await;
        let found = match found {
            Outcome::Continue => "continue",
            Outcome::BodyBroken => "gone",
            Outcome::Reply(_) | Outcome::Reset | Outcome::TooLarge => "neither",
        };
        assert_eq!(found, outcome);
        let read: Vec<Piece> = running.take_read().collect();
        assert_eq!(read.len(), usize::from(!broken), "what was read is kept");
        assert_eq!(*log.lock().unwrap(), said);
    }
}

/// A filter that asks somebody of connections.
struct Asker(Option<Admission>);

impl Factory for Asker {
    fn name(&self) -> &str {
        "asker"
    }

    fn phases(&self) -> Phases {
        Phases::empty()
    }

    fn start(&self, _exchange: &Exchange) -> Option<Box<dyn Filter>> {
        None
    }

    fn ask(&self, _connection: &Connection) -> Option<AdmissionFuture> {
        let answer = self.0.clone()?;
        Some(Box::pin(std::future::ready(answer)))
    }
}

#[tokio::test]
async fn a_connection_passes_when_everybody_who_is_asked_lets_it() {
    let refuse = || Admission::Refuse(Denial { policy: "p".into(), reason: "no".to_owned() });
    let pass = || Admission::Pass(None);
    for (answers, expected) in [
        (vec![], pass()),
        (vec![None], pass()),
        (vec![None, Some(pass())], pass()),
        (vec![Some(pass()), Some(refuse())], refuse()),
    ] {
        let askers = answers.into_iter().map(|answer| Arc::new(Asker(answer)) as Arc<dyn Factory>);
        let chain = Chain::new(askers.collect());
        assert_eq!(chain.ask(&exchange().connection).await, expected);
    }
}

#[test]
fn notes_are_bounded() {
    let mut exchange = exchange();
    let filter: Arc<str> = "a".into();
    for number in 0..NOTES_MAX * 2 {
        exchange.note(&filter, number.to_string());
    }
    assert_eq!(exchange.notes.len(), NOTES_MAX);
    assert_eq!(exchange.notes[0].text, "0");
}

#[test]
fn the_chain_names_its_filters_in_request_order() {
    let log = Log::default();
    let chain = Chain::new(vec![Arc::new(scripted("a", &log)), Arc::new(scripted("b", &log))]);
    assert_eq!(chain.names().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn filters_sort_by_position_then_priority_then_name() {
    use crate::{Position, Slot, sort_factories};
    let log = Log::default();
    let slot =
        |name, position, priority| Slot { position, priority, factory: Arc::new(scripted(name, &log)) };
    let sorted = sort_factories(vec![
        slot("late", Position::PluginUnspecified, 9),
        slot("b", Position::PluginAuthz, 1),
        slot("rbac", Position::Authorization, 0),
        slot("a", Position::PluginAuthz, 1),
        slot("first", Position::PluginAuthz, 5),
        slot("broken", Position::Unenforceable, 0),
        slot("unset", Position::PluginAuthz, i32::MIN),
    ]);
    let names: Vec<_> = sorted.iter().map(|factory| factory.name()).collect();
    assert_eq!(names, ["broken", "first", "a", "b", "unset", "rbac", "late"]);
}

#[test]
fn grpc_requests_are_known_by_their_content_type() {
    for (content_type, expected) in [
        ("application/grpc", true),
        ("application/grpc+proto", true),
        ("application/grpc; charset=utf-8", false),
        ("application/grpc-web", false),
        ("application/json", false),
    ] {
        let mut head = request();
        head.headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        assert_eq!(head.is_grpc(), expected, "{content_type}");
    }
}
