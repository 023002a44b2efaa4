//! What a plugin is, and what its handlers decide.

use crate::{Body, Chunk, ClosedBy, Connection, Passage, Properties, Reply, Request, Response, Trailers};
use std::fmt;
use std::pin::Pin;

/// What a handler decides.
#[must_use]
pub enum Flow {
    /// The exchange goes on.
    Continue,
    /// The headers go on; the body is held until it is whole, and then shown to [`Plugin::on_request_body`] or
    /// [`Plugin::on_response_body`], which is called with an empty one too. Only headers can ask for it.
    ReadBody,
    /// As [`Flow::ReadBody`], for a body that may be replaced by one of another length: takes `content-length` away, since
    /// the headers may be gone by then.
    EditBody,
    /// The proxy answers this in place of the upstream.
    Reply(Reply),
    /// The exchange waits until the future has decided. Made by [`Flow::wait`].
    Wait(Pin<Box<dyn Future<Output = Flow>>>),
}

impl Flow {
    /// The exchange waits until `future` has decided: awaiting callouts and [`crate::sleep`] pauses it. When the exchange
    /// ends earlier, the future is dropped.
    pub fn wait(future: impl Future<Output = Self> + 'static) -> Self {
        Self::Wait(Box::pin(future))
    }
}

impl From<Reply> for Flow {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply)
    }
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Continue => f.write_str("Continue"),
            Self::ReadBody => f.write_str("ReadBody"),
            Self::EditBody => f.write_str("EditBody"),
            Self::Reply(reply) => f.debug_tuple("Reply").field(reply).finish(),
            Self::Wait(_) => f.write_str("Wait"),
        }
    }
}

/// A plugin: the logic of one configuration, shared by all exchanges of a worker.
///
/// Proxies call only the handlers that the `impl` block overrides, given [`macro@crate::plugin`]. Headers can be read and
/// changed in their own handler; later ones may find them gone (in Envoy they do), so take along in `Exchange` what they
/// need.
pub trait Plugin: Sized + 'static {
    /// The configuration, `pluginConfig` of the WasmPlugin. Give its type `deny_unknown_fields` to find typing errors.
    type Config: serde::de::DeserializeOwned;

    /// What is remembered of an exchange between its phases, or of a connection; `()` for nothing.
    type Exchange: Default + 'static;

    /// Makes the plugin of its configuration. An empty configuration is read as `{}`.
    ///
    /// # Errors
    /// When it makes no sense. The text goes to the proxy's log and the plugin is refused.
    fn configure(config: Self::Config) -> Result<Self, String>;

    /// A request's headers are here.
    fn on_request(&self, request: Request, exchange: &mut Self::Exchange) -> Flow {
        let _ = (request, exchange);
        Flow::Continue
    }

    /// A piece of a request's body passes by, cut wherever the network cut it. Called unless the body is read whole. An error
    /// is the reply that ends the exchange.
    ///
    /// ```
    /// use cairn_sdk::{Chunk, Plugin, Reply, Request};
    /// # use cairn_sdk::testing::{Proxy, TestRequest};
    ///
    /// struct Limit;
    ///
    /// #[cairn_sdk::plugin]
    /// impl Plugin for Limit {
    ///     type Config = ();
    ///     type Exchange = usize;
    /// #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
    ///
    ///     fn on_request_chunk(&self, _: Request, chunk: &mut Chunk, seen: &mut usize) -> Result<(), Reply> {
    ///         *seen += chunk.len();
    ///         if *seen > 4 { Err(Reply::text(413, "too much")) } else { Ok(()) }
    ///     }
    /// }
    /// # let mut proxy = Proxy::<Limit>::new("").unwrap();
    /// # assert_eq!(proxy.send_split(TestRequest::post("/", "1234")).status, 200);
    /// # assert_eq!(proxy.send_split(TestRequest::post("/", "12345")).status, 413);
    /// ```
    ///
    /// # Errors
    /// The reply that ends the exchange.
    fn on_request_chunk(
        &self,
        request: Request,
        chunk: &mut Chunk,
        exchange: &mut Self::Exchange,
    ) -> Result<(), Reply> {
        let _ = (request, chunk, exchange);
        Ok(())
    }

    /// A request's body is whole; called when headers asked for it.
    ///
    /// ```
    /// use cairn_sdk::{Body, Flow, Plugin, Reply, Request};
    /// # use cairn_sdk::testing::{Proxy, TestRequest};
    ///
    /// struct Shout;
    ///
    /// #[cairn_sdk::plugin]
    /// impl Plugin for Shout {
    ///     type Config = ();
    ///     type Exchange = ();
    /// #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
    ///
    ///     fn on_request(&self, _: Request, _: &mut ()) -> Flow {
    ///         Flow::EditBody
    ///     }
    ///
    ///     fn on_request_body(&self, _: Request, body: Body, _: &mut ()) -> Flow {
    ///         let Ok(text) = String::from_utf8(body.bytes()) else {
    ///             return Reply::text(400, "say it in UTF-8").into();
    ///         };
    ///         body.replace(text.to_uppercase() + "!");
    ///         Flow::Continue
    ///     }
    /// }
    /// # let mut proxy = Proxy::<Shout>::new("").unwrap();
    /// # let outcome = proxy.send_split(TestRequest::post("/", "hey").header("content-length", "3"));
    /// # let upstream = outcome.upstream.unwrap();
    /// # assert_eq!((upstream.text(), upstream.header("content-length")), ("HEY!".to_owned(), None));
    /// # assert_eq!(proxy.send_split(TestRequest::post("/", b"\xff")).status, 400);
    /// ```
    fn on_request_body(&self, request: Request, body: Body, exchange: &mut Self::Exchange) -> Flow {
        let _ = (request, body, exchange);
        Flow::Continue
    }

    /// A request ends with trailers.
    fn on_request_trailers(
        &self,
        request: Request,
        trailers: Trailers,
        exchange: &mut Self::Exchange,
    ) -> Flow {
        let _ = (request, trailers, exchange);
        Flow::Continue
    }

    /// A response's headers are here, from the upstream or of a local reply, the plugin's own included.
    fn on_response(&self, response: Response, exchange: &mut Self::Exchange) -> Flow {
        let _ = (response, exchange);
        Flow::Continue
    }

    /// A piece of a response's body passes by; see [`Plugin::on_request_chunk`].
    ///
    /// # Errors
    /// The reply that ends the exchange. Where the headers are gone the response is cut off.
    fn on_response_chunk(
        &self,
        response: Response,
        chunk: &mut Chunk,
        exchange: &mut Self::Exchange,
    ) -> Result<(), Reply> {
        let _ = (response, chunk, exchange);
        Ok(())
    }

    /// A response's body is whole; see [`Plugin::on_request_body`].
    fn on_response_body(&self, response: Response, body: Body, exchange: &mut Self::Exchange) -> Flow {
        let _ = (response, body, exchange);
        Flow::Continue
    }

    /// A response ends with trailers.
    fn on_response_trailers(
        &self,
        response: Response,
        trailers: Trailers,
        exchange: &mut Self::Exchange,
    ) -> Flow {
        let _ = (response, trailers, exchange);
        Flow::Continue
    }

    /// A connection that carries no HTTP is here; nothing of it was read, and no upstream is connected. Called, as the other
    /// handlers of connections, where the WasmPlugin says `type: NETWORK`.
    ///
    /// ```
    /// use cairn_sdk::{Chunk, ClosedBy, Connection, Passage, Plugin, log};
    /// # use cairn_sdk::testing::Proxy;
    ///
    /// /// Lets only clients in that greet as the protocol wants it, however their greeting is cut.
    /// struct Greeted;
    ///
    /// #[cairn_sdk::plugin]
    /// impl Plugin for Greeted {
    ///     type Config = ();
    ///     /// Whether the client has greeted.
    ///     type Exchange = bool;
    /// #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
    ///
    ///     fn on_downstream_data(&self, _: Connection, data: &mut Chunk, greeted: &mut bool) -> Passage {
    ///         const GREETING: &[u8] = b"HELLO ";
    ///         let bytes = data.bytes();
    ///         if *greeted || bytes.starts_with(GREETING) {
    ///             *greeted = true;
    ///             return Passage::Continue;
    ///         }
    ///         if GREETING.starts_with(&bytes) && !data.is_last() { Passage::Hold } else { Passage::Close }
    ///     }
    ///
    ///     fn on_close(&self, _: Connection, by: ClosedBy, greeted: &mut bool) {
    ///         log::info!("closed by {by:?}, greeted: {greeted}");
    ///     }
    /// }
    ///
    /// # let mut proxy = Proxy::<Greeted>::new("").unwrap();
    /// # let polite = proxy.connect();
    /// # proxy.client_sends(polite, "HEL");
    /// # assert_eq!(proxy.to_server(polite), b"");
    /// # proxy.client_sends(polite, "LO you");
    /// # proxy.client_sends(polite, "!");
    /// # assert_eq!(proxy.to_server(polite), b"HELLO you!");
    /// # let rude = proxy.connect();
    /// # proxy.client_sends(rude, "GIVE");
    /// # assert!(!proxy.is_open(rude) && proxy.is_open(polite));
    /// # assert_eq!((proxy.to_server(rude), proxy.logs()), (Vec::new(), vec!["closed by Proxy, greeted: false".to_owned()]));
    /// ```
    fn on_connection(&self, connection: Connection, exchange: &mut Self::Exchange) -> Passage {
        let _ = (connection, exchange);
        Passage::Continue
    }

    /// The client of a connection has sent bytes, or has no more to send; cut wherever the network cut them.
    fn on_downstream_data(
        &self,
        connection: Connection,
        data: &mut Chunk,
        exchange: &mut Self::Exchange,
    ) -> Passage {
        let _ = (connection, data, exchange);
        Passage::Continue
    }

    /// The server of a connection has sent bytes, or has no more to send.
    fn on_upstream_data(
        &self,
        connection: Connection,
        data: &mut Chunk,
        exchange: &mut Self::Exchange,
    ) -> Passage {
        let _ = (connection, data, exchange);
        Passage::Continue
    }

    /// A connection is over.
    fn on_close(&self, connection: Connection, by: ClosedBy, exchange: &mut Self::Exchange) {
        let _ = (connection, by, exchange);
    }

    /// The period asked for by [`crate::tick_every`] has passed.
    fn on_tick(&self) {}

    /// The plugin begins anew in an instance for one exchange, as it was when it had been configured (Cairn's
    /// `cairn.dev/isolation: exchange`). What was drawn at random then is the same in all of them: draw it anew here, if
    /// nobody may guess it. What its tick, queues and calls from `configure` bring does not come here.
    fn on_clone(&self) {}

    /// The exchange, or the connection, is over; what the proxy knows of it can be read for the last time.
    fn on_log(&self, properties: Properties, exchange: &mut Self::Exchange) {
        let _ = (properties, exchange);
    }
}
