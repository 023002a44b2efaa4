//! The table: host functions, and what each call of them answers.
//!
//! The statuses are those that this host gives and that the official SDKs survive; where Envoy 1.40 was recorded
//! (`tests/probe/envoy.log`), they are its own but for reads, which are allowed longer. `tests/modules/statuses.rs` asks Envoy
//! the same and lists in what it differs.

use super::{Arg, Row, When};
use Arg::{Context, Got, Id, In, L, N, Out, Room, Slices};
use When::{Body, Configure, Delete, Headers, Next, Pending};

/// For functions of exchanges: good while headers are at hand, out of place at the root's configuration.
const EXCHANGE: [When; 3] = [Headers, Configure, Delete];
/// For functions that are of no exchange: good anywhere.
const ROOT: [When; 3] = [Configure, Headers, Delete];
/// For functions of a body.
const BODY: [When; 3] = [Body, Configure, Delete];

/// A map of one header, `a: b`.
const MAP: &[u8] = b"\x01\0\0\0\x01\0\0\0\x01\0\0\0a\0b\0";
/// What a call needs: `:method`, `:path` and `:authority`.
const CALL: &[u8] = b"\x03\0\0\0\x07\0\0\0\x03\0\0\0\x05\0\0\0\x01\0\0\0\x0a\0\0\0\x01\0\0\0\
    :method\0GET\0:path\0/\0:authority\0a\0";
const UPSTREAM: Arg = In(b"auth.shop:80");
const GRPC_UPSTREAM: Arg = In(b"auth.shop:81");

const fn row(name: &'static str, args: &'static [Arg], when: [When; 3], statuses: &'static str) -> Row {
    Row { name, args, before: &[], when, statuses }
}

const fn after(
    before: &'static [&'static str],
    name: &'static str,
    args: &'static [Arg],
    when: [When; 3],
    statuses: &'static str,
) -> Row {
    Row { name, args, before, when, statuses }
}

/// Each function with a good call: its status, then those of a bad pointer, a bad length, out of place, and when the exchange
/// is over.
pub(crate) const ROWS: &[Row] = &[
    // Integration.
    row("proxy_log", &[N(0), In(b"line")], ROOT, "0 6 6 0 0"),
    row("proxy_log", &[N(6), In(b"line")], ROOT, "2 2 2 2 2"),
    row("proxy_get_log_level", &[Out], ROOT, "0 6 - 0 0"),
    row("proxy_get_current_time_nanoseconds", &[Out], ROOT, "0 6 - 0 0"),
    row("proxy_set_tick_period_milliseconds", &[N(0)], ROOT, "0 - - 0 0"),
    row("proxy_get_configuration", &[Out, Out], ROOT, "0 6 - 0 0"),
    row("proxy_set_effective_context", &[Context], [Headers, Configure, Next], "0 - - 0 2"),
    row("proxy_set_effective_context", &[N(999)], EXCHANGE, "2 - - 2 2"),
    row("proxy_done", &[], [Pending, Headers, Delete], "0 - - 1 1"),
    // Buffers.
    row("proxy_get_buffer_bytes", &[N(0), N(0), N(9), Out, Out], BODY, "0 6 - 0 0"),
    row("proxy_get_buffer_bytes", &[N(0), N(1), N(u32::MAX), Out, Out], BODY, "0 6 - 0 0"),
    row("proxy_get_buffer_bytes", &[N(2), N(0), N(9), Out, Out], BODY, "0 6 - 0 0"),
    row("proxy_get_buffer_bytes", &[N(4), N(0), N(9), Out, Out], BODY, "1 6 - 1 1"),
    row("proxy_get_buffer_bytes", &[N(7), N(0), N(9), Out, Out], ROOT, "0 6 - 1 1"),
    row("proxy_get_buffer_bytes", &[N(9), N(0), N(9), Out, Out], BODY, "2 6 - 2 2"),
    row("proxy_get_buffer_status", &[N(0), Out, Out], BODY, "0 6 - 0 0"),
    row("proxy_set_buffer_bytes", &[N(0), N(0), N(0), In(b"x")], BODY, "0 6 6 2 2"),
    row("proxy_set_buffer_bytes", &[N(2), N(0), N(0), In(b"x")], BODY, "2 6 6 2 2"),
    row("proxy_set_buffer_bytes", &[N(7), N(0), N(0), In(b"x")], ROOT, "2 6 6 1 1"),
    // Header maps.
    row("proxy_get_header_map_size", &[N(0), Out], EXCHANGE, "0 6 - 2 0"),
    row("proxy_get_header_map_size", &[N(8), Out], EXCHANGE, "2 2 - 2 2"),
    row("proxy_get_header_map_pairs", &[N(0), Out, Out], EXCHANGE, "0 6 - 0 0"),
    row("proxy_get_header_map_pairs", &[N(8), Out, Out], EXCHANGE, "2 2 - 2 2"),
    row("proxy_set_header_map_pairs", &[N(2), In(MAP)], EXCHANGE, "2 6 6 2 2"),
    row("proxy_get_header_map_value", &[N(0), In(b"x-in"), Out, Out], EXCHANGE, "0 6 6 2 0"),
    row("proxy_get_header_map_value", &[N(0), In(b"x-none"), Out, Out], EXCHANGE, "1 6 6 2 1"),
    row("proxy_add_header_map_value", &[N(0), In(b"x-a"), In(b"b")], EXCHANGE, "0 6 6 2 2"),
    row("proxy_replace_header_map_value", &[N(0), In(b"x-a"), In(b"b")], EXCHANGE, "0 6 6 2 2"),
    row("proxy_remove_header_map_value", &[N(0), In(b"x-a")], EXCHANGE, "0 6 6 2 2"),
    // Streams.
    row("proxy_continue_stream", &[N(0)], EXCHANGE, "0 - - 0 0"),
    row("proxy_continue_stream", &[N(2)], EXCHANGE, "0 - - 0 0"),
    row("proxy_continue_stream", &[N(4)], EXCHANGE, "2 - - 2 2"),
    row("proxy_continue_request", &[], EXCHANGE, "0 - - 0 0"),
    row("proxy_continue_response", &[], EXCHANGE, "0 - - 0 0"),
    row("proxy_close_stream", &[N(2)], EXCHANGE, "0 - - 0 0"),
    row("proxy_close_stream", &[N(4)], EXCHANGE, "2 - - 2 2"),
    row("proxy_clear_route_cache", &[], EXCHANGE, "0 - - 0 0"),
    row(
        "proxy_send_local_response",
        &[N(403), In(b"why"), In(b"no"), In(MAP), N(u32::MAX)],
        [Delete, Configure, Next],
        "0 6 6 0 0",
    ),
    row("proxy_get_status", &[Out, Out, Out], EXCHANGE, "0 6 - 0 0"),
    // Calls.
    row("proxy_http_call", &[UPSTREAM, In(CALL), In(b"body"), In(b""), N(1000), Id], EXCHANGE, "0 6 6 0 0"),
    row(
        "proxy_grpc_call",
        &[GRPC_UPSTREAM, In(b"service"), In(b"method"), In(b""), In(b"message"), N(1000), Id],
        EXCHANGE,
        "0 6 6 0 0",
    ),
    row(
        "proxy_grpc_stream",
        &[GRPC_UPSTREAM, In(b"service"), In(b"method"), In(b""), Id],
        EXCHANGE,
        "0 6 6 0 0",
    ),
    after(&["proxy_grpc_stream"], "proxy_grpc_send", &[Got, In(b"message"), N(0)], EXCHANGE, "0 6 6 0 0"),
    row("proxy_grpc_send", &[N(2), In(b"message"), N(0)], EXCHANGE, "1 6 6 1 1"),
    after(&["proxy_grpc_stream"], "proxy_grpc_close", &[Got], EXCHANGE, "0 - - 0 0"),
    row("proxy_grpc_close", &[N(2)], EXCHANGE, "1 - - 1 1"),
    after(&["proxy_grpc_stream"], "proxy_grpc_cancel", &[Got], EXCHANGE, "0 - - 0 0"),
    row("proxy_grpc_cancel", &[N(2)], EXCHANGE, "1 - - 1 1"),
    // What plugins share.
    row("proxy_set_shared_data", &[In(b"key"), In(b"value"), N(0)], ROOT, "0 6 6 0 0"),
    after(
        &["proxy_set_shared_data"],
        "proxy_get_shared_data",
        &[In(b"key"), Out, Out, Out],
        ROOT,
        "0 6 6 0 0",
    ),
    row("proxy_get_shared_data", &[In(b"none"), Out, Out, Out], ROOT, "1 6 6 1 1"),
    row("proxy_register_shared_queue", &[In(b"queue"), Id], ROOT, "0 6 6 0 0"),
    after(
        &["proxy_register_shared_queue"],
        "proxy_resolve_shared_queue",
        &[In(b""), In(b"queue"), Id],
        ROOT,
        "0 6 6 0 0",
    ),
    row("proxy_resolve_shared_queue", &[In(b"other"), In(b"queue"), Id], ROOT, "1 6 6 1 1"),
    after(
        &["proxy_register_shared_queue"],
        "proxy_enqueue_shared_queue",
        &[Got, In(b"item")],
        ROOT,
        "0 6 6 0 0",
    ),
    row("proxy_enqueue_shared_queue", &[N(999), In(b"item")], ROOT, "1 6 6 1 1"),
    after(
        &["proxy_register_shared_queue", "proxy_enqueue_shared_queue"],
        "proxy_dequeue_shared_queue",
        &[Got, Out, Out],
        ROOT,
        "0 6 - 0 0",
    ),
    row("proxy_dequeue_shared_queue", &[N(999), Out, Out], ROOT, "1 6 - 1 1"),
    // Metrics.
    row("proxy_define_metric", &[N(0), In(b"metric"), Id], ROOT, "0 6 6 0 0"),
    row("proxy_define_metric", &[N(3), In(b"metric"), Id], ROOT, "2 6 6 2 2"),
    after(&["proxy_define_metric"], "proxy_increment_metric", &[Got, L(1)], ROOT, "0 - - 0 0"),
    row("proxy_increment_metric", &[N(4000), L(1)], ROOT, "1 - - 1 1"),
    after(&["proxy_define_metric"], "proxy_record_metric", &[Got, L(1)], ROOT, "0 - - 0 0"),
    row("proxy_record_metric", &[N(4000), L(1)], ROOT, "1 - - 1 1"),
    after(&["proxy_define_metric"], "proxy_get_metric", &[Got, Out], ROOT, "0 6 - 0 0"),
    row("proxy_get_metric", &[N(4000), Out], ROOT, "1 6 - 1 1"),
    // Properties and foreign functions.
    row("proxy_get_property", &[In(b"plugin_name"), Out, Out], ROOT, "0 6 6 0 0"),
    row("proxy_get_property", &[In(b"connection\0mtls"), Out, Out], EXCHANGE, "0 6 6 1 0"),
    row("proxy_set_property", &[In(b"mine"), In(b"value")], EXCHANGE, "0 6 6 0 0"),
    row("proxy_call_foreign_function", &[In(b"compress"), In(b"text"), Out, Out], ROOT, "0 6 6 0 0"),
    row("proxy_call_foreign_function", &[In(b"none"), In(b"text"), Out, Out], ROOT, "1 6 6 1 1"),
    row("emscripten_notify_memory_growth", &[N(0)], ROOT, "0 - - 0 0"),
    row("pthread_equal", &[N(1), N(1)], ROOT, "1 - - 1 1"),
    // WASI.
    row("proc_exit", &[N(0)], ROOT, "T - - T T"),
    row("environ_sizes_get", &[Out, Out], ROOT, "0 21 - 0 0"),
    row("environ_get", &[Out, Out], ROOT, "0 21 - 0 0"),
    row("args_sizes_get", &[Out, Out], ROOT, "0 21 - 0 0"),
    row("clock_time_get", &[N(0), L(0), Out], ROOT, "0 21 - 0 0"),
    row("clock_time_get", &[N(2), L(0), Out], ROOT, "58 58 - 58 58"),
    row("clock_res_get", &[N(0), Out], ROOT, "0 21 - 0 0"),
    row("random_get", &[Room(16)], ROOT, "0 21 28 0 0"),
    row("poll_oneoff", &[N(0), N(0), N(0), Out], ROOT, "0 21 - 0 0"),
    row("fd_write", &[N(1), Slices(b"line\n"), Out], ROOT, "0 21 21 0 0"),
    row("fd_write", &[N(3), Slices(b"line\n"), Out], ROOT, "8 8 8 8 8"),
    row("fd_fdstat_get", &[N(1), Out], ROOT, "0 21 - 0 0"),
    row("fd_fdstat_get", &[N(3), Out], ROOT, "8 8 - 8 8"),
    row("fd_close", &[N(1)], ROOT, "0 - - 0 0"),
    row("fd_seek", &[N(1), L(0), N(0), N(0)], ROOT, "0 - - 0 0"),
    row("fd_sync", &[N(1)], ROOT, "0 - - 0 0"),
    row("fd_datasync", &[N(1)], ROOT, "0 - - 0 0"),
];

/// Functions of WASI that touch nothing, and their one answer for whatever they are given, descriptors beyond the standard
/// ones included.
pub(crate) const STUBS: &[(&str, u32)] = &[
    ("args_get", 0),
    ("sched_yield", 0),
    ("fd_fdstat_set_flags", 0),
    ("fd_tell", 8),
    ("fd_advise", 8),
    ("fd_allocate", 8),
    ("fd_fdstat_set_rights", 8),
    ("fd_filestat_get", 8),
    ("fd_filestat_set_size", 8),
    ("fd_filestat_set_times", 8),
    ("fd_read", 8),
    ("fd_pread", 8),
    ("fd_pwrite", 8),
    ("fd_readdir", 8),
    ("fd_renumber", 8),
    ("fd_prestat_get", 8),
    ("fd_prestat_dir_name", 8),
    ("fd_close", 8),
    ("fd_seek", 8),
    ("fd_sync", 8),
    ("fd_datasync", 8),
    ("path_open", 44),
    ("path_filestat_get", 44),
    ("path_filestat_set_times", 44),
    ("path_create_directory", 44),
    ("path_link", 44),
    ("path_readlink", 44),
    ("path_remove_directory", 44),
    ("path_rename", 44),
    ("path_symlink", 44),
    ("path_unlink_file", 44),
    ("sock_accept", 58),
    ("sock_recv", 58),
    ("sock_send", 58),
    ("sock_shutdown", 58),
    ("proc_raise", 58),
];
