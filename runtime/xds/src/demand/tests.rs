//! What is asked for, once, and what is remembered of the answers.

use super::*;
use cairn_mesh::{Change, Identity, NetworkAddress, Store, Workload};

fn at(address: &str) -> Wanted {
    Wanted::Address(NetworkAddress { network: "".into(), address: address.parse().unwrap() })
}

/// The orders so far: `+` to ask, `-` to give up.
fn ordered(orders: &mut mpsc::Receiver<Order>) -> Vec<String> {
    let word = |order| match order {
        Order::Ask(wanted) => format!("+{wanted}"),
        Order::GiveUp(wanted) => format!("-{wanted}"),
    };
    std::iter::from_fn(|| orders.try_recv().ok()).map(word).collect()
}

#[tokio::test]
async fn many_who_want_the_same_ask_once_and_are_all_told() {
    let demand = Demand::new();
    let mut orders = demand.orders().unwrap();
    let answer = async {
        while orders.recv().await.is_none() {}
        demand.answered("/10.0.0.1", true, Instant::now());
    };
    let wanted = at("10.0.0.1");
    let (one, other, ()) = tokio::join!(demand.ask(&wanted), demand.ask(&wanted), answer);
    assert_eq!((one, other), (Ok(()), Ok(())));
    assert!(ordered(&mut orders).is_empty(), "asked twice");
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_does_not_answer_is_waited_for_no_longer_than_said() {
    let demand = Demand::new();
    let mut orders = demand.orders().unwrap();
    let wanted = at("10.0.0.1");
    let (one, other) = tokio::join!(demand.ask(&wanted), demand.ask(&wanted));
    assert_eq!(
        (one, other),
        (Err(DemandError::Unanswered(ANSWER_WAIT)), Err(DemandError::Unanswered(ANSWER_WAIT)))
    );
    assert_eq!(ordered(&mut orders), ["+/10.0.0.1", "-/10.0.0.1"], "given up by the last who waits");
    assert!(demand.reconnected().is_empty());
}

#[test]
fn what_is_absent_is_not_asked_for_again_for_a_while() {
    let (demand, start) = (Demand::new(), Instant::now());
    let mut orders = demand.orders().unwrap();
    let nothing = Store::new().snapshot();
    for name in ["1.1.1.1", "2.2.2.2"] {
        assert!(demand.begin(&at(name), start).unwrap().is_some());
        demand.answered(&at(name).to_string(), false, start);
        assert!(demand.begin(&at(name), start).unwrap().is_none(), "{name}");
    }
    assert_eq!(ordered(&mut orders), ["+/1.1.1.1", "+/2.2.2.2"]);
    // One of them comes to be: the control plane goes on telling of it.
    let identity = Identity::new("td", "ns", "sa").unwrap();
    let workload =
        Workload { addresses: vec!["2.2.2.2".parse().unwrap()], ..Workload::new("u", "u", identity) };
    let mut store = Store::new();
    store.apply([Change::Workload(workload)]);
    demand.expire(&nothing, start + ABSENT_FOR - Duration::from_secs(1));
    assert!(ordered(&mut orders).is_empty());
    let end = start + ABSENT_FOR;
    demand.expire(&store.snapshot(), end);
    assert_eq!(ordered(&mut orders), ["-/1.1.1.1"]);
    assert!(demand.begin(&at("1.1.1.1"), end).unwrap().is_some(), "asked for anew");
    // With a new connection nobody tells of it any more.
    demand.answered("/1.1.1.1", false, end);
    assert!(demand.reconnected().is_empty());
    assert!(demand.begin(&at("1.1.1.1"), end).unwrap().is_some());
    assert_eq!(demand.reconnected(), ["/1.1.1.1"], "what waits is asked for with it");
}

#[test]
fn names_that_wait_and_absences_are_bounded() {
    let (demand, start) = (Demand::new(), Instant::now());
    let mut orders = demand.orders().unwrap();
    let name = |number: usize| Wanted::Workload(number.to_string().into());
    let mut held = Vec::new();
    for number in 0..WAITING_MAX {
        held.push(demand.begin(&name(number), start).unwrap().unwrap());
    }
    assert_eq!(demand.begin(&name(WAITING_MAX), start).map(drop), Err(DemandError::Full));
    assert_eq!(ordered(&mut orders).len(), WAITING_MAX);
    for number in 0..WAITING_MAX {
        demand.answered(&number.to_string(), false, start);
    }
    drop(held);
    assert!(demand.begin(&name(WAITING_MAX), start).unwrap().is_some());
    demand.answered(&WAITING_MAX.to_string(), false, start);
    demand.expire(&Store::new().snapshot(), start);
    let last = ordered(&mut orders);
    assert_eq!(last, [format!("+{WAITING_MAX}"), "-0".to_owned()], "the oldest of too many is forgotten");
}
