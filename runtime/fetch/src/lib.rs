//! Bytes of a module: from a file, over HTTP, from a registry of images; and back to one.
//!
//! A [`Source`] is what a URL says. A [`Fetcher`] gets what is there, however it is packed: bare, compressed, in an archive,
//! or as one of the kinds of image by which modules are published. What is fetched is bounded in size and time while it
//! comes, held against the digest that was pinned, and asked for at no address of the machine's own. A [`Puller`] keeps what it
//! fetched in a [`Store`] and knows when to ask again.

mod backoff;
mod challenge;
mod credentials;
mod digest;
mod error;
mod fetcher;
mod manifest;
mod pack;
mod puller;
mod registry;
mod source;
mod store;
mod tls;
mod unpack;
mod web;

pub use backoff::Backoff;
pub use credentials::{Credentials, CredentialsError, Login};
pub use digest::Digest;
pub use error::FetchError;
pub use fetcher::{FetchSettings, Fetched, Fetcher, Wanted};
pub use pack::ImageFormat;
pub use puller::{Asking, PullCounts, Pulled, Puller, kept_as};
pub use source::{Reference, Source, SourceError};
pub use store::{Store, StoreSettings};

#[cfg(test)]
mod tests;
