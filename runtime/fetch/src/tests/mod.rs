//! The crate at its edge: against a server of our own, and against Debian's registry of images.

mod peer;
mod puller;
mod registry;
mod server;
mod web;

use crate::{Credentials, Digest, FetchSettings, Fetched, Fetcher, Source, Wanted};
use std::time::Duration;

/// The smallest module there is, and one more byte to tell it from others.
fn module(mark: u8) -> bytes::Bytes {
    // A custom section without a name, one byte long.
    vec![0, b'a', b's', b'm', 1, 0, 0, 0, 0, 2, 0, mark].into()
}

fn quick() -> FetchSettings {
    FetchSettings {
        silence_max: Duration::from_secs(5),
        backoff: Duration::from_millis(1),
        ..FetchSettings::default()
    }
}

fn wanted(url: &str) -> Wanted {
    Wanted { source: Source::parse(url).unwrap(), pinned: None, credentials: Credentials::default() }
}

/// Fetches and says what became of it: the module's digest, or the error with its causes.
async fn outcome(fetcher: &Fetcher, wanted: &Wanted) -> Result<Fetched, String> {
    fetcher.fetch(wanted).await.map_err(|error| {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(next) = cause {
            text = format!("{text}: {next}");
            cause = next.source();
        }
        text
    })
}

fn refused(outcome: Result<Fetched, String>, why: &str) {
    let said = outcome.map(|fetched| fetched.digest).unwrap_err();
    assert!(said.contains(why), "`{said}` does not say `{why}`");
}

fn digest(mark: u8) -> Digest {
    Digest::of(&module(mark))
}
