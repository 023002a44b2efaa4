//! Both sides of a hand-over, in one process.

use super::super::successor::Predecessor;
use super::super::{Owner, message};
use super::*;
use cairn_net::ListenOptions;
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A predecessor that listens on one port.
struct Old {
    home: tempfile::TempDir,
    listener: Arc<TcpListener>,
    phase: watch::Receiver<Phase>,
    stopped: watch::Sender<bool>,
    offer: JoinHandle<()>,
}

impl Old {
    async fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let sockets = Arc::new(Sockets::for_handover().unwrap());
        // A free port, known by its number.
        let probe = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = probe.local_addr().unwrap();
        drop(probe);
        let listener = sockets.listen(Owner::ZTUNNEL, at, &ListenOptions::default()).unwrap();
        let (phase, stopped) = (watch::Sender::new(Phase::Alone), watch::Sender::new(false));
        let offer = Offer::at(&home.path().join("socket"), sockets, phase.clone(), stopped.subscribe());
        let offer = tokio::spawn(offer.unwrap().run());
        Self { home, listener, phase: phase.subscribe(), stopped, offer }
    }

    fn path(&self) -> std::path::PathBuf {
        self.home.path().join("socket")
    }

    fn at(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    async fn find(&self, sockets: &Sockets) -> Option<Predecessor> {
        Predecessor::find(&self.path(), sockets.network()).await
    }
}

#[tokio::test]
async fn a_successor_has_the_ports_before_its_predecessor_stops() {
    let mut old = Old::start().await;
    let sockets = Sockets::for_handover().unwrap();
    let predecessor = old.find(&sockets).await.unwrap();
    assert!(predecessor.shares_network);
    let waiting = TcpStream::connect(old.at()).await.unwrap();
    sockets.leave(predecessor.take().await.unwrap());
    let listener = sockets.listen(Owner::ZTUNNEL, old.at(), &ListenOptions::default()).unwrap();
    assert_eq!(*old.phase.borrow(), Phase::Alone, "it still accepts");
    let serving = tokio::spawn(predecessor.serving());
    let succeeded = old.phase.wait_for(|phase| *phase != Phase::Alone).await.unwrap();
    assert_eq!(*succeeded, Phase::Succeeded { shares_network: true });
    drop(succeeded);
    assert!(!serving.is_finished(), "told before accepting has ended");
    let at = old.at();
    let Old { listener: first, stopped, offer, .. } = old;
    drop(first);
    stopped.send_replace(true);
    serving.await.unwrap().unwrap();
    offer.await.unwrap();
    // Who waited, and who comes now, is accepted.
    let anew = TcpStream::connect(at).await.unwrap();
    for client in [waiting, anew] {
        assert_eq!(listener.accept().await.unwrap().1, client.local_addr().unwrap());
    }
}

#[tokio::test]
async fn one_successor_at_a_time_and_one_that_ends_leaves_room() {
    let old = Old::start().await;
    let sockets = Sockets::for_handover().unwrap();
    let first = old.find(&sockets).await.unwrap();
    assert!(old.find(&sockets).await.is_none(), "two at once");
    first.take().await.unwrap();
    drop(first);
    // The offer notices that soon.
    let free = async {
        loop {
            match old.find(&sockets).await {
                Some(second) => return second,
                None => tokio::task::yield_now().await,
            }
        }
    };
    let second = tokio::time::timeout(STEP_MAX, free).await.unwrap();
    assert_eq!(second.take().await.unwrap().len(), 1);
    assert_eq!(*old.phase.borrow(), Phase::Alone);
}

#[tokio::test]
async fn a_predecessor_that_ends_hands_nothing_over() {
    let old = Old::start().await;
    let sockets = Sockets::for_handover().unwrap();
    let predecessor = old.find(&sockets).await.unwrap();
    old.offer.abort();
    let _aborted = old.offer.await;
    let error = predecessor.take().await.unwrap_err();
    assert!(matches!(error, HandoverError::Closed | HandoverError::Packet(_)), "{error:?}");
    assert!(predecessor.serving().await.is_err());
    assert!(
        Predecessor::find(&old.home.path().join("socket"), "").await.is_none(),
        "a file is no predecessor"
    );
    assert!(Predecessor::find(&old.home.path().join("none"), "").await.is_none());
}

#[tokio::test]
async fn releases_that_share_no_version_say_so_and_part() {
    let old = Old::start().await;
    // A successor from the future.
    let socket = PacketSocket::connect(&old.path()).unwrap();
    let hello = Message::Hello { versions: vec![7, 8], release: "9.0.0".to_owned(), network: String::new() };
    send(&socket, &hello).await.unwrap();
    let limit = STEP_MAX;
    let answer = message::receive(&socket, limit).await.unwrap().0;
    assert_eq!(answer, Message::Refused { reason: "version 1 only".to_owned() });
    assert!(matches!(message::receive(&socket, limit).await, Err(HandoverError::Closed)));
    // One that also speaks ours.
    let socket = PacketSocket::connect(&old.path()).unwrap();
    let hello =
        Message::Hello { versions: vec![7, VERSION], release: "9.0.0".to_owned(), network: String::new() };
    send(&socket, &hello).await.unwrap();
    let answer = message::receive(&socket, limit).await.unwrap().0;
    assert!(matches!(answer, Message::Welcome { version: VERSION, .. }), "{answer:?}");
}

#[tokio::test]
async fn a_predecessor_that_answers_otherwise_is_none() {
    for (name, answer) in [
        (
            "another version",
            Some(Message::Welcome { version: 7, release: String::new(), network: String::new() }),
        ),
        ("no", Some(Message::Refused { reason: "not today".to_owned() })),
        ("out of order", Some(Message::Stopped)),
        ("nothing", None),
    ] {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let listener = PacketListener::bind(&path).unwrap();
        let stranger = tokio::spawn(async move {
            let socket = listener.accept().await.unwrap();
            receive(&socket, STEP_MAX).await.unwrap();
            if let Some(answer) = answer {
                send(&socket, &answer).await.unwrap();
            }
        });
        assert!(Predecessor::find(&path, "").await.is_none(), "{name}");
        stranger.await.unwrap();
    }
}
