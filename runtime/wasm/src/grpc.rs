//! gRPC over HTTP/2 as callouts need it: framing of messages, and what an answer comes to.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use cairn_filter::{CalloutAnswer, CalloutError, CalloutFeed};
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// The longest message of a stream.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// The most bytes that wait to be sent in one stream.
const QUEUED_BYTES_MAX: usize = 1 << 20;
/// A flag for compression and a length stand before each message.
const PREFIX_BYTES: usize = 5;

/// How a call ended: its status and message.
pub(crate) type Ended = (u32, Arc<str>);

/// Statuses of gRPC; the highest there is, and what Envoy makes of one that there is not.
const STATUS_MAX: u32 = 16;
const NONE: u32 = u32::MAX;
const OK: u32 = 0;
const UNKNOWN: u32 = 2;
const INTERNAL: u32 = 13;
const UNAVAILABLE: u32 = 14;

/// What happens in a call.
#[derive(Debug, PartialEq)]
pub(crate) enum GrpcEvent {
    Initial(Metadata),
    Message(Bytes),
    Trailing(Metadata),
    Closed(Ended),
}

/// A head, whose status is shown with it, or trailers.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Metadata {
    pub(crate) status: Option<StatusCode>,
    pub(crate) headers: HeaderMap,
}

impl Metadata {
    /// The number of entries.
    pub(crate) fn count(&self) -> usize {
        self.headers.len() + usize::from(self.status.is_some())
    }

    /// What Envoy's router would have answered in the place of somebody who did not.
    pub(crate) fn of_end((code, text): &Ended) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(*code));
        if let Ok(text) = HeaderValue::from_str(text) {
            headers.insert("grpc-message", text);
        }
        Self { status: Some(StatusCode::OK), headers }
    }
}

/// A message with what stands before it.
pub(crate) fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(message);
    framed.freeze()
}

/// Takes messages out of a stream of bytes.
#[derive(Default)]
pub(crate) struct Deframer(BytesMut);

impl Deframer {
    pub(crate) fn push(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
    }

    /// The next message; `None` when it is not whole yet.
    ///
    /// # Errors
    /// When it is compressed, which was not offered, or too long.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Ended> {
        let Some((flag, rest)) = self.0.split_first() else { return Ok(None) };
        let Some(length) = rest.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes) as usize) else {
            return Ok(None);
        };
        if *flag != 0 {
            return Err((INTERNAL, "a message is compressed".into()));
        }
        if length > MESSAGE_BYTES_MAX {
            return Err((INTERNAL, "a message is too long".into()));
        }
        if self.0.len() < PREFIX_BYTES + length {
            return Ok(None);
        }
        self.0.advance(PREFIX_BYTES);
        Ok(Some(self.0.split_to(length).freeze()))
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a single call comes to: its message, or why there is none.
pub(crate) fn of_answer(answer: Result<CalloutAnswer, CalloutError>) -> Result<Bytes, Ended> {
    let answer = answer.map_err(|error| of_error(&error))?;
    let head = of_head(answer.response.status(), answer.response.headers());
    let (code, text) = match (head, of_trailers(&answer.trailers)) {
        (Some(ended), _) | (None, Some(ended)) => ended,
        (None, None) => (UNKNOWN, "".into()),
    };
    if code != OK {
        return Err((code, text));
    }
    let mut deframer = Deframer::default();
    deframer.push(answer.response.body());
    let mut last = None;
    while let Some(message) = deframer.next()? {
        last = Some(message);
    }
    // Of several the last one counts, as in Envoy.
    last.filter(|_| deframer.is_empty()).ok_or_else(|| (INTERNAL, "the answer is no whole message".into()))
}

/// How a call ended before it began.
pub(crate) fn of_error(error: &CalloutError) -> Ended {
    match error {
        CalloutError::Timeout(_) => (UNAVAILABLE, "upstream request timeout".into()),
        // It had begun to answer.
        CalloutError::TooLong(_) | CalloutError::BrokenOff(_) => (INTERNAL, error.to_string().into()),
        _ => (UNAVAILABLE, error.to_string().into()),
    }
}

/// How a call ended by its head alone: the answer is none of gRPC, or consists of trailers only.
pub(crate) fn of_head(status: StatusCode, headers: &HeaderMap) -> Option<Ended> {
    if let Some(ended) = of_trailers(headers) {
        return Some(ended);
    }
    // `Grpc::Utility::httpToGrpcStatus` of Envoy.
    let code = match status.as_u16() {
        200 => return None,
        400 => INTERNAL,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => UNAVAILABLE,
        _ => UNKNOWN,
    };
    Some((code, format!("HTTP status {status}").into()))
}

/// The status that trailers bring.
pub(crate) fn of_trailers(trailers: &HeaderMap) -> Option<Ended> {
    let status = trailers.get("grpc-status")?;
    let code = status.to_str().ok().and_then(|status| status.parse().ok());
    let code = code.filter(|code| *code <= STATUS_MAX).unwrap_or(NONE);
    let message = trailers.get("grpc-message").map(|message| percent_decoded(message.as_bytes()));
    Some((code, message.unwrap_or_default().into()))
}

/// How a stream ended that brought no status.
pub(crate) fn without_status() -> Ended {
    (UNKNOWN, "the stream ended without a status".into())
}

fn percent_decoded(bytes: &[u8]) -> String {
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((byte, after)) = rest.split_first() {
        let escaped = after.first_chunk::<2>().filter(|_| *byte == b'%');
        let escaped = escaped.and_then(|digits| std::str::from_utf8(digits).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(value) => {
                decoded.push(value);
                rest = &after[2..];
            }
            None => {
                decoded.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// The guest's end of what a stream sends.
#[derive(Debug)]
pub(crate) struct FeedSender {
    frames: mpsc::UnboundedSender<Bytes>,
    /// Bytes that wait.
    queued: Arc<AtomicUsize>,
}

/// The other end.
pub(crate) struct Feed {
    frames: mpsc::UnboundedReceiver<Bytes>,
    queued: Arc<AtomicUsize>,
}

/// Both ends of what a stream sends.
pub(crate) fn feed() -> (FeedSender, Feed) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let queued = Arc::new(AtomicUsize::new(0));
    (FeedSender { frames: sender, queued: Arc::clone(&queued) }, Feed { frames: receiver, queued })
}

impl FeedSender {
    /// Sends a frame; false when too much waits already.
    pub(crate) fn send(&self, frame: Bytes) -> bool {
        let length = frame.len();
        let waiting = self.queued.fetch_add(length, Ordering::Relaxed);
        // One frame may be longer than all that may wait, if nothing does.
        let fits = waiting == 0 || waiting + length <= QUEUED_BYTES_MAX;
        if !fits || self.frames.send(frame).is_err() {
            self.queued.fetch_sub(length, Ordering::Relaxed);
        }
        fits
    }
}

impl CalloutFeed for Feed {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let frame = self.frames.poll_recv(cx);
        if let Poll::Ready(Some(frame)) = &frame {
            self.queued.fetch_sub(frame.len(), Ordering::Relaxed);
        }
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Response;

    #[test]
    fn messages_are_found_wherever_the_bytes_are_cut() {
        let bytes = [frame(b"one"), frame(b""), frame(b"three")].concat();
        for cut in 0..bytes.len() {
            let mut deframer = Deframer::default();
            let mut found = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                deframer.push(part);
                while let Some(message) = deframer.next().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, [&b"one"[..], b"", b"three"], "cut {cut}");
        }
        for bad in [&[1, 0, 0, 0, 0][..], &[0, 255, 0, 0, 0]] {
            let mut deframer = Deframer::default();
            deframer.push(bad);
            assert_eq!(deframer.next().unwrap_err().0, INTERNAL);
        }
    }

    fn answered(
        status: u16,
        head: &[(&'static str, &'static str)],
        trailers: &[(&'static str, &'static str)],
        body: &[u8],
    ) -> Result<Bytes, Ended> {
        let map = |pairs: &[(&'static str, &'static str)]| {
            pairs
                .iter()
                .map(|(n, v)| (n.parse().unwrap(), HeaderValue::from_static(v)))
                .collect::<HeaderMap>()
        };
        let mut response = Response::new(Bytes::copy_from_slice(body));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        *response.headers_mut() = map(head);
        of_answer(Ok(CalloutAnswer { response, trailers: map(trailers) }))
    }

    #[test]
    fn a_call_has_one_message_or_a_status() {
        let ok = &[("grpc-status", "0")][..];
        assert_eq!(answered(200, &[], ok, &frame(b"hi")), Ok(Bytes::from_static(b"hi")));
        let both = [frame(b"one"), frame(b"two")].concat();
        assert_eq!(answered(200, &[], ok, &both), Ok(Bytes::from_static(b"two")));
        for (name, result, code, text) in [
            (
                "status",
                answered(200, &[], &[("grpc-status", "7"), ("grpc-message", "no%20way%")], b""),
                7,
                "no way%",
            ),
            ("trailers only", answered(200, &[("grpc-status", "5")], &[], b""), 5, ""),
            ("no status", answered(200, &[], &[], &frame(b"hi")), 2, ""),
            ("odd status", answered(200, &[], &[("grpc-status", "x")], b""), u32::MAX, ""),
            ("no status of gRPC's", answered(200, &[], &[("grpc-status", "17")], b""), u32::MAX, ""),
            ("other HTTP status", answered(503, &[], &[], b""), 14, "HTTP status 503 Service Unavailable"),
            ("no message", answered(200, &[], ok, b""), 13, "the answer is no whole message"),
            (
                "half a message",
                answered(200, &[], ok, &frame(b"hi")[..6]),
                13,
                "the answer is no whole message",
            ),
        ] {
            assert_eq!(result, Err((code, text.into())), "{name}");
        }
        assert_eq!(of_answer(Err(CalloutError::Closed)).unwrap_err().0, 14);
        assert_eq!(of_answer(Err(CalloutError::BrokenOff("x".to_owned()))).unwrap_err().0, 13);
    }

    #[test]
    fn what_waits_to_be_sent_is_bounded() {
        let (sender, mut feed) = feed();
        let big = Bytes::from(vec![0; QUEUED_BYTES_MAX + 1]);
        assert!(sender.send(big.clone()), "one may be longer than the bound");
        assert!(!sender.send(Bytes::from_static(b"x")));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert_eq!(feed.poll_next(&mut cx), Poll::Ready(Some(big)));
        assert!(sender.send(Bytes::from_static(b"x")));
        drop(sender);
        assert_eq!(feed.poll_next(&mut cx), Poll::Ready(Some(Bytes::from_static(b"x"))));
        assert_eq!(feed.poll_next(&mut cx), Poll::Ready(None));
    }
}
