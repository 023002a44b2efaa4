//! The L7 proxy of a namespace or service: tunnel, HTTP engine, tunnel.
