//! Data that the instances of a plugin share, on all workers of a proxy: small values by key, changed by compare and swap.
//!
//! ```
//! use cairn_sdk::{Flow, Plugin, Request, shared};
//! # use cairn_sdk::testing::{Proxy, TestRequest};
//!
//! struct Count;
//!
//! #[cairn_sdk::plugin]
//! impl Plugin for Count {
//!     type Config = ();
//!     type Exchange = ();
//! #   fn configure((): ()) -> Result<Self, String> { Ok(Self) }
//!
//!     fn on_request(&self, request: Request, _: &mut ()) -> Flow {
//!         let count = shared::update("count", |old| {
//!             let old: u64 = old.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
//!             ((old + 1).to_le_bytes().to_vec(), old + 1)
//!         });
//!         request.set_header("x-count", count.unwrap_or_default().to_string());
//!         Flow::Continue
//!     }
//! }
//! # let mut proxy = Proxy::<Count>::new("").unwrap();
//! # proxy.send(TestRequest::get("/"));
//! # assert_eq!(proxy.send(TestRequest::get("/")).upstream.unwrap().header("x-count").as_deref(), Some("2"));
//! ```

use crate::{HostError, sys};

/// How often [`update`] tries: others may change the value in between that often.
const TRIES: usize = 64;

/// The value of a key.
pub fn get(key: &str) -> Option<Vec<u8>> {
    sys::shared_data(key).ok().map(|(value, _)| value)
}

/// Sets a key, whatever its value was.
///
/// # Errors
/// When the proxy has no room for it.
pub fn set(key: &str, value: impl AsRef<[u8]>) -> Result<(), HostError> {
    sys::set_shared_data(key, value.as_ref(), 0)
}

/// Makes a new value of the old one, which is `None` if there is none, and something to return. `change` is called again when
/// another worker was faster.
///
/// # Errors
/// When the proxy has no room for it, or others were faster 64 times.
pub fn update<T>(key: &str, mut change: impl FnMut(Option<&[u8]>) -> (Vec<u8>, T)) -> Result<T, HostError> {
    for _ in 0..TRIES {
        let old = match sys::shared_data(key) {
            Ok(old) => Some(old),
            Err(HostError::NotFound) => None,
            Err(error) => return Err(error),
        };
        let (value, output) = change(old.as_ref().map(|(value, _)| value.as_slice()));
        // An absent key takes any number, and one that somebody has set meanwhile does not have this one.
        let cas = old.map_or(u32::MAX, |(_, cas)| cas);
        match sys::set_shared_data(key, &value, cas) {
            Ok(()) => return Ok(output),
            Err(HostError::CasMismatch) => {}
            Err(error) => return Err(error),
        }
    }
    Err(HostError::CasMismatch)
}
