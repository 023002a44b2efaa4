//! The node proxy: outbound, inbound, passthrough.
