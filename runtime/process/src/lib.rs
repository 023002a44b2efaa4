//! Being a daemon: settings, threads, signals, readiness, admin server.
