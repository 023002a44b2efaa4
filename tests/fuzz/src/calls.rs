//! Random host calls: a guest that calls whatever it likes with whatever arguments, in every callback.

use super::guest::{self, CALLBACKS, FUNCTIONS};
use super::proxy;
use std::fmt::Write;

/// The most calls of one guest.
const CALLS_MAX: usize = 64;
/// Where the texts begin that guests know, and how far apart they are.
const TEXTS_AT: usize = 1024;
const TEXT_BYTES_MAX: usize = 128;
/// Where the last bytes of the input are placed, and how many.
const INPUT_AT: usize = 0x2000;
const INPUT_BYTES_MAX: usize = 4096;

/// Three bytes that say what the guest is like, a call after the other, and behind a byte of [`END`] what is said to it.
pub fn calls(data: &[u8]) {
    let at = data.iter().skip(3).position(|byte| *byte == END).map_or(data.len(), |at| at + 3);
    let said = data.get(at + 1..).unwrap_or_default();
    let said = &said[..said.len().min(INPUT_BYTES_MAX)];
    let text = guest_of(Bytes(&data[..at]), said);
    match wat::parse_str(&text) {
        Ok(module) => proxy::run(&module, said),
        Err(error) => panic!("not a module: {error}\n{text}"),
    }
}

/// So many of the callbacks are of a guest's start.
const STARTS: usize = 4;

/// Ends the calls.
const END: u8 = 0xff;

/// Bytes that are read one by one, and zero when there are no more.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }
}

/// The guest as text.
fn guest_of(mut input: Bytes<'_>, said: &[u8]) -> String {
    let (marker, allocator, actions) = (input.next(), input.next(), input.next());
    let mut bodies = vec![String::new(); CALLBACKS.len()];
    let mut count = 0;
    while !input.0.is_empty() && count < CALLS_MAX {
        let callback = usize::from(input.next()) % CALLBACKS.len();
        let parameters = CALLBACKS[callback].parameters;
        let instruction = instruction(&mut input, parameters);
        // A start may take ten seconds, which nobody waits for here.
        if callback >= STARTS || !instruction.contains("(loop") {
            bodies[callback].push_str(&instruction);
        }
        count += 1;
    }
    let mut text = format!("(module {}\n(memory (export \"memory\") 2)\n", guest::imports());
    text += &data(said);
    text += ALLOCATORS[usize::from(allocator) % ALLOCATORS.len()];
    let _written =
        writeln!(text, "(func (export \"{}\"))", guest::MARKERS[usize::from(marker) % guest::MARKERS.len()]);
    for (number, (callback, body)) in CALLBACKS.iter().zip(bodies).enumerate() {
        let parameters = " i32".repeat(callback.parameters);
        let (result, answer) = match callback.answers {
            true => ("(result i32)", format!("(i32.const {})", answer(callback.name, actions, number))),
            false => ("", String::new()),
        };
        let _written = writeln!(
            text,
            "(func (export \"{}\") (param{parameters}) {result}\n{body}{answer})",
            callback.name
        );
    }
    text.push(')');
    text
}

/// What a callback answers: starts succeed, streams go on or are held.
fn answer(name: &str, actions: u8, number: usize) -> u8 {
    match name {
        "proxy_on_vm_start" | "proxy_on_configure" => 1,
        "proxy_on_done" => u8::from(actions & 1 == 0),
        _ if actions & (1 << (number % 8)) != 0 => 1 + actions % 3,
        _ => 0,
    }
}

/// Allocators: one that gives what it has, one that asks for more, one that is full, one that gives what is not there,
/// one that calls the host, and one that traps.
const ALLOCATORS: [&str; 6] = [
    r#"(global $free (mut i32) (i32.const 65536))
       (func (export "proxy_on_memory_allocate") (param i32) (result i32)
         (global.get $free) (global.set $free (i32.add (global.get $free) (local.get 0))))"#,
    r#"(func (export "malloc") (param i32) (result i32)
         (i32.mul (i32.const 65536) (memory.grow (i32.add (i32.const 1) (i32.shr_u (local.get 0) (i32.const 16))))))"#,
    r#"(func (export "malloc") (param i32) (result i32) (i32.const 0))"#,
    r#"(func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const -8))"#,
    r#"(func (export "malloc") (param i32) (result i32) (drop (call $f2 (i32.const 8)))
         (drop (call $f4 (i32.const 0) (i32.const 8) (i32.const 12))) (i32.const 65536))"#,
    r#"(func (export "malloc") (param i32) (result i32) unreachable)"#,
];

/// One instruction, or a call.
fn instruction(input: &mut Bytes<'_>, parameters: usize) -> String {
    let number = usize::from(input.next());
    let Some(function) = FUNCTIONS.get(number % (FUNCTIONS.len() + OTHERS.len())) else {
        let other = OTHERS[number % (FUNCTIONS.len() + OTHERS.len()) - FUNCTIONS.len()];
        return format!("{}\n", other.replace("{n}", &input.next().to_string()));
    };
    let mut call = format!("(call $f{}", number % (FUNCTIONS.len() + OTHERS.len()));
    let mut text_length = None;
    for kind in function.parameters.chars() {
        let argument = match text_length.take() {
            Some(length) => format!("(i32.const {length})"),
            None => argument(input.next(), parameters, &mut text_length),
        };
        match kind {
            'l' => {
                let _written = write!(call, " (i64.extend_i32_s {argument})");
            }
            _ => {
                let _written = write!(call, " {argument}");
            }
        }
    }
    call.push(')');
    if function.answers { format!("(drop {call})\n") } else { format!("{call}\n") }
}

/// What a guest does without the host. The last three end it, by and by or at once.
const OTHERS: [&str; 6] = [
    "(drop (memory.grow (i32.const {n})))",
    "(i32.store (i32.const 8) (i32.const {n}))",
    "(i32.store8 (i32.load (i32.const 8)) (i32.const {n}))",
    "(if (i32.eqz (i32.const {n})) (then (loop (br 0))))",
    "(drop (i32.div_u (i32.const 1) (i32.load (i32.const 12))))",
    "(if (i32.lt_u (i32.load (i32.const 8)) (i32.const {n})) (then unreachable))",
];

/// Numbers that are addresses, lengths, ids or kinds, good and bad.
const NUMBERS: [i64; 32] = [
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
    10,
    12,
    16,
    20,
    24,
    32,
    64,
    100,
    200,
    503,
    1000,
    1024,
    4096,
    65_535,
    65_536,
    131_064,
    131_072,
    0x7fff_ffff,
    -1,
    -2,
    -8,
    -65_536,
];

/// An argument: a number, a text with its length behind it, a parameter of the callback, or what is in memory.
fn argument(byte: u8, parameters: usize, text_length: &mut Option<usize>) -> String {
    let number = usize::from(byte);
    match number {
        0..96 => format!("(i32.const {})", NUMBERS[number % NUMBERS.len()]),
        96..192 => {
            let (at, length) = text(number - 96);
            *text_length = Some(length);
            format!("(i32.const {at})")
        }
        192..224 if parameters > 0 => format!("(local.get {})", number % parameters),
        _ => format!("(i32.load (i32.const {}))", 8 + 4 * (number % 8)),
    }
}

/// The address and length of a text that the guest knows; the last one is what is said to it.
fn text(number: usize) -> (usize, usize) {
    match TEXTS.get(number % (TEXTS.len() + 1)) {
        Some(text) => (TEXTS_AT + TEXT_BYTES_MAX * (number % (TEXTS.len() + 1)), text.len()),
        None => (INPUT_AT, 64 << (number % 7)),
    }
}

/// Texts that mean something to the host.
const TEXTS: &[&[u8]] = &[
    b":path",
    b":status",
    b":authority",
    b"x-in",
    b"content-length",
    b"x-dup",
    b"/other?y=2",
    b"200",
    b"a\r\nb: c",
    b"\x01\0\0\0\x04\0\0\0\x05\0\0\0x-in\0hello\0",
    b"\x03\0\0\0\x07\0\0\0\x03\0\0\0\x05\0\0\0\x01\0\0\0\x0a\0\0\0\x01\0\0\0:method\0GET\0:path\0/\0:authority\0a\0",
    b"\xff\0\0\0\x04\0\0\0",
    b"request\0path",
    b"request\0headers",
    b"xds\0node",
    b"plugin_name",
    b"connection\0mtls",
    b"response\0code",
    b"filter_state\0wasm.own",
    b"own",
    b"auth.shop:80",
    b"auth.shop:81",
    b"outbound|81||auth.shop.svc.cluster.local",
    b"pkg.Service",
    b"Ask",
    b"requests",
    b"istio_requests_total;.;a=.=b;.;",
    b"queue",
    b"compress",
    b"uncompress",
    b"expr_create",
    b"expr_evaluate",
    b"expr_delete",
    b"declare_property",
    b"set_envoy_filter_state",
    b"verify_signature",
    b"sign",
    b"cairn.features",
    b"request.path.startsWith('/items') && size(request.headers) > 1",
    b"\x01\0\0\0",
    b"\0\0\0\0\x05hello",
    b"x\x9c\x03\0\0\0\0\x01",
    b"\x0a\x03own\x10\x01\x18\x02",
];

/// The texts in the guest's memory.
fn data(said: &[u8]) -> String {
    let mut data = format!("(data (i32.const {INPUT_AT}) \"{}\")\n", escaped(said));
    for (number, text) in TEXTS.iter().enumerate() {
        let at = TEXTS_AT + TEXT_BYTES_MAX * number;
        let _written = writeln!(data, "(data (i32.const {at}) \"{}\")", escaped(text));
    }
    data
}

fn escaped(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\{byte:02x}")).collect()
}
