//! Connections that carry no HTTP: what each callback is told and sees, and what the configuration makes it do.

// Exported functions have fixed names.
#![allow(unsafe_code)]

use crate::abi::{self, log, set_buffer};
use crate::lines::{buffer, map, phase, property};
use std::cell::{Cell, RefCell};

/// The buffers of what the client, and the server, sent.
const DOWN: u32 = 2;
const UP: u32 = 3;

/// What is asked for.
const PROPERTIES: &[&str] = &[
    "plugin_name",
    "plugin_root_id",
    "connection_id",
    "connection.id",
    "connection.mtls",
    "connection.requested_server_name",
    "connection.tls_version",
    "connection.termination_details",
    "source.address",
    "source.port",
    "destination.address",
    "destination.port",
    "upstream.address",
    "upstream.port",
    "upstream.transport_failure_reason",
    "upstream.request_attempt_count",
    "request.time",
    "request.path",
    "request.protocol",
    "request.size",
    "request.total_size",
    "request.duration",
    "response.code",
    "response.code_details",
    "response.flags",
    "response.size",
    "response.total_size",
    "xds.cluster_name",
    "xds.route_name",
    "xds.listener_direction",
    "filter_state",
    "metadata",
    "request",
    "mine",
    "nosuch",
];

thread_local! {
    /// For each callback by name, what its calls do in turn; `None` where the probe is asked about exchanges.
    static SCRIPT: RefCell<Option<Vec<(String, Vec<String>)>>> = const { RefCell::new(None) };
    /// The last connection.
    static LAST: Cell<u32> = const { Cell::new(0) };
}

/// Whether the configuration is a script for connections, such as `{"connections": "new:hold down:hold,pass"}`.
pub(crate) fn configure(configuration: &[u8]) -> bool {
    let text = String::from_utf8_lossy(configuration);
    let Some((_, script)) = text.split_once("\"connections\"") else { return false };
    let script = script.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    let acts = |part: &str| {
        let (name, acts) = part.split_once(':')?;
        Some((name.to_owned(), acts.split(',').map(str::to_owned).collect()))
    };
    SCRIPT.set(Some(script.split(' ').filter_map(acts).collect()));
    true
}

/// Whether connections are what is asked about.
pub(crate) fn is_asked() -> bool {
    SCRIPT.with_borrow(Option::is_some)
}

/// What the next call of a callback does: the last one of those listed is for all that follow.
fn next(name: &str) -> String {
    SCRIPT.with_borrow_mut(|script| {
        let mut all = script.iter_mut().flatten();
        let Some((_, acts)) = all.find(|(known, _)| known == name) else { return String::new() };
        if acts.len() > 1 { acts.remove(0) } else { acts.first().cloned().unwrap_or_default() }
    })
}

/// Does it; the action that is returned.
fn act(name: &str, context: u32) -> u32 {
    let what = next(name);
    let said = |word: &str, status: u32| log(&format!("ACT {word} st={status}"));
    let own = if name == "up" { UP } else { DOWN };
    match what.as_str() {
        "hold" => return 1,
        "odd" => return 7,
        "replace" => said("replace", set_buffer(own, 0, usize::MAX, "REPLACED")),
        "edit" => edit(own),
        "closedown" => said("close 2", abi::close_stream(2)),
        "closeup" => said("close 3", abi::close_stream(3)),
        "closeodd" => {
            [0, 1, 4].into_iter().for_each(|stream| said("close", abi::close_stream(stream)));
        }
        "goon" => {
            for stream in 0..3 {
                said("continue", abi::continue_stream(stream));
            }
            return 1;
        }
        "goonup" => {
            said("continue 3", abi::continue_stream(3));
            return 1;
        }
        "tick" => {
            said("tick", abi::set_tick(20));
            return 1;
        }
        "reply" => said("reply", abi::reply(403, "d", "no", &map(&[("x", "y")]), -1)),
        "property" => said("property", abi::set_property("mine", b"value")),
        "properties" => PROPERTIES.iter().for_each(|path| property(path)),
        "phase" => phase(name),
        "crash" => panic!("asked for"),
        _ => {}
    }
    LAST.set(context);
    0
}

/// Changes of a buffer, as those of bodies.
fn edit(own: u32) {
    log(&format!(
        "RANGE overflow={} beyond={} middle={}",
        buffer(own, 1, usize::MAX),
        buffer(own, 9999, 5),
        buffer(own, 1, 2)
    ));
    log(&format!(
        "SETBUF prepend={} append={} mid(2,1)={} replace0-3={} other={}",
        set_buffer(own, 0, 0, "PRE"),
        set_buffer(own, usize::MAX, 0, "POST"),
        set_buffer(own, 2, 1, "X"),
        set_buffer(own, 0, 3, "pre"),
        set_buffer(5 - own, 0, 0, "Z"),
    ));
    log(&format!("AFTER {}", buffer(own, 0, 200)));
}

/// What a callback sees of both buffers.
fn see(line: &str) {
    log(&format!("{line} 2:{} 3:{}", buffer(DOWN, 0, 60), buffer(UP, 0, 60)));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_new_connection(context: u32) -> u32 {
    LAST.set(context);
    see(&format!("CB new_connection({context})"));
    act("new", context)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_downstream_data(context: u32, size: u32, end: u32) -> u32 {
    see(&format!("CB downstream_data({context},{size},{end})"));
    act("down", context)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_upstream_data(context: u32, size: u32, end: u32) -> u32 {
    see(&format!("CB upstream_data({context},{size},{end})"));
    act("up", context)
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_downstream_connection_close(context: u32, peer: u32) {
    see(&format!("CB downstream_close({context},{peer})"));
    act("downclose", context);
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_upstream_connection_close(context: u32, peer: u32) {
    see(&format!("CB upstream_close({context},{peer})"));
    act("upclose", context);
}

/// The timer goes on with the connection that was held last.
pub(crate) fn tick() {
    abi::set_tick(0);
    let context = LAST.get();
    let known = abi::set_effective_context(context);
    let held = buffer(DOWN, 0, 60);
    let (down, up) = (abi::continue_stream(2), abi::continue_stream(3));
    log(&format!("TICK known={known} held={held} continue(2,3)={down},{up}"));
}

/// The end of a connection.
pub(crate) fn ended(context: u32) {
    act("log", context);
}
