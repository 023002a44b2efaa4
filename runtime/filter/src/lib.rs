//! The filter interface and the chain that runs it.
//!
//! Whatever happens to an L7 exchange between arrival and upstream is a filter. Built-ins and Wasm plugins are peers
//! behind [`Factory`] and [`Filter`]. A [`Factory`] is the compiled, immutable configuration of one filter, shared by
//! all workers; for each exchange it starts a [`Filter`] (or answers "not for this exchange"). Each phase returns at
//! once with a [`Verdict`]; a filter that must wait returns [`Verdict::Wait`], and *pausing is awaiting*.
//!
//! Order is data: [`sort_factories`] puts Istio's phases and priorities into one list. Requests run it forwards,
//! responses backwards.

mod body;
mod callout;
mod chain;
mod connection;
mod exchange;
mod flow;
mod head;
mod metadata;
mod order;
mod rehearsal;
mod reply;
mod running;
mod token;

pub use body::{
    Body, BodyBroken, BodyRead, Chunk, HeldHead, Hold, NoBody, Part, Piece, Side, Until, WhenFull, append,
};
pub use callout::{
    Callout, CalloutAnswer, CalloutError, CalloutFeed, CalloutFuture, CalloutOpening, CalloutPart,
    CalloutParts, CalloutRequest, NoCallout,
};
pub use chain::Chain;
pub use connection::{Closer, ConnectionFilter, Passage, Wakers};
pub use exchange::{Connection, Exchange, Measures, Note, Peer, Protocol};
pub use head::{RequestHead, ResponseHead};
pub use metadata::Metadata;
pub use order::{Position, Slot, sort_factories};
pub use rehearsal::{Considered, Judgement, Rehearsal, Rehearsed};
pub use reply::{Denial, LocalReply};
pub use running::{Outcome, Running};
pub use token::Token;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

bitflags::bitflags! {
    /// The phases of an exchange that a filter wants to see; the chain skips it in all others.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Phases: u8 {
        /// [`Filter::request_headers`].
        const REQUEST_HEADERS = 1;
        /// [`Filter::response_headers`].
        const RESPONSE_HEADERS = 2;
        /// [`Filter::finish`].
        const FINISH = 4;
        /// [`Filter::body`] and [`Filter::trailers`] of the request.
        const REQUEST_BODY = 8;
        /// [`Filter::trailers`] of the request.
        const REQUEST_TRAILERS = 16;
        /// [`Filter::body`] and [`Filter::trailers`] of the response.
        const RESPONSE_BODY = 32;
        /// [`Filter::trailers`] of the response.
        const RESPONSE_TRAILERS = 64;
    }
}

/// What a phase decides.
pub enum Verdict {
    /// Go on with the next filter.
    Continue,
    /// Answer the downstream now. In the phases of the request, the upstream's answer is not waited for; in those of
    /// the response, it is replaced. Once the head of a response is on its way, this is a [`Verdict::Reset`].
    Reply(Box<LocalReply>),
    /// End the exchange without an answer (HTTP/2: a stream reset; HTTP/1.1: the connection closes).
    Reset,
    /// Hold the exchange, and read nothing more, until the future resolves; the chain then calls the same phase of the
    /// same filter again, which finds out from its own state what came of it. The future must bound its own waiting.
    Wait(Until),
    /// In a head's phase: hold the head, and show this filter the body; the head goes on when the filter lets some of
    /// the body pass, or when it is asked in [`Filter::resumed`] and lets go. Where there is no body, this is a wait.
    /// In a body's phase or that of its trailers: hold what was shown, and call again with all of it when more comes.
    Hold(Hold),
    /// In the phase of a request's head: hold the exchange until the request's body is here, or more than `bytes_max`
    /// of it, and call [`Filter::request_read`] with it. What is read still goes on as it came.
    ReadBody {
        /// The most bytes that the filter is given; one more piece may be kept.
        bytes_max: usize,
    },
}

/// What a filter says of a connection whose bytes are not HTTP: its own judgement on who connects to what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may pass; the policy that allowed it, if one did.
    Pass(Option<Arc<str>>),
    /// It may not.
    Refuse(Denial),
}

/// A judgement on its way.
pub type AdmissionFuture = Pin<Box<dyn Future<Output = Admission> + Send>>;

/// The compiled configuration of one filter, immutable and shared by all exchanges of all workers.
pub trait Factory: Send + Sync {
    /// The name under which notes, logs and denials speak of this filter: `authorization`, or a plugin's `ns/name`.
    fn name(&self) -> &str;

    /// The phases that instances of this factory want. Asked once, when the chain is compiled.
    fn phases(&self) -> Phases;

    /// Starts an instance for one exchange, or `None` when the filter has nothing to do with it.
    fn start(&self, exchange: &Exchange) -> Option<Box<dyn Filter>>;

    /// How this filter takes part when an exchange is only told about, for people who ask why: a filter that touches
    /// nothing but the exchange is run, and says what it looks at; all others stay out.
    fn rehearse(&self, exchange: &Exchange, head: &RequestHead) -> Rehearsal {
        let _ = (exchange, head);
        Rehearsal::Withheld("its code is not run for an explanation".to_owned())
    }

    /// Judges a connection that carries no HTTP. It is asked before the connection goes on and again whenever the
    /// configuration changes while it is open. A filter that only knows requests has no say (Istio attaches HTTP
    /// plugins to HTTP chains only).
    fn admit(&self, connection: &Connection) -> Admission {
        let _ = connection;
        Admission::Pass(None)
    }

    /// Judges a connection that carries no HTTP when that takes asking somebody; `None`: it does not. It is asked once
    /// [`Factory::admit`] of all filters let the connection pass, and again only when the filters of the destination
    /// changed. The future must bound its own waiting.
    fn ask(&self, connection: &Connection) -> Option<AdmissionFuture> {
        let _ = connection;
        None
    }

    /// Starts an instance for a connection that carries no HTTP and that may pass; `None`: this filter does not look at
    /// its bytes.
    fn connect(&self, exchange: &Exchange, wakers: &Wakers) -> Option<Box<dyn ConnectionFilter>> {
        let _ = (exchange, wakers);
        None
    }
}

/// One filter at work on one exchange.
///
/// Every method has a pass-through default. An instance is dropped when its exchange ends; a client that goes away
/// ends the exchange too, and [`Filter::finish`] is still called, once.
pub trait Filter: Send {
    /// The request's head is here; no byte has gone upstream. `end_of_stream`: the request has no body.
    fn request_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        end_of_stream: bool,
    ) -> Verdict {
        let _ = (exchange, head, end_of_stream);
        Verdict::Continue
    }

    /// The request's body is here, as far as [`Verdict::ReadBody`] asked for it; no byte has gone upstream.
    fn request_read(&mut self, exchange: &mut Exchange, head: &mut RequestHead, body: &BodyRead) -> Verdict {
        let _ = (exchange, head, body);
        Verdict::Continue
    }

    /// The response's head is here (from upstream, or a local reply); no byte has gone downstream.
    fn response_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut ResponseHead,
        end_of_stream: bool,
    ) -> Verdict {
        let _ = (exchange, head, end_of_stream);
        Verdict::Continue
    }

    /// More of a body is here, or its end.
    fn body(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        let _ = (exchange, part);
        Verdict::Continue
    }

    /// A body ended with trailers. What the filter held of the body goes on with them.
    fn trailers(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        let _ = (exchange, part);
        Verdict::Continue
    }

    /// What a filter waits for that holds ([`Hold::until`]) is here. If it lets pass, what it held goes on without
    /// being shown again.
    fn resumed(&mut self, exchange: &mut Exchange, part: Part<'_>) -> Verdict {
        let _ = (exchange, part);
        Verdict::Continue
    }

    /// The exchange is over, for whatever reason; its record is complete. Called once.
    fn finish(&mut self, exchange: &mut Exchange) {
        let _ = exchange;
    }
}
