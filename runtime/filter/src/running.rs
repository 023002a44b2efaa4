//! The filters at work on one exchange: the heads meet them one by one, bodies flow through them.

use crate::flow::{Flow, Scene};
use crate::{
    Body, BodyRead, Exchange, Filter, HeldHead, LocalReply, Phases, Piece, RequestHead, ResponseHead, Side,
    Until, Verdict,
};
use smallvec::SmallVec;
use std::future::poll_fn;
use std::task::{Context, Poll, ready};

/// What a phase of the whole chain came to.
#[derive(Debug)]
pub enum Outcome {
    /// Every filter let it pass.
    Continue,
    /// A filter answered. The reply has not run through the response phase yet; the engine does that.
    Reply(Box<LocalReply>),
    /// A filter ended the exchange.
    Reset,
    /// A filter holds more of a body than may be held.
    TooLarge,
    /// The sender broke off within the body.
    BodyBroken,
}

/// The most bytes of one body that one filter holds, by default (Envoy's `per_connection_buffer_limit_bytes`).
const HELD_BYTES_MAX: usize = 1 << 20;

/// One filter at work.
pub(crate) struct Active {
    pub(crate) phases: Phases,
    pub(crate) filter: Box<dyn Filter>,
}

/// The filters at work on one exchange.
pub struct Running {
    filters: SmallVec<[Active; 6]>,
    /// How many filters, counted from the first, have yet to see the response's head.
    respond_to: usize,
    /// How many filters, counted from the first, the response meets; known once it is here.
    responding: Option<usize>,
    /// The filter that the request's head has reached.
    at: usize,
    step: Step,
    request: Option<Box<Flow>>,
    response: Option<Box<Flow>>,
    held_max: usize,
    finished: bool,
}

/// What is done with the filter that a head has reached.
enum Step {
    /// It is asked: about the head, or about what it read of the body.
    Ask(Option<BodyRead>),
    /// It waits, and is asked again.
    Wait(Until, Option<BodyRead>),
    /// It reads the body.
    Read { bytes_max: usize },
    /// It holds the head and looks at the body.
    Hold,
}

impl Running {
    pub(crate) fn new(filters: SmallVec<[Active; 6]>) -> Self {
        Self {
            respond_to: filters.len(),
            responding: None,
            filters,
            at: 0,
            step: Step::Ask(None),
            request: None,
            response: None,
            held_max: HELD_BYTES_MAX,
            finished: false,
        }
    }

    /// Lets each filter hold so many bytes of a body. Default: 1 MiB.
    pub fn hold_at_most(&mut self, bytes: usize) {
        self.held_max = bytes;
    }

    /// Whether some filter wants to see the body of this side, or its trailers.
    pub fn wants_body(&self, side: Side) -> bool {
        let (body, trailers) = side.phases();
        let met = match side {
            Side::Request => self.filters.len(),
            Side::Response => self.responding.unwrap_or(self.respond_to).min(self.filters.len()),
        };
        self.filters.iter().take(met).any(|active| active.phases.intersects(body | trailers))
    }

    /// Runs the request phase, first filter first. Filters after the one that answered do not run, and will not see
    /// the response either (Envoy encodes a local reply through the filters from the one that sent it backwards).
    /// `body` is read when a filter asks for it.
    pub async fn request_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        end_of_stream: bool,
        body: &mut dyn Body,
    ) -> Outcome {
        poll_fn(|cx| self.poll_request_headers(cx, exchange, head, end_of_stream, body)).await
    }

    /// [`Running::request_headers`] as one poll.
    pub fn poll_request_headers(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        end_of_stream: bool,
        body: &mut dyn Body,
    ) -> Poll<Outcome> {
        while let Some(active) = self.filters.get_mut(self.at) {
            if !active.phases.contains(Phases::REQUEST_HEADERS) {
                self.at += 1;
                continue;
            }
            let verdict = match &mut self.step {
                Step::Ask(None) => active.filter.request_headers(exchange, head, end_of_stream),
                Step::Ask(Some(read)) => active.filter.request_read(exchange, head, read),
                Step::Wait(until, read) => {
                    ready!(until.as_mut().poll(cx));
                    self.step = Step::Ask(read.take());
                    continue;
                }
                Step::Read { .. } | Step::Hold => {
                    if let Err(outcome) = ready!(self.poll_request_held(cx, exchange, head, body)) {
                        return Poll::Ready(self.request_stopped(outcome, exchange));
                    }
                    continue;
                }
            };
            match verdict {
                Verdict::Continue => self.next_request_filter(),
                Verdict::Wait(until) => self.wait(until),
                Verdict::ReadBody { bytes_max } => self.step = Step::Read { bytes_max },
                Verdict::Hold(hold) if end_of_stream => match hold.until {
                    Some(until) => self.wait(until),
                    None => self.next_request_filter(),
                },
                Verdict::Hold(hold) => {
                    let at = self.at;
                    self.request_flow().hold(at, hold);
                    self.step = Step::Hold;
                }
                Verdict::Reset => return Poll::Ready(Outcome::Reset),
                Verdict::Reply(reply) => {
                    return Poll::Ready(self.request_stopped(Outcome::Reply(reply), exchange));
                }
            }
        }
        self.step = Step::Ask(None);
        Poll::Ready(Outcome::Continue)
    }

    fn wait(&mut self, until: Until) {
        let read = match &mut self.step {
            Step::Ask(read) => read.take(),
            _ => None,
        };
        self.step = Step::Wait(until, read);
    }

    fn next_request_filter(&mut self) {
        self.at += 1;
        self.step = Step::Ask(None);
    }

    /// Lets the filter that the head has reached look at the body, until it goes on.
    fn poll_request_held(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        source: &mut dyn Body,
    ) -> Poll<Result<(), Outcome>> {
        self.request_flow();
        let Self { filters, request: Some(flow), at, step, held_max, .. } = self else {
            return Poll::Ready(Ok(()));
        };
        let head = Some((*at, HeldHead::Request(head)));
        let mut scene = Scene { side: Side::Request, filters, exchange, source, head, held_max: *held_max };
        match *step {
            Step::Read { bytes_max } => {
                let read = ready!(flow.poll_read(*at, bytes_max, cx, &mut scene))?;
                *step = Step::Ask(Some(read));
            }
            _ => {
                ready!(flow.poll_released(*at, cx, &mut scene))?;
                self.next_request_filter();
            }
        }
        Poll::Ready(Ok(()))
    }

    /// The request's head goes no further than the filter that it has reached.
    fn request_stopped(&mut self, outcome: Outcome, exchange: &mut Exchange) -> Outcome {
        self.request = None;
        self.step = Step::Ask(None);
        if matches!(outcome, Outcome::Reply(_)) {
            self.end_rest(self.at + 1, exchange);
        }
        outcome
    }

    fn request_flow(&mut self) -> &mut Flow {
        let count = self.filters.len();
        self.request.get_or_insert_with(|| Box::new(Flow::new(0..count)))
    }

    /// What was read of the request's body and has not gone on, for a chain that wants no bodies: it comes before what
    /// is still to be read.
    pub fn take_read(&mut self) -> impl Iterator<Item = Piece> + use<> {
        self.request.take().into_iter().flat_map(|flow| flow.into_read())
    }

    /// The next piece of the request's body that all filters let pass; not called again after the last.
    ///
    /// # Errors
    /// What ended the body.
    pub fn poll_request_body(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &mut Exchange,
        source: &mut dyn Body,
    ) -> Poll<Result<Piece, Outcome>> {
        self.request_flow();
        let Self { filters, request: Some(flow), held_max, .. } = self else {
            return Poll::Ready(Err(Outcome::Reset));
        };
        let held_max = *held_max;
        flow.poll(cx, &mut Scene { side: Side::Request, filters, exchange, source, head: None, held_max })
    }

    /// Runs the response phase, last filter first. A filter that answers replaces the response: make a head of its
    /// reply and call this again, and the filters before it see that. So no filter answers twice.
    pub async fn response_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        end_of_stream: bool,
        body: &mut dyn Body,
    ) -> Outcome {
        poll_fn(|cx| self.poll_response_headers(cx, exchange, head, end_of_stream, body)).await
    }

    /// [`Running::response_headers`] as one poll.
    pub fn poll_response_headers(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        end_of_stream: bool,
        body: &mut dyn Body,
    ) -> Poll<Outcome> {
        self.respond_to = self.respond_to.min(self.filters.len());
        self.responding.get_or_insert(self.respond_to);
        while let Some(index) = self.respond_to.checked_sub(1) {
            let Some(active) = self.filters.get_mut(index) else { break };
            if !active.phases.contains(Phases::RESPONSE_HEADERS) {
                self.respond_to = index;
                continue;
            }
            let verdict = match &mut self.step {
                Step::Ask(_) => active.filter.response_headers(exchange, head, end_of_stream),
                Step::Wait(until, _) => {
                    ready!(until.as_mut().poll(cx));
                    self.step = Step::Ask(None);
                    continue;
                }
                Step::Read { .. } | Step::Hold => {
                    if let Err(outcome) = ready!(self.poll_response_held(cx, exchange, head, body)) {
                        return Poll::Ready(self.response_stopped(index, outcome));
                    }
                    self.next_response_filter(index);
                    continue;
                }
            };
            match verdict {
                // There is no request left to read when it is answered.
                Verdict::Continue | Verdict::ReadBody { .. } => self.next_response_filter(index),
                Verdict::Wait(until) => self.wait(until),
                Verdict::Hold(hold) if end_of_stream => match hold.until {
                    Some(until) => self.wait(until),
                    None => self.next_response_filter(index),
                },
                Verdict::Hold(hold) => {
                    let (flow, met) = self.response_flow();
                    flow.hold(met - 1 - index, hold);
                    self.step = Step::Hold;
                }
                Verdict::Reset => return Poll::Ready(Outcome::Reset),
                Verdict::Reply(reply) => {
                    return Poll::Ready(self.response_stopped(index, Outcome::Reply(reply)));
                }
            }
        }
        Poll::Ready(Outcome::Continue)
    }

    fn next_response_filter(&mut self, index: usize) {
        self.respond_to = index;
        self.step = Step::Ask(None);
    }

    fn poll_response_held(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        source: &mut dyn Body,
    ) -> Poll<Result<(), Outcome>> {
        let (_, met) = self.response_flow();
        let stage = met - self.respond_to;
        let Self { filters, response: Some(flow), held_max, .. } = self else { return Poll::Ready(Ok(())) };
        let head = Some((stage, HeldHead::Response(head)));
        let held_max = *held_max;
        let mut scene = Scene { side: Side::Response, filters, exchange, source, head, held_max };
        flow.poll_released(stage, cx, &mut scene)
    }

    /// What replaces the response meets the filters before this one.
    fn response_stopped(&mut self, index: usize, outcome: Outcome) -> Outcome {
        self.next_response_filter(index);
        self.response = None;
        self.responding = None;
        outcome
    }

    /// The response's way through the filters, and how many it meets.
    fn response_flow(&mut self) -> (&mut Flow, usize) {
        let met = self.responding.unwrap_or(self.respond_to).min(self.filters.len());
        (self.response.get_or_insert_with(|| Box::new(Flow::new((0..met).rev()))), met)
    }

    /// The next piece of the response's body that all filters let pass; not called again after the last.
    ///
    /// # Errors
    /// What ended the body.
    pub fn poll_response_body(
        &mut self,
        cx: &mut Context<'_>,
        exchange: &mut Exchange,
        source: &mut dyn Body,
    ) -> Poll<Result<Piece, Outcome>> {
        self.response_flow();
        let Self { filters, response: Some(flow), held_max, .. } = self else {
            return Poll::Ready(Err(Outcome::Reset));
        };
        let held_max = *held_max;
        flow.poll(cx, &mut Scene { side: Side::Response, filters, exchange, source, head: None, held_max })
    }

    /// Whether filters put other bytes in the place of those that came, so far.
    pub fn is_body_changed(&self, side: Side) -> bool {
        let flow = if side == Side::Request { &self.request } else { &self.response };
        flow.as_ref().is_some_and(|flow| flow.is_changed())
    }

    /// Ends every filter, once; later calls do nothing.
    pub fn finish(&mut self, exchange: &mut Exchange) {
        if !self.finished {
            self.finished = true;
            self.end_rest(0, exchange);
        }
    }

    fn end_rest(&mut self, from: usize, exchange: &mut Exchange) {
        if from >= self.filters.len() {
            return;
        }
        for mut active in self.filters.drain(from..) {
            if active.phases.contains(Phases::FINISH) {
                active.filter.finish(exchange);
            }
        }
    }
}

#[cfg(test)]
#[path = "running/tests.rs"]
mod tests;
