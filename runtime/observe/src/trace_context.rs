//! Trace context on the wire: W3C `traceparent` and `tracestate`, and Zipkin's B3 in one header or in several.

use cairn_telemetry::Trace;
use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The most bytes of `tracestate` that are passed on (W3C asks for at least 512).
const STATE_BYTES_MAX: usize = 4096;

/// Which headers carry the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Propagation {
    W3c,
    B3,
    B3AndW3c,
}

/// What a caller says of the trace it is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Context {
    /// The trace and the caller's span; `None`: it only decides about sampling.
    pub(crate) ids: Option<(u128, u64)>,
    /// The ids are of 64 bits.
    pub(crate) narrow: bool,
    /// Whether the trace is sampled, if the caller has decided.
    pub(crate) sampled: Option<bool>,
    /// `tracestate`.
    pub(crate) state: String,
}

impl Propagation {
    /// What the caller says; by default nothing.
    pub(crate) fn extract(self, headers: &HeaderMap) -> Context {
        match self {
            Self::W3c => w3c(headers),
            Self::B3 => b3(headers),
            Self::B3AndW3c => b3(headers).or_else(|| w3c(headers)),
        }
        .unwrap_or_default()
    }

    /// Writes a trace into the headers for the upstream. Context of the caller that this kind does not speak of stays.
    pub(crate) fn inject(self, trace: &Trace, headers: &mut HeaderMap) {
        if self != Self::B3 {
            let flags = u8::from(trace.sampled);
            put(
                headers,
                TRACEPARENT,
                &format!("00-{:032x}-{:016x}-{flags:02x}", trace.trace_id, trace.span_id),
            );
            if trace.state.is_empty() {
                headers.remove(TRACESTATE);
            } else {
                put(headers, TRACESTATE, &trace.state);
            }
        }
        if self == Self::W3c {
            return;
        }
        let width = if trace.narrow { 16 } else { 32 };
        let trace_id = format!("{:0width$x}", trace.trace_id);
        let sampled = if trace.sampled { "1" } else { "0" };
        if headers.contains_key(B3) {
            let single = format!("{trace_id}-{:016x}-{sampled}", trace.span_id);
            put(headers, B3, &single);
        }
        put(headers, B3_TRACE_ID, &trace_id);
        put(headers, B3_SPAN_ID, &format!("{:016x}", trace.span_id));
        put(headers, B3_SAMPLED, sampled);
        if trace.parent_id == 0 {
            headers.remove(B3_PARENT_ID);
        } else {
            put(headers, B3_PARENT_ID, &format!("{:016x}", trace.parent_id));
        }
    }
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Lower-case hex of exactly this many digits, not all zero.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let plain = text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let number = plain.then(|| u128::from_str_radix(text, 16).ok()).flatten()?;
    (number != 0).then_some(number)
}

fn span_id(text: &str) -> Option<u64> {
    hex(text, 16).and_then(|number| u64::try_from(number).ok())
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// W3C Trace Context §3.2. A later version may have more fields behind the flags.
fn w3c(headers: &HeaderMap) -> Option<Context> {
    let mut parts = text(headers, &TRACEPARENT)?.splitn(5, '-');
    let (version, trace_id, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let known = version.len() == 2 && version.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !known || version == "ff" || (version == "00" && parts.next().is_some()) || flags.len() != 2 {
        return None;
    }
    let flags = u8::from_str_radix(flags, 16).ok()?;
    let ids = (hex(trace_id, 32)?, span_id(parent)?);
    let states: Vec<&str> =
        headers.get_all(TRACESTATE).iter().filter_map(|value| value.to_str().ok()).collect();
    let state = states.join(",");
    Some(Context {
        ids: Some(ids),
        narrow: false,
        sampled: Some(flags & 1 == 1),
        state: if state.len() > STATE_BYTES_MAX { String::new() } else { state },
    })
}

/// A trace id of 16 or 32 digits, and whether it is of 16.
fn b3_trace_id(text: &str) -> Option<(u128, bool)> {
    let text = text.to_ascii_lowercase();
    hex(&text, 32).map(|id| (id, false)).or_else(|| hex(&text, 16).map(|id| (id, true)))
}

fn b3_sampled(text: &str) -> Option<bool> {
    match text {
        "1" | "true" | "d" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

fn b3(headers: &HeaderMap) -> Option<Context> {
    if let Some(single) = text(headers, &B3) {
        let mut parts = single.split('-');
        let first = parts.next()?;
        let Some(span) = parts.next() else {
            // Only a decision.
            return Some(Context { sampled: Some(b3_sampled(first)?), ..Context::default() });
        };
        let (trace_id, narrow) = b3_trace_id(first)?;
        let span = span_id(&span.to_ascii_lowercase())?;
        let sampled = parts.next().and_then(b3_sampled);
        return Some(Context { ids: Some((trace_id, span)), narrow, sampled, state: String::new() });
    }
    let debug = text(headers, &B3_FLAGS) == Some("1");
    let sampled = if debug { Some(true) } else { text(headers, &B3_SAMPLED).and_then(b3_sampled) };
    let ids = text(headers, &B3_TRACE_ID).and_then(b3_trace_id);
    let span = text(headers, &B3_SPAN_ID).and_then(|text| span_id(&text.to_ascii_lowercase()));
    let (ids, narrow) = match (ids, span) {
        (Some((trace_id, narrow)), Some(span)) => (Some((trace_id, span)), narrow),
        _ => (None, false),
    };
    (ids.is_some() || sampled.is_some()).then(|| Context { ids, narrow, sampled, state: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";
    const IDS: (u128, u64) = (0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c, 0xb7ad_6b71_6920_3331);

    fn headers(pairs: &[(&'static str, String)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn a_callers_context_is_read() {
        use Propagation::{B3, B3AndW3c, W3c};
        let parent = |value: String| vec![("traceparent", value)];
        let found = |sampled| Context { ids: Some(IDS), sampled, ..Context::default() };
        let none = Context::default();
        let narrow = Context { ids: Some((IDS.0 as u64 as u128, IDS.1)), narrow: true, ..Context::default() };
        let decision = |sampled| Context { sampled: Some(sampled), ..Context::default() };
        for (name, kind, pairs, expected) in [
            ("nothing", W3c, vec![], none.clone()),
            ("sampled", W3c, parent(format!("00-{TRACE}-{SPAN}-01")), found(Some(true))),
            ("not sampled", W3c, parent(format!("00-{TRACE}-{SPAN}-00")), found(Some(false))),
            ("other flags", W3c, parent(format!("00-{TRACE}-{SPAN}-ff")), found(Some(true))),
            ("a later version", W3c, parent(format!("cc-{TRACE}-{SPAN}-01-more")), found(Some(true))),
            ("too much", W3c, parent(format!("00-{TRACE}-{SPAN}-01-more")), none.clone()),
            ("version ff", W3c, parent(format!("ff-{TRACE}-{SPAN}-01")), none.clone()),
            ("no trace", W3c, parent(format!("00-{}-{SPAN}-01", "0".repeat(32))), none.clone()),
            ("no span", W3c, parent(format!("00-{TRACE}-{}-01", "0".repeat(16))), none.clone()),
            ("upper case", W3c, parent(format!("00-{}-{SPAN}-01", TRACE.to_uppercase())), none.clone()),
            ("too short", W3c, parent(format!("00-{TRACE}-{SPAN}")), none.clone()),
            ("not for us", W3c, vec![("b3", "1".to_owned())], none.clone()),
            ("one header", B3, vec![("b3", format!("{TRACE}-{SPAN}-1"))], found(Some(true))),
            ("one header, undecided", B3, vec![("b3", format!("{TRACE}-{SPAN}"))], found(None)),
            ("one header, debug", B3, vec![("b3", format!("{TRACE}-{SPAN}-d-{SPAN}"))], found(Some(true))),
            ("one header, decision only", B3, vec![("b3", "0".to_owned())], decision(false)),
            ("64 bits", B3, vec![("b3", format!("{}-{SPAN}", &TRACE[16..]))], narrow),
            (
                "several headers",
                B3,
                vec![
                    ("x-b3-traceid", TRACE.to_owned()),
                    ("x-b3-spanid", SPAN.to_owned()),
                    ("x-b3-sampled", "0".to_owned()),
                ],
                found(Some(false)),
            ),
            ("several headers, decision only", B3, vec![("x-b3-sampled", "1".to_owned())], decision(true)),
            ("several headers, debug", B3, vec![("x-b3-flags", "1".to_owned())], decision(true)),
            ("half of it", B3, vec![("x-b3-traceid", TRACE.to_owned())], none.clone()),
            ("W3C beside B3", B3AndW3c, parent(format!("00-{TRACE}-{SPAN}-01")), found(Some(true))),
        ] {
            assert_eq!(kind.extract(&headers(&pairs)), expected, "{name}");
        }
    }

    #[test]
    fn the_state_is_passed_on() {
        let pairs = [
            ("traceparent", format!("00-{TRACE}-{SPAN}-01")),
            ("tracestate", "a=1".to_owned()),
            ("tracestate", "b=2".to_owned()),
        ];
        assert_eq!(Propagation::W3c.extract(&headers(&pairs)).state, "a=1,b=2");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let trace = Trace {
            trace_id: IDS.0,
            span_id: IDS.1,
            parent_id: 7,
            sampled: true,
            narrow: false,
            state: "a=1".to_owned(),
        };
        for kind in [Propagation::W3c, Propagation::B3, Propagation::B3AndW3c] {
            let mut headers = headers(&[("b3", "1".to_owned())]);
            kind.inject(&trace, &mut headers);
            let found = kind.extract(&headers);
            assert_eq!((found.ids, found.sampled), (Some(IDS), Some(true)), "{kind:?}");
            assert_eq!(headers.contains_key("traceparent"), kind != Propagation::B3);
            assert_eq!(headers.contains_key("x-b3-traceid"), kind != Propagation::W3c);
        }
        let mut headers = HeaderMap::new();
        Propagation::B3.inject(&Trace { trace_id: 0xabc, narrow: true, ..trace }, &mut headers);
        assert_eq!(headers["x-b3-traceid"], "0000000000000abc");
        assert_eq!(headers["x-b3-parentspanid"], "0000000000000007");
        assert!(!headers.contains_key("b3"), "only who sent it in one header gets it in one");
    }
}
