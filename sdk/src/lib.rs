//! The guest side of proxy-wasm for plugin authors: a thin, typed layer on the official `proxy-wasm` crate.
//!
//! A plugin is a type that implements [`Plugin`]: it is made of its configuration and handles the headers of requests
//! and responses. [`plugin!`] exports it. The module speaks ABI 0.2.1 and nothing more, so it runs in every proxy-wasm
//! host. Handlers see [`Request`] and [`Response`], which stand on a [`Host`]: the proxy when compiled to Wasm, memory in
//! [`testing`], so that `cargo test` runs the logic natively.
//!
//! ```
//! use cairn_sdk::{Flow, Plugin, Reply, Request, Response};
//!
//! #[derive(serde::Deserialize)]
//! struct Config {
//!     team: String,
//! }
//!
//! struct Teams {
//!     team: String,
//! }
//!
//! impl Plugin for Teams {
//!     type Config = Config;
//!     type Exchange = ();
//!
//!     fn configure(config: Config) -> Result<Self, String> {
//!         Ok(Self { team: config.team })
//!     }
//!
//!     fn on_request(&self, request: &mut Request<'_>, _: &mut ()) -> Flow {
//!         if request.header("x-team").as_deref() != Some(self.team.as_bytes()) {
//!             return Flow::Reply(Reply::text(403, "not your team"));
//!         }
//!         Flow::Continue
//!     }
//!
//!     fn on_response(&self, response: &mut Response<'_>, _: &mut ()) -> Flow {
//!         response.set_header("x-team", self.team.as_bytes());
//!         Flow::Continue
//!     }
//! }
//!
//! cairn_sdk::plugin!(Teams);
//!
//! # fn main() {
//! let plugin = cairn_sdk::testing::configure::<Teams>(r#"{"team": "blue"}"#).unwrap();
//! let mut exchange = cairn_sdk::testing::TestExchange::new("GET", "/").with_header("x-team", "red");
//! assert_eq!(exchange.request(&plugin), Flow::Reply(Reply::text(403, "not your team")));
//! # }
//! ```

mod config;
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod guest;
mod host;
mod properties;
mod reply;
pub mod testing;
mod view;

pub use host::{Host, Side};
pub use log;
pub use properties::{Properties, Workload};
pub use reply::Reply;
pub use view::{Request, Response};

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub use proxy_wasm;

/// What a handler decides.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Flow {
    /// The exchange goes on.
    Continue,
    /// The proxy answers this in place of the upstream.
    Reply(Reply),
}

/// A plugin: the logic of one configuration, shared by all exchanges.
pub trait Plugin: Sized + 'static {
    /// The configuration, `pluginConfig` of the WasmPlugin. Give its type `deny_unknown_fields` to find typing errors.
    type Config: serde::de::DeserializeOwned;

    /// What is remembered of an exchange between its phases; `()` for nothing.
    type Exchange: Default + 'static;

    /// Makes the plugin of its configuration. An empty configuration is read as `{}`.
    ///
    /// # Errors
    /// When it makes no sense. The text goes to the proxy's log and the plugin is refused.
    fn configure(config: Self::Config) -> Result<Self, String>;

    /// A request's headers are here.
    fn on_request(&self, request: &mut Request<'_>, exchange: &mut Self::Exchange) -> Flow {
        let _ = (request, exchange);
        Flow::Continue
    }

    /// A response's headers are here.
    fn on_response(&self, response: &mut Response<'_>, exchange: &mut Self::Exchange) -> Flow {
        let _ = (response, exchange);
        Flow::Continue
    }
}

/// Exports a [`Plugin`] from a `cdylib`. Does nothing when not compiled to Wasm.
#[macro_export]
macro_rules! plugin {
    ($plugin:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            $crate::proxy_wasm::main! {{ $crate::guest::register::<$plugin>(); }}
        };
    };
}
