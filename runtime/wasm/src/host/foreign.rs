//! Foreign functions: what Envoy offers plugins beyond the ABI, by name.

mod expression;
mod signature;

pub(crate) use expression::Expressions;

use super::Guest;
use super::memory::{charge, check, hand_over, read, split};
use crate::abi::{Done, Status, answer};
use crate::state::State;
use flate2::Compression;
use flate2::bufread::{ZlibDecoder, ZlibEncoder};
use prost::Message;
use std::collections::HashMap;
use std::io::Read;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_call_foreign_function",
        |mut guest: Guest<'_>,
         name: u32,
         name_length: u32,
         arguments: u32,
         arguments_length: u32,
         pointer_at: u32,
         length_at: u32| {
            let (name, arguments) = ((name, name_length), (arguments, arguments_length));
            answer(call(&mut guest, name, arguments, (pointer_at, length_at)))
        },
    )?;
    // Emscripten calls it after its memory grew; WebAssembly itself has no use for it.
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_: Guest<'_>, _: u32| {})?;
    linker.func_wrap("env", "pthread_equal", |_: Guest<'_>, a: u32, b: u32| u32::from(a == b))?;
    Ok(())
}

/// A pointer and a length, as the guest passes them.
type Slice = (u32, u32);

fn call(guest: &mut Guest<'_>, name: Slice, arguments: Slice, result: Slice) -> Done {
    let (memory, state) = split(guest)?;
    // Guests that do not want the result pass no place for it.
    let wanted = result != (0, 0);
    if wanted {
        check(memory, result.0, 4)?;
        check(memory, result.1, 4)?;
    }
    let name = read(memory, name.0, name.1)?;
    let arguments = read(memory, arguments.0, arguments.1)?;
    charge(state, arguments.len())?;
    let out = run(state, name, arguments)?;
    if wanted {
        hand_over(guest, result.0, result.1, &out)?;
    }
    Ok(())
}

/// What this host offers, in one word each, for plugins that ask with `cairn.features`.
const FEATURES: &[u8] = b"callouts,grpc,timers,queues,expressions,signatures,compression";

fn run(state: &mut State, name: &[u8], arguments: &[u8]) -> Result<Vec<u8>, Status> {
    match name {
        b"compress" => compress(arguments),
        b"uncompress" => uncompress(arguments),
        b"verify_signature" => signature::verify(arguments),
        b"sign" => signature::sign(arguments),
        b"declare_property" => declare_property(state, arguments),
        b"set_envoy_filter_state" => set_filter_state(state, arguments),
        b"expr_create" => expression::create(state, arguments),
        b"expr_evaluate" => expression::evaluate(state, arguments),
        b"expr_delete" => expression::delete(state, arguments),
        // Routes are looked up again whenever a plugin changed what they match on.
        b"clear_route_cache" => Ok(Vec::new()),
        b"cairn.features" => Ok(FEATURES.to_vec()),
        _ => {
            let name = &name[..name.len().min(64)];
            state.in_vain(&format!("foreign function {}", String::from_utf8_lossy(name).escape_default()));
            Err(Status::NotFound)
        }
    }
}

/// The most bytes that are uncompressed at once.
const UNCOMPRESSED_BYTES_MAX: usize = 16 << 20;

fn compress(bytes: &[u8]) -> Result<Vec<u8>, Status> {
    let mut out = Vec::new();
    let compressed = ZlibEncoder::new(bytes, Compression::default()).read_to_end(&mut out);
    compressed.map(|_| out).map_err(|_| Status::SerializationFailure)
}

fn uncompress(bytes: &[u8]) -> Result<Vec<u8>, Status> {
    let mut out = Vec::new();
    let decoder = ZlibDecoder::new(bytes).take(UNCOMPRESSED_BYTES_MAX as u64 + 1);
    let read = { decoder }.read_to_end(&mut out).map_err(|_| Status::SerializationFailure)?;
    if read > UNCOMPRESSED_BYTES_MAX { Err(Status::SerializationFailure) } else { Ok(out) }
}

/// `DeclarePropertyArguments`, as far as it means something here.
#[derive(Clone, PartialEq, Message)]
struct Declaration {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bool, tag = "2")]
    readonly: bool,
    #[prost(int32, tag = "3")]
    kind: i32,
    #[prost(bytes = "vec", tag = "4")]
    schema: Vec<u8>,
    #[prost(int32, tag = "5")]
    span: i32,
}

/// The span of a property that outlives its exchange.
const SPAN_CONNECTION: i32 = 2;

/// What a guest declared of its properties: their names, and whether each may be set once only.
#[derive(Clone, Default)]
pub(crate) struct Declared(HashMap<Box<[u8]>, bool>);

/// The most declarations of one instance.
const DECLARED_MAX: usize = 256;

impl Declared {
    pub(crate) fn is_read_only(&self, name: &[u8]) -> bool {
        self.0.get(name).copied().unwrap_or_default()
    }
}

fn declare_property(state: &mut State, arguments: &[u8]) -> Result<Vec<u8>, Status> {
    let declaration = Declaration::decode(arguments).map_err(|_| Status::BadArgument)?;
    let name = declaration.name.as_bytes();
    if state.declared.0.contains_key(name) {
        return Err(Status::BadArgument);
    }
    if state.declared.0.len() >= DECLARED_MAX {
        state.in_vain(&format!("more than {DECLARED_MAX} declared properties"));
        return Err(Status::InternalFailure);
    }
    if declaration.span == SPAN_CONNECTION {
        state.in_vain("properties that outlive their exchange");
    }
    state.declared.0.insert(name.into(), declaration.readonly);
    Ok(Vec::new())
}

/// `SetEnvoyFilterStateArguments`.
#[derive(Clone, PartialEq, Message)]
struct FilterState {
    #[prost(string, tag = "1")]
    path: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// Keeps what filters of Envoy would be told, to be read back; none of ours looks for it.
fn set_filter_state(state: &mut State, arguments: &[u8]) -> Result<Vec<u8>, Status> {
    let set = FilterState::decode(arguments).map_err(|_| Status::BadArgument)?;
    let Some(stream) = state.stream_mut() else { return Err(Status::NotFound) };
    let path = [b"filter_state\0", set.path.as_bytes()].concat();
    let kept = stream.properties.set(&path, set.value.as_bytes());
    state.in_vain(&format!("an effect of filter state `{}`", set.path.escape_default()));
    if kept { Ok(Vec::new()) } else { Err(Status::InternalFailure) }
}
