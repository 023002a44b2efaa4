//! CONNECT tunnels over mTLS HTTP/2: accept, open, pool.
