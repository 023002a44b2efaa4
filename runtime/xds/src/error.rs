//! Why a resource is refused.

use cairn_mesh::IdentityError;

/// Why one resource cannot be taken. It goes back to the server as the reason of a refusal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResourceError {
    /// It is not a message of its type.
    #[error("not a valid message: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// Its content is of another type than the subscription.
    #[error("it holds a `{found}`")]
    WrongType {
        /// What it holds.
        found: String,
    },
    /// A field that it cannot do without is not set.
    #[error("`{field}` is not set")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A field's value cannot be read.
    #[error("`{field}` cannot be {value}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// Namespace, service account and trust domain make no identity.
    #[error("no identity: {0}")]
    Identity(#[from] IdentityError),
    /// The decoder of objects refused it.
    #[error("{0}")]
    Object(String),
}

impl ResourceError {
    /// A value that is not possible, as it will be printed.
    pub(crate) fn value(field: &'static str, value: impl ToString) -> Self {
        Self::Value { field, value: value.to_string() }
    }
}
