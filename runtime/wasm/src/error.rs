//! Why a plugin cannot be used.

/// Why a module does not compile, or a plugin made of it does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginError {
    /// The module is larger than the limit.
    #[error("the module has {bytes} bytes, more than the {bytes_max} allowed")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The bytes are not a WebAssembly module, or one that uses features that are switched off.
    #[error("the module does not compile")]
    Compile(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The process that compiled the module ended before it was done: it was killed, or came to its bounds. The next one may
    /// do better.
    #[error("the compiler's process ended early ({status}){said}")]
    CompilerEnded {
        /// How it ended.
        status: String,
        /// The last line that it said, after a colon; or nothing.
        said: String,
    },
    /// The module has no marker export of an ABI version that we speak.
    #[error(
        "the module exports none of proxy_abi_version_0_1_0, _0_2_0 and _0_2_1: it is no proxy-wasm plugin"
    )]
    UnknownAbi,
    /// An export that is needed is missing.
    #[error("the module exports no {wanted}")]
    MissingExport {
        /// What is missing.
        wanted: &'static str,
    },
    /// An export has another type than the ABI gives it.
    #[error("the export `{name}` has the type {found}, which the ABI does not know for it")]
    ExportType {
        /// The export.
        name: String,
        /// Its type.
        found: String,
    },
    /// The module wants a memory, table or global of the host; there is none.
    #[error("the module imports `{module}.{name}`, which is not a function")]
    Import {
        /// The import's module.
        module: String,
        /// The import's name.
        name: String,
    },
    /// The plugin trapped while it started.
    #[error("the plugin failed in {callback}: {reason}{}", logged(log))]
    Start {
        /// The function it was in.
        callback: &'static str,
        /// What happened.
        reason: String,
        /// The last lines the plugin logged.
        log: Vec<String>,
    },
    /// The plugin answered that it cannot work with what it was given.
    #[error("the plugin answered false in {callback}{}", logged(log))]
    Refused {
        /// `proxy_on_vm_start` or `proxy_on_configure`.
        callback: &'static str,
        /// The last lines the plugin logged.
        log: Vec<String>,
    },
    /// No exchange can have an instance of its own.
    #[error("the plugin cannot have an instance per exchange")]
    Snapshot(#[from] crate::snapshot::SnapshotError),
    /// The cache of compiled modules cannot be used.
    #[error("compiled modules cannot be kept")]
    Cache(#[from] crate::cache::CacheError),
    /// The thread that compiles could not be started.
    #[error("no thread to compile on")]
    Thread(#[source] std::io::Error),
}

fn logged(lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!("; it logged: {}", lines.join(" | ")) }
}
