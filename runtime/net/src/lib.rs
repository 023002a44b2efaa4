//! The operating system's network: listeners, original destination, transparent sockets, namespaces, copy, drain.
