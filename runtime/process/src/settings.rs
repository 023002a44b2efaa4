//! Settings from a file. Flags and environment variables come from clap in the binaries and win over the file.

use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Why a settings file was not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// It could not be read.
    #[error("cannot read settings file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not valid; the reason names line and field.
    #[error("settings file {}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its position.
        reason: String,
    },
}

/// Reads a YAML settings file into a type that refuses unknown fields. `None` gives the type's default.
///
/// # Errors
/// When the file cannot be read or does not fit the type.
pub fn load_file<T: DeserializeOwned + Default>(path: Option<&Path>) -> Result<T, SettingsError> {
    let Some(path) = path else { return Ok(T::default()) };
    let text = std::fs::read_to_string(path)
        .map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
    if text.trim().is_empty() {
        return Ok(T::default());
    }
    serde_saphyr::from_str(&text)
        .map_err(|error| SettingsError::Parse { path: path.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Default, Debug, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Example {
        workers: usize,
    }

    fn check(text: &str) -> Result<Example, SettingsError> {
        let dir = std::env::temp_dir().join(format!("cairn-settings-{}-{}", std::process::id(), text.len()));
        std::fs::write(&dir, text).unwrap();
        let result = load_file(Some(&dir));
        std::fs::remove_file(&dir).unwrap();
        result
    }

    #[test]
    fn a_file_gives_settings_or_a_reason() {
        assert_eq!(check("workers: 3").unwrap(), Example { workers: 3 });
        assert_eq!(check("").unwrap(), Example::default());
        let unknown = check("wrokers: 3").unwrap_err().to_string();
        assert!(unknown.contains("wrokers"), "{unknown}");
        let wrong = check("workers: many").unwrap_err().to_string();
        assert!(wrong.contains("1"), "names the line: {wrong}");
        assert!(load_file::<Example>(Some(Path::new("/nonexistent/x.yaml"))).is_err());
    }
}
