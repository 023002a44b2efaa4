//! From `pluginConfig` to a configured plugin.

use crate::Plugin;

/// Reads the configuration and makes the plugin. The error names the field.
pub(crate) fn configure<P: Plugin>(bytes: &[u8]) -> Result<P, String> {
    // No `pluginConfig` arrives as no bytes.
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let config =
        serde_path_to_error::deserialize(&mut json).map_err(|error| match error.path().iter().next() {
            Some(_) => format!("configuration: {}: {}", error.path(), error.inner()),
            None => format!("configuration: {}", error.inner()),
        })?;
    json.end().map_err(|error| format!("configuration: {error}"))?;
    P::configure(config).map_err(|error| format!("configuration: {error}"))
}
