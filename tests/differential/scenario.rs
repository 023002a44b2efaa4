//! What is compared: policies, the requests they decide on, and what came of each.

use crate::yaml;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use cairn_mesh::PathNormalization;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

/// Policies, and requests that they decide on.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// How paths are normalised.
    pub normalization: PathNormalization,
    /// The mesh's trust domain, and its aliases.
    pub trust_domains: Vec<String>,
    /// There is no HTTP on the connections: what is asked is nothing but who connects to what.
    pub tcp: bool,
    /// The policies, as whole Kubernetes objects.
    pub objects: Vec<Value>,
    /// The requests, each on a connection of its own.
    pub asks: Vec<Ask>,
}

/// One request, and who sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The peer's identity; `None` for plaintext.
    pub peer: Option<String>,
    /// The peer's address.
    pub source: SocketAddr,
    /// Where it meant to go.
    pub destination: SocketAddr,
    /// The method.
    pub method: String,
    /// The request target, as on the wire.
    pub target: String,
    /// The headers, `host` among them, in the order of the wire.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
    /// It is sent over HTTP/2.
    pub http2: bool,
}

/// The header by which Envoy finds the policies of a scenario.
pub const SCENARIO: &str = "x-differential-scenario";

/// The header in which Envoy finds the peer's identity.
pub const PEER: &str = "x-differential-peer";

impl Ask {
    /// The bytes of the request. Both sides get the same.
    pub fn bytes(&self, scenario: usize) -> Vec<u8> {
        let mut text = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            text += &format!("{name}: {value}\r\n");
        }
        if let Some(peer) = &self.peer {
            text += &format!("{PEER}: {peer}\r\n");
        }
        if !self.body.is_empty() {
            text += &format!("content-length: {}\r\n", self.body.len());
        }
        text += &format!("{SCENARIO}: {scenario}\r\nconnection: close\r\n\r\n{}", self.body);
        text.into_bytes()
    }

    /// All values of a header.
    pub fn header<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self.headers.iter().filter(move |(own, _)| own.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str())
    }
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = self.peer.as_deref().unwrap_or("nobody");
        writeln!(f, "# {peer} at {} asks {}", self.source, self.destination)?;
        let version = if self.http2 { "HTTP/2" } else { "HTTP/1.1" };
        write!(f, "{:?} {:?} {version}", self.method, self.target)?;
        self.headers.iter().try_for_each(|(name, value)| write!(f, "\n{name}: {value:?}"))?;
        if self.body.is_empty() { Ok(()) } else { write!(f, "\n\n{}", self.body) }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# pathNormalization: {:?}, trust domains: {:?}",
            self.normalization, self.trust_domains
        )?;
        if self.tcp {
            writeln!(f, "# connections without HTTP")?;
        }
        self.objects.iter().try_for_each(|object| write!(f, "---\n{}", yaml::text(object)))?;
        self.asks.iter().try_for_each(|ask| write!(f, "---\n{ask}"))
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed every policy.
    Allowed {
        /// What policies said that decide nothing.
        remarks: Remarks,
        /// What the upstream sees of [`SEEN`].
        seen: Vec<(&'static str, String)>,
        /// What the client is told of [`TOLD`].
        told: Vec<(&'static str, String)>,
    },
    /// A policy refused it.
    Denied {
        /// The status.
        status: u16,
        /// The status of gRPC and its message, for gRPC requests.
        grpc: Option<(String, String)>,
        /// The body.
        body: String,
        /// Which policy, as Envoy's `%RESPONSE_CODE_DETAILS%` has it.
        details: String,
        /// The header `www-authenticate`.
        challenge: Option<String>,
        /// What the client is told of [`TOLD`].
        told: Vec<(&'static str, String)>,
        /// What an AUDIT policy said.
        audited: bool,
    },
    /// It was refused as no good HTTP, before any policy.
    Malformed,
    /// The connection ended without an answer.
    Closed,
    /// Something else.
    Other(String),
}

impl Outcome {
    /// It passed, and that is all.
    pub fn passes() -> Self {
        Self::Allowed { remarks: Remarks::default(), seen: Vec::new(), told: Vec::new() }
    }
}

/// What policies said that decide nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remarks {
    /// An AUDIT policy matched.
    pub audited: bool,
    /// ALLOW policies on trial would refuse it, as none of their rules matches.
    pub refused_by_allow_on_trial: bool,
    /// DENY policies on trial would refuse it.
    pub refused_by_deny_on_trial: bool,
}

/// What the `%RESPONSE_CODE_DETAILS%` of refusals by policies begin with.
const REFUSALS: [&str; 4] = ["rbac_", "jwt_", "ext_authz_", "request_payload_too_large"];

/// The `%RESPONSE_CODE_DETAILS%` of an answer that stands for the upstream's.
pub const PASSED: &str = "direct_response";

/// The headers in which both sides say more than they would tell a client.
pub const DETAILS: &str = "x-differential-details";
pub const AUDITED: &str = "x-differential-audited";
pub const TRIAL_ALLOW: &str = "x-differential-trial-allow";
pub const TRIAL_DENY: &str = "x-differential-trial-deny";

/// The headers of a request of which the answer tells what the upstream would see.
pub const SEEN: [&str; 15] = [
    ":path",
    "authorization",
    "cookie",
    "x-jwt",
    "x-auth",
    "x-payload",
    "x-claim",
    "x-issuer",
    "x-forwarded-for",
    "x-user",
    "x-team",
    "x-set-a",
    "x-set-b",
    "x-set-c",
    "x-remove",
];

/// The headers of an answer that a provider of external authorization may have written.
pub const TOLD: [&str; 8] =
    ["x-why", "x-seen", "x-other", "location", "set-cookie", "x-absent", "x-none", "x-always"];

/// The header of the answer that tells it.
pub fn seen_name(name: &str) -> String {
    format!("x-differential-seen-{}", name.trim_start_matches(':'))
}

/// An answer as it came.
#[derive(Clone, Debug)]
pub struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    /// Reads all bytes of a connection; `None` if there is no whole answer in them.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n")?;
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        let headers: Vec<_> = lines.filter_map(header).collect();
        // The answer to HEAD has no body, whatever its headers say.
        let chunked = !body.is_empty() && headers.iter().any(|(name, _)| name == "transfer-encoding");
        let body = if chunked { unchunk(body)? } else { body.to_owned() };
        Some(Self { status, headers, body })
    }

    /// The answer with this head and body.
    pub fn new(head: &http::response::Parts, body: &[u8]) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let headers = head.headers.iter().map(|(name, value)| (name.to_string(), text(value.as_bytes())));
        Self { status: head.status.as_u16(), headers: headers.collect(), body: text(body) }
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    /// What it says of [`TOLD`], all values of each.
    fn told(&self) -> Vec<(&'static str, String)> {
        let of = |name: &'static str| {
            let named = self.headers.iter().filter(move |(own, _)| own == name);
            let values: Vec<&str> = named.map(|(_, value)| value.as_str()).collect();
            (!values.is_empty()).then(|| (name, values.join(",")))
        };
        TOLD.into_iter().filter_map(of).collect()
    }

    /// What it says of policies that were asked `ask`. A stream of HTTP/2 that is reset is what a 400 is in HTTP/1.
    pub fn outcome(answer: Option<Self>, ask: &Ask) -> Outcome {
        let Some(answer) = answer else {
            return if ask.http2 { Outcome::Malformed } else { Outcome::Closed };
        };
        let said = |name: &str| answer.header(name).filter(|text| !text.is_empty() && *text != "-");
        let refused = |name| said(name) == Some("denied");
        let audited = said(AUDITED) == Some("true");
        let details = said(DETAILS).unwrap_or_default().to_owned();
        match answer.status {
            _ if details == PASSED => Outcome::Allowed {
                remarks: Remarks {
                    audited,
                    refused_by_allow_on_trial: refused(TRIAL_ALLOW),
                    refused_by_deny_on_trial: refused(TRIAL_DENY),
                },
                seen: SEEN
                    .iter()
                    .filter_map(|name| Some((*name, readable(said(&seen_name(name))?))))
                    .collect(),
                told: answer.told(),
            },
            status if REFUSALS.iter().any(|start| details.starts_with(start)) => Outcome::Denied {
                grpc: answer.header("grpc-status").map(|code| {
                    let message = answer.header("grpc-message").unwrap_or_default();
                    (code.to_owned(), message.to_owned())
                }),
                challenge: answer.header("www-authenticate").map(str::to_owned),
                told: answer.told(),
                status,
                body: answer.body.clone(),
                details,
                audited,
            },
            400 => Outcome::Malformed,
            // The same to a client that speaks gRPC.
            200 if answer.header("grpc-status") == Some("13") => Outcome::Malformed,
            status => Outcome::Other(format!("{status} {details}")),
        }
    }
}

/// An object in base64 as JSON with its keys in order, which Envoy writes in any; other texts as they are.
fn readable(text: &str) -> String {
    let json = BASE64_STANDARD.decode(text).ok().and_then(|json| serde_json::from_slice::<Value>(&json).ok());
    match json {
        Some(Value::Object(map)) => {
            let sorted: BTreeMap<_, _> = map.iter().map(|(key, value)| (key, value.to_string())).collect();
            format!("{sorted:?}")
        }
        _ => text.to_owned(),
    }
}

fn unchunk(mut rest: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.push_str(after.get(..size)?);
        rest = after.get(size + 2..)?;
    }
}
