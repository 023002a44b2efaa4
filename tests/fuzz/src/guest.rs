//! What guests are made of: the functions that the host offers, and those that it calls. Written down here once more, so
//! that nothing which the host changes goes unnoticed.

/// A host function.
pub struct Function {
    pub module: &'static str,
    pub name: &'static str,
    /// Its parameters: `i` has 32 bits, `l` has 64.
    pub parameters: &'static str,
    /// Whether it answers with a status.
    pub answers: bool,
}

const fn env(name: &'static str, parameters: &'static str) -> Function {
    Function { module: "env", name, parameters, answers: true }
}

const fn wasi(name: &'static str, parameters: &'static str) -> Function {
    Function { module: "wasi_snapshot_preview1", name, parameters, answers: true }
}

/// What the host offers: all of proxy-wasm, and the part of WASI that does something. The last one ends the guest.
pub const FUNCTIONS: &[Function] = &[
    env("proxy_log", "iii"),
    env("proxy_get_log_level", "i"),
    env("proxy_get_current_time_nanoseconds", "i"),
    env("proxy_get_header_map_size", "ii"),
    env("proxy_get_header_map_pairs", "iii"),
    env("proxy_set_header_map_pairs", "iii"),
    env("proxy_get_header_map_value", "iiiii"),
    env("proxy_add_header_map_value", "iiiii"),
    env("proxy_replace_header_map_value", "iiiii"),
    env("proxy_remove_header_map_value", "iii"),
    env("proxy_get_buffer_bytes", "iiiii"),
    env("proxy_get_buffer_status", "iii"),
    env("proxy_set_buffer_bytes", "iiiii"),
    env("proxy_get_property", "iiii"),
    env("proxy_set_property", "iiii"),
    env("proxy_send_local_response", "iiiiiiii"),
    env("proxy_continue_stream", "i"),
    env("proxy_close_stream", "i"),
    env("proxy_continue_request", ""),
    env("proxy_continue_response", ""),
    env("proxy_clear_route_cache", ""),
    env("proxy_done", ""),
    env("proxy_set_effective_context", "i"),
    env("proxy_define_metric", "iiii"),
    env("proxy_increment_metric", "il"),
    env("proxy_record_metric", "il"),
    env("proxy_get_metric", "ii"),
    env("proxy_set_shared_data", "iiiii"),
    env("proxy_get_shared_data", "iiiii"),
    env("proxy_register_shared_queue", "iii"),
    env("proxy_resolve_shared_queue", "iiiii"),
    env("proxy_enqueue_shared_queue", "iii"),
    env("proxy_dequeue_shared_queue", "iii"),
    env("proxy_http_call", "iiiiiiiiii"),
    env("proxy_grpc_call", "iiiiiiiiiiii"),
    env("proxy_grpc_stream", "iiiiiiiii"),
    env("proxy_grpc_send", "iiii"),
    env("proxy_grpc_close", "i"),
    env("proxy_grpc_cancel", "i"),
    env("proxy_call_foreign_function", "iiiiii"),
    env("proxy_set_tick_period_milliseconds", "i"),
    env("proxy_get_status", "iii"),
    wasi("fd_write", "iiii"),
    wasi("random_get", "ii"),
    wasi("environ_sizes_get", "ii"),
    wasi("environ_get", "ii"),
    wasi("args_sizes_get", "ii"),
    wasi("clock_time_get", "ili"),
    wasi("clock_res_get", "ii"),
    wasi("poll_oneoff", "iiii"),
    wasi("fd_seek", "ilii"),
    wasi("fd_fdstat_get", "ii"),
    Function { module: "wasi_snapshot_preview1", name: "proc_exit", parameters: "i", answers: false },
];

/// A function that the host calls.
pub struct Callback {
    pub name: &'static str,
    /// How many parameters it has, of 32 bits each.
    pub parameters: usize,
    pub answers: bool,
}

const fn callback(name: &'static str, parameters: usize, answers: bool) -> Callback {
    Callback { name, parameters, answers }
}

/// What the host calls, in about the order in which it does.
pub const CALLBACKS: &[Callback] = &[
    callback("_initialize", 0, false),
    callback("proxy_on_context_create", 2, false),
    callback("proxy_on_vm_start", 2, true),
    callback("proxy_on_configure", 2, true),
    callback("proxy_on_request_headers", 3, true),
    callback("proxy_on_request_body", 3, true),
    callback("proxy_on_request_trailers", 2, true),
    callback("proxy_on_response_headers", 3, true),
    callback("proxy_on_response_body", 3, true),
    callback("proxy_on_response_trailers", 2, true),
    callback("proxy_on_tick", 1, false),
    callback("proxy_on_queue_ready", 2, false),
    callback("proxy_on_http_call_response", 5, false),
    callback("proxy_on_grpc_receive_initial_metadata", 3, false),
    callback("proxy_on_grpc_receive", 3, false),
    callback("proxy_on_grpc_receive_trailing_metadata", 3, false),
    callback("proxy_on_grpc_close", 3, false),
    callback("proxy_on_done", 1, true),
    callback("proxy_on_log", 1, false),
    callback("proxy_on_delete", 1, false),
];

/// Which ABI a guest says that it speaks.
pub const MARKERS: [&str; 3] =
    ["proxy_abi_version_0_1_0", "proxy_abi_version_0_2_0", "proxy_abi_version_0_2_1"];

/// An import of each host function, as text, under the name `$f` and its number.
pub fn imports() -> String {
    let import = |(number, function): (usize, &Function)| {
        let Function { module, name, answers, .. } = function;
        let parameters: String =
            function.parameters.chars().map(|kind| format!(" {}", type_of(kind))).collect();
        let result = if *answers { "(result i32)" } else { "" };
        format!("(import \"{module}\" \"{name}\" (func $f{number} (param{parameters}) {result}))\n")
    };
    FUNCTIONS.iter().enumerate().map(import).collect()
}

/// The type of a parameter.
pub fn type_of(kind: char) -> &'static str {
    if kind == 'l' { "i64" } else { "i32" }
}
