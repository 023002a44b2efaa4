//! One issuer's keys: fetched in the background, renewed before they are old, kept while the issuer is down, and asked for
//! anew when a token names a key that is not among them, within bounds.

use super::fetch::{FetchError, Fetched, Fetcher, Place};
use super::shelf::Shelf;
use arc_swap::ArcSwapOption;
use cairn_builtin::{KeySet, KeySource, Keys};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

/// How old keys may become before they are fetched anew (Istio's control plane).
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// How old keys may become while the issuer cannot be asked. One that takes a key back may be unable to say so for as long.
const STALE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The pause after a first failure; it doubles with each further one.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(5 * 60);
/// How often tokens may lead to asking: so many times at once, and once more in each interval.
const ASK_BURST: u32 = 4;
const ASK_INTERVAL: Duration = Duration::from_secs(5);
/// How long a key that was not there is taken not to be there, and how many are remembered.
const ABSENT: Duration = Duration::from_secs(60);
const ABSENT_MAX: usize = 256;

/// One issuer's keys.
pub(super) struct Issuer {
    place: Place,
    /// How long a request waits, and a fetch may take.
    timeout: Duration,
    set: ArcSwapOption<KeySet>,
    asking: Mutex<Asking>,
    /// Counts fetches that have ended.
    ended: watch::Sender<u64>,
    wanted: Arc<Notify>,
    /// Where keys are kept for the next start.
    shelf: Option<Arc<Shelf>>,
    failures: AtomicU64,
    refused: AtomicU64,
}

/// What decides whether keys are asked for now.
struct Asking {
    /// A fetch has begun, or is about to, and has not ended.
    under_way: bool,
    /// How many times tokens may still lead to asking, when last counted.
    left: u32,
    counted: Instant,
    /// Keys that tokens named and that were asked for.
    absent: VecDeque<(String, Instant)>,
    /// When the keys were last got.
    got: Option<Instant>,
    /// How long their server lets them be used without asking again.
    fresh: Option<Duration>,
}

impl Issuer {
    /// Begins to fetch, until nobody holds the issuer any more.
    pub(super) fn start(
        place: Place,
        timeout: Duration,
        fetcher: &Arc<Fetcher>,
        shelf: Option<Arc<Shelf>>,
    ) -> Arc<Self> {
        let now = Instant::now();
        let known = shelf.as_ref().and_then(|shelf| known(shelf, &place, now));
        let (set, got) = known.map_or((None, None), |(set, got)| (Some(Arc::new(set)), Some(got)));
        let (left, absent) = (ASK_BURST, VecDeque::new());
        let asking = Asking { under_way: true, left, counted: now, absent, got, fresh: None };
        let issuer = Arc::new(Self {
            place,
            timeout,
            set: ArcSwapOption::from(set),
            shelf,
            asking: Mutex::new(asking),
            ended: watch::Sender::new(0),
            wanted: Arc::default(),
            failures: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        tokio::spawn(keep(Arc::downgrade(&issuer), Arc::clone(&issuer.wanted), Arc::clone(fetcher)));
        issuer
    }

    /// Where the keys are, as the rule says.
    pub(super) fn name(&self) -> &str {
        self.place.name()
    }

    /// How often keys were asked for.
    pub(super) fn fetches(&self) -> u64 {
        *self.ended.borrow()
    }

    /// How often they were not got.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// How often a token did not lead to asking.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// How old the keys are.
    pub(super) fn age(&self) -> Option<Duration> {
        self.asking.lock().got.map(|got| got.elapsed())
    }

    async fn fetch(&self, fetcher: &Fetcher) -> bool {
        self.asking.lock().under_way = true;
        let result = timeout(self.timeout, fetcher.keys(&self.place)).await;
        let result = result.unwrap_or(Err(FetchError::Timeout(self.timeout)));
        let good = result.is_ok();
        match result {
            Ok(Fetched { set, text, fresh }) => {
                tracing::debug!(source = self.name(), keys = set.count(), "keys fetched");
                self.set.store(Some(Arc::new(set)));
                self.keep(&text);
                self.asking.lock().fresh = fresh;
            }
            Err(error) => {
                self.failures.fetch_add(1, Relaxed);
                if self.age().is_some_and(|age| age > STALE_MAX) {
                    self.set.store(None);
                }
                let stale = self.set.load().is_some();
                tracing::warn!(source = self.name(), error = %crate::chain(&error), stale, "keys cannot be fetched, will retry");
            }
        }
        let mut asking = self.asking.lock();
        asking.under_way = false;
        if good {
            asking.got = Some(Instant::now());
        }
        drop(asking);
        self.ended.send_modify(|count| *count += 1);
        good
    }
}

impl Issuer {
    /// Keeps the keys for the next start, when they are new.
    fn keep(&self, text: &[u8]) {
        let Some(shelf) = &self.shelf else { return };
        if let Err(error) = shelf.write(&self.place.key(), text, SystemTime::now()) {
            tracing::warn!(source = self.name(), %error, "keys cannot be kept for the next start");
        }
    }

    /// How long to wait after so many failures in a row.
    fn pause(&self, failures: u32) -> Duration {
        let fresh = self.asking.lock().fresh;
        pause(failures, fresh.unwrap_or(REFRESH))
    }
}

/// The keys that were kept at the last run, if they are not too old, and when they were got.
fn known(shelf: &Shelf, place: &Place, now: Instant) -> Option<(KeySet, Instant)> {
    let (text, age) = shelf.read(&place.key(), SystemTime::now())?;
    let got = now.checked_sub(age).filter(|_| age <= STALE_MAX)?;
    Some((KeySet::parse(&text).ok()?, got))
}

impl Drop for Issuer {
    fn drop(&mut self) {
        // The task wakes, finds nobody, and ends.
        self.wanted.notify_one();
    }
}

async fn keep(issuer: Weak<Issuer>, wanted: Arc<Notify>, fetcher: Arc<Fetcher>) {
    let mut failures = 0;
    loop {
        let Some(held) = issuer.upgrade() else { return };
        failures = if held.fetch(&fetcher).await { 0 } else { failures + 1 };
        let pause = held.pause(failures);
        drop(held);
        tokio::select! {
            () = sleep(pause) => {}
            () = wanted.notified() => {}
        }
    }
}

/// How long to wait after so many failures, or while keys are fresh, a tenth more or less, so that proxies do not ask all at once.
fn pause(failures: u32, fresh: Duration) -> Duration {
    let pause = match failures.checked_sub(1) {
        None => fresh,
        Some(before) => PAUSE_MAX.min(PAUSE_MIN * 2_u32.saturating_pow(before.min(16))),
    };
    pause.mul_f64(0.9 + 0.2 * fastrand::f64())
}

impl KeySource for Issuer {
    fn keys(&self) -> Keys {
        self.set.load_full().map_or(Keys::Missing, Keys::Known)
    }

    fn renew(&self, key_id: &str) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        let mut ended = self.ended.subscribe();
        let now = Instant::now();
        let mut asking = self.asking.lock();
        if !asking.under_way {
            if !asking.may_ask(key_id, self.set.load().is_some(), now) {
                self.refused.fetch_add(1, Relaxed);
                return None;
            }
            asking.under_way = true;
            self.wanted.notify_one();
        }
        drop(asking);
        let wait = self.timeout;
        Some(Box::pin(async move {
            // Whether it came in time shows in the keys.
            let _ended = timeout(wait, ended.changed()).await;
        }))
    }
}

impl Asking {
    /// Whether a token that names `key_id` may lead to asking at `now`. It may not when the same key was not there a
    /// moment ago, unless there are no keys at all, nor when it was done too often.
    fn may_ask(&mut self, key_id: &str, has_keys: bool, now: Instant) -> bool {
        self.absent.retain(|(_, since)| now.duration_since(*since) < ABSENT);
        if has_keys && self.absent.iter().any(|(absent, _)| absent == key_id) {
            return false;
        }
        let regained = now.duration_since(self.counted).as_millis() / ASK_INTERVAL.as_millis();
        if let Some(regained) = u32::try_from(regained).ok().filter(|regained| *regained > 0) {
            self.left = self.left.saturating_add(regained).min(ASK_BURST);
            self.counted = now;
        }
        let Some(left) = self.left.checked_sub(1) else { return false };
        self.left = left;
        if self.absent.len() >= ABSENT_MAX {
            self.absent.pop_front();
        }
        self.absent.push_back((key_id.to_owned(), now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking() -> Asking {
        let (under_way, left, counted) = (false, ASK_BURST, Instant::now());
        Asking { under_way, left, counted, absent: VecDeque::new(), got: None, fresh: None }
    }

    #[test]
    fn tokens_lead_to_asking_within_bounds() {
        let mut asking = asking();
        let start = asking.counted;
        let after = |seconds| start + Duration::from_secs(seconds);
        for (name, key, has_keys, at, may) in [
            ("an unknown key", "a", true, 0, true),
            ("the same key", "a", true, 1, false),
            ("the same key, and no keys at all", "a", false, 1, true),
            ("another key", "b", true, 2, true),
            ("another", "c", true, 2, true),
            ("too many at once", "d", true, 2, false),
            ("one more after a while", "d", true, 5, true),
            ("and no more", "e", true, 6, false),
            ("the first after a minute", "a", true, 70, true),
        ] {
            assert_eq!(asking.may_ask(key, has_keys, after(at)), may, "{name}");
        }
    }

    #[test]
    fn absent_keys_are_remembered_within_a_bound() {
        let mut asking = asking();
        for at in 0..2 * ABSENT_MAX {
            asking.left = ASK_BURST;
            assert!(asking.may_ask(&at.to_string(), true, asking.counted));
        }
        assert_eq!(asking.absent.len(), ABSENT_MAX);
    }

    #[test]
    fn pauses_grow_up_to_a_bound() {
        for (failures, seconds) in [(0, 1200), (1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (100, 300)] {
            for _ in 0..20 {
                let pause = pause(failures, REFRESH).as_secs_f64() / f64::from(seconds);
                assert!((0.9..=1.1).contains(&pause), "{failures}: {pause}");
            }
        }
    }
}
