//! What is asked for again, and what becomes of a plugin when nobody answers.

use super::peer::Registry;
use super::server::{Server, answer};
use super::{digest, module, quick, wanted};
use crate::pack::gzip;
use crate::{
    Asking, Credentials, Digest, Fetcher, ImageFormat, Puller, Reference, Store, StoreSettings, Wanted,
};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};

fn puller(home: &Path) -> Puller {
    let settings = StoreSettings { directory: Some(home.join("modules")), ..StoreSettings::default() };
    Puller::new(Fetcher::new(quick()), Arc::new(Store::open(settings).unwrap()))
}

/// What a pull came to: the module, whether its bytes came, and whether it is stale.
async fn pull(puller: &Puller, wanted: &Wanted, asking: Asking) -> Result<(Digest, bool, bool), String> {
    let pulled = puller.pull("name", wanted, asking, &|_| false).await;
    pulled.map(|it| (it.digest, it.bytes.is_some(), it.stale.is_some())).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_tag_is_asked_for_again_as_the_policy_says() {
    let Some(registry) = Registry::start("", "", &[]) else { return };
    let home = tempfile::tempdir().unwrap();
    let (image, nobody) = (format!("{}/tag:v1", registry.address), Credentials::default());
    let (reference, publisher) = (Reference::parse(&image).unwrap(), Fetcher::new(quick()));
    let publish = |mark| {
        let (publisher, reference, nobody) = (&publisher, &reference, &nobody);
        async move { publisher.push(&module(mark), ImageFormat::Compat, reference, nobody).await.unwrap() }
    };
    let first = publish(1).await;
    let wanted = wanted(&image);
    let here = puller(home.path());
    assert_eq!(pull(&here, &wanted, Asking::IfNotPresent).await.unwrap(), (digest(1), true, false));
    assert_eq!(
        pull(&here, &wanted, Asking::Always).await.unwrap(),
        (digest(1), false, false),
        "nothing is new"
    );
    publish(2).await;
    assert_eq!(pull(&here, &wanted, Asking::IfNotPresent).await.unwrap(), (digest(1), false, false));
    assert_eq!(pull(&here, &wanted, Asking::Always).await.unwrap(), (digest(2), true, false));
    // A pin to what was there before fetches that.
    let pinned = Wanted {
        pinned: Some(first),
        ..super::wanted(&format!("{}/tag@{}", registry.address, first.qualified()))
    };
    assert_eq!(pull(&here, &pinned, Asking::IfNotPresent).await.unwrap(), (digest(1), true, false));
    assert_eq!(pull(&here, &pinned, Asking::Always).await.unwrap(), (digest(1), false, false));

    // The registry goes away, and the process starts again.
    drop(registry);
    let again = puller(home.path());
    assert_eq!(pull(&again, &wanted, Asking::IfNotPresent).await.unwrap(), (digest(2), false, false));
    assert_eq!(pull(&again, &wanted, Asking::Always).await.unwrap(), (digest(2), false, true));
    assert_eq!(pull(&again, &pinned, Asking::Always).await.unwrap(), (digest(1), false, false));
    let other = tempfile::tempdir().unwrap();
    let elsewhere = puller(other.path());
    assert!(pull(&elsewhere, &wanted, Asking::IfNotPresent).await.unwrap_err().contains("cannot connect"));
    assert_eq!(again.counts.present.load(Ordering::Relaxed), 2);
    assert_eq!(again.counts.failed.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn what_is_pinned_is_asked_for_once() {
    let home = tempfile::tempdir().unwrap();
    let (mark, asked) = (Arc::new(AtomicU8::new(1)), Arc::new(AtomicU32::new(0)));
    let server = Server::start(None, {
        let (mark, asked) = (Arc::clone(&mark), Arc::clone(&asked));
        move |_| {
            asked.fetch_add(1, Ordering::Relaxed);
            answer(200, gzip(&module(mark.load(Ordering::Relaxed))).unwrap())
        }
    })
    .await;
    let at = wanted(&format!("http://{}/x", server.address));
    let packed = |mark| Digest::of(&gzip(&module(mark)).unwrap());
    // A pin is of what is served, or of the module in it.
    let pins = [(1, digest(1)), (1, packed(1)), (2, digest(2)), (2, packed(2))];
    let here = puller(home.path());
    for (number, (served, pin)) in (1..).zip(pins) {
        mark.store(served, Ordering::Relaxed);
        let pinned = Wanted { pinned: Some(pin), ..at.clone() };
        assert_eq!(
            pull(&here, &pinned, Asking::Always).await.unwrap(),
            (digest(served), true, false),
            "{pin}"
        );
        assert_eq!(asked.load(Ordering::Relaxed), number);
    }
    let wrong = Wanted { pinned: Some(digest(3)), ..at.clone() };
    assert!(pull(&here, &wrong, Asking::Always).await.unwrap_err().contains("is wanted"));
    drop(server);
    for puller in [here, puller(home.path())] {
        for (served, pin) in pins {
            let pinned = Wanted { pinned: Some(pin), ..at.clone() };
            let pulled = pull(&puller, &pinned, Asking::Always).await.unwrap();
            assert_eq!(pulled, (digest(served), false, false), "{pin}");
        }
        assert!(pull(&puller, &wrong, Asking::Always).await.is_err(), "a pin that nothing was held against");
    }
}

#[tokio::test]
async fn a_server_that_fails_is_forgiven_and_one_that_says_no_is_heeded() {
    let home = tempfile::tempdir().unwrap();
    let (status, asked) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicU32::new(0)));
    let server = Server::start(None, {
        let (status, asked) = (Arc::clone(&status), Arc::clone(&asked));
        move |_| {
            asked.fetch_add(1, Ordering::Relaxed);
            answer(status.load(Ordering::Relaxed), module(1))
        }
    })
    .await;
    let at = wanted(&format!("http://{}/x", server.address));
    let puller = puller(home.path());
    assert_eq!(pull(&puller, &at, Asking::Always).await.unwrap(), (digest(1), true, false));
    assert_eq!(pull(&puller, &at, Asking::IfNotPresent).await.unwrap(), (digest(1), false, false));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    status.store(503, Ordering::Relaxed);
    assert_eq!(pull(&puller, &at, Asking::Always).await.unwrap(), (digest(1), false, true));
    status.store(404, Ordering::Relaxed);
    assert!(pull(&puller, &at, Asking::Always).await.unwrap_err().contains("404"));
    // What the caller has need not be here.
    let forgetful =
        Puller::new(Fetcher::new(quick()), Arc::new(Store::open(StoreSettings::default()).unwrap()));
    status.store(200, Ordering::Relaxed);
    assert_eq!(pull(&forgetful, &at, Asking::IfNotPresent).await.unwrap(), (digest(1), true, false));
    let has = forgetful.pull("name", &at, Asking::IfNotPresent, &|_| true).await.unwrap();
    assert_eq!((has.digest, has.bytes), (digest(1), None));
    assert_eq!(pull(&forgetful, &at, Asking::IfNotPresent).await.unwrap(), (digest(1), true, false));
}
