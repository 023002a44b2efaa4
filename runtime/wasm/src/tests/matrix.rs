//! Every host function, called by a real guest: well, with a bad pointer, with a bad length, in a phase that it is not meant
//! for, and when the exchange is over. One table says what each call answers, and one module makes all calls.

mod guest;

use super::outside::Mesh;
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
use guest::table::{ROWS, STUBS};
use guest::{Function, When, cells, module};
use std::collections::BTreeSet;
use wasmtime::{ExternType, FuncType, Linker, Store, ValType};

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

/// The same for the guest.
fn imports(functions: &[(String, String, FuncType)]) -> Vec<Function> {
    let import = |(from, name, ty): &(String, String, FuncType)| Function {
        from: from.clone(),
        name: name.clone(),
        params: ty.params().map(|param| word_of(&param)).collect(),
        has_result: ty.results().len() > 0,
    };
    functions.iter().map(import).collect()
}

fn word_of(ty: &ValType) -> &'static str {
    if matches!(ty, ValType::I64) { "i64" } else { "i32" }
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
    let text = module(&cells, &imports(&functions));
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
