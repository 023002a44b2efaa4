//! The host's functions as they are, and what is needed to call them.

// The ABI passes addresses both ways: its declarations, and taking over what the host put into our memory.
#![allow(unsafe_code)]

use std::ptr::null_mut;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_log(level: u32, at: *const u8, length: usize) -> u32;
    fn proxy_get_property(path: *const u8, length: usize, at: *mut *mut u8, bytes: *mut usize) -> u32;
    fn proxy_set_property(path: *const u8, length: usize, value: *const u8, bytes: usize) -> u32;
    fn proxy_get_header_map_pairs(map: u32, at: *mut *mut u8, bytes: *mut usize) -> u32;
    fn proxy_set_header_map_pairs(map: u32, at: *const u8, bytes: usize) -> u32;
    fn proxy_get_header_map_value(
        map: u32,
        name: *const u8,
        length: usize,
        at: *mut *mut u8,
        bytes: *mut usize,
    ) -> u32;
    fn proxy_add_header_map_value(
        map: u32,
        name: *const u8,
        length: usize,
        value: *const u8,
        bytes: usize,
    ) -> u32;
    fn proxy_replace_header_map_value(
        map: u32,
        name: *const u8,
        length: usize,
        value: *const u8,
        bytes: usize,
    ) -> u32;
    fn proxy_remove_header_map_value(map: u32, name: *const u8, length: usize) -> u32;
    fn proxy_get_header_map_size(map: u32, size: *mut usize) -> u32;
    fn proxy_get_buffer_bytes(
        buffer: u32,
        start: usize,
        max: usize,
        at: *mut *mut u8,
        bytes: *mut usize,
    ) -> u32;
    fn proxy_set_buffer_bytes(buffer: u32, start: usize, size: usize, at: *const u8, bytes: usize) -> u32;
    fn proxy_get_buffer_status(buffer: u32, length: *mut usize, flags: *mut u32) -> u32;
    fn proxy_continue_stream(stream: u32) -> u32;
    fn proxy_close_stream(stream: u32) -> u32;
    fn proxy_get_status(code: *mut u32, at: *mut *mut u8, bytes: *mut usize) -> u32;
    fn proxy_http_call(
        upstream: *const u8,
        length: usize,
        headers: *const u8,
        headers_length: usize,
        body: *const u8,
        body_length: usize,
        trailers: *const u8,
        trailers_length: usize,
        timeout: u32,
        id: *mut u32,
    ) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, length: usize, id: *mut u32) -> u32;
    fn proxy_increment_metric(id: u32, delta: i64) -> u32;
    fn proxy_record_metric(id: u32, value: u64) -> u32;
    fn proxy_get_metric(id: u32, value: *mut u64) -> u32;
    fn proxy_set_shared_data(
        key: *const u8,
        length: usize,
        value: *const u8,
        bytes: usize,
        version: u32,
    ) -> u32;
    fn proxy_get_shared_data(
        key: *const u8,
        length: usize,
        at: *mut *mut u8,
        bytes: *mut usize,
        version: *mut u32,
    ) -> u32;
    fn proxy_register_shared_queue(name: *const u8, length: usize, id: *mut u32) -> u32;
    fn proxy_enqueue_shared_queue(id: u32, at: *const u8, bytes: usize) -> u32;
    fn proxy_dequeue_shared_queue(id: u32, at: *mut *mut u8, bytes: *mut usize) -> u32;
    fn proxy_resolve_shared_queue(
        vm: *const u8,
        vm_length: usize,
        name: *const u8,
        length: usize,
        id: *mut u32,
    ) -> u32;
    fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
    fn proxy_get_log_level(level: *mut u32) -> u32;
    fn proxy_done() -> u32;
    fn proxy_set_effective_context(context: u32) -> u32;
    fn proxy_call_foreign_function(
        name: *const u8,
        length: usize,
        arguments: *const u8,
        arguments_length: usize,
        at: *mut *mut u8,
        bytes: *mut usize,
    ) -> u32;
    fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_length: usize,
        body: *const u8,
        body_length: usize,
        headers: *const u8,
        headers_length: usize,
        grpc: i32,
    ) -> u32;
}

/// The host's allocator for what it gives us.
#[unsafe(no_mangle)]
extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
    let mut bytes = Vec::<u8>::with_capacity(size);
    let at = bytes.as_mut_ptr();
    std::mem::forget(bytes);
    at
}

/// The marker of the ABI's version.
#[unsafe(no_mangle)]
extern "C" fn proxy_abi_version_0_2_1() {}

/// A status, what the host gave, and whether the address was left or made null.
pub(crate) struct Given {
    pub(crate) status: u32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) null: bool,
}

/// Calls a function that answers with bytes.
fn given(call: impl FnOnce(*mut *mut u8, *mut usize) -> u32) -> Given {
    let (mut at, mut length) = (null_mut(), 0);
    let status = call(&mut at, &mut length);
    let null = at.is_null();
    // SAFETY: the host put the bytes where `proxy_on_memory_allocate`, a `Vec` of this capacity, gave it room.
    let bytes = if null { Vec::new() } else { unsafe { Vec::from_raw_parts(at, length, length) } };
    Given { status, bytes, null }
}

/// Calls a function that answers with a number.
fn number<N: Copy>(before: N, call: impl FnOnce(*mut N) -> u32) -> (u32, N) {
    let mut number = before;
    (call(&mut number), number)
}

// SAFETY of everything below: addresses and lengths are those of slices and variables that outlive the call.

pub(crate) fn log(line: &str) {
    unsafe { proxy_log(2, line.as_ptr(), line.len()) };
}

pub(crate) fn property(path: &[u8]) -> Given {
    given(|at, bytes| unsafe { proxy_get_property(path.as_ptr(), path.len(), at, bytes) })
}

pub(crate) fn set_property(path: &str, value: &[u8]) -> u32 {
    unsafe { proxy_set_property(path.as_ptr(), path.len(), value.as_ptr(), value.len()) }
}

pub(crate) fn pairs(map: u32) -> Given {
    given(|at, bytes| unsafe { proxy_get_header_map_pairs(map, at, bytes) })
}

pub(crate) fn set_pairs(map: u32, bytes: &[u8]) -> u32 {
    unsafe { proxy_set_header_map_pairs(map, bytes.as_ptr(), bytes.len()) }
}

pub(crate) fn value(map: u32, name: &str) -> Given {
    given(|at, bytes| unsafe { proxy_get_header_map_value(map, name.as_ptr(), name.len(), at, bytes) })
}

pub(crate) fn add(map: u32, name: &str, value: &str) -> u32 {
    unsafe { proxy_add_header_map_value(map, name.as_ptr(), name.len(), value.as_ptr(), value.len()) }
}

pub(crate) fn replace(map: u32, name: &str, value: &str) -> u32 {
    unsafe { proxy_replace_header_map_value(map, name.as_ptr(), name.len(), value.as_ptr(), value.len()) }
}

pub(crate) fn remove(map: u32, name: &str) -> u32 {
    unsafe { proxy_remove_header_map_value(map, name.as_ptr(), name.len()) }
}

pub(crate) fn map_size(map: u32) -> (u32, usize) {
    number(0, |size| unsafe { proxy_get_header_map_size(map, size) })
}

pub(crate) fn buffer(buffer: u32, start: usize, max: usize) -> Given {
    given(|at, bytes| unsafe { proxy_get_buffer_bytes(buffer, start, max, at, bytes) })
}

pub(crate) fn set_buffer(buffer: u32, start: usize, size: usize, bytes: &str) -> u32 {
    unsafe { proxy_set_buffer_bytes(buffer, start, size, bytes.as_ptr(), bytes.len()) }
}

/// A status, the length, and the flags.
pub(crate) fn buffer_status(buffer: u32) -> (u32, usize, u32) {
    let mut flags = 9;
    let (status, length) = number(0, |length| unsafe { proxy_get_buffer_status(buffer, length, &mut flags) });
    (status, length, flags)
}

pub(crate) fn continue_stream(stream: u32) -> u32 {
    unsafe { proxy_continue_stream(stream) }
}

pub(crate) fn close_stream(stream: u32) -> u32 {
    unsafe { proxy_close_stream(stream) }
}

/// The code before the call is 99.
pub(crate) fn call_status() -> (Given, u32) {
    let mut code = 99;
    let message = given(|at, bytes| unsafe { proxy_get_status(&mut code, at, bytes) });
    (message, code)
}

/// A call with the id that was there before, and the one after.
pub(crate) fn http_call(upstream: &str, headers: &[u8], body: &str, timeout: u32, before: u32) -> (u32, u32) {
    number(before, |id| unsafe {
        proxy_http_call(
            upstream.as_ptr(),
            upstream.len(),
            headers.as_ptr(),
            headers.len(),
            body.as_ptr(),
            body.len(),
            std::ptr::null(),
            0,
            timeout,
            id,
        )
    })
}

pub(crate) fn define_metric(kind: u32, name: &str) -> (u32, u32) {
    number(0, |id| unsafe { proxy_define_metric(kind, name.as_ptr(), name.len(), id) })
}

pub(crate) fn increment(id: u32, delta: i64) -> u32 {
    unsafe { proxy_increment_metric(id, delta) }
}

pub(crate) fn record(id: u32, value: u64) -> u32 {
    unsafe { proxy_record_metric(id, value) }
}

pub(crate) fn metric(id: u32) -> (u32, u64) {
    number(0, |value| unsafe { proxy_get_metric(id, value) })
}

pub(crate) fn set_shared(key: &str, value: &str, version: u32) -> u32 {
    unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), version) }
}

pub(crate) fn shared(key: &str) -> (Given, u32) {
    let mut version = 77;
    let value =
        given(|at, bytes| unsafe { proxy_get_shared_data(key.as_ptr(), key.len(), at, bytes, &mut version) });
    (value, version)
}

pub(crate) fn register_queue(name: &str) -> (u32, u32) {
    number(0, |id| unsafe { proxy_register_shared_queue(name.as_ptr(), name.len(), id) })
}

pub(crate) fn resolve_queue(vm: &str, name: &str) -> (u32, u32) {
    number(0, |id| unsafe {
        proxy_resolve_shared_queue(vm.as_ptr(), vm.len(), name.as_ptr(), name.len(), id)
    })
}

pub(crate) fn enqueue(id: u32, item: &str) -> u32 {
    unsafe { proxy_enqueue_shared_queue(id, item.as_ptr(), item.len()) }
}

pub(crate) fn dequeue(id: u32) -> Given {
    given(|at, bytes| unsafe { proxy_dequeue_shared_queue(id, at, bytes) })
}

pub(crate) fn set_tick(milliseconds: u32) -> u32 {
    unsafe { proxy_set_tick_period_milliseconds(milliseconds) }
}

pub(crate) fn log_level() -> (u32, u32) {
    number(99, |level| unsafe { proxy_get_log_level(level) })
}

pub(crate) fn done() -> u32 {
    unsafe { proxy_done() }
}

pub(crate) fn set_effective_context(context: u32) -> u32 {
    unsafe { proxy_set_effective_context(context) }
}

pub(crate) fn foreign(name: &str, arguments: &str) -> Given {
    given(|at, bytes| unsafe {
        proxy_call_foreign_function(name.as_ptr(), name.len(), arguments.as_ptr(), arguments.len(), at, bytes)
    })
}

pub(crate) fn reply(status: u32, details: &str, body: &str, headers: &[u8], grpc: i32) -> u32 {
    unsafe {
        proxy_send_local_response(
            status,
            details.as_ptr(),
            details.len(),
            body.as_ptr(),
            body.len(),
            headers.as_ptr(),
            headers.len(),
            grpc,
        )
    }
}
