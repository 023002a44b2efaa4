//! The host functions of ABI 0.2.1. Each import is used by one function, so that a module imports only what its plugin
//! uses. All unsafe code of the SDK is in this file and in what [`crate::export!`] exports.
#![allow(unsafe_code)]

use crate::abi::{Buffer, HostError, Map, MetricKind, Pairs, Stream, read_pairs, write_pairs};
use std::ptr::null_mut;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    safe fn proxy_log(level: u32, text: *const u8, length: usize) -> u32;
    safe fn proxy_get_log_level(level: &mut u32) -> u32;
    safe fn proxy_get_current_time_nanoseconds(time: &mut u64) -> u32;
    safe fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
    safe fn proxy_set_effective_context(context: u32) -> u32;
    safe fn proxy_continue_stream(stream: u32) -> u32;
    safe fn proxy_close_stream(stream: u32) -> u32;
    safe fn proxy_get_buffer_bytes(
        kind: u32,
        start: usize,
        most: usize,
        data: &mut *mut u8,
        length: &mut usize,
    ) -> u32;
    safe fn proxy_set_buffer_bytes(
        kind: u32,
        start: usize,
        size: usize,
        data: *const u8,
        length: usize,
    ) -> u32;
    safe fn proxy_get_header_map_pairs(map: u32, data: &mut *mut u8, length: &mut usize) -> u32;
    safe fn proxy_get_header_map_value(
        map: u32,
        name: *const u8,
        name_length: usize,
        data: &mut *mut u8,
        length: &mut usize,
    ) -> u32;
    safe fn proxy_add_header_map_value(
        map: u32,
        name: *const u8,
        name_length: usize,
        value: *const u8,
        value_length: usize,
    ) -> u32;
    safe fn proxy_replace_header_map_value(
        map: u32,
        name: *const u8,
        name_length: usize,
        value: *const u8,
        value_length: usize,
    ) -> u32;
    safe fn proxy_remove_header_map_value(map: u32, name: *const u8, name_length: usize) -> u32;
    safe fn proxy_get_property(
        path: *const u8,
        path_length: usize,
        data: &mut *mut u8,
        length: &mut usize,
    ) -> u32;
    safe fn proxy_set_property(
        path: *const u8,
        path_length: usize,
        value: *const u8,
        value_length: usize,
    ) -> u32;
    safe fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_length: usize,
        body: *const u8,
        body_length: usize,
        headers: *const u8,
        headers_length: usize,
        grpc_status: i32,
    ) -> u32;
    safe fn proxy_http_call(
        cluster: *const u8,
        cluster_length: usize,
        headers: *const u8,
        headers_length: usize,
        body: *const u8,
        body_length: usize,
        trailers: *const u8,
        trailers_length: usize,
        timeout: u32,
        id: &mut u32,
    ) -> u32;
    safe fn proxy_grpc_call(
        cluster: *const u8,
        cluster_length: usize,
        service: *const u8,
        service_length: usize,
        method: *const u8,
        method_length: usize,
        metadata: *const u8,
        metadata_length: usize,
        message: *const u8,
        message_length: usize,
        timeout: u32,
        id: &mut u32,
    ) -> u32;
    safe fn proxy_get_status(code: &mut u32, data: &mut *mut u8, length: &mut usize) -> u32;
    safe fn proxy_get_shared_data(
        key: *const u8,
        key_length: usize,
        data: &mut *mut u8,
        length: &mut usize,
        cas: &mut u32,
    ) -> u32;
    safe fn proxy_set_shared_data(
        key: *const u8,
        key_length: usize,
        data: *const u8,
        length: usize,
        cas: u32,
    ) -> u32;
    safe fn proxy_define_metric(kind: u32, name: *const u8, name_length: usize, id: &mut u32) -> u32;
    safe fn proxy_increment_metric(id: u32, delta: i64) -> u32;
    safe fn proxy_record_metric(id: u32, value: u64) -> u32;
    safe fn proxy_call_foreign_function(
        name: *const u8,
        name_length: usize,
        argument: *const u8,
        argument_length: usize,
        data: &mut *mut u8,
        length: &mut usize,
    ) -> u32;
}

/// Memory for what the host returns; see [`take`].
pub fn allocate(size: usize) -> *mut u8 {
    let mut bytes = Vec::<u8>::new();
    if size == 0 || bytes.try_reserve_exact(size).is_err() {
        return null_mut();
    }
    let mut bytes = std::mem::ManuallyDrop::new(bytes);
    bytes.as_mut_ptr()
}

/// What a host function returned through its two pointers.
fn take(status: u32, data: *mut u8, length: usize) -> Result<Vec<u8>, HostError> {
    HostError::check(status)?;
    if data.is_null() || length == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the host got the memory from `allocate(length)`, where it has this capacity, has written all of it, and
    // keeps no pointer to it: that is the contract of the ABI (`proxy_on_memory_allocate`).
    Ok(unsafe { Vec::from_raw_parts(data, length, length) })
}

pub(crate) fn log(level: u32, text: &str) {
    // A line that the host does not take has nowhere else to go.
    let _ = proxy_log(level, text.as_ptr(), text.len());
}

pub(crate) fn log_level() -> Result<u32, HostError> {
    let mut level = 0;
    HostError::check(proxy_get_log_level(&mut level))?;
    Ok(level)
}

pub(crate) fn now() -> u64 {
    let mut time = 0;
    // The time is zero if the host does not know it.
    let _ = proxy_get_current_time_nanoseconds(&mut time);
    time
}

/// Each hasher of the standard library has keys of its own, made of the host's randomness.
pub(crate) fn random() -> u64 {
    std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), 0)
}

pub(crate) fn set_tick_period(milliseconds: u32) -> Result<(), HostError> {
    HostError::check(proxy_set_tick_period_milliseconds(milliseconds))
}

pub(crate) fn set_effective_context(context: u32) -> Result<(), HostError> {
    HostError::check(proxy_set_effective_context(context))
}

pub(crate) fn continue_stream(stream: Stream) -> Result<(), HostError> {
    HostError::check(proxy_continue_stream(stream as u32))
}

pub(crate) fn close_stream(stream: Stream) -> Result<(), HostError> {
    HostError::check(proxy_close_stream(stream as u32))
}

pub(crate) fn buffer(kind: Buffer, start: usize, most: usize) -> Result<Vec<u8>, HostError> {
    let (mut data, mut length) = (null_mut(), 0);
    let status = proxy_get_buffer_bytes(kind as u32, start, most, &mut data, &mut length);
    take(status, data, length)
}

pub(crate) fn set_buffer(kind: Buffer, start: usize, size: usize, bytes: &[u8]) -> Result<(), HostError> {
    HostError::check(proxy_set_buffer_bytes(kind as u32, start, size, bytes.as_ptr(), bytes.len()))
}

pub(crate) fn map(map: Map) -> Result<Pairs, HostError> {
    let (mut data, mut length) = (null_mut(), 0);
    let status = proxy_get_header_map_pairs(map as u32, &mut data, &mut length);
    take(status, data, length).map(|bytes| read_pairs(&bytes))
}

pub(crate) fn header(map: Map, name: &str) -> Result<Vec<u8>, HostError> {
    let (mut data, mut length) = (null_mut(), 0);
    let status = proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), &mut data, &mut length);
    take(status, data, length)
}

pub(crate) fn add_header(map: Map, name: &str, value: &[u8]) -> Result<(), HostError> {
    let status =
        proxy_add_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len());
    HostError::check(status)
}

pub(crate) fn set_header(map: Map, name: &str, value: &[u8]) -> Result<(), HostError> {
    let status =
        proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len());
    HostError::check(status)
}

pub(crate) fn remove_header(map: Map, name: &str) -> Result<(), HostError> {
    HostError::check(proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len()))
}

pub(crate) fn property(path: &[&str]) -> Result<Vec<u8>, HostError> {
    let (mut data, mut length) = (null_mut(), 0);
    let path = path.join("\0");
    let status = proxy_get_property(path.as_ptr(), path.len(), &mut data, &mut length);
    take(status, data, length)
}

pub(crate) fn set_property(path: &[&str], value: &[u8]) -> Result<(), HostError> {
    let path = path.join("\0");
    HostError::check(proxy_set_property(path.as_ptr(), path.len(), value.as_ptr(), value.len()))
}

pub(crate) fn send_reply(
    status: u16,
    details: &str,
    headers: &[(String, Vec<u8>)],
    body: &[u8],
    grpc_status: Option<u32>,
) -> Result<(), HostError> {
    let headers = write_pairs(headers);
    HostError::check(proxy_send_local_response(
        u32::from(status),
        details.as_ptr(),
        details.len(),
        body.as_ptr(),
        body.len(),
        headers.as_ptr(),
        headers.len(),
        grpc_status.and_then(|code| i32::try_from(code).ok()).unwrap_or(-1),
    ))
}

pub(crate) fn http_call(
    cluster: &str,
    headers: &[(String, Vec<u8>)],
    body: &[u8],
    timeout: u32,
) -> Result<u32, HostError> {
    let headers = write_pairs(headers);
    let trailers = write_pairs::<&str, &str>(&[]);
    let mut id = 0;
    HostError::check(proxy_http_call(
        cluster.as_ptr(),
        cluster.len(),
        headers.as_ptr(),
        headers.len(),
        body.as_ptr(),
        body.len(),
        trailers.as_ptr(),
        trailers.len(),
        timeout,
        &mut id,
    ))?;
    Ok(id)
}

pub(crate) fn grpc_call(
    cluster: &str,
    [service, method]: [&str; 2],
    metadata: &[(String, Vec<u8>)],
    message: &[u8],
    timeout: u32,
) -> Result<u32, HostError> {
    let metadata = write_pairs(metadata);
    let mut id = 0;
    HostError::check(proxy_grpc_call(
        cluster.as_ptr(),
        cluster.len(),
        service.as_ptr(),
        service.len(),
        method.as_ptr(),
        method.len(),
        metadata.as_ptr(),
        metadata.len(),
        message.as_ptr(),
        message.len(),
        timeout,
        &mut id,
    ))?;
    Ok(id)
}

/// The message of the gRPC status at hand.
pub(crate) fn grpc_status_message() -> Vec<u8> {
    let (mut code, mut data, mut length) = (0, null_mut(), 0);
    let status = proxy_get_status(&mut code, &mut data, &mut length);
    take(status, data, length).unwrap_or_default()
}

pub(crate) fn shared_data(key: &str) -> Result<(Vec<u8>, u32), HostError> {
    let (mut data, mut length, mut cas) = (null_mut(), 0, 0);
    let status = proxy_get_shared_data(key.as_ptr(), key.len(), &mut data, &mut length, &mut cas);
    take(status, data, length).map(|bytes| (bytes, cas))
}

pub(crate) fn set_shared_data(key: &str, value: &[u8], cas: u32) -> Result<(), HostError> {
    HostError::check(proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), cas))
}

pub(crate) fn define_metric(kind: MetricKind, name: &str) -> Result<u32, HostError> {
    let mut id = 0;
    HostError::check(proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &mut id))?;
    Ok(id)
}

pub(crate) fn increment_metric(id: u32, delta: i64) -> Result<(), HostError> {
    HostError::check(proxy_increment_metric(id, delta))
}

pub(crate) fn record_metric(id: u32, value: u64) -> Result<(), HostError> {
    HostError::check(proxy_record_metric(id, value))
}

pub(crate) fn call_foreign(name: &str, argument: &[u8]) -> Result<Vec<u8>, HostError> {
    let (mut data, mut length) = (null_mut(), 0);
    let status = proxy_call_foreign_function(
        name.as_ptr(),
        name.len(),
        argument.as_ptr(),
        argument.len(),
        &mut data,
        &mut length,
    );
    take(status, data, length)
}
