//! What reaches the root context later: its timer, answers, its queue.

// Exported functions have fixed names.
#![allow(unsafe_code)]

use crate::abi::{self, Given, log};
use crate::connection;
use crate::lines::{entries, map, phase, show};

#[unsafe(no_mangle)]
extern "C" fn proxy_on_tick(context: u32) {
    if connection::is_asked() {
        return connection::tick();
    }
    abi::set_tick(0);
    log(&format!("CB tick({context})"));
    phase("tick");
    let headers =
        map(&[(":method", "GET"), (":path", "/callout"), (":authority", "callee.example"), ("X-Mixed", "A")]);
    let (unknown, id) = abi::http_call("nocluster", &headers, "", 1000, 0);
    let (incomplete, id) = abi::http_call("outbound|80||up", &map(&[(":method", "GET")]), "", 1000, id);
    let (good, first) = abi::http_call("outbound|80||up", &headers, "hey", 1000, id);
    let (dead, second) = abi::http_call("outbound|80||dead", &headers, "", 500, first);
    log(&format!(
        "HTTPCALL unknown-cluster={unknown} missing-pseudo={incomplete} ok={good} id={first} dead={dead} id={second}"
    ));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_http_call_response(context: u32, id: u32, headers: u32, bytes: u32, trailers: u32) {
    let (Given { status, bytes: message, .. }, code) = abi::call_status();
    log(&format!(
        "CB http_call_response({context},{id},{headers},{bytes},{trailers}) get_status st={status} code={code} msg={}",
        show(&message)
    ));
    log(&format!("CALLMAP {:?}", entries(6)));
    phase("callresp");
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_queue_ready(context: u32, queue: u32) {
    let Given { status, bytes, .. } = abi::dequeue(queue);
    log(&format!("CB queue_ready({context},{queue}) dequeue={status} {}", show(&bytes)));
}
