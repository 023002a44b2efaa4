//! Filters written in Rust: authorization.
