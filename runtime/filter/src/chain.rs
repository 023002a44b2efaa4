//! The chain: the filters of one destination, and their run over one exchange.

use crate::{
    Admission, Body, BodyRead, Connection, Exchange, Factory, Filter, LocalReply, Phases, RequestHead,
    ResponseHead, Verdict,
};
use smallvec::SmallVec;
use std::sync::Arc;

/// The filters of one destination in request order, compiled once per configuration.
#[derive(Clone, Default)]
pub struct Chain {
    links: Arc<[Link]>,
}

#[derive(Clone)]
struct Link {
    factory: Arc<dyn Factory>,
    phases: Phases,
}

/// What a phase of the whole chain came to.
#[derive(Debug)]
pub enum Outcome {
    /// Every filter let it pass.
    Continue,
    /// A filter answered. The reply has not run through the response phase yet; the engine does that.
    Reply(Box<LocalReply>),
    /// A filter ended the exchange.
    Reset,
    /// The client broke off within the body that a filter asked for.
    ClientGone,
}

impl Chain {
    /// A chain that runs `factories` in this order on requests and in reverse on responses.
    pub fn new(factories: Vec<Arc<dyn Factory>>) -> Self {
        let link = |factory: Arc<dyn Factory>| Link { phases: factory.phases(), factory };
        Self { links: factories.into_iter().map(link).collect() }
    }

    /// The names of the filters, in request order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.links.iter().map(|link| link.factory.name())
    }

    /// The filters, in request order.
    pub(crate) fn factories(&self) -> impl Iterator<Item = &Arc<dyn Factory>> {
        self.links.iter().map(|link| &link.factory)
    }

    /// Whether nothing is asked of the destination's traffic.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Judges a connection that carries no HTTP: any filter's refusal is the chain's.
    pub fn admit(&self, connection: &Connection) -> Admission {
        let mut allowed_by = None;
        for link in self.links.iter() {
            match link.factory.admit(connection) {
                Admission::Pass(by) => allowed_by = allowed_by.or(by),
                refused => return refused,
            }
        }
        Admission::Pass(allowed_by)
    }

    /// Judges a connection that carries no HTTP and that [`Chain::admit`] lets pass, by filters that ask somebody.
    pub async fn ask(&self, connection: &Connection) -> Admission {
        let asked: Vec<_> = self.links.iter().filter_map(|link| link.factory.ask(connection)).collect();
        for judgement in asked {
            if let Admission::Refuse(denial) = judgement.await {
                return Admission::Refuse(denial);
            }
        }
        Admission::Pass(None)
    }

    /// Starts the instances for one exchange.
    pub fn start(&self, exchange: &Exchange) -> Running {
        let mut filters = SmallVec::new();
        for link in self.links.iter() {
            if let Some(filter) = link.factory.start(exchange) {
                filters.push(Active { phases: link.phases, filter });
            }
        }
        Running { respond_to: filters.len(), filters, finished: false }
    }
}

struct Active {
    phases: Phases,
    filter: Box<dyn Filter>,
}

/// The filters at work on one exchange.
pub struct Running {
    filters: SmallVec<[Active; 6]>,
    /// How many filters, counted from the first, have yet to see the response.
    respond_to: usize,
    finished: bool,
}

impl Running {
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
        for index in 0..self.filters.len() {
            let active = &mut self.filters[index];
            if !active.phases.contains(Phases::REQUEST_HEADERS) {
                continue;
            }
            let mut read: Option<BodyRead> = None;
            loop {
                let verdict = match &read {
                    None => active.filter.request_headers(exchange, head, end_of_stream),
                    Some(read) => active.filter.request_body(exchange, head, read),
                };
                match verdict {
                    Verdict::Continue => break,
                    Verdict::Wait(until) => until.await,
                    Verdict::Reset => return Outcome::Reset,
                    Verdict::ReadBody { bytes_max } => match body.read(bytes_max).await {
                        Ok(body) => read = Some(body),
                        Err(_) => return Outcome::ClientGone,
                    },
                    Verdict::Reply(reply) => {
                        self.end_rest(index + 1, exchange);
                        return Outcome::Reply(reply);
                    }
                }
            }
        }
        Outcome::Continue
    }

    /// Runs the response phase, last filter first. A filter that answers replaces the response: make a head of its
    /// reply and call this again, and the filters before it see that. So no filter answers twice.
    pub async fn response_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        end_of_stream: bool,
    ) -> Outcome {
        while let Some(index) = self.respond_to.min(self.filters.len()).checked_sub(1) {
            let active = &mut self.filters[index];
            let verdict = match active.phases.contains(Phases::RESPONSE_HEADERS) {
                true => active.filter.response_headers(exchange, head, end_of_stream),
                false => Verdict::Continue,
            };
            match verdict {
                // There is no request left to read when it is answered.
                Verdict::Continue | Verdict::ReadBody { .. } => self.respond_to = index,
                Verdict::Wait(until) => until.await,
                Verdict::Reset => return Outcome::Reset,
                Verdict::Reply(reply) => {
                    self.respond_to = index;
                    return Outcome::Reply(reply);
                }
            }
        }
        Outcome::Continue
    }

    /// Ends every filter, once; later calls do nothing.
    pub fn finish(&mut self, exchange: &mut Exchange) {
        if !self.finished {
            self.finished = true;
            self.end_rest(0, exchange);
        }
    }

    fn end_rest(&mut self, from: usize, exchange: &mut Exchange) {
        for mut active in self.filters.drain(from..) {
            if active.phases.contains(Phases::FINISH) {
                active.filter.finish(exchange);
            }
        }
    }
}

#[cfg(test)]
#[path = "chain/tests.rs"]
mod tests;
