//! Messages of DNS as they are on the wire.

use super::*;

/// Whether an answer was cut, so that it is to be asked for over TCP.
fn is_cut(message: &[u8]) -> bool {
    message.get(2).is_some_and(|high| (u16::from(*high) << 8) & TRUNCATED != 0)
}

fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    append_name(&mut bytes, name);
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

#[test]
fn a_question_is_read_and_its_answer_points_to_it() {
    let query = read(&question("Echo.B", A)).unwrap();
    assert_eq!((query.id, query.name.as_str(), query.kind, query.is_plain()), (0x1234, "echo.b", A, true));
    let records = [("echo.b".to_owned(), Record::A(Ipv4Addr::new(10, 96, 0, 10)))];
    let answer = write(&query, Code::Done, &records, 512);
    let expected: &[u8] = &[
        0x12, 0x34, 0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, // header: an answer, authoritative, recursion
        4, b'E', b'c', b'h', b'o', 1, b'B', 0, 0, 1, 0, 1, // the question as it came
        0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 10, 96, 0, 10,
    ];
    assert_eq!(answer, expected);
    assert!(
        is_answer_to(&answer, 0x1234)
            && !is_answer_to(&answer, 1)
            && !is_cut(&answer)
            && !is_failure(&answer)
    );
}

#[test]
fn other_records_are_written_with_their_names() {
    let query = read(&question("_http._tcp.db", SRV)).unwrap();
    let records = [
        ("_http._tcp.db".to_owned(), Record::Cname("db.a".to_owned())),
        ("db.a".to_owned(), Record::Srv(8080, "p.db.a".to_owned())),
        ("db.a".to_owned(), Record::Aaaa("fd00::7".parse().unwrap())),
    ];
    let answer = write(&query, Code::Done, &records, 512);
    let tail: &[u8] = &[
        0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 30, 0, 6, 2, b'd', b'b', 1, b'a', 0, //
        2, b'd', b'b', 1, b'a', 0, 0, 33, 0, 1, 0, 0, 0, 30, 0, 14, 0, 0, 0, 1, 0x1f, 0x90, 1, b'p', 2, b'd',
        b'b', 1, b'a', 0, //
        2, b'd', b'b', 1, b'a', 0, 0, 28, 0, 1, 0, 0, 0, 30, 0, 16, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 7,
    ];
    assert!(answer.ends_with(tail), "{answer:?}");
}

#[test]
fn an_answer_that_is_too_long_is_cut_and_says_so() {
    let mut bytes = question("many", A);
    let records = vec![("many".to_owned(), Record::A(Ipv4Addr::LOCALHOST)); 100];
    let query = read(&bytes).unwrap();
    let answer = write(&query, Code::Done, &records, query.udp_bytes_max());
    assert!(is_cut(&answer) && answer.len() <= 512, "{}", answer.len());
    // With EDNS there is more room, and the answer has it too.
    bytes[11] = 1;
    bytes.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    let query = read(&bytes).unwrap();
    assert_eq!(query.udp_bytes_max(), 1232);
    let answer = write(&query, Code::Done, &records, query.udp_bytes_max());
    assert!(is_cut(&answer) && answer.len() <= 1232 && answer.len() > 1200, "{}", answer.len());
    assert_eq!(answer.get(11), Some(&1), "EDNS is answered");
    assert!(!is_cut(&write(&query, Code::Done, &records, MESSAGE_BYTES_MAX)));
}

#[test]
fn what_is_no_question_is_refused_or_nothing() {
    let good = question("a.b", A);
    for length in 0..good.len() {
        let cut = good.get(..length).unwrap();
        let expected = if length < 12 { Unread::Nothing } else { Unread::Malformed };
        assert_eq!(read(cut), Err(expected), "{length} bytes");
    }
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        read(&bytes)
    };
    assert_eq!(changed(2, 0x81), Err(Unread::Nothing), "an answer");
    assert_eq!(changed(5, 2), Err(Unread::Malformed), "two questions");
    assert_eq!(changed(12, 0xc0), Err(Unread::Malformed), "a pointer");
    assert!(changed(2, 0x28).is_ok_and(|query| !query.is_plain()), "an update");
    assert_eq!(changed(13, b'.').unwrap().name, "\\046.b", "a dot within a label is none between");
    assert_eq!(refuse(&good).unwrap(), [0x12, 0x34, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert!(refuse(&[1]).is_none());
}

#[test]
fn bytes_of_any_kind_never_panic() {
    for seed in 0..20_000_u32 {
        let mut random = fastrand::Rng::with_seed(seed.into());
        let mut bytes = question("some.name.example", A);
        for _ in 0..random.usize(1..8) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        bytes.truncate(random.usize(..=bytes.len()));
        if let Ok(query) = read(&bytes) {
            let _answer = write(&query, Code::Failure, &[], query.udp_bytes_max());
        }
        let _refused = refuse(&bytes);
    }
}
