//! What a callback outside of streams brings: the answer of another service, as maps and buffers that exist while the
//! callback runs.

use crate::grpc::{Ended, Metadata};
use crate::pairs;
use bytes::Bytes;
use cairn_filter::{CalloutAnswer, CalloutError};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use std::sync::Arc;

/// What the running callback brings; nothing, mostly.
pub(crate) struct Delivery {
    /// Header maps 4 to 7, serialised, and their entries: see the constants.
    maps: [Vec<u8>; 4],
    counts: [u32; 4],
    /// Buffer 4; `None` outside of an HTTP answer.
    pub(crate) body: Option<Bytes>,
    /// Buffer 5.
    pub(crate) message: Bytes,
    /// The status and message of a gRPC call.
    pub(crate) status: Ended,
}

impl Default for Delivery {
    fn default() -> Self {
        let maps = std::array::from_fn(|_| Vec::new());
        Self { maps, counts: [0; 4], body: None, message: Bytes::new(), status: (0, Arc::from("")) }
    }
}

impl Delivery {
    /// The places of maps.
    pub(crate) const GRPC_INITIAL: usize = 0;
    pub(crate) const GRPC_TRAILING: usize = 1;
    const CALL_HEADERS: usize = 2;
    const CALL_TRAILERS: usize = 3;

    /// A map, serialised; empty when there is none.
    pub(crate) fn map(&self, index: usize) -> &[u8] {
        self.maps.get(index).map_or(&[], Vec::as_slice)
    }

    /// The numbers of an HTTP answer's headers, bytes and trailers.
    pub(crate) fn http_counts(&self) -> [u32; 3] {
        let [_, _, headers, trailers] = self.counts;
        [headers, self.body.as_ref().map_or(0, |body| body.len() as u32), trailers]
    }

    /// Puts what came of a gRPC call in its place.
    pub(crate) fn set_metadata(&mut self, index: usize, metadata: &Metadata) {
        let status = metadata.status.as_ref().map(status_entry);
        self.set_entries(index, metadata.count(), status.into_iter().chain(entries(&metadata.headers)));
    }

    fn set_entries<'a>(
        &mut self,
        index: usize,
        count: usize,
        entries: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        let (Some(map), Some(known)) = (self.maps.get_mut(index), self.counts.get_mut(index)) else { return };
        *known = count as u32;
        map.clear();
        if count > 0 {
            pairs::write(map, count as u32, entries);
        }
    }

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
        let mut delivery = Self { body: Some(body), ..Self::default() };
        let headers = std::iter::once(status_entry(&parts.status)).chain(entries(&parts.headers));
        delivery.set_entries(Self::CALL_HEADERS, parts.headers.len() + 1, headers);
        delivery.set_entries(Self::CALL_TRAILERS, answer.trailers.len(), entries(&answer.trailers));
        delivery
    }
}

/// Envoy's words.
const UNREACHABLE: &str =
    "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure";
const CLOSED: &str =
    "upstream connect error or disconnect/reset before headers. reset reason: connection termination";

fn status_entry(status: &StatusCode) -> (&[u8], &[u8]) {
    (b":status", status.as_str().as_bytes())
}

fn entries(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
}
