//! A compiled module: which ABI it speaks, what it exports, and how its imports are met.

use crate::abi::AbiVersion;
use crate::engine::compile_error;
use crate::error::PluginError;
use crate::host;
use crate::state::State;
use std::collections::BTreeSet;
use wasmtime::{Caller, ExternType, FuncType, InstancePre, Linker, Val, ValType};

/// A compiled module, ready to be instantiated.
pub struct Module {
    pub(crate) pre: InstancePre<State>,
    pub(crate) exports: Exports,
    abi: AbiVersion,
    unmet: Vec<String>,
    uncalled: Vec<String>,
}

/// What a module exports that decides how it is called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exports {
    pub(crate) allocator: &'static str,
    pub(crate) request_headers: bool,
    pub(crate) response_headers: bool,
    /// `proxy_on_request_body` and `proxy_on_response_body`.
    pub(crate) body: [bool; 2],
    /// `proxy_on_request_trailers` and `proxy_on_response_trailers`.
    pub(crate) trailers: [bool; 2],
    /// `proxy_on_log`.
    pub(crate) log: bool,
    /// `cairn_on_clone`.
    pub(crate) clone: bool,
}

impl Module {
    /// The ABI version that it was built for.
    pub fn abi(&self) -> AbiVersion {
        self.abi
    }

    /// Imports that this host does not know; calling one traps.
    pub fn unmet_imports(&self) -> &[String] {
        &self.unmet
    }

    /// Callbacks that it exports and that are not called yet. The official SDKs export all there are.
    pub fn uncalled_callbacks(&self) -> &[String] {
        &self.uncalled
    }
}

/// Checks that `module` is a plugin and meets its imports.
pub(crate) fn analyze(module: wasmtime::Module, linker: &Linker<State>) -> Result<Module, PluginError> {
    let abi = abi_version(&module)?;
    let exports = exports(&module)?;
    let (linker, unmet) = meet_imports(&module, linker)?;
    let uncalled = module.exports().map(|export| export.name().to_owned());
    let uncalled = uncalled.filter(|name| name.starts_with("proxy_on_") && !is_called(name)).collect();
    let pre = linker.instantiate_pre(&module).map_err(compile_error)?;
    Ok(Module { pre, exports, abi, unmet, uncalled })
}

fn abi_version(module: &wasmtime::Module) -> Result<AbiVersion, PluginError> {
    let markers = [
        ("proxy_abi_version_0_2_1", AbiVersion::V0_2_1),
        ("proxy_abi_version_0_2_0", AbiVersion::V0_2_0),
        ("proxy_abi_version_0_1_0", AbiVersion::V0_1_0),
    ];
    let marker = markers.into_iter().find(|(name, _)| module.get_export(name).is_some());
    marker.map(|(_, version)| version).ok_or(PluginError::UnknownAbi)
}

/// The callbacks that are called, with the numbers of their parameters and whether they have a result.
const CALLED: [(&str, &[usize], bool); 31] = [
    ("proxy_on_context_create", &[2], false),
    ("proxy_on_vm_start", &[2], true),
    ("proxy_on_configure", &[2], true),
    // ABI 0.1.0 has no `end_of_stream`; modules mix that up, so the function's own type decides.
    ("proxy_on_request_headers", &[2, 3], true),
    ("proxy_on_response_headers", &[2, 3], true),
    ("proxy_on_request_body", &[3], true),
    ("proxy_on_response_body", &[3], true),
    ("proxy_on_request_trailers", &[2], true),
    ("proxy_on_response_trailers", &[2], true),
    ("proxy_on_new_connection", &[1], true),
    ("proxy_on_downstream_data", &[3], true),
    ("proxy_on_upstream_data", &[3], true),
    ("proxy_on_downstream_connection_close", &[2], false),
    ("proxy_on_upstream_connection_close", &[2], false),
    ("proxy_on_tick", &[1], false),
    ("proxy_on_queue_ready", &[2], false),
    ("proxy_on_http_call_response", &[5], false),
    ("proxy_on_grpc_receive_initial_metadata", &[3], false),
    ("proxy_on_grpc_receive", &[3], false),
    ("proxy_on_grpc_receive_trailing_metadata", &[3], false),
    ("proxy_on_grpc_trailing_metadata", &[3], false),
    ("proxy_on_grpc_close", &[3], false),
    ("proxy_on_done", &[1], true),
    ("proxy_on_log", &[1], false),
    ("proxy_on_delete", &[1], false),
    ("proxy_on_memory_allocate", &[1], true),
    ("malloc", &[1], true),
    ("_initialize", &[0], false),
    ("_start", &[0], false),
    ("__main_void", &[0], true),
    (ON_CLONE, &[0], false),
];

/// Called in each instance that is made of a snapshot; an addition of ours to the ABI.
pub(crate) const ON_CLONE: &str = "cairn_on_clone";

fn is_called(name: &str) -> bool {
    CALLED.iter().any(|(called, _, _)| *called == name)
}

fn exports(module: &wasmtime::Module) -> Result<Exports, PluginError> {
    if !matches!(module.get_export("memory"), Some(ExternType::Memory(_))) {
        return Err(PluginError::MissingExport { wanted: "`memory`" });
    }
    for (name, parameters, result) in CALLED {
        let Some(export) = module.get_export(name) else { continue };
        let fits = |function: &FuncType| is_shape(function, parameters, result);
        if !export.func().is_some_and(fits) {
            let found = export.func().map_or_else(|| "not a function".to_owned(), ToString::to_string);
            return Err(PluginError::ExportType { name: name.to_owned(), found });
        }
    }
    let has = |name: &str| module.get_export(name).is_some();
    // The specification's order. Preferring `malloc`, as Envoy does, leaks in modules built by TinyGo.
    let allocator = ["proxy_on_memory_allocate", "malloc"].into_iter().find(|name| has(name));
    let allocator =
        allocator.ok_or(PluginError::MissingExport { wanted: "`proxy_on_memory_allocate` or `malloc`" })?;
    Ok(Exports {
        allocator,
        request_headers: has("proxy_on_request_headers"),
        response_headers: has("proxy_on_response_headers"),
        body: ["proxy_on_request_body", "proxy_on_response_body"].map(has),
        trailers: ["proxy_on_request_trailers", "proxy_on_response_trailers"].map(has),
        log: has("proxy_on_log"),
        clone: has(ON_CLONE),
    })
}

fn is_shape(function: &FuncType, parameters: &[usize], result: bool) -> bool {
    let is_i32 = |value: ValType| matches!(value, ValType::I32);
    parameters.contains(&function.params().len())
        && function.params().all(is_i32)
        && function.results().len() == usize::from(result)
        && function.results().all(is_i32)
}

/// A linker that has all that the module imports. Functions unknown to us trap when called, so that a module that could
/// use another host's extensions, but does not, still runs; functions of ABI 0.1.0 that modules import without a result get
/// one thrown away.
fn meet_imports(
    module: &wasmtime::Module,
    linker: &Linker<State>,
) -> Result<(Linker<State>, Vec<String>), PluginError> {
    let mut linker = linker.clone();
    let mut unmet = BTreeSet::new();
    for import in module.imports() {
        let (from, name) = (import.module(), import.name());
        let ExternType::Func(wanted) = import.ty() else {
            return Err(PluginError::Import { module: from.to_owned(), name: name.to_owned() });
        };
        let resultless = ["proxy_continue_request", "proxy_continue_response", "proxy_clear_route_cache"];
        if from == "env" && resultless.contains(&name) && wanted.results().len() == 0 {
            linker.allow_shadowing(true);
            host::define_resultless(&mut linker, name).map_err(compile_error)?;
            linker.allow_shadowing(false);
            continue;
        }
        let message = format!("it called {from}.{name}, which this host does not have");
        let trap =
            move |_: Caller<'_, State>, _: &[Val], _: &mut [Val]| Err(wasmtime::Error::msg(message.clone()));
        // Defining a name twice fails, so what succeeds was not there. A wrong type is found when instantiating.
        if linker.func_new(from, name, wanted, trap).is_ok() {
            unmet.insert(format!("{from}.{name}"));
        }
    }
    Ok((linker, unmet.into_iter().collect()))
}
