//! Fetching and renewing, with paused time and a CA whose answers the test decides.

use super::*;
use crate::Authority;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// Signs after `delay` while `works`, and counts.
struct Ca {
    authority: Authority,
    _dir: tempfile::TempDir,
    calls: AtomicUsize,
    asked: Mutex<Vec<String>>,
    running: Arc<AtomicUsize>,
    running_max: Arc<AtomicUsize>,
    works: watch::Sender<bool>,
    delay: Duration,
}

impl Ca {
    fn new(delay: Duration) -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        Arc::new(Self {
            authority: Authority::open(dir.path(), "cluster.local").unwrap(),
            _dir: dir,
            calls: AtomicUsize::new(0),
            asked: Mutex::default(),
            running: Arc::default(),
            running_max: Arc::default(),
            works: watch::Sender::new(true),
            delay,
        })
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

impl Issuer for Ca {
    fn issue(
        &self,
        identity: Identity,
        csr_pem: String,
        ttl: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<String>, IssueError>> + Send>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.asked.lock().push(identity.service_account().to_owned());
        let answer = self.authority.issue(identity, csr_pem, ttl);
        let works = *self.works.borrow();
        let (running, running_max, delay) = (self.running.clone(), self.running_max.clone(), self.delay);
        Box::pin(async move {
            let now = running.fetch_add(1, Ordering::Relaxed) + 1;
            running_max.fetch_max(now, Ordering::Relaxed);
            tokio::time::sleep(delay).await;
            running.fetch_sub(1, Ordering::Relaxed);
            if works { answer.await } else { Err(IssueError::Timeout(delay)) }
        })
    }
}

fn identity(name: &str) -> Identity {
    Identity::new("cluster.local", "a", name).unwrap()
}

fn start(ca: &Arc<Ca>, settings: CertificateSettings) -> Arc<Certificates> {
    let certificates = Certificates::new(Arc::clone(ca) as Arc<dyn Issuer>, settings);
    tokio::spawn(Arc::clone(&certificates).renew());
    certificates
}

#[tokio::test(start_paused = true)]
async fn concurrent_gets_share_one_fetch() {
    let ca = Ca::new(Duration::from_secs(1));
    let certificates = start(&ca, CertificateSettings::default());
    let (one, two) = (identity("one"), identity("two"));
    assert!(certificates.current(&one).is_none());
    let mut waiting = JoinSet::new();
    for number in 0..50 {
        let (certificates, identity) =
            (certificates.clone(), if number % 2 == 0 { one.clone() } else { two.clone() });
        waiting.spawn(async move { certificates.get(&identity).await.unwrap() });
    }
    let all = waiting.join_all().await;
    assert_eq!(all.len(), 50);
    assert_eq!(ca.calls(), 2);
    assert!(Arc::ptr_eq(&certificates.current(&one).unwrap(), &certificates.get(&one).await.unwrap()));
    assert_eq!(certificates.list().len(), 2);
    assert_eq!(ca.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn fetches_are_bounded_and_none_is_forgotten() {
    let ca = Ca::new(Duration::from_millis(100));
    let certificates = start(&ca, CertificateSettings { fetches_max: 3, ..Default::default() });
    for number in 0..20 {
        certificates.prefetch(&identity(&format!("sa-{number}"))).unwrap();
    }
    // Twenty fetches, three at a time, a tenth of a second each.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(certificates.list().len(), 20);
    assert_eq!(ca.running_max.load(Ordering::Relaxed), 3);
}

#[tokio::test(start_paused = true)]
async fn who_is_waited_for_comes_before_who_is_fetched_ahead() {
    let ca = Ca::new(Duration::from_secs(1));
    let certificates = start(&ca, CertificateSettings { fetches_max: 1, ..Default::default() });
    for number in 1..=4 {
        certificates.prefetch(&identity(&format!("ahead-{number}"))).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Asking again and again for one that waits its turn does not put it back.
    let impatient = async {
        while certificates.current(&identity("ahead-4")).is_none() {
            let _one_of_many =
                tokio::time::timeout(Duration::from_millis(10), certificates.get(&identity("ahead-4"))).await;
        }
    };
    let (new, ()) = tokio::join!(async { certificates.get(&identity("new")).await }, impatient);
    assert!(new.is_ok());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut asked = ca.asked.lock().clone();
    asked.get_mut(1..3).unwrap().sort();
    assert_eq!(asked, ["ahead-1", "ahead-4", "new", "ahead-2", "ahead-3"]);
}

#[tokio::test(start_paused = true)]
async fn certificate_is_renewed_at_half_its_life() {
    let ca = Ca::new(Duration::ZERO);
    let certificates = start(&ca, CertificateSettings::default());
    let one = identity("one");
    let first = certificates.get(&one).await.unwrap();
    tokio::time::sleep(HOUR * 11).await;
    assert!(Arc::ptr_eq(&first, &certificates.current(&one).unwrap()));
    tokio::time::sleep(HOUR).await;
    let second = certificates.current(&one).unwrap();
    assert_ne!(first.serial, second.serial);
    assert_eq!(ca.calls(), 2);
    // The paused clock does not move the certificates' own time, so the next half life is as long.
    tokio::time::sleep(HOUR * 12).await;
    assert_eq!(ca.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn failing_renewal_keeps_the_certificate_and_backs_off() {
    let ca = Ca::new(Duration::ZERO);
    let certificates = start(&ca, CertificateSettings::default());
    let one = identity("one");
    let first = certificates.get(&one).await.unwrap();
    ca.works.send_replace(false);
    // Renewal begins half a minute before the twelve hours, since certificates begin a minute early.
    tokio::time::sleep(HOUR * 12 + Duration::from_secs(60 * 60)).await;
    assert!(Arc::ptr_eq(&first, &certificates.get(&one).await.unwrap()));
    // 1 + 2 + 4 + … + 128, then every 150 s, give or take a fifth: between 24 and 45 attempts in an hour.
    let attempts = ca.calls() - 1;
    assert!((24..=45).contains(&attempts), "{attempts}");
    ca.works.send_replace(true);
    tokio::time::sleep(Duration::from_secs(181)).await;
    assert_ne!(certificates.current(&one).unwrap().serial, first.serial);
}

#[tokio::test(start_paused = true)]
async fn failure_is_told_at_once_and_while_the_next_attempt_is_far() {
    let ca = Ca::new(Duration::ZERO);
    ca.works.send_replace(false);
    let settings = CertificateSettings { retry_min: Duration::from_secs(60), ..Default::default() };
    let certificates = start(&ca, settings);
    let one = identity("one");
    let start = Instant::now();
    for _ in 0..3 {
        let error = certificates.get(&one).await.unwrap_err();
        assert!(matches!(error, CertificateError::Issue { .. }), "{error}");
    }
    assert_eq!(ca.calls(), 1);
    assert!(start.elapsed() < Duration::from_secs(1));
    ca.works.send_replace(true);
    tokio::time::sleep(Duration::from_secs(73)).await;
    assert!(certificates.current(&one).is_some());
}

#[tokio::test(start_paused = true)]
async fn silent_ca_is_waited_for_only_so_long() {
    let ca = Ca::new(HOUR);
    let certificates = start(&ca, CertificateSettings::default());
    let start = Instant::now();
    let error = certificates.get(&identity("one")).await.unwrap_err();
    assert!(matches!(error, CertificateError::Timeout { .. }), "{error}");
    assert_eq!(start.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn forgotten_identity_is_not_renewed_and_makes_room() {
    let ca = Ca::new(Duration::from_secs(1));
    let certificates = start(&ca, CertificateSettings { identities_max: 1, ..Default::default() });
    let (one, two) = (identity("one"), identity("two"));
    let waiting = tokio::spawn({
        let (certificates, one) = (certificates.clone(), one.clone());
        async move { certificates.get(&one).await }
    });
    while ca.calls() == 0 {
        tokio::task::yield_now().await;
    }
    let full = certificates.get(&two).await.unwrap_err();
    assert!(matches!(full, CertificateError::Full { maximum: 1, .. }), "{full}");
    certificates.forget(&one);
    assert!(matches!(waiting.await.unwrap(), Err(CertificateError::Forgotten { .. })));
    certificates.get(&two).await.unwrap();
    tokio::time::sleep(HOUR * 13).await;
    assert_eq!(ca.calls(), 3);
    assert!(certificates.current(&one).is_none());
}

#[tokio::test(start_paused = true)]
async fn renewing_can_be_stopped_and_taken_up_again() {
    let ca = Ca::new(Duration::from_secs(5));
    let certificates = Certificates::new(Arc::clone(&ca) as Arc<dyn Issuer>, CertificateSettings::default());
    let one = identity("one");
    certificates.prefetch(&one).unwrap();
    let stopped = tokio::time::timeout(Duration::from_secs(1), Arc::clone(&certificates).renew()).await;
    assert!(stopped.is_err());
    assert_eq!(ca.calls(), 1);
    tokio::spawn(Arc::clone(&certificates).renew());
    certificates.get(&one).await.unwrap();
    assert_eq!(ca.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn short_lives_do_not_make_a_storm() {
    // A CA that grants less than the minute by which certificates begin early: half the life is over at once.
    let ca = Ca::new(Duration::ZERO);
    let settings = CertificateSettings { ttl: Duration::from_secs(30), ..Default::default() };
    let certificates = start(&ca, settings);
    certificates.get(&identity("one")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!((10..=11).contains(&ca.calls()), "{}", ca.calls());
}
