//! What a callback outside of streams brings: the answer of another service, as maps and buffers that exist while the
//! callback runs.

use crate::pairs;
use bytes::Bytes;
use cairn_filter::{CalloutAnswer, CalloutError};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Response, StatusCode};

/// What the running callback brings; nothing, mostly.
#[derive(Default)]
pub(crate) struct Delivery {
    /// Header map 6, serialised.
    pub(crate) headers: Vec<u8>,
    /// Header map 7, serialised.
    pub(crate) trailers: Vec<u8>,
    /// Buffer 4; `None` outside of an answer.
    pub(crate) body: Option<Bytes>,
    /// The numbers of headers and of trailers.
    pub(crate) counts: [u32; 2],
}

impl Delivery {
    /// What became of an HTTP call. What Envoy's router answers by itself is answered here too, since plugins look for the
    /// status; an answer that broke off or is too long has nothing at all.
    pub(crate) fn of_http_call(answer: Result<CalloutAnswer, CalloutError>) -> Self {
        let failure = match answer {
            Ok(answer) => return Self::of_answer(answer),
            Err(CalloutError::UnknownService(_) | CalloutError::NoEndpoint(_)) => {
                (503, "no healthy upstream")
            }
            Err(CalloutError::Unreachable(_)) => (503, UNREACHABLE),
            Err(CalloutError::Closed) => (503, CLOSED),
            Err(CalloutError::Timeout(_)) => (504, "upstream request timeout"),
            Err(_) => return Self { body: Some(Bytes::new()), ..Self::default() },
        };
        let (status, text) = failure;
        let mut response = Response::new(Bytes::from_static(text.as_bytes()));
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        Self::of_answer(CalloutAnswer { response, trailers: HeaderMap::new() })
    }

    fn of_answer(answer: CalloutAnswer) -> Self {
        let (parts, body) = answer.response.into_parts();
        let counts = [parts.headers.len() as u32 + 1, answer.trailers.len() as u32];
        let status = (&b":status"[..], parts.status.as_str().as_bytes());
        let mut headers = Vec::new();
        pairs::write(&mut headers, counts[0], std::iter::once(status).chain(entries(&parts.headers)));
        let mut trailers = Vec::new();
        if counts[1] > 0 {
            pairs::write(&mut trailers, counts[1], entries(&answer.trailers));
        }
        Self { headers, trailers, body: Some(body), counts }
    }

    /// The length of the body.
    pub(crate) fn body_bytes(&self) -> u32 {
        self.body.as_ref().map_or(0, |body| body.len() as u32)
    }
}

/// Envoy's words.
const UNREACHABLE: &str =
    "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure";
const CLOSED: &str =
    "upstream connect error or disconnect/reset before headers. reset reason: connection termination";

fn entries(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
}
