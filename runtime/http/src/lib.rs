//! The life of one HTTP exchange: serve, route, balance, retry, upstream.
