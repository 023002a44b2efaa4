//! The guest that makes all calls of the table: this host's tests run it, and `tests/modules/statuses.rs` runs it in Envoy.

// Each of the two that include this file uses a part of it.
#![allow(dead_code)]

use std::fmt::Write;
use table::ROWS;

#[path = "table.rs"]
pub(crate) mod table;

/// One parameter of a call, or two.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// A number.
    N(u32),
    /// A long number.
    L(i64),
    /// The address and the length of these bytes.
    In(&'static [u8]),
    /// The address and the length of room to be filled.
    Room(u32),
    /// The address and the number of slices of bytes: one slice.
    Slices(&'static [u8]),
    /// An address to write to.
    Out,
    /// An address to write an id to.
    Id,
    /// The id that a call before wrote there.
    Got,
    /// The context of the exchange at hand, or of the last one.
    Context,
}

/// When a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Configure,
    Headers,
    Body,
    /// In `proxy_on_delete`.
    Delete,
    /// In the next exchange, which asked to speak of the one before.
    Next,
    /// The same, while that one is not deleted: `proxy_on_done` answered false.
    Pending,
}

impl When {
    pub(crate) fn letter(self) -> char {
        match self {
            Self::Configure => 'c',
            Self::Headers => 'h',
            Self::Body => 'b',
            Self::Delete => 'd',
            Self::Next => 'n',
            Self::Pending => 'p',
        }
    }
}

/// A host function with the arguments of a good call.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) args: &'static [Arg],
    /// Good calls of these functions come first.
    pub(crate) before: &'static [&'static str],
    /// When a call is good, when it is out of place, and when the exchange is over.
    pub(crate) when: [When; 3],
    /// The status of a good call, with each bad pointer, with each bad length, in the wrong phase, and when the exchange
    /// is over; `-` where there is no such call, `T` for a trap.
    pub(crate) statuses: &'static str,
}

/// A call to be made.
pub(crate) struct Cell<'a> {
    pub(crate) name: String,
    pub(crate) row: &'a Row,
    /// Which argument is bad, and whether its length is.
    pub(crate) bad: Option<(usize, bool)>,
    pub(crate) when: When,
    pub(crate) expected: &'a str,
}

/// Far beyond any memory of the guest.
const BAD: &str = "(i32.const -16)";

/// All calls of the table.
pub(crate) fn cells() -> Vec<Cell<'static>> {
    let mut cells = Vec::new();
    for row in ROWS {
        let statuses: Vec<&str> = row.statuses.split(' ').collect();
        let [good, pointer, length, wrong, over] = statuses[..] else { panic!("{row:?}") };
        let [right_time, wrong_time, late] = row.when;
        let mut cell = |what: &str, bad, when, expected| {
            cells.push(Cell { name: format!("{}: {what}", row.name), row, bad, when, expected });
        };
        cell("good", None, right_time, good);
        for (index, arg) in row.args.iter().enumerate() {
            if matches!(arg, Arg::In(_) | Arg::Room(_) | Arg::Slices(_) | Arg::Out | Arg::Id) {
                cell(
                    &format!("argument {index} is a bad pointer"),
                    Some((index, false)),
                    right_time,
                    pointer,
                );
            }
            if matches!(arg, Arg::In(_) | Arg::Room(_) | Arg::Slices(_)) {
                cell(&format!("argument {index} has a bad length"), Some((index, true)), right_time, length);
            }
        }
        cell("out of place", None, wrong_time, wrong);
        cell("when the exchange is over", None, late, over);
    }
    cells.retain(|cell| cell.expected != "-");
    cells
}

/// Where bytes that are passed lie, and what is to be written goes.
const DATA: usize = 4096;
/// What calls of the configuration answered, and where memory for the host begins.
const STATUSES: usize = 0x1_0000;
const FREE: usize = 0x2_0000;
const OUTS: usize = 256;
const ID: usize = 64;

/// A host function as the module imports it.
pub(crate) struct Function {
    pub(crate) from: String,
    pub(crate) name: String,
    pub(crate) params: Vec<&'static str>,
    pub(crate) has_result: bool,
}

/// The text of a module that can make all of these calls: [`FRAME`] says how it is told which, and when.
pub(crate) fn module(cells: &[Cell<'_>], functions: &[Function]) -> String {
    let mut data = Vec::new();
    let mut text = String::from("(module\n");
    for (index, Function { from, name, params, has_result }) in functions.iter().enumerate() {
        let (params, result) = (params.join(" "), if *has_result { " (result i32)" } else { "" });
        writeln!(text, "(import \"{from}\" \"{name}\" (func $f{index} (param {params}){result}))").unwrap();
    }
    let call = |row: &Row, bad: Option<(usize, bool)>, data: &mut Vec<u8>| {
        let index = functions.iter().position(|function| function.name == row.name).expect("it is known");
        let arguments: String = (0..).zip(row.args).map(|(at, arg)| argument(at, *arg, bad, data)).collect();
        let call = format!("(call $f{index}{arguments})");
        if functions[index].has_result { call } else { format!("(block (result i32) {call} (i32.const 0))") }
    };
    let (mut runs, mut starts) = (String::new(), String::new());
    for (index, cell) in cells.iter().enumerate() {
        let row_of = |name: &&str| ROWS.iter().find(|row| row.name == *name).expect("it has a row");
        let before: String = cell
            .row
            .before
            .iter()
            .map(|name| format!("(drop {})", call(row_of(name), None, &mut data)))
            .collect();
        let call = call(cell.row, cell.bad, &mut data);
        writeln!(runs, "(if (i32.eq (local.get 0) (i32.const {index})) (then {before} (return {call})))")
            .unwrap();
        if cell.when == When::Configure {
            let at = STATUSES + index;
            writeln!(starts, "(i32.store8 (i32.const {at}) (call $run (i32.const {index})))").unwrap();
        }
    }
    assert!(DATA + data.len() < STATUSES && cells.len() < FREE - STATUSES, "more memory is needed");
    let frame =
        FRAME.replace("{data}", &escaped(&data)).replace("{runs}", &runs).replace("{starts}", &starts);
    text.push_str(&frame.replace("{statuses}", &STATUSES.to_string()).replace("{free}", &FREE.to_string()));
    text
}

fn escaped(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "\\{byte:02x}").unwrap();
        text
    })
}

/// The text of one argument.
fn argument(index: usize, arg: Arg, bad: Option<(usize, bool)>, data: &mut Vec<u8>) -> String {
    let mut place = |bytes: &[u8]| {
        data.resize(data.len().next_multiple_of(8), 0);
        data.extend(bytes);
        DATA + data.len() - bytes.len()
    };
    let out = OUTS + index * 64;
    let number = |at: usize| format!("(i32.const {at})");
    let [bad_pointer, bad_length] = [false, true].map(|length| bad == Some((index, length)));
    let pointer = |at: usize| if bad_pointer { BAD.to_owned() } else { number(at) };
    let length = |length: usize| if bad_length { BAD.to_owned() } else { number(length) };
    match arg {
        Arg::N(number) => format!("(i32.const {})", number as i32),
        Arg::L(number) => format!("(i64.const {number})"),
        Arg::In(bytes) => format!("{}{}", pointer(place(bytes)), length(bytes.len())),
        Arg::Room(size) => format!("{}{}", pointer(out), length(size as usize)),
        Arg::Slices(bytes) => {
            let at = place(bytes) as u32;
            let slice = [at.to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat();
            format!("{}{}", pointer(place(&slice)), length(1))
        }
        Arg::Out => pointer(out),
        Arg::Id => pointer(ID),
        Arg::Got => format!("(i32.load (i32.const {ID}))"),
        Arg::Context => "(global.get $context)".to_owned(),
    }
}

/// The rest of the module. A letter for when and four digits say which call is to be made: in the configuration, or in the
/// request header `x-cell` where one guest is to make many; then the configuration is `a`, for all calls of that time. The
/// status goes into the request header `x-status` of that exchange, or of the next one.
const FRAME: &str = r#"
  (import "env" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_value" (func $value (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_replace_header_map_value" (func $replace (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
  (memory (export "memory") 16)
  (global $free (mut i32) (i32.const {free}))
  (global $when (mut i32) (i32.const 0))
  (global $cell (mut i32) (i32.const 0))
  (global $status (mut i32) (i32.const 99))
  (global $context (mut i32) (i32.const 0))
  (data (i32.const 8) "x-status")
  (data (i32.const 16) "x-cell")
  (data (i32.const 4096) "{data}")
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32)
    (global.get $free) (global.set $free (i32.add (global.get $free) (local.get 0))))
  (func $digit (param i32) (result i32)
    (i32.sub (i32.load8_u (i32.add (i32.load (i32.const 32)) (local.get 0))) (i32.const 48)))
  (func $run (param i32) (result i32) {runs} (i32.const 98))
  ;; Makes the call if its time is now.
  (func $now (param i32)
    (if (i32.eq (global.get $when) (local.get 0)) (then (global.set $status (call $run (global.get $cell))))))
  (func $told
    (global.set $when (i32.load8_u (i32.load (i32.const 32))))
    (global.set $cell (i32.add
      (i32.add (i32.mul (call $digit (i32.const 1)) (i32.const 1000)) (i32.mul (call $digit (i32.const 2)) (i32.const 100)))
      (i32.add (i32.mul (call $digit (i32.const 3)) (i32.const 10)) (call $digit (i32.const 4))))))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $buffer (i32.const 7) (i32.const 0) (i32.const 5) (i32.const 32) (i32.const 36)))
    (if (i32.eq (i32.load8_u (i32.load (i32.const 32))) (i32.const 97)) (then {starts} (return (i32.const 1)))) ;; a
    (call $told)
    (call $now (i32.const 99)) ;; c
    (i32.const 1))
  (func (export "proxy_on_request_headers") (param $own i32) (param i32 i32) (result i32)
    (if (i32.and (i32.eq (global.get $status) (i32.const 99)) (i32.ne (global.get $context) (i32.const 0))) (then
      (drop (call $effective (global.get $context)))
      (call $now (i32.const 110)) ;; n
      (call $now (i32.const 112)) ;; p
      (drop (call $effective (local.get $own)))))
    (if (i32.eqz (call $value (i32.const 0) (i32.const 16) (i32.const 6) (i32.const 32) (i32.const 36))) (then
      (if (i32.eq (i32.load (i32.const 36)) (i32.const 5)) (then
        (global.set $status (i32.const 99))
        (call $told)
        (if (i32.eq (global.get $when) (i32.const 99)) (then ;; c
          (global.set $status (i32.load8_u (i32.add (i32.const {statuses}) (global.get $cell))))))))))
    (global.set $context (local.get $own))
    (call $now (i32.const 104)) ;; h
    ;; Once: what lets this request go is told with the next one.
    (if (i32.eq (global.get $when) (i32.const 104)) (then (global.set $when (i32.const 0))))
    (i32.store8 (i32.const 24) (i32.add (i32.const 48) (i32.div_u (global.get $status) (i32.const 10))))
    (i32.store8 (i32.const 25) (i32.add (i32.const 48) (i32.rem_u (global.get $status) (i32.const 10))))
    (drop (call $replace (i32.const 0) (i32.const 8) (i32.const 8) (i32.const 24) (i32.const 2)))
    (i32.const 0))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (call $now (i32.const 98)) (i32.const 0))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.ne (global.get $when) (i32.const 112)))
  (func (export "proxy_on_delete") (param i32)
    (if (i32.gt_u (local.get 0) (i32.const 1)) (then (call $now (i32.const 100))))) ;; d
)"#;
