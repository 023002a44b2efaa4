//! Keys and certificates: CSR, CA client, the embedded CA, rotation, SPIFFE verification, TLS configurations.
