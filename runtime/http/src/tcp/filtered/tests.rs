//! Tests of what filters see of a connection, and what gets through.

use super::*;
use cairn_filter::{Factory, Filter, NoCallout, Peer, Phases};
use std::collections::VecDeque;
use tokio::io::{DuplexStream, duplex};

/// What a filter does with what it is shown next.
#[derive(Clone, Copy, Debug)]
enum Act {
    Pass,
    /// Passes this in its place.
    Write(&'static str),
    Hold,
    Close,
}

/// A filter that does what its script says, passes everything after that, and keeps what it was told.
struct Scripted {
    name: &'static str,
    opened: Act,
    data: [VecDeque<Act>; 2],
    kept: [Bytes; 2],
    /// Let go of what is held when woken.
    lets_go: bool,
    told: Arc<Mutex<Vec<String>>>,
}

const PATIENCE: Duration = Duration::from_secs(10);

impl Scripted {
    fn passage(&mut self, side: Side, act: Act) -> Passage {
        let kept = &mut self.kept[number_of(side)];
        match act {
            Act::Pass => Passage::Pass(std::mem::take(kept)),
            Act::Write(text) => {
                *kept = Bytes::new();
                Passage::Pass(Bytes::from_static(text.as_bytes()))
            }
            Act::Hold => Passage::Hold { kept: kept.len(), patience: PATIENCE },
            Act::Close => Passage::Close(format!("{} closed it", self.name)),
        }
    }

    fn tell(&self, what: String) {
        self.told.lock().push(format!("{} {what}", self.name));
    }
}

impl ConnectionFilter for Scripted {
    fn opened(&mut self, _: &mut Exchange) -> Passage {
        self.tell("opened".to_owned());
        let act = std::mem::replace(&mut self.opened, Act::Pass);
        self.passage(Side::Request, act)
    }

    fn data(&mut self, _: &mut Exchange, side: Side, bytes: Bytes, end: bool) -> Passage {
        append(&mut self.kept[number_of(side)], bytes);
        let shown = String::from_utf8_lossy(&self.kept[number_of(side)]).into_owned();
        self.tell(format!("{side:?} {shown}{}", if end { " end" } else { "" }));
        let act = self.data[number_of(side)].pop_front().unwrap_or(Act::Pass);
        self.passage(side, act)
    }

    fn woken(&mut self, _: &mut Exchange, side: Side) -> Passage {
        let act = if self.lets_go || self.kept[number_of(side)].is_empty() { Act::Pass } else { Act::Hold };
        self.passage(side, act)
    }

    fn overdue(&mut self, _: &mut Exchange, _: Side) -> Passage {
        Passage::Close(format!("{} is overdue", self.name))
    }

    fn closed(&mut self, _: &mut Exchange, by: Closer) {
        self.tell(format!("closed by {by:?}"));
    }
}

/// Makes one filter.
struct Once(Mutex<Option<Scripted>>);

impl Factory for Once {
    fn name(&self) -> &str {
        "once"
    }

    fn phases(&self) -> Phases {
        Phases::empty()
    }

    fn start(&self, _: &Exchange) -> Option<Box<dyn Filter>> {
        None
    }

    fn connect(&self, _: &Exchange, _: &Wakers) -> Option<Box<dyn ConnectionFilter>> {
        Some(Box::new(self.0.lock().take()?))
    }
}

/// Filters with a client and a server, and what the filters are told.
struct Bench {
    filters: Arc<Filters>,
    told: Arc<Mutex<Vec<String>>>,
}

impl Bench {
    fn new(scripts: &[(&'static str, Act, &[Act], &[Act])]) -> Self {
        let told = Arc::<Mutex<Vec<String>>>::default();
        let filter = |(name, opened, down, up): &(&'static str, Act, &[Act], &[Act])| {
            let data = [down, up].map(|acts| acts.iter().copied().collect());
            let (name, opened, told) = (*name, *opened, Arc::clone(&told));
            let filter = Scripted { name, opened, data, kept: Default::default(), lets_go: true, told };
            Arc::new(Once(Mutex::new(Some(filter)))) as Arc<dyn Factory>
        };
        let chain = Chain::new(scripts.iter().map(filter).collect());
        let now = (Instant::now(), SystemTime::now());
        let filters = Filters::start(&chain, &connection(), now).unwrap();
        Self { filters: Arc::new(filters), told }
    }

    /// Copies between the two ends in a task.
    fn copy(&self) -> (DuplexStream, DuplexStream, tokio::task::JoinHandle<(Option<Closer>, String)>) {
        let (client, mut near) = duplex(64 << 10);
        let (server, mut far) = duplex(64 << 10);
        let filters = Arc::clone(&self.filters);
        let copying = async move {
            let counts = ByteCounts::default();
            let ended = filters.copy(&mut near, &mut far, &counts).await;
            let ended = match ended {
                Ok(by) => (Some(by), String::new()),
                Err(end) => (Some(end.by()), end.into_reason()),
            };
            filters.closed(ended.0.unwrap_or(Closer::Here));
            ended
        };
        (client, server, tokio::spawn(copying))
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut *self.told.lock())
    }
}

fn connection() -> Arc<Connection> {
    let address = std::net::SocketAddr::from(([10, 0, 0, 1], 1));
    Arc::new(Connection {
        id: 1,
        worker: 0,
        source: Peer { address, identity: None, workload: None },
        destination: address,
        service: None,
        local: None,
        callout: Arc::new(NoCallout),
    })
}

async fn read(stream: &mut DuplexStream, length: usize) -> String {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn what_a_client_sends_meets_filters_in_order_and_what_a_server_sends_in_reverse() {
    let bench = Bench::new(&[
        ("a", Act::Pass, &[Act::Write("A")], &[Act::Pass]),
        ("b", Act::Pass, &[Act::Pass], &[Act::Write("B")]),
    ]);
    assert!(bench.filters.opened().await.is_ok());
    let (mut client, mut server, copying) = bench.copy();
    client.write_all(b"hello").await.unwrap();
    assert_eq!(read(&mut server, 1).await, "A");
    server.write_all(b"there").await.unwrap();
    assert_eq!(read(&mut client, 1).await, "B");
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0, "the end arrives");
    server.shutdown().await.unwrap();
    assert_eq!(copying.await.unwrap(), (Some(Closer::Here), String::new()));
    assert_eq!(
        bench.told(),
        [
            "a opened",
            "b opened",
            "a Request hello",
            "b Request A",
            "b Response there",
            "a Response B",
            "a Request  end",
            "b Request  end",
            "b Response  end",
            "a Response  end",
            "a closed by Here",
            "b closed by Here",
        ]
    );
}

#[tokio::test]
async fn what_is_held_is_shown_again_with_more_and_goes_on_when_woken() {
    let bench = Bench::new(&[("a", Act::Pass, &[Act::Hold, Act::Hold], &[]), ("b", Act::Pass, &[], &[])]);
    let (mut client, mut server, copying) = bench.copy();
    client.write_all(b"one").await.unwrap();
    wait_for(&bench, "a Request one").await;
    client.write_all(b"two").await.unwrap();
    client.shutdown().await.unwrap();
    wait_for(&bench, "a Request onetwo").await;
    bench.filters.wakers.of(Side::Request).notify_one();
    assert_eq!(read(&mut server, 6).await, "onetwo");
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0, "the end too, whether it was held or came after");
    drop(server);
    assert_eq!(copying.await.unwrap().0, Some(Closer::Here));
}

async fn wait_for(bench: &Bench, line: &str) {
    while !bench.told.lock().iter().any(|told| told == line) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_holds_what_nothing_can_follow_is_overdue() {
    for (name, held, sent) in [
        ("the end", vec![Act::Hold; 8], 10),
        ("as much as may be held", vec![Act::Hold; 4096], HELD_BYTES_MAX + READ_BYTES),
    ] {
        let bench = Bench::new(&[("a", Act::Pass, &held, &[])]);
        let (mut client, _server, copying) = bench.copy();
        let started = tokio::time::Instant::now();
        let writing = tokio::spawn(async move {
            // Part of it stays where it is: nothing more is read.
            let _stuck = client.write_all(&vec![b'x'; sent]).await;
            let _ended = client.shutdown().await;
            client
        });
        assert_eq!(copying.await.unwrap(), (Some(Closer::Here), "a is overdue".to_owned()), "{name}");
        assert!(started.elapsed() >= PATIENCE, "{name}");
        writing.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_for_its_filters_before_it_goes_on() {
    let bench = Bench::new(&[("a", Act::Hold, &[], &[]), ("b", Act::Pass, &[], &[])]);
    bench.filters.wakers.of(Side::Request).notify_one();
    assert!(bench.filters.opened().await.is_ok());
    assert_eq!(bench.told(), ["a opened", "a opened", "b opened"]);
    for (act, reason) in [(Act::Close, "a closed it"), (Act::Hold, "a is overdue")] {
        let bench = Bench::new(&[("a", act, &[], &[]), ("b", Act::Pass, &[], &[])]);
        let end = bench.filters.opened().await.err().unwrap();
        assert_eq!((end.by(), end.into_reason().as_str()), (Closer::Here, reason));
        assert_eq!(bench.told(), ["a opened"], "b is not told");
    }
}

#[tokio::test]
async fn a_filter_that_closes_ends_both_ways_and_the_client_reads_what_came_before() {
    let bench = Bench::new(&[("a", Act::Pass, &[Act::Pass, Act::Close], &[])]);
    let (mut client, mut server, copying) = bench.copy();
    client.write_all(b"one").await.unwrap();
    assert_eq!(read(&mut server, 3).await, "one");
    server.write_all(b"answer").await.unwrap();
    assert_eq!(read(&mut client, 6).await, "answer");
    client.write_all(b"two").await.unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0, "nothing of what was refused arrives");
    assert_eq!(copying.await.unwrap(), (Some(Closer::Here), "a closed it".to_owned()));
    assert_eq!(bench.told().last().unwrap(), "a closed by Here");
}

#[tokio::test]
async fn who_ends_last_has_closed_it() {
    let bench = Bench::new(&[("a", Act::Pass, &[], &[])]);
    let (mut client, mut server, copying) = bench.copy();
    server.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    client.shutdown().await.unwrap();
    assert_eq!(copying.await.unwrap(), (Some(Closer::Client), String::new()));
    assert_eq!(bench.told(), ["a Response  end", "a Request  end", "a closed by Client"]);
}

#[tokio::test(start_paused = true)]
async fn a_side_that_stays_silent_after_the_other_has_ended_is_not_waited_for_for_ever() {
    let bench = Bench::new(&[("a", Act::Pass, &[], &[])]);
    let (mut client, mut server, copying) = bench.copy();
    server.shutdown().await.unwrap();
    tokio::time::sleep(HALF_CLOSED_MAX - Duration::from_secs(1)).await;
    client.write_all(b"late").await.unwrap();
    assert_eq!(read(&mut server, 4).await, "late", "it may still send");
    tokio::time::sleep(HALF_CLOSED_MAX - Duration::from_secs(1)).await;
    assert!(!copying.is_finished(), "it was not silent for so long");
    let (by, _) = copying.await.unwrap();
    assert_eq!(by, Some(Closer::Client));
}
