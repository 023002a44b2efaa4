//! The start of the root context: everything that is not about a stream.

// Exported functions have fixed names.
#![allow(unsafe_code)]

use crate::abi::{self, Given, log};
use crate::connection;
use crate::lines::{buffer, phase, property};

#[unsafe(no_mangle)]
extern "C" fn proxy_on_context_create(context: u32, parent: u32) {
    log(&format!("CB context_create({context},{parent})"));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_vm_start(context: u32, size: usize) -> u32 {
    log(&format!(
        "CB vm_start({context},{size}) vmconf {} plugconf {}",
        buffer(6, 0, 999),
        buffer(7, 0, 999)
    ));
    1
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(context: u32, size: usize) -> u32 {
    if connection::configure(&abi::buffer(7, 0, size).bytes) {
        return 1;
    }
    log(&format!(
        "CB configure({context},{size}) vmconf {} plugconf {}",
        buffer(6, 0, 999),
        buffer(7, 0, 9999)
    ));
    for path in [
        "plugin_name",
        "plugin_root_id",
        "plugin_vm_id",
        "node.id",
        "xds.node.id",
        "node.metadata.LABELS.app",
        "request.path",
        "listener_direction",
        "xds.listener_direction",
    ] {
        property(path);
    }
    let (status, level) = abi::log_level();
    log(&format!("LOGLEVEL st={status} level={level}"));
    (0..4).for_each(metric);
    log(&format!("METRIC unknown inc={} rec={}", abi::increment(4000, 1), abi::record(4001, 1)));
    shared_data();
    queue();
    log(&format!("TICK {}", abi::set_tick(400)));
    contexts();
    foreign_functions();
    phase("configure");
    1
}

fn metric(kind: u32) {
    let name = format!("probe.m{kind}");
    let (status, id) = abi::define_metric(kind, &name);
    let (again, other) = abi::define_metric(kind, &name);
    let steps = [5, 0, -2].map(|delta| abi::increment(id, delta));
    let recorded = abi::record(id, 7);
    let (read, value) = abi::metric(id);
    log(&format!(
        "METRIC type={kind} define st={status} id={id} again st={again} id={other} inc(5)={} inc(0)={} inc(-2)={} rec(7)={recorded} get={read} val={value}",
        steps[0], steps[1], steps[2]
    ));
    log(&format!("METRIC type={kind} value {value}"));
}

fn shared_data() {
    let (missing, _) = abi::shared("k");
    let new = abi::set_shared("k", "v1", 123);
    let (present, version) = abi::shared("k");
    let wrong = abi::set_shared("k", "v1", version + 1);
    let right = abi::set_shared("k", "v1", version);
    let empty = abi::set_shared("k", "", 0);
    let (Given { status, bytes, null }, last) = abi::shared("k");
    log(&format!(
        "SHARED get-missing={} set-new-with-cas123={new} get={} cas={version} set-wrong-cas={wrong} set-right-cas={right} set-empty={empty} get-empty={status} null={null} len={} cas={last}",
        missing.status,
        present.status,
        bytes.len()
    ));
}

fn queue() {
    let (registered, id) = abi::register_queue("q");
    let (resolved, same) = abi::resolve_queue("", "q");
    let (other, _) = abi::resolve_queue("other", "q");
    let empty = abi::dequeue(id).status;
    let (put, nowhere) = (abi::enqueue(id, "item"), abi::enqueue(9999, "item"));
    log(&format!(
        "QUEUE register={registered} id={id} resolve={resolved} id={same} resolve-other-vm={other} dequeue-empty={empty} enqueue={put} enqueue-bad={nowhere}"
    ));
}

fn contexts() {
    let (done, none, unknown) = (abi::done(), abi::set_effective_context(0), abi::set_effective_context(999));
    let going_on = [0, 1, 2, 3, 4].map(|stream| abi::continue_stream(stream).to_string()).join(",");
    log(&format!(
        "MISC done(not pending)={done} seteff(0)={none} seteff(999)={unknown} continue(0..4)={going_on}"
    ));
}

fn foreign_functions() {
    for name in [
        "compress",
        "uncompress",
        "expr_create",
        "clear_route_cache",
        "verify_signature",
        "sign",
        "set_envoy_filter_state",
        "declare_property",
        "nosuch",
    ] {
        let Given { status, bytes, .. } = abi::foreign(name, "1 == 1");
        log(&format!("FOREIGN {name} st={status} len={}", bytes.len()));
    }
}
