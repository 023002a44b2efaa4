//! Differences that are meant. `README.md` gives the reason of each, under its name.

use crate::client::Told;
use crate::module::Module;
use crate::run::{Difference, Line, Observed, differences};

/// Whether all differences of a request are meant.
pub fn explains(module: &Module, envoy: &Observed, ours: &Observed) -> bool {
    differences(module, envoy, ours).iter().all(|found| name(module, envoy, ours, found).is_some())
}

/// The name of a difference that is meant.
pub fn name(module: &Module, envoy: &Observed, ours: &Observed, found: &Difference) -> Option<&'static str> {
    if found.what == "log" {
        return log(module, envoy, ours);
    }
    let of_headers = matches!(found.what, "headers" | "seen upstream");
    match found.what {
        "body" | "headers" if is_failure(envoy) && is_failure(ours) => Some("words of a failure"),
        _ if of_headers && without_length(&found.envoy) == without_length(&found.ours) => Some("framing"),
        "seen upstream" if grpc_call(&found.envoy) == grpc_call(&found.ours) => {
            Some("authority of gRPC calls")
        }
        "body" if module.known.cuts => Some("cuts"),
        _ => None,
    }
}

/// The proxy itself says that the upstream failed.
fn is_failure(observed: &Observed) -> bool {
    let says = |body: &[u8]| body.starts_with(b"upstream ");
    matches!(&observed.told, Told::Answer(answer) if answer.status >= 500 && says(&answer.body))
}

/// Headers without how long the body is said to be; that it is, the comparison of bodies shows.
fn without_length(text: &str) -> String {
    let mut parts = text.split(r#"("content-length", ""#);
    let first = parts.next().unwrap_or_default().to_owned();
    let rest = parts.map(|part| part.split_once(')').map_or(part, |(_, rest)| rest.trim_start_matches(", ")));
    (first + &rest.collect::<String>()).replace(", ]", "]")
}

/// What is seen of a gRPC call, to whichever name it says that it goes.
fn grpc_call(text: &str) -> String {
    without_length(text).replace(".modules.svc.cluster.local", "")
}

/// A line without what a host's way with headers changes; `None`: nothing is left.
type Without = fn(Line) -> Option<Line>;

/// In the order in which they are tried: each leaves aside what the ones before it do.
const HEADERS: [(&str, Without); 4] = [
    ("order of headers", Some),
    ("count of headers", |line| {
        let is_routers = line.text.contains("x-envoy-upstream-service-time");
        (!is_routers).then(|| Line { text: without_count(&line.text), ..line })
    }),
    ("framing", |line| (!line.text.contains("transfer-encoding")).then_some(line)),
    ("length of a failure", |line| (!line.text.contains("content-length")).then_some(line)),
];

/// Envoy shows a header of its own in answers to calls, and one that frames the body.
fn without_count(text: &str) -> String {
    match text.split_once("headers:") {
        Some((before, after)) => {
            let after = after.trim_start().trim_start_matches(|c: char| c.is_ascii_digit());
            format!("{before}headers: *{after}")
        }
        None => text.to_owned(),
    }
}

fn log(module: &Module, envoy: &Observed, ours: &Observed) -> Option<&'static str> {
    let (mut theirs, mut own) = (module.comparable(&envoy.lines), module.comparable(&ours.lines));
    for (name, without) in HEADERS {
        if name == "length of a failure" && !(is_failure(envoy) && is_failure(ours)) {
            return None;
        }
        theirs = theirs.into_iter().filter_map(without).collect();
        own = own.into_iter().filter_map(without).collect();
        if in_order(&theirs) == in_order(&own) {
            return Some(name);
        }
    }
    None
}

/// The lines, those of successive headers in the order of their names; headers of one name stay as they are.
fn in_order(lines: &[Line]) -> Vec<&Line> {
    let mut ordered: Vec<&Line> = lines.iter().collect();
    ordered
        .chunk_by_mut(|a, b| tells_a_header(a) && tells_a_header(b))
        .for_each(|run| run.sort_by_key(|line| name_of(line)));
    ordered
}

/// Names of headers that occur here.
const NAMES: [&str; 24] = [
    ":authority",
    ":method",
    ":path",
    ":scheme",
    ":status",
    "accept",
    "buffer-operation",
    "buffer-replace-at",
    "content-length",
    "content-type",
    "date",
    "my-custom-header",
    "te",
    "test",
    "transfer-encoding",
    "user-agent",
    "x-checksum",
    "x-double",
    "x-empty",
    "x-envoy-upstream-service-time",
    "x-forwarded-proto",
    "x-request-id",
    "x-upstream",
    "server",
];

fn name_of(line: &Line) -> Option<&'static str> {
    let words = line
        .text
        .split([' ', '"'])
        .map(|word| word.strip_suffix(':').filter(|word| !word.is_empty()).unwrap_or(word));
    words.filter_map(|word| NAMES.into_iter().find(|name| *name == word)).next()
}

fn tells_a_header(line: &Line) -> bool {
    name_of(line).is_some()
}
