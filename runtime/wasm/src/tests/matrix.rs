//! Every host function, called by a real guest: well, with a bad pointer, with a bad length, in a phase that it is not meant
//! for, and when the exchange is over. One table says what each call answers, and one module makes all calls.

mod table;

use super::outside::{Mesh, escaped};
use super::*;
use crate::AbiVersion;
use crate::engine::Environment;
use crate::lease::Leases;
use crate::metrics::Registry;
use crate::places::Places;
use crate::shared::Shared;
use crate::state::{Facts, State};
use crate::ticker::Ticker;
use cairn_filter::{Callout, Chunk, Part, Side};
use std::collections::BTreeSet;
use std::fmt::Write;
use table::{ROWS, STUBS};
use wasmtime::{ExternType, FuncType, Linker, Store, ValType};

/// One parameter of a call, or two.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arg {
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
pub(super) enum When {
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
    fn letter(self) -> char {
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
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) args: &'static [Arg],
    /// Good calls of these functions come first.
    pub(super) before: &'static [&'static str],
    /// When a call is good, when it is out of place, and when the exchange is over.
    pub(super) when: [When; 3],
    /// The status of a good call, with each bad pointer, with each bad length, in the wrong phase, and when the exchange
    /// is over; `-` where there is no such call, `T` for a trap.
    pub(super) statuses: &'static str,
}

/// A call to be made.
struct Cell<'a> {
    name: String,
    row: &'a Row,
    /// Which argument is bad, and whether its length is.
    bad: Option<(usize, bool)>,
    when: When,
    expected: &'a str,
}

/// Far beyond any memory of the guest.
const BAD: &str = "(i32.const -16)";

/// All calls of the table.
fn cells() -> Vec<Cell<'static>> {
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
const OUTS: usize = 256;
const ID: usize = 64;

/// The text of a module that can make all of these calls: the configuration says which, and when.
fn module(cells: &[Cell<'_>], functions: &[(String, String, FuncType)]) -> String {
    let mut data = Vec::new();
    let mut text = String::from("(module\n");
    for (index, (from, name, ty)) in functions.iter().enumerate() {
        let params: String = ty.params().map(|param| format!(" {}", word_of(&param))).collect();
        let result = ty.results().next().map(|result| format!(" (result {})", word_of(&result)));
        let result = result.unwrap_or_default();
        writeln!(text, "(import \"{from}\" \"{name}\" (func $f{index} (param{params}){result}))").unwrap();
    }
    let call = |row: &Row, bad: Option<(usize, bool)>, data: &mut Vec<u8>| {
        let index = functions.iter().position(|(_, name, _)| name == row.name).expect("it is registered");
        let arguments: String = (0..).zip(row.args).map(|(at, arg)| argument(at, *arg, bad, data)).collect();
        let call = format!("(call $f{index}{arguments})");
        if functions[index].2.results().len() == 0 {
            format!("(block (result i32) {call} (i32.const 0))")
        } else {
            call
        }
    };
    let mut runs = String::new();
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
    }
    text.push_str(&FRAME.replace("{data}", &escaped(&data)).replace("{runs}", &runs));
    text
}

fn word_of(ty: &ValType) -> &'static str {
    if matches!(ty, ValType::I64) { "i64" } else { "i32" }
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

/// The rest of the module. The configuration is a letter for when and four digits for which call; the status goes into the
/// request header `x-status` of that exchange, or of the next one.
const FRAME: &str = r#"
  (import "env" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_replace_header_map_value" (func $replace (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
  (memory (export "memory") 4)
  (global $free (mut i32) (i32.const 131072))
  (global $when (mut i32) (i32.const 0))
  (global $cell (mut i32) (i32.const 0))
  (global $status (mut i32) (i32.const 99))
  (global $context (mut i32) (i32.const 0))
  (data (i32.const 8) "x-status")
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
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $buffer (i32.const 7) (i32.const 0) (i32.const 5) (i32.const 32) (i32.const 36)))
    (global.set $when (i32.load8_u (i32.load (i32.const 32))))
    (global.set $cell (i32.add
      (i32.add (i32.mul (call $digit (i32.const 1)) (i32.const 1000)) (i32.mul (call $digit (i32.const 2)) (i32.const 100)))
      (i32.add (i32.mul (call $digit (i32.const 3)) (i32.const 10)) (call $digit (i32.const 4)))))
    (call $now (i32.const 99)) ;; c
    (i32.const 1))
  (func (export "proxy_on_request_headers") (param $own i32) (param i32 i32) (result i32)
    (if (i32.and (i32.eq (global.get $status) (i32.const 99)) (i32.ne (global.get $context) (i32.const 0))) (then
      (drop (call $effective (global.get $context)))
      (call $now (i32.const 110)) ;; n
      (call $now (i32.const 112)) ;; p
      (drop (call $effective (local.get $own)))))
    (global.set $context (local.get $own))
    (call $now (i32.const 104)) ;; h
    (i32.store8 (i32.const 24) (i32.add (i32.const 48) (i32.div_u (global.get $status) (i32.const 10))))
    (i32.store8 (i32.const 25) (i32.add (i32.const 48) (i32.rem_u (global.get $status) (i32.const 10))))
    (drop (call $replace (i32.const 0) (i32.const 8) (i32.const 8) (i32.const 24) (i32.const 2)))
    (i32.const 0))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (call $now (i32.const 98)) (i32.const 0))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.ne (global.get $when) (i32.const 112)))
  (func (export "proxy_on_delete") (param i32)
    (if (i32.gt_u (local.get 0) (i32.const 1)) (then (call $now (i32.const 100))))) ;; d
)"#;

/// What a store of guests is made of.
fn facts(engine: &wasmtime::Engine) -> Arc<Facts> {
    let environment = Environment {
        settings: settings(),
        metrics: Registry::default(),
        shared: Shared::default(),
        places: Places::new(Vec::new()),
        ticker: Ticker::start(engine.weak()).unwrap(),
        leases: Arc::new(Leases::new(0, 0)),
    };
    let name: Arc<str> = "ns/none".into();
    Arc::new(Facts {
        plugin_name: "ns.none".to_owned(),
        scope: "ns".into(),
        data_scope: "ns".into(),
        abi: AbiVersion::V0_2_1,
        root_id: "".into(),
        config: "".into(),
        env: Vec::new(),
        counters: environment.metrics.plugin(&name),
        deadline: crate::budget::DEADLINE,
        memory_max: environment.settings.memory_max,
        log_rate: Default::default(),
        slow_sampled: crate::budget::slow_sampled(),
        environment: Arc::new(environment),
        asked_in_vain: Default::default(),
        name,
    })
}

/// What is registered: module, name and type.
fn registered() -> Vec<(String, String, FuncType)> {
    let engine = wasmtime::Engine::default();
    let mut linker = Linker::new(&engine);
    crate::host::define(&mut linker).unwrap();
    let mut store = Store::new(&engine, State::new(facts(&engine)));
    let all: Vec<_> =
        linker.iter(&mut store).map(|(from, name, item)| (from.to_owned(), name.to_owned(), item)).collect();
    let mut functions = Vec::new();
    for (from, name, item) in all {
        let ExternType::Func(ty) = item.ty(&store) else { panic!("{name} is a function") };
        functions.push((from, name, ty));
    }
    functions
}

#[test]
fn every_function_that_is_registered_has_a_row() {
    let functions = registered();
    let rows: BTreeSet<&str> =
        ROWS.iter().map(|row| row.name).chain(STUBS.iter().map(|stub| stub.0)).collect();
    let missing: Vec<_> = functions.iter().filter(|(_, name, _)| !rows.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "no row for {missing:?}");
    for name in rows {
        assert!(functions.iter().any(|(_, known, _)| known == name), "{name} is not registered");
    }
    // WASI functions have two modules.
    for (from, name, _) in functions.iter().filter(|(from, ..)| from == "wasi_unstable") {
        let both = functions.iter().filter(|(_, known, _)| known == name).count();
        assert_eq!(both, 2, "{from}.{name}");
    }
}

/// What a call came to: a status, or `T`.
fn status_of(host: &Asking, index: usize, when: When) -> String {
    let config = format!("{}{index:04}", when.letter());
    let Ok(factory) = host.engine.factory(Arc::clone(&host.module), &plugin(FailStrategy::Close, &config))
    else {
        return "T".to_owned();
    };
    let exchanges = if matches!(when, When::Configure | When::Headers) { 1 } else { 2 };
    let mut status = String::new();
    for _ in 0..exchanges {
        let mut exchange = exchange();
        Arc::get_mut(&mut exchange.connection).unwrap().callout = Arc::clone(&host.mesh) as Arc<dyn Callout>;
        let mut filter = factory.start(&exchange).unwrap();
        let mut head = request();
        let verdict = filter.request_headers(&mut exchange, &mut head, false);
        let is_broken = matches!(&verdict, Verdict::Reply(reply) if reply.details == "wasm_fail_stream");
        let header = head.headers.get("x-status").and_then(|value| value.to_str().ok()).unwrap_or_default();
        status = if is_broken { "T".to_owned() } else { header.to_owned() };
        let mut chunk = Chunk { bytes: "hello".into(), end_of_stream: true, ..Chunk::default() };
        filter.body(&mut exchange, Part { side: Side::Request, head: None, chunk: &mut chunk });
        filter.finish(&mut exchange);
    }
    // A guest that ended in between is new in the second exchange.
    match status.trim_start_matches('0') {
        "99" if exchanges == 2 => "T".to_owned(),
        "" => "0".to_owned(),
        other => other.to_owned(),
    }
}

struct Asking {
    engine: Engine,
    module: Arc<crate::Module>,
    mesh: Arc<Mesh>,
    _runtime: tokio::runtime::Runtime,
}

impl Asking {
    fn new(text: &str) -> Self {
        let mesh = Arc::new(Mesh::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let callout = Arc::clone(&mesh) as Arc<dyn Callout>;
        let place = crate::WorkerPlace { runtime: runtime.handle().clone(), callout };
        let engine = Engine::new(EngineSettings { places: vec![place], ..settings() }).unwrap();
        let module = engine.compile(&wat::parse_str(text).unwrap()).unwrap();
        Self { engine, module, mesh, _runtime: runtime }
    }
}

#[test]
fn every_call_answers_what_the_table_says() {
    let cells = cells();
    let functions = registered();
    let text = module(&cells, &functions);
    if let Some(path) = std::env::var_os("CAIRN_MATRIX") {
        // To be run in another host.
        std::fs::write(&path, wat::parse_str(&text).unwrap()).unwrap();
        let list = cells.iter().enumerate().map(|(index, cell)| {
            format!("{}{index:04} {} {}\n", cell.when.letter(), cell.expected, cell.name)
        });
        std::fs::write(std::path::Path::new(&path).with_extension("list"), list.collect::<String>()).unwrap();
    }
    let host = Asking::new(&text);
    let mut wrong = Vec::new();
    for (index, cell) in cells.iter().enumerate() {
        let found = status_of(&host, index, cell.when);
        if found != cell.expected {
            wrong.push(format!("{} ({:?}): {found}, not {}", cell.name, cell.when, cell.expected));
        }
    }
    assert!(wrong.is_empty(), "{} of {} calls:\n{}", wrong.len(), cells.len(), wrong.join("\n"));
}

#[test]
fn what_is_not_offered_of_wasi_says_so_whatever_it_is_given() {
    let functions = registered();
    for (name, expected) in STUBS {
        let (_, _, ty) = functions.iter().find(|(_, known, _)| known == name).expect("it is registered");
        let arguments = |number: i64| -> String {
            ty.params().map(|param| format!("({}.const {number})", word_of(&param))).collect()
        };
        let params: String = ty.params().map(|param| format!(" {}", word_of(&param))).collect();
        for (from, number) in [("wasi_snapshot_preview1", 3), ("wasi_unstable", -16)] {
            let import = format!("(import \"{from}\" \"{name}\" (func $stub (param{params}) (result i32)))");
            let code = format!("(call $stub {})", arguments(number));
            let text = calling("", &code).replacen("(module", &format!("(module {import}"), 1);
            let host = Host::new(&text);
            let mut run = host.start();
            run.request();
            assert_eq!(run.header("x-status"), format!("{expected:02}"), "{from}.{name} of {number}");
        }
    }
}
