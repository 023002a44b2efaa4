//! Where roots and tokens come from: a file, read each time so that it may be replaced, or a text that is given.

use crate::pem;
use std::io;
use std::path::{Path, PathBuf};

/// Roots that a server's certificate chains to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// A PEM file.
    File(PathBuf),
    /// PEM.
    Text(String),
    /// The system's.
    System,
}

impl Roots {
    /// The roots in PEM.
    ///
    /// # Errors
    /// When the file cannot be read, or the system has none.
    pub fn read(&self) -> io::Result<String> {
        match self {
            Self::File(path) => std::fs::read_to_string(path),
            Self::Text(text) => Ok(text.clone()),
            Self::System => {
                let loaded = rustls_native_certs::load_native_certs();
                if loaded.certs.is_empty() {
                    return Err(io::Error::new(
                        io::ErrorKind::NotFound,
                        "the system has no root certificates",
                    ));
                }
                Ok(loaded.certs.iter().map(pem::encode).collect())
            }
        }
    }

    /// What stands for them in errors.
    pub fn name(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Text(_) => Path::new("the roots given"),
            Self::System => Path::new("the system's roots"),
        }
    }
}

impl<P: Into<PathBuf>> From<P> for Roots {
    fn from(path: P) -> Self {
        Self::File(path.into())
    }
}

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// A file that holds it.
    File(PathBuf),
    /// Itself.
    Text(String),
}

impl Token {
    /// The token, without the space around it.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self) -> io::Result<String> {
        match self {
            Self::File(path) => std::fs::read_to_string(path).map(|text| text.trim().to_owned()),
            Self::Text(text) => Ok(text.trim().to_owned()),
        }
    }

    /// What stands for it in errors.
    pub fn name(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Text(_) => Path::new("the token given"),
        }
    }
}

/// Never shows the token.
impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Token").field(&self.name()).finish()
    }
}

impl<P: Into<PathBuf>> From<P> for Token {
    fn from(path: P) -> Self {
        Self::File(path.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_each_time_and_a_text_is_itself() {
        let path = std::env::temp_dir().join(format!("cairn-material-{}", std::process::id()));
        let (roots, token) = (Roots::from(path.as_path()), Token::from(path.as_path()));
        assert!(roots.read().is_err() && token.read().is_err());
        for text in ["one\n", "two\n"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!((roots.read().unwrap().as_str(), token.read().unwrap().as_str()), (text, text.trim()));
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Roots::Text("pem".into()).read().unwrap(), "pem");
        let given = Token::Text(" secret ".into());
        assert_eq!(given.read().unwrap(), "secret");
        assert!(!format!("{given:?}").contains("secret"));
    }
}
