//! Contexts, the end of streams, going on after a pause, and local replies.

use super::Guest;
use super::memory::{charge, read, split};
use crate::abi::{Callback, Done, ROOT_CONTEXT, Status, VM_CONTEXT, answer};
use crate::heads::refuse_injection;
use crate::pairs::Pairs;
use crate::state::{State, Stream};
use bytes::Bytes;
use cairn_filter::LocalReply;
use http::StatusCode;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use std::borrow::Cow;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap("env", "proxy_set_effective_context", |mut guest: Guest<'_>, context: u32| {
        answer(set_effective_context(guest.data_mut(), context))
    })?;
    linker.func_wrap("env", "proxy_done", |mut guest: Guest<'_>| answer(done(guest.data_mut())))?;
    linker.func_wrap("env", "proxy_continue_stream", |mut guest: Guest<'_>, stream: u32| {
        answer(continue_stream(guest.data_mut(), stream))
    })?;
    linker.func_wrap("env", "proxy_continue_request", |mut guest: Guest<'_>| {
        answer(continue_stream(guest.data_mut(), 0))
    })?;
    linker.func_wrap("env", "proxy_continue_response", |mut guest: Guest<'_>| {
        answer(continue_stream(guest.data_mut(), 1))
    })?;
    linker.func_wrap("env", "proxy_close_stream", |mut guest: Guest<'_>, stream: u32| {
        answer(close_stream(guest.data_mut(), stream))
    })?;
    // Routes are looked up again whenever a plugin changed what they match on.
    linker.func_wrap("env", "proxy_clear_route_cache", |_: Guest<'_>| answer(Ok(())))?;
    linker.func_wrap(
        "env",
        "proxy_send_local_response",
        |mut guest: Guest<'_>,
         status: u32,
         details: u32,
         details_length: u32,
         body: u32,
         body_length: u32,
         headers: u32,
         headers_length: u32,
         grpc_status: i32| {
            let reply = Reply {
                status,
                details: (details, details_length),
                body: (body, body_length),
                headers: (headers, headers_length),
                grpc_status,
            };
            answer(send_local_response(&mut guest, &reply))
        },
    )?;
    Ok(())
}

/// Defines one of the functions that ABI 0.1.0 specifies without a result, for modules that import it so.
pub(crate) fn define_resultless(linker: &mut Linker<State>, name: &str) -> wasmtime::Result<()> {
    let stream = match name {
        "proxy_continue_request" => 0,
        "proxy_continue_response" => 1,
        _ => return linker.func_wrap("env", name, |_: Guest<'_>| {}).map(|_| ()),
    };
    let resume = move |mut guest: Guest<'_>| answer(continue_stream(guest.data_mut(), stream)).map(|_| ());
    linker.func_wrap("env", name, resume).map(|_| ())
}

fn set_effective_context(state: &mut State, context: u32) -> Done {
    let known = context == VM_CONTEXT || context == ROOT_CONTEXT || state.streams.contains_key(&context);
    if !known {
        return Err(Status::BadArgument.into());
    }
    state.speak_of(context);
    Ok(())
}

/// The guest is done with a stream for which it answered false in `proxy_on_done`.
fn done(state: &mut State) -> Done {
    let context = state.effective;
    match state.stream_mut() {
        Some(stream) if stream.done_pending => stream.done_pending = false,
        _ => return Err(Status::NotFound.into()),
    }
    state.released.push(context);
    Ok(())
}

/// Whether a stream is what this number means: a request or a response, or one way of a connection. With any other, Envoy
/// answers OK and does nothing.
fn is_its(stream: &Stream, number: u32) -> bool {
    stream.is_connection() == (number >= 2)
}

fn continue_stream(state: &mut State, number: u32) -> Done {
    if number > 3 {
        return Err(Status::BadArgument.into());
    }
    // Envoy does not know how to resume what a server sends on a connection (3), and says so with a status that SDKs do
    // not survive.
    if let Some(stream) = state.stream_mut().filter(|stream| is_its(stream, number)) {
        stream.resumed[number as usize % 2] = true;
        stream.wake();
    }
    Ok(())
}

fn close_stream(state: &mut State, number: u32) -> Done {
    if number > 3 {
        return Err(Status::BadArgument.into());
    }
    if let Some(stream) = state.stream_mut().filter(|stream| is_its(stream, number)) {
        stream.closed = true;
        stream.wake();
    }
    Ok(())
}

/// The arguments of `proxy_send_local_response`; texts are a pointer and a length.
struct Reply {
    status: u32,
    details: (u32, u32),
    body: (u32, u32),
    headers: (u32, u32),
    grpc_status: i32,
}

/// The bounds of a local reply.
const BODY_BYTES_MAX: usize = 1 << 20;
const DETAILS_BYTES_MAX: usize = 256;

fn send_local_response(guest: &mut Guest<'_>, reply: &Reply) -> Done {
    let (memory, state) = split(guest)?;
    let details = read(memory, reply.details.0, reply.details.1)?;
    let body = read(memory, reply.body.0, reply.body.1)?;
    let headers = read(memory, reply.headers.0, reply.headers.1)?;
    let status = u16::try_from(reply.status).ok().filter(|status| (200..600).contains(status));
    let status = status.and_then(|status| StatusCode::from_u16(status).ok()).ok_or(Status::BadArgument)?;
    let grpc_status = match reply.grpc_status {
        -1 => None,
        code => Some(u8::try_from(code).ok().filter(|code| *code <= 16).ok_or(Status::BadArgument)?),
    };
    if body.len() > BODY_BYTES_MAX {
        return Err(Status::BadArgument.into());
    }
    charge(state, body.len())?;
    let reply = LocalReply {
        status,
        grpc_status,
        body: Bytes::copy_from_slice(body),
        headers: reply_headers(headers)?,
        details: details_word(details),
    };
    let logging = matches!(state.callback, Callback::Log | Callback::Done | Callback::Delete);
    // Where there is nobody to answer, Envoy says OK, too.
    if let Some(stream) = state.stream_mut().filter(|_| !logging) {
        // The first answer counts, as in Envoy.
        stream.reply.get_or_insert_with(|| Box::new(reply));
        stream.wake();
    }
    Ok(())
}

/// The headers of a local reply. Pseudo-headers, and the length that the engine sets, are left out; so is what HTTP forbids.
fn reply_headers(bytes: &[u8]) -> Result<HeaderMap, Status> {
    let pairs = Pairs::parse(bytes).ok_or(Status::BadArgument)?;
    let mut headers = HeaderMap::new();
    for (name, value) in pairs.iter() {
        refuse_injection(name, value).map_err(|_| Status::BadArgument)?;
        if name.starts_with(b":") || name.eq_ignore_ascii_case(b"content-length") {
            continue;
        }
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            // At most 1024 pairs were parsed, which always fit.
            headers.append(name, value);
        }
    }
    Ok(headers)
}

/// Response code details as one printable word.
fn details_word(bytes: &[u8]) -> Cow<'static, str> {
    if bytes.is_empty() {
        return Cow::Borrowed("wasm_local_response");
    }
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(DETAILS_BYTES_MAX)]);
    text.chars().map(|c| if c.is_whitespace() || c.is_control() { '_' } else { c }).collect::<String>().into()
}
