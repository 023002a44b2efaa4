//! The compiler for plugins: rustup's with its `wasm32-wasip1` target, or Debian's with the sources of the standard library and
//! wasi-libc. `plugins/build` of this repository chooses in the same way.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target of all plugins.
pub const TARGET: &str = "wasm32-wasip1";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_LIBRARIES: &str = "/usr/lib/wasm32-wasi";
const DEBIAN_PACKAGES: &str = "rustc-web rust-web-src wasi-libc";

/// A compiler that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// rustup's, with the target.
    Rustup,
    /// Debian's, which builds the standard library too, and a linker for it.
    Debian {
        /// `rust-lld` or `wasm-ld`.
        linker: PathBuf,
    },
}

impl Toolchain {
    /// Looks for one; has rustup add the target if it has not, and can.
    ///
    /// # Errors
    /// When there is none; says what to install.
    pub fn find() -> Result<Self> {
        if has_target() || (add_target() && has_target()) {
            return Ok(Self::Rustup);
        }
        if has_debian_compiler() {
            let linker =
                linker().context("neither rust-lld nor wasm-ld was found to link WebAssembly with")?;
            return Ok(Self::Debian { linker });
        }
        bail!(
            "there is no compiler for {TARGET}: run `rustup target add {TARGET}`, or on Debian, as root, `apt-get install \
             --no-install-recommends {DEBIAN_PACKAGES}`"
        )
    }

    /// The name for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rustup => "rustup",
            Self::Debian { .. } => "debian",
        }
    }

    /// `cargo build` for the target. What builds for this machine are told does not reach it.
    pub fn cargo_build(&self) -> Command {
        let mut command = Command::new("cargo");
        for name in [
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_RUSTFLAGS",
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
        ] {
            command.env_remove(name);
        }
        command.args(["build", "--release", "--lib", "--target", TARGET]);
        if let Self::Debian { linker } = self {
            let flags = format!("-L native={DEBIAN_LIBRARIES} -C linker={}", linker.display());
            command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", flags);
            command.arg("-Zbuild-std=std,panic_abort");
        }
        command
    }
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn has_target() -> bool {
    let installed = output(Command::new("rustup").args(["target", "list", "--installed"]));
    installed.is_some_and(|targets| targets.lines().any(|target| target == TARGET))
}

fn add_target() -> bool {
    // Where the network hangs, so would rustup.
    output(Command::new("timeout").args(["60", "rustup", "target", "add", TARGET])).is_some()
}

fn has_debian_compiler() -> bool {
    let sysroot = output(Command::new(DEBIAN_RUSTC).args(["--print", "sysroot"]));
    let has_sources = sysroot.is_some_and(|root| Path::new(root.trim()).join("lib/rustlib/src").is_dir());
    has_sources && Path::new(DEBIAN_LIBRARIES).is_dir()
}

fn linker() -> Option<PathBuf> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let hosts = std::fs::read_dir(Path::new(sysroot.trim()).join("lib/rustlib")).into_iter().flatten();
    let lld = hosts.flatten().map(|host| host.path().join("bin/rust-lld")).find(|path| path.is_file());
    lld.or_else(|| {
        let paths = std::env::var_os("PATH")?;
        std::env::split_paths(&paths).map(|folder| folder.join("wasm-ld")).find(|path| path.is_file())
    })
}
