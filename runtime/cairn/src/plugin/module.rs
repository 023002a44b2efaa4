//! A module and its configuration as files, and the plugin that they make in an engine.

use anyhow::{Context, Result};
use cairn_filter::Factory;
use cairn_mesh::{FailStrategy, Isolation, PluginKind, PluginMode, PluginPhase, ResourceName, WasmPlugin};
use cairn_wasm::Engine;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the module and its configuration are.
#[derive(Clone, Debug, clap::Args)]
pub struct Files {
    /// The module, `.wasm`.
    pub module: PathBuf,
    /// A file with its configuration, JSON, as `pluginConfig` of a WasmPlugin.
    #[arg(long, short)]
    pub config: Option<PathBuf>,
}

/// What the files hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// The module.
    pub module: Vec<u8>,
    /// The configuration, compact, as it travels through a mesh.
    pub config: String,
}

impl Files {
    /// Reads them.
    ///
    /// # Errors
    /// When one cannot be read, or the configuration is no JSON.
    pub fn read(&self) -> Result<Contents> {
        let module =
            std::fs::read(&self.module).with_context(|| format!("cannot read {}", self.module.display()))?;
        Ok(Contents { module, config: self.config.as_deref().map_or(Ok(String::new()), read_config)? })
    }

    /// The plugin's name: the module's.
    pub fn name(&self) -> String {
        let stem = self.module.file_stem().unwrap_or_default().to_string_lossy();
        stem.replace('_', "-")
    }
}

fn read_config(path: &Path) -> Result<String> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    Ok(value.to_string())
}

impl Contents {
    /// Compiles the module and starts the plugin.
    ///
    /// # Errors
    /// When it is none, or refuses its configuration.
    pub fn start(&self, engine: &Engine, name: &str) -> Result<Arc<dyn Factory>> {
        let module = engine.compile(&self.module).context("the module does not compile")?;
        engine.factory(module, &plugin(name, &self.config)).context("the plugin does not start")
    }
}

/// A plugin as a mesh would describe it.
pub fn plugin(name: &str, config: &str) -> WasmPlugin {
    WasmPlugin {
        name: ResourceName::new("default", name),
        targets: Vec::new(),
        url: "file:".into(),
        sha256: None,
        pull_policy: None,
        pull_secret: None,
        plugin_name: "".into(),
        kind: PluginKind::Http,
        ports: Vec::new(),
        config: config.into(),
        phase: PluginPhase::Unspecified,
        priority: 0,
        fail_strategy: FailStrategy::Close,
        env: Vec::new(),
        host_env: Vec::new(),
        holds_heads: false,
        limits: Default::default(),
        isolation: Isolation::Shared,
        mode: PluginMode::Enforce,
    }
}
