//! Connections that carry no HTTP, as a plugin of type NETWORK sees them, and how far each is.

use crate::abi::{Action, Stream};
use crate::{Chunk, Plugin, Properties, sys, task};
use std::fmt;
use std::pin::Pin;
use std::task::Poll;

/// A connection that carries no HTTP.
#[derive(Clone, Copy, Debug)]
pub struct Connection(pub(crate) ());

impl Connection {
    /// What the proxy knows about it: its ends, who they are and, once bytes pass, its upstream.
    pub fn properties(&self) -> Properties {
        Properties(())
    }
}

/// What a handler of connections decides.
#[must_use]
pub enum Passage {
    /// What it was shown goes on.
    Continue,
    /// What it was shown is held, and shown again with what follows. A connection that is new goes on.
    Hold,
    /// The connection ends. What was sent before still arrives.
    Close,
    /// The connection, or what was shown, waits until the future has decided. Made by [`Passage::wait`].
    Wait(Pin<Box<dyn Future<Output = Passage>>>),
}

impl Passage {
    /// Waits until `future` has decided: awaiting callouts and [`crate::sleep`] holds the connection. Bytes that arrive
    /// meanwhile are held too, and shown together with those before. When the connection ends earlier, the future is
    /// dropped. Do not wait with what an upstream has sent: Envoy lets that go on only when more of it comes.
    pub fn wait(future: impl Future<Output = Self> + 'static) -> Self {
        Self::Wait(Box::pin(future))
    }
}

impl fmt::Debug for Passage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Continue => "Continue",
            Self::Hold => "Hold",
            Self::Close => "Close",
            Self::Wait(_) => "Wait",
        })
    }
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClosedBy {
    /// The proxy does not say.
    Unknown,
    /// The proxy, or the server behind it.
    Proxy,
    /// The client.
    Client,
}

impl ClosedBy {
    pub(crate) fn of(peer: u32) -> Self {
        match peer {
            1 => Self::Proxy,
            2 => Self::Client,
            _ => Self::Unknown,
        }
    }
}

/// What waits in a connection: with what the client, and with what the server sent.
#[derive(Default)]
pub(crate) struct Waits([Wait; 2]);

#[derive(Default)]
struct Wait {
    future: Option<Pin<Box<dyn Future<Output = Passage>>>>,
    /// What arrived since, all bytes that are held counted, and whether they are the last.
    unseen: Option<(usize, bool)>,
}

impl Waits {
    fn of(&mut self, stream: Stream) -> &mut Wait {
        let [down, up] = &mut self.0;
        if stream == Stream::Upstream { up } else { down }
    }

    /// The connection is new.
    pub(crate) fn opened<P: Plugin>(&mut self, plugin: &P, state: &mut P::Exchange) -> Action {
        match plugin.on_connection(Connection(()), state) {
            Passage::Hold => Action::Continue,
            passage => self.decide(plugin, state, Stream::Downstream, passage),
        }
    }

    /// Bytes have come, all that are held counted.
    pub(crate) fn data<P: Plugin>(
        &mut self,
        plugin: &P,
        state: &mut P::Exchange,
        stream: Stream,
        (size, end): (usize, bool),
    ) -> Action {
        let wait = self.of(stream);
        if wait.future.is_some() {
            wait.unseen = Some((size, end));
            return Action::Pause;
        }
        let passage = show(plugin, state, stream, (size, end));
        self.decide(plugin, state, stream, passage)
    }

    /// Polls what waits.
    pub(crate) fn resume<P: Plugin>(&mut self, plugin: &P, state: &mut P::Exchange) {
        for stream in [Stream::Downstream, Stream::Upstream] {
            let Some(future) = self.of(stream).future.take() else { continue };
            if self.decide(plugin, state, stream, Passage::Wait(future)) == Action::Continue
                && let Err(error) = sys::continue_stream(stream)
            {
                log::warn!("the proxy did not go on: {error}");
            }
        }
    }

    /// Does what a handler decided, and shows it what arrived while it waited.
    fn decide<P: Plugin>(
        &mut self,
        plugin: &P,
        state: &mut P::Exchange,
        stream: Stream,
        mut passage: Passage,
    ) -> Action {
        loop {
            passage = match passage {
                Passage::Continue => match self.of(stream).unseen.take() {
                    Some(unseen) => show(plugin, state, stream, unseen),
                    None => return Action::Continue,
                },
                Passage::Hold => return Action::Pause,
                Passage::Close => {
                    if let Err(error) = sys::close_stream(Stream::Downstream) {
                        log::error!("the proxy did not close a connection: {error}");
                    }
                    return Action::Pause;
                }
                Passage::Wait(mut future) => match task::poll(future.as_mut()) {
                    Poll::Ready(passage) => passage,
                    Poll::Pending => {
                        self.of(stream).future = Some(future);
                        return Action::Pause;
                    }
                },
            };
        }
    }
}

fn show<P: Plugin>(
    plugin: &P,
    state: &mut P::Exchange,
    stream: Stream,
    (size, end): (usize, bool),
) -> Passage {
    let mut chunk = Chunk::new(stream.buffer(), size, end);
    match stream {
        Stream::Upstream => plugin.on_upstream_data(Connection(()), &mut chunk, state),
        _ => plugin.on_downstream_data(Connection(()), &mut chunk, state),
    }
}
