//! Who to say that we are to a registry: the `.dockerconfigjson` of a pull secret, or a `~/.docker/config.json`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;

/// How one proves to a registry who one is.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// By user and password.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// By a token that another one is got for (OAuth 2's refresh token).
    IdentityToken(String),
    /// By a token that the registry takes as it is.
    RegistryToken(String),
}

impl fmt::Debug for Login {
    /// Says the kind only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password",
            Self::IdentityToken(_) => "IdentityToken",
            Self::RegistryToken(_) => "RegistryToken",
        })
    }
}

/// Why a file of credentials cannot be used. Says nothing of what is in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// It is not JSON of the right form.
    #[error("the credentials are not a docker configuration: {0}")]
    Form(String),
    /// An entry's `auth` is not base64 of `user:password`.
    #[error("the credentials of `{0}` are not `user:password` in base64")]
    Auth(String),
}

/// Logins by registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// By registry or by registry and folder, without scheme.
    logins: BTreeMap<String, Login>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(&self.logins).finish()
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl Credentials {
    /// Reads the JSON of a docker configuration: of a pull secret's `.dockerconfigjson`.
    ///
    /// # Errors
    /// When it is not one. Helper programs (`credHelpers`, `credsStore`) are not run.
    pub fn parse(json: &[u8]) -> Result<Self, CredentialsError> {
        // The parser's own message may quote a secret; where it failed says enough.
        let form = |error: serde_json::Error| {
            CredentialsError::Form(format!("line {}, column {}", error.line(), error.column()))
        };
        let file: File = serde_json::from_slice(json).map_err(form)?;
        let mut logins = BTreeMap::new();
        for (registry, entry) in file.auths {
            if let Some(login) = login(entry).ok_or_else(|| CredentialsError::Auth(registry.clone()))? {
                logins.insert(key(&registry), login);
            }
        }
        Ok(Self { logins })
    }

    /// One login for one registry.
    pub fn single(registry: &str, login: Login) -> Self {
        Self { logins: BTreeMap::from([(key(registry), login)]) }
    }

    /// The login for a repository: of the longest entry that it is in.
    pub fn login(&self, registry: &str, repository: &str) -> Option<&Login> {
        let mut place = format!("{}/{repository}", key(registry));
        loop {
            if let Some(login) = self.logins.get(&place) {
                return Some(login);
            }
            place.truncate(place.rfind('/')?);
        }
    }
}

/// An entry's name without scheme and end: `https://index.docker.io/v1/` is how docker itself writes its hub.
fn key(registry: &str) -> String {
    let bare = registry.strip_prefix("https://").or_else(|| registry.strip_prefix("http://"));
    let bare = bare.unwrap_or(registry).trim_end_matches('/');
    let bare = bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare);
    match bare {
        "docker.io" | "registry-1.docker.io" => "index.docker.io".to_owned(),
        other => other.to_owned(),
    }
}

/// `None`: the entry is damaged; `Some(None)`: it says nothing, as where a helper program keeps the password.
#[expect(clippy::option_option, reason = "two kinds of nothing, told apart at once by the one caller")]
fn login(entry: Entry) -> Option<Option<Login>> {
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    if let Some(token) = filled(entry.identitytoken) {
        return Some(Some(Login::IdentityToken(token)));
    }
    if let Some(token) = filled(entry.registrytoken) {
        return Some(Some(Login::RegistryToken(token)));
    }
    if let Some(auth) = filled(entry.auth) {
        let text = String::from_utf8(STANDARD.decode(auth.trim()).ok()?).ok()?;
        let (user, password) = text.split_once(':')?;
        let password = password.trim_end_matches('\0').to_owned();
        return Some(Some(Login::Password { user: user.to_owned(), password }));
    }
    let named = filled(entry.username).zip(filled(entry.password));
    Some(named.map(|(user, password)| Login::Password { user, password }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(login: Option<&Login>) -> Option<&str> {
        login.map(|login| match login {
            Login::Password { user, .. } => user.as_str(),
            Login::IdentityToken(_) => "(identity)",
            Login::RegistryToken(_) => "(registry)",
        })
    }

    #[test]
    fn the_longest_entry_that_a_repository_is_in_is_its_login() {
        let me = STANDARD.encode("hub:word:with:colons");
        let json = format!(
            r#"{{"auths": {{
                "https://index.docker.io/v1/": {{"auth": "{me}"}},
                "ghcr.io": {{"username": "all", "password": "x"}},
                "ghcr.io/team": {{"username": "team", "password": "x"}},
                "https://reg.example:5000/": {{"identitytoken": "t"}},
                "raw.example": {{"registrytoken": "t"}},
                "helped.example": {{}}
            }}, "credsStore": "desktop"}}"#
        );
        let credentials = Credentials::parse(json.as_bytes()).unwrap();
        for (registry, repository, expected) in [
            ("index.docker.io", "library/tag", Some("hub")),
            ("ghcr.io", "other/tag", Some("all")),
            ("ghcr.io", "team/tag", Some("team")),
            ("ghcr.io", "teams/tag", Some("all")),
            ("reg.example:5000", "tag", Some("(identity)")),
            ("reg.example", "tag", None),
            ("raw.example", "a/b/c", Some("(registry)")),
            ("helped.example", "tag", None),
        ] {
            assert_eq!(user(credentials.login(registry, repository)), expected, "{registry}/{repository}");
        }
        let Some(Login::Password { password, .. }) = credentials.login("docker.io", "a") else { panic!() };
        assert_eq!(password, "word:with:colons");
    }

    #[test]
    fn what_is_damaged_is_refused_and_nothing_secret_is_said() {
        for (json, expected) in [
            ("{", "the credentials are not a docker configuration: line 1, column 1"),
            (
                r#"{"auths": {"a": {"auth": 7}}}"#,
                "the credentials are not a docker configuration: line 1, column 26",
            ),
            (
                r#"{"auths": {"a": {"auth": "?secret"}}}"#,
                "the credentials of `a` are not `user:password` in base64",
            ),
            (
                r#"{"auths": {"a": {"auth": "c2VjcmV0"}}}"#,
                "the credentials of `a` are not `user:password` in base64",
            ),
        ] {
            assert_eq!(Credentials::parse(json.as_bytes()).unwrap_err().to_string(), expected, "{json}");
        }
        let login = Login::Password { user: "me".into(), password: "secret".into() };
        assert_eq!(
            format!("{:?}", Credentials::single("https://ghcr.io", login)),
            r#"{"ghcr.io": Password}"#
        );
    }
}
