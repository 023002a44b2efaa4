//! The host functions as the [`crate::testing`] world of the thread answers them. The twin of this file, `wasm.rs`, asks the
//! proxy.

use crate::abi::{Buffer, HostError, Map, MetricKind, Pairs, Stream};
use crate::testing::world::with;

pub(crate) fn log(level: u32, text: &str) {
    with((), |world| world.log(level, text));
}

pub(crate) fn log_level() -> Result<u32, HostError> {
    Ok(0)
}

pub(crate) fn now() -> u64 {
    with(0, |world| world.now())
}

pub(crate) fn random() -> u64 {
    with(0, |world| world.random())
}

pub(crate) fn set_tick_period(milliseconds: u32) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_set_tick_period_milliseconds")?;
        world.set_tick_period(milliseconds);
        Ok(())
    })
}

pub(crate) fn set_effective_context(context: u32) -> Result<(), HostError> {
    with(outside(), |world| world.set_effective_context(context))
}

pub(crate) fn continue_stream(stream: Stream) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_continue_stream")?;
        world.continue_stream(stream)
    })
}

pub(crate) fn close_stream(stream: Stream) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_close_stream")?;
        world.close_stream(stream)
    })
}

pub(crate) fn buffer(kind: Buffer, start: usize, most: usize) -> Result<Vec<u8>, HostError> {
    with(outside(), |world| {
        world.may("proxy_get_buffer_bytes")?;
        world.buffer(kind, start, most)
    })
}

pub(crate) fn set_buffer(kind: Buffer, start: usize, size: usize, bytes: &[u8]) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_set_buffer_bytes")?;
        world.set_buffer(kind, start, size, bytes)
    })
}

pub(crate) fn map(map: Map) -> Result<Pairs, HostError> {
    with(outside(), |world| {
        world.may("proxy_get_header_map_pairs")?;
        Ok(world.map(map).cloned().unwrap_or_default())
    })
}

pub(crate) fn header(map: Map, name: &str) -> Result<Vec<u8>, HostError> {
    with(outside(), |world| {
        world.may("proxy_get_header_map_value")?;
        world.header(map, name)
    })
}

pub(crate) fn add_header(map: Map, name: &str, value: &[u8]) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_add_header_map_value")?;
        world.add_header(map, name, value)
    })
}

pub(crate) fn set_header(map: Map, name: &str, value: &[u8]) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_replace_header_map_value")?;
        world.set_header(map, name, value)
    })
}

pub(crate) fn remove_header(map: Map, name: &str) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_remove_header_map_value")?;
        world.remove_header(map, name)
    })
}

pub(crate) fn property(path: &[&str]) -> Result<Vec<u8>, HostError> {
    with(outside(), |world| {
        world.may("proxy_get_property")?;
        world.property(path)
    })
}

pub(crate) fn set_property(path: &[&str], value: &[u8]) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_set_property")?;
        world.set_property(path, value);
        Ok(())
    })
}

pub(crate) fn send_reply(
    status: u16,
    details: &str,
    headers: &[(String, Vec<u8>)],
    body: &[u8],
    grpc_status: Option<u32>,
) -> Result<(), HostError> {
    let reply = crate::Reply {
        status,
        headers: headers.to_vec(),
        body: body.to_vec(),
        details: details.to_owned(),
        grpc_status,
    };
    with(outside(), |world| {
        world.may("proxy_send_local_response")?;
        world.reply(reply)
    })
}

pub(crate) fn http_call(
    cluster: &str,
    headers: &[(String, Vec<u8>)],
    body: &[u8],
    timeout: u32,
) -> Result<u32, HostError> {
    with(outside(), |world| {
        world.may("proxy_http_call")?;
        world.http_call(cluster, headers, body, timeout)
    })
}

pub(crate) fn grpc_call(
    cluster: &str,
    [service, method]: [&str; 2],
    metadata: &[(String, Vec<u8>)],
    message: &[u8],
    timeout: u32,
) -> Result<u32, HostError> {
    with(outside(), |world| {
        world.may("proxy_grpc_call")?;
        world.grpc_call(cluster, &format!("/{service}/{method}"), metadata, message, timeout)
    })
}

pub(crate) fn grpc_status_message() -> Vec<u8> {
    with(Vec::new(), |world| world.grpc_message())
}

pub(crate) fn shared_data(key: &str) -> Result<(Vec<u8>, u32), HostError> {
    with(outside(), |world| {
        world.may("proxy_get_shared_data")?;
        world.shared_data(key)
    })
}

pub(crate) fn set_shared_data(key: &str, value: &[u8], cas: u32) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_set_shared_data")?;
        world.set_shared_data(key, value, cas)
    })
}

pub(crate) fn define_metric(kind: MetricKind, name: &str) -> Result<u32, HostError> {
    with(outside(), |world| {
        world.may("proxy_define_metric")?;
        Ok(world.define_metric(kind, name))
    })
}

pub(crate) fn increment_metric(id: u32, delta: i64) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_increment_metric")?;
        world.increment_metric(id, delta)
    })
}

pub(crate) fn record_metric(id: u32, value: u64) -> Result<(), HostError> {
    with(outside(), |world| {
        world.may("proxy_record_metric")?;
        world.record_metric(id, value)
    })
}

pub(crate) fn call_foreign(name: &str, argument: &[u8]) -> Result<Vec<u8>, HostError> {
    with(outside(), |world| {
        world.may("proxy_call_foreign_function")?;
        world.call_foreign(name, argument)
    })
}

/// The answer when no proxy runs in the thread.
fn outside<T>() -> Result<T, HostError> {
    Err(HostError::Unimplemented)
}
