//! `cairn plugin inspect`: what a module is and asks for, and which proxies lack it.

use crate::output::Output;
use anyhow::{Context, Result, bail};
use cairn_wasm::{AbiVersion, Engine, EngineSettings};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use wasmparser::{ExternalKind, Parser, Payload, TypeRef};

/// `cairn plugin inspect`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The module, `.wasm`.
    module: PathBuf,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// What is in a module.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    bytes: usize,
    sha256: String,
    /// The version of proxy-wasm that it speaks; none if it is no plugin.
    abi: Option<&'static str>,
    imports: BTreeSet<String>,
    callbacks: BTreeSet<String>,
    /// What it may do, by its imports and callbacks.
    asks_for: Vec<&'static str>,
    sections: Vec<Section>,
    memory_pages: u64,
    /// Callbacks that this host never calls.
    uncalled: Vec<String>,
    /// Why this host would not run it.
    refused: Option<String>,
    lacking: Lacking,
}

/// A part of the file.
#[derive(Debug, Serialize)]
struct Section {
    name: String,
    bytes: usize,
}

/// Imports that a proxy does not have; calling one ends the plugin here, and Envoy does not load it.
#[derive(Debug, Default, Serialize)]
struct Lacking {
    cairn: Vec<String>,
    envoy: Vec<String>,
}

/// What an import or callback is for.
const PURPOSES: [(&str, &[&str]); 16] = [
    ("request headers", &["proxy_on_request_headers"]),
    ("request bodies", &["proxy_on_request_body"]),
    ("response headers", &["proxy_on_response_headers"]),
    ("response bodies", &["proxy_on_response_body"]),
    ("trailers", &["proxy_on_request_trailers", "proxy_on_response_trailers"]),
    ("connections", &["proxy_on_new_connection", "proxy_on_downstream_data", "proxy_on_upstream_data"]),
    ("replies of its own", &["proxy_send_local_response"]),
    ("HTTP callouts", &["proxy_http_call"]),
    ("gRPC callouts", &["proxy_grpc_call", "proxy_grpc_stream"]),
    ("timers", &["proxy_set_tick_period_milliseconds"]),
    ("shared data", &["proxy_get_shared_data", "proxy_set_shared_data"]),
    ("shared queues", &["proxy_register_shared_queue", "proxy_resolve_shared_queue"]),
    ("metrics", &["proxy_define_metric"]),
    ("properties", &["proxy_get_property", "proxy_set_property"]),
    ("foreign functions", &["proxy_call_foreign_function"]),
    ("the end of exchanges", &["proxy_on_log", "proxy_on_done"]),
];

/// What Envoy 1.40 has in `env`.
const ENVOY: [&str; 46] = [
    "proxy_set_effective_context",
    "proxy_done",
    "proxy_log",
    "proxy_get_log_level",
    "proxy_get_current_time_nanoseconds",
    "proxy_set_tick_period_milliseconds",
    "proxy_get_configuration",
    "proxy_get_buffer_bytes",
    "proxy_get_buffer_status",
    "proxy_set_buffer_bytes",
    "proxy_get_header_map_size",
    "proxy_get_header_map_pairs",
    "proxy_set_header_map_pairs",
    "proxy_get_header_map_value",
    "proxy_add_header_map_value",
    "proxy_replace_header_map_value",
    "proxy_remove_header_map_value",
    "proxy_continue_stream",
    "proxy_close_stream",
    "proxy_continue_request",
    "proxy_continue_response",
    "proxy_clear_route_cache",
    "proxy_send_local_response",
    "proxy_get_status",
    "proxy_http_call",
    "proxy_grpc_call",
    "proxy_grpc_stream",
    "proxy_grpc_send",
    "proxy_grpc_cancel",
    "proxy_grpc_close",
    "proxy_set_shared_data",
    "proxy_get_shared_data",
    "proxy_register_shared_queue",
    "proxy_resolve_shared_queue",
    "proxy_enqueue_shared_queue",
    "proxy_dequeue_shared_queue",
    "proxy_define_metric",
    "proxy_record_metric",
    "proxy_increment_metric",
    "proxy_get_metric",
    "proxy_get_property",
    "proxy_set_property",
    "proxy_call_foreign_function",
    "pthread_equal",
    "emscripten_notify_memory_growth",
    "envoy_resolve_dns",
];

/// Functions of WASI that Envoy 1.40 has, under both names of the module.
const ENVOY_WASI: [&str; 44] = [
    "args_get",
    "args_sizes_get",
    "clock_res_get",
    "clock_time_get",
    "environ_get",
    "environ_sizes_get",
    "fd_advise",
    "fd_allocate",
    "fd_close",
    "fd_datasync",
    "fd_fdstat_get",
    "fd_fdstat_set_flags",
    "fd_fdstat_set_rights",
    "fd_filestat_get",
    "fd_filestat_set_size",
    "fd_filestat_set_times",
    "fd_pread",
    "fd_prestat_dir_name",
    "fd_prestat_get",
    "fd_pwrite",
    "fd_read",
    "fd_readdir",
    "fd_renumber",
    "fd_seek",
    "fd_sync",
    "fd_tell",
    "fd_write",
    "path_create_directory",
    "path_filestat_get",
    "path_filestat_set_times",
    "path_link",
    "path_open",
    "path_readlink",
    "path_remove_directory",
    "path_rename",
    "path_symlink",
    "path_unlink_file",
    "poll_oneoff",
    "proc_exit",
    "random_get",
    "sched_yield",
    "sock_recv",
    "sock_send",
    "sock_shutdown",
];

/// Reads a module and prints what is in it. The exit status tells whether this host runs it.
///
/// # Errors
/// When the file is no module.
pub fn run(options: &Options) -> Result<ExitCode> {
    let report = inspect(&options.module)?;
    match options.output {
        Output::Text => print!("{}", report.text()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.refused.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn inspect(path: &Path) -> Result<Report> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !bytes.starts_with(b"\0asm") {
        bail!("{} is no WebAssembly module", path.display());
    }
    let mut report = parse(&bytes).with_context(|| format!("{} is broken", path.display()))?;
    report.sha256 = cairn_fetch::Digest::of(&bytes).qualified();
    let engine = Engine::new(EngineSettings::default())?;
    match engine.compile(&bytes) {
        Ok(module) => {
            report.abi = Some(match module.abi() {
                AbiVersion::V0_1_0 => "0.1.0",
                AbiVersion::V0_2_0 => "0.2.0",
                AbiVersion::V0_2_1 => "0.2.1",
            });
            report.lacking.cairn = module.unmet_imports().to_vec();
            report.uncalled = module.uncalled_callbacks().to_vec();
        }
        Err(error) => report.refused = Some(chain(&error)),
    }
    Ok(report)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

fn parse(bytes: &[u8]) -> Result<Report> {
    let mut report = Report { bytes: bytes.len(), ..Report::default() };
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        if let Some((_, range)) = payload.as_section() {
            let name = section_name(&payload);
            report.sections.push(Section { name, bytes: range.len() });
        }
        match payload {
            Payload::ImportSection(imports) => {
                for import in imports.into_imports() {
                    let import = import?;
                    if matches!(import.ty, TypeRef::Func(_)) {
                        report.imports.insert(format!("{}.{}", import.module, import.name));
                    }
                }
            }
            Payload::ExportSection(exports) => {
                for export in exports {
                    let export = export?;
                    if export.kind == ExternalKind::Func && export.name.starts_with("proxy_on_") {
                        report.callbacks.insert(export.name.to_owned());
                    }
                }
            }
            Payload::MemorySection(memories) => {
                for memory in memories {
                    report.memory_pages += memory?.initial;
                }
            }
            _ => {}
        }
    }
    report.asks_for = asks_for(&report);
    report.lacking.envoy = report.imports.iter().filter(|import| !is_in_envoy(import)).cloned().collect();
    Ok(report)
}

fn asks_for(report: &Report) -> Vec<&'static str> {
    let has =
        |name: &&str| report.callbacks.contains(*name) || report.imports.contains(&format!("env.{name}"));
    PURPOSES.iter().filter(|(_, names)| names.iter().any(&has)).map(|(purpose, _)| *purpose).collect()
}

fn is_in_envoy(import: &str) -> bool {
    match import.split_once('.') {
        Some(("env", name)) => ENVOY.contains(&name),
        Some(("wasi_snapshot_preview1" | "wasi_unstable", name)) => ENVOY_WASI.contains(&name),
        _ => false,
    }
}

fn section_name(payload: &Payload<'_>) -> String {
    match payload {
        Payload::CustomSection(custom) => format!("custom {}", custom.name()),
        Payload::CodeSectionStart { .. } => "code".to_owned(),
        Payload::DataSection(_) => "data".to_owned(),
        Payload::ImportSection(_) => "imports".to_owned(),
        Payload::ExportSection(_) => "exports".to_owned(),
        Payload::FunctionSection(_) => "functions".to_owned(),
        Payload::TypeSection(_) => "types".to_owned(),
        Payload::ElementSection(_) => "elements".to_owned(),
        _ => "other".to_owned(),
    }
}

impl Report {
    fn text(&self) -> String {
        let list = |names: &BTreeSet<String>| names.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let lacks = |names: &[String]| match names {
            [] => "nothing".to_owned(),
            names => names.join(", "),
        };
        let sections = self.sections.iter().filter(|section| section.bytes * 20 > self.bytes);
        let sections: Vec<String> =
            sections.map(|section| format!("{} {}", section.name, section.bytes)).collect();
        let lines = [
            ("size", format!("{} bytes ({})", self.bytes, sections.join(", "))),
            ("digest", self.sha256.clone()),
            ("ABI", self.abi.unwrap_or("none").to_owned()),
            ("memory", format!("{} KiB at the start", self.memory_pages * 64)),
            ("asks for", self.asks_for.join(", ")),
            ("callbacks", list(&self.callbacks)),
            ("imports", list(&self.imports)),
            ("Cairn lacks", self.refused.clone().unwrap_or_else(|| lacks(&self.lacking.cairn))),
            ("Envoy 1.40 lacks", lacks(&self.lacking.envoy)),
        ];
        lines.iter().map(|(name, value)| format!("{name:<17} {value}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_it_asks_for() {
        let text = r#"(module
            (import "env" "proxy_http_call" (func (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
            (import "env" "proxy_redis_call" (func (param i32) (result i32)))
            (import "wasi_snapshot_preview1" "random_get" (func (param i32 i32) (result i32)))
            (memory (export "memory") 3)
            (func (export "proxy_abi_version_0_2_1"))
            (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 0))
            (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.const 0)))"#;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.wasm");
        std::fs::write(&path, wat::parse_str(text).unwrap()).unwrap();
        let report = inspect(&path).unwrap();
        assert_eq!((report.abi, report.memory_pages, &report.refused), (Some("0.2.1"), 3, &None));
        assert_eq!(report.asks_for, ["request bodies", "HTTP callouts"]);
        assert_eq!(report.lacking.cairn, ["env.proxy_redis_call"]);
        assert_eq!(report.lacking.envoy, ["env.proxy_redis_call"]);
        assert!(report.text().contains("Envoy 1.40 lacks  env.proxy_redis_call\n"), "{}", report.text());
        std::fs::write(&path, "nothing").unwrap();
        assert!(inspect(&path).unwrap_err().to_string().contains("is no WebAssembly module"));
        std::fs::write(&path, wat::parse_str("(module)").unwrap()).unwrap();
        assert!(inspect(&path).unwrap().refused.unwrap().contains("proxy_abi_version"));
    }
}
