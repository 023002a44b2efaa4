//! From `pluginConfig` to a configured plugin.

use crate::Plugin;
use serde::de::DeserializeOwned;

/// Reads the configuration and makes the plugin. The error names the field and the line.
pub(crate) fn configure<P: Plugin>(bytes: &[u8]) -> Result<P, String> {
    let config = match bytes.trim_ascii() {
        // No `pluginConfig` arrives as no bytes. A type without fields may be a unit.
        b"" | b"{}" => read(b"{}").or_else(|error| read(b"null").map_err(|_| error)),
        bytes => read(bytes),
    };
    config.and_then(P::configure).map_err(|error| format!("configuration: {error}"))
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let config =
        serde_path_to_error::deserialize(&mut json).map_err(|error| match error.path().iter().next() {
            Some(_) => format!("{}: {}", error.path(), error.inner()),
            None => error.inner().to_string(),
        })?;
    json.end().map_err(|error| error.to_string())?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        #[serde(default)]
        limits: Vec<Limit>,
    }

    #[derive(Deserialize)]
    struct Limit {
        most: u32,
    }

    struct Limits {
        most: u32,
    }

    impl Plugin for Limits {
        type Config = Config;
        type Exchange = ();

        fn configure(config: Config) -> Result<Self, String> {
            let most = config.limits.iter().map(|limit| limit.most).max().unwrap_or(100);
            if most == 0 { Err("limits: all are zero".to_owned()) } else { Ok(Self { most }) }
        }
    }

    struct Nothing;

    impl Plugin for Nothing {
        type Config = ();
        type Exchange = ();

        fn configure((): ()) -> Result<Self, String> {
            Ok(Self)
        }
    }

    #[test]
    fn errors_name_the_field_and_the_line() {
        let cases = [
            (
                "{\"limits\": [{\"most\": 1},\n{\"most\": \"x\"}]}",
                "configuration: limits[1].most: invalid type",
                "line 2",
            ),
            (r#"{"limit": []}"#, "configuration: limit: unknown field `limit`", "line 1"),
            (r#"{"limits": [{"most": 0}]}"#, "configuration: limits: all are zero", ""),
            ("{", "configuration: ", "line 1"),
            ("{} {}", "configuration: trailing characters", "line 1"),
        ];
        for (json, error, line) in cases {
            let found = configure::<Limits>(json.as_bytes()).err().unwrap_or_default();
            assert!(found.starts_with(error) && found.contains(line), "{json}: {found}");
        }
    }

    #[test]
    fn no_configuration_is_an_empty_one() {
        for json in ["", " ", "{}"] {
            assert_eq!(configure::<Limits>(json.as_bytes()).map(|limits| limits.most), Ok(100), "{json:?}");
            assert!(configure::<Nothing>(json.as_bytes()).is_ok(), "{json:?}");
        }
    }
}
