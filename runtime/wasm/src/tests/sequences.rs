//! Random sequences of host calls with arguments that are often bad: whatever a guest does, the host goes on.

use super::outside::{Asking, answer};
use super::*;
use proptest::prelude::*;

/// A host function by the name that the prelude gives it, and whether each parameter has 64 bits.
#[derive(Clone, Debug)]
struct Function {
    name: String,
    wide: Vec<bool>,
}

/// Every function that the prelude imports but the one that ends the guest.
fn functions() -> Vec<Function> {
    let imports = PRELUDE.split("(import ").skip(1).filter_map(|import| {
        let (_, function) = import.split_once("(func $")?;
        let (name, types) = function.split_once(' ')?;
        let types = types.split_once(')').map_or("", |(types, _)| types);
        let wide = types.split_whitespace().filter(|word| word.starts_with('i')).map(|word| word == "i64");
        Some(Function { name: name.to_owned(), wide: wide.collect() })
    });
    imports.filter(|function| function.name != "exit").collect()
}

/// Numbers that are addresses, lengths, ids or kinds, good and bad.
const ARGUMENTS: [i64; 24] = [
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    12,
    16,
    24,
    600,
    1024,
    1280,
    4096,
    65536,
    131_070,
    131_072,
    -1,
    -2,
    -4,
    0x7fff_ffff,
];

fn call() -> impl Strategy<Value = String> {
    let functions = functions();
    assert!(functions.len() > 40, "{functions:?}");
    let arguments = prop::collection::vec(prop::sample::select(&ARGUMENTS[..]), 12);
    (prop::sample::select(functions), arguments).prop_map(|(function, arguments)| {
        let constants = function.wide.iter().zip(arguments).map(|(wide, argument)| {
            let kind = if *wide { "i64" } else { "i32" };
            format!(" ({kind}.const {argument})")
        });
        let call = format!("(call ${}{})", function.name, constants.collect::<String>());
        // One function has no result.
        format!("(drop {call})")
    })
}

fn guest_with(phases: [&[String]; 4]) -> String {
    let [start, request, response, later] = phases.map(|calls| calls.concat());
    let body = format!(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) {start} (i32.const 1))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) {request}
             (drop (call $http_call (i32.const 1344) (i32.const 12) (i32.const 1280) (i32.const 61) (i32.const 0)
               (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 16)))
             (i32.const 1))
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) {response} (i32.const 0))
           (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
             (drop (call $effective (i32.const 2))) {later} (drop (call $continue (i32.const 0))))
           (func (export "proxy_on_tick") (param i32) {later})
           (func (export "proxy_on_queue_ready") (param i32 i32) {later})
           (func (export "proxy_on_log") (param i32) {response})
           (func (export "proxy_on_done") (param i32) (result i32) {response} (i32.const 1))"#
    );
    let mut data = b"request\0path".to_vec();
    data.resize(256, 0);
    let asked = super::outside::map(&[(":method", "GET"), (":path", "/"), (":authority", "a")]);
    data.extend_from_slice(&asked);
    data.resize(320, 0);
    data.extend_from_slice(b"auth.shop:80");
    guest(&super::outside::escaped(&data), &body)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_guest_calls_the_host_goes_on(
        start in prop::collection::vec(call(), 0..6),
        request in prop::collection::vec(call(), 0..12),
        response in prop::collection::vec(call(), 0..6),
        later in prop::collection::vec(call(), 0..6),
    ) {
        let text = guest_with([&start, &request, &response, &later]);
        // A guest that ends itself while it is configured is not started; that is told, not suffered.
        if let Some(asking) = Asking::start_with(&text) {
            let mut run = asking.start();
            let verdict = run.request();
            let asked = asking.mesh.asked.lock().len();
            (0..asked).for_each(|index| asking.mesh.answer(index, answer(200, "body")));
            drop(verdict);
            run.request();
            run.response();
            run.finish();
            // The next exchange meets an instance, the same or a new one.
            let mut next = asking.start();
            next.request();
            next.finish();
        }
    }
}
