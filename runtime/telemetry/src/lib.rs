//! One record of an exchange or connection, turned into metrics and access log.
