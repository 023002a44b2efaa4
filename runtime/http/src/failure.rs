//! Everything that can go wrong with an exchange, and what follows from it: what the client sees, what the log says,
//! whether it may be tried again. One `match`, so that a new failure cannot be forgotten.

use cairn_filter::LocalReply;
use http::StatusCode;
use std::borrow::Cow;
use std::sync::Arc;

/// Why an exchange did not get the upstream's answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The path cannot be normalised.
    #[error("the path cannot be normalised")]
    BadPath,
    /// HTTP/1.1 without a host.
    #[error("the request names no host")]
    NoHost,
    /// CONNECT, or an upgrade other than to a WebSocket.
    #[error("the upgrade is not supported")]
    Upgrade,
    /// There are routes and none matches.
    #[error("no route matches")]
    NoRoute,
    /// The rule that matches cannot be honoured.
    #[error("the route is broken: {0}")]
    BrokenRoute(Arc<str>),
    /// The share of requests that fell on a backend that cannot be used, or all when no backend has a share.
    #[error("the backend cannot be used: {0}")]
    InvalidBackend(Arc<str>),
    /// No endpoint is ready.
    #[error("no endpoint is ready")]
    NoEndpoint,
    /// The endpoint does not accept connections, or proves another identity.
    #[error("the endpoint cannot be reached: {0}")]
    Connect(&'static str),
    /// The endpoint did not accept in time.
    #[error("the endpoint did not answer in time")]
    ConnectTimeout,
    /// There are too many connections to the endpoint already.
    #[error("the endpoint has too many connections")]
    Overflow,
    /// The endpoint refused the stream before working on it.
    #[error("the endpoint refused the stream")]
    Refused,
    /// The endpoint ended the connection, or broke the protocol, before it answered.
    #[error("the endpoint closed before it answered")]
    UpstreamClosed,
    /// The endpoint ended within its answer.
    #[error("the endpoint closed within its answer")]
    UpstreamCut,
    /// The endpoint ended an answer before the end that the answer has by its own framing.
    #[error("the endpoint's answer is not whole")]
    UpstreamBroken,
    /// The client went away.
    #[error("the client went away")]
    ClientGone,
    /// A filter ended the exchange.
    #[error("a filter ended the exchange")]
    FilterReset,
    /// A filter holds more of the request than may be held.
    #[error("the request's body is longer than filters may hold")]
    RequestTooLarge,
    /// A filter holds more of the response than may be held.
    #[error("the response's body is longer than filters may hold")]
    ResponseTooLarge,
    /// A filter made a body longer or shorter than its head says, which is gone.
    #[error("a filter changed the length of a body whose head is gone")]
    LengthChanged,
}

/// What follows from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status the client sees; `None` when it sees none.
    pub status: Option<StatusCode>,
    /// The gRPC status a gRPC client sees in its place.
    pub grpc_status: u8,
    /// Envoy's response flag.
    pub flags: &'static str,
    /// Envoy's response code details.
    pub details: &'static str,
    /// The text of the answer.
    pub text: &'static str,
    /// Whether another endpoint may be tried: this one has not begun to work on the request.
    pub retry: bool,
}

impl Failure {
    /// What follows.
    pub fn answer(&self) -> Answer {
        let (status, flags, details, text, retry) = match self {
            Self::BadPath => (Some(StatusCode::BAD_REQUEST), "-", "path_normalization_failed", "", false),
            Self::NoHost => (Some(StatusCode::BAD_REQUEST), "-", "missing_host_header", "", false),
            Self::Upgrade => (Some(StatusCode::FORBIDDEN), "-", "upgrade_failed", "", false),
            Self::NoRoute => (Some(StatusCode::NOT_FOUND), "NR", "route_not_found", "", false),
            Self::BrokenRoute(_) => {
                (Some(StatusCode::INTERNAL_SERVER_ERROR), "-", "route_not_usable", "", false)
            }
            Self::InvalidBackend(_) => {
                (Some(StatusCode::INTERNAL_SERVER_ERROR), "NC", "backend_not_usable", "", false)
            }
            Self::NoEndpoint => (
                Some(StatusCode::SERVICE_UNAVAILABLE),
                "UH",
                "no_healthy_upstream",
                "no healthy upstream",
                false,
            ),
            Self::Connect(_) => (
                Some(StatusCode::SERVICE_UNAVAILABLE),
                "UF",
                "upstream_reset_before_response_started{remote_connection_failure}",
                "upstream connection failure",
                true,
            ),
            Self::ConnectTimeout => (
                Some(StatusCode::SERVICE_UNAVAILABLE),
                "UF",
                "upstream_reset_before_response_started{connection_timeout}",
                "upstream connection timeout",
                true,
            ),
            Self::Overflow => (
                Some(StatusCode::SERVICE_UNAVAILABLE),
                "UO",
                "upstream_reset_before_response_started{overflow}",
                "upstream overflow",
                false,
            ),
            Self::Refused => (
                Some(StatusCode::SERVICE_UNAVAILABLE),
                "UR",
                "upstream_reset_before_response_started{remote_refused_stream_reset}",
                "upstream refused the request",
                true,
            ),
            Self::UpstreamClosed => (
                Some(StatusCode::SERVICE_UNAVAILABLE),
                "UC",
                "upstream_reset_before_response_started{connection_termination}",
                "upstream closed before it answered",
                false,
            ),
            Self::UpstreamCut => {
                (None, "UC", "upstream_reset_after_response_started{connection_termination}", "", false)
            }
            Self::UpstreamBroken => {
                (None, "UPE", "upstream_reset_after_response_started{protocol_error}", "", false)
            }
            Self::ClientGone => (None, "DC", "downstream_remote_disconnect", "", false),
            Self::FilterReset => (None, "-", "filter_reset", "", false),
            Self::RequestTooLarge => (
                Some(StatusCode::PAYLOAD_TOO_LARGE),
                "-",
                "request_payload_too_large",
                "Payload Too Large",
                false,
            ),
            Self::ResponseTooLarge => (
                Some(StatusCode::INTERNAL_SERVER_ERROR),
                "-",
                "response_payload_too_large",
                "Internal Server Error",
                false,
            ),
            Self::LengthChanged => {
                (Some(StatusCode::INTERNAL_SERVER_ERROR), "-", "filter_changed_length_after_head", "", false)
            }
        };
        let grpc_status = status.map_or(GRPC_UNKNOWN, grpc_status_of);
        Answer { status, grpc_status, flags, details, text, retry }
    }

    /// Why there was no connection to the endpoint, in Envoy's words; empty for other failures.
    pub fn transport(&self) -> &'static str {
        match self {
            Self::Connect(reason) => reason,
            _ => "",
        }
    }

    /// Envoy's response code details: with the reason behind the failure's name, where there is one.
    pub(crate) fn details(&self) -> Cow<'static, str> {
        let name = self.answer().details;
        match self.transport() {
            "" => name.into(),
            reason => format!("{}|{}}}", name.trim_end_matches('}'), reason.replace(' ', "_")).into(),
        }
    }

    /// Its flags when it is what the last of several attempts came to (Envoy's `URX`, "retry limit exceeded").
    pub(crate) fn flags_of_last_attempt(&self) -> &'static str {
        match self.answer().flags {
            "UF" => "URX,UF",
            "UR" => "URX,UR",
            flags => flags,
        }
    }

    /// The reply to the client, or `None` when there is nobody to answer or nothing more to say.
    pub fn reply(&self) -> Option<LocalReply> {
        let answer = self.answer();
        let mut reply = LocalReply::text(answer.status?, answer.text, answer.details);
        reply.details = self.details();
        reply.grpc_status = Some(answer.grpc_status);
        Some(reply)
    }
}

const GRPC_UNKNOWN: u8 = 2;

/// The gRPC status that stands for an HTTP status (gRPC `http-grpc-status-mapping.md`; Envoy's local replies).
pub(crate) fn grpc_status_of(status: StatusCode) -> u8 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => GRPC_UNKNOWN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_the_answer_that_istio_users_know() {
        let reason: Arc<str> = "r".into();
        for (failure, status, grpc, flags, retry) in [
            (Failure::BadPath, 400, 13, "-", false),
            (Failure::NoHost, 400, 13, "-", false),
            (Failure::Upgrade, 403, 7, "-", false),
            (Failure::NoRoute, 404, 12, "NR", false),
            (Failure::BrokenRoute(reason.clone()), 500, 2, "-", false),
            (Failure::InvalidBackend(reason), 500, 2, "NC", false),
            (Failure::NoEndpoint, 503, 14, "UH", false),
            (Failure::Connect("r"), 503, 14, "UF", true),
            (Failure::ConnectTimeout, 503, 14, "UF", true),
            (Failure::Overflow, 503, 14, "UO", false),
            (Failure::Refused, 503, 14, "UR", true),
            (Failure::UpstreamClosed, 503, 14, "UC", false),
            (Failure::UpstreamCut, 0, 2, "UC", false),
            (Failure::UpstreamBroken, 0, 2, "UPE", false),
            (Failure::ClientGone, 0, 2, "DC", false),
            (Failure::FilterReset, 0, 2, "-", false),
            (Failure::RequestTooLarge, 413, 2, "-", false),
            (Failure::ResponseTooLarge, 500, 2, "-", false),
            (Failure::LengthChanged, 500, 2, "-", false),
        ] {
            let answer = failure.answer();
            let found = (answer.status.map_or(0, |status| status.as_u16()), answer.grpc_status, answer.flags);
            assert_eq!((found, answer.retry), ((status, grpc, flags), retry), "{failure:?}");
            assert!(!answer.details.is_empty() && !answer.details.contains(' '), "{failure:?}");
            assert_eq!(failure.reply().is_some(), status != 0, "{failure:?}");
        }
    }

    #[test]
    fn the_reason_of_a_broken_route_is_not_told_to_the_client() {
        let reply = Failure::BrokenRoute("secret".into()).reply().unwrap();
        assert!(reply.body.is_empty());
    }
}
