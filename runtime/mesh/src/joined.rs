//! Headers whose lines are one value to policies.

/// Headers whose lines Envoy joins by `,` when it reads them, empty ones left out (found by asking Envoy 1.40).
const JOINED: [&str; 36] = [
    "accept",
    "accept-encoding",
    "access-control-request-headers",
    "access-control-request-method",
    "access-control-request-private-network",
    "authorization",
    "cache-control",
    "cdn-loop",
    "content-encoding",
    "content-type",
    "grpc-accept-encoding",
    "grpc-timeout",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "origin",
    "pragma",
    "proxy-status",
    "referer",
    "user-agent",
    "via",
    "x-client-trace-id",
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-external-address",
    "x-envoy-is-timeout-retry",
    "x-envoy-original-host",
    "x-envoy-original-path",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-request-id",
];

/// Whether conditions on the header `name`, in lower case, compare all of its lines joined by `,`. Each line of any other
/// header is compared by itself, and one that matches suffices.
pub fn is_joined_header(name: &str) -> bool {
    JOINED.binary_search(&name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_found() {
        assert!(JOINED.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(JOINED.iter().all(|name| is_joined_header(name)));
        for other in ["x-role", "cookie", "host", "Authorization", ""] {
            assert!(!is_joined_header(other), "{other}");
        }
    }
}
