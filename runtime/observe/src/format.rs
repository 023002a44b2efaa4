//! Access log formats: Envoy's command operators, parsed once to a list of segments, written by going through it.

use crate::Expression;
use crate::facts::{Facts, Header, as_text};
use crate::json::append_json_bytes;
use crate::operator::{Operator, Written};
use cairn_telemetry::Wants;
use serde_json::Value;
use std::borrow::Cow;

/// The longest format.
const BYTES_MAX: usize = 16 << 10;

/// Why a format cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// There is no such operator.
    #[error("there is no operator `%{0}%`")]
    UnknownOperator(String),
    /// What is between the operator's brackets cannot be read.
    #[error("`%{operator}%`: {reason}")]
    BadArgument {
        /// The operator, as written.
        operator: String,
        /// What is wrong.
        reason: String,
    },
    /// A percent sign that begins nothing; one by itself is written twice.
    #[error("`%` at byte {0} begins no operator; for a percent sign write `%%`")]
    Unclosed(usize),
    /// It is too long.
    #[error("is longer than {BYTES_MAX} bytes")]
    TooLong,
}

/// A format that is ready to be written.
#[derive(Clone, Debug, Default)]
pub struct Format {
    segments: Vec<Segment>,
}

#[derive(Clone, Debug)]
enum Segment {
    Text(String),
    Operator {
        operator: Operator,
        /// The most bytes of its value.
        bytes_max: Option<usize>,
    },
}

impl Format {
    /// Parses a format.
    ///
    /// # Errors
    /// When it has an operator that there is not, or one whose arguments cannot be read.
    pub fn parse(text: &str) -> Result<Self, FormatError> {
        if text.len() > BYTES_MAX {
            return Err(FormatError::TooLong);
        }
        let mut segments = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('%') {
            let (before, after) =
                (rest.get(..at).unwrap_or_default(), rest.get(at + 1..).unwrap_or_default());
            plain.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                plain.push('%');
                rest = after;
                continue;
            }
            let place = text.len() - after.len() - 1;
            let (written, after) = operator_text(after).ok_or(FormatError::Unclosed(place))?;
            if !plain.is_empty() {
                segments.push(Segment::Text(std::mem::take(&mut plain)));
            }
            segments.push(operator(written)?);
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            segments.push(Segment::Text(plain));
        }
        Ok(Self { segments })
    }

    /// Asks for the headers it needs.
    pub(crate) fn want(&self, wants: &mut Wants) {
        for segment in &self.segments {
            if let Segment::Operator { operator, .. } = segment {
                operator.want(wants);
            }
        }
    }

    /// Appends what it says of an exchange, as Envoy writes it: nothing is escaped but what could end a line. What is
    /// not there is `-`, or nothing if `omit_empty`.
    pub(crate) fn write(&self, out: &mut Vec<u8>, facts: &Facts<'_>, omit_empty: bool) {
        for segment in &self.segments {
            match segment {
                Segment::Text(text) => out.extend_from_slice(text.as_bytes()),
                Segment::Operator { operator, bytes_max } => {
                    let before = out.len();
                    if operator.write(out, facts) == Written::Nothing {
                        out.truncate(before);
                        if !omit_empty {
                            out.push(b'-');
                        }
                    } else if let Some(most) = bytes_max {
                        out.truncate(before + most);
                    }
                }
            }
        }
    }

    /// What it says, for OTLP and span tags; `None` where a single operator has nothing to say.
    pub(crate) fn text(&self, facts: &Facts<'_>) -> Option<String> {
        self.bytes(facts, b"-").map(|bytes| as_text(bytes).into_owned())
    }

    /// What it says as it is, with `missing` for what is not there beside others.
    fn bytes<'a>(&'a self, facts: &Facts<'a>, missing: &'static [u8]) -> Option<Cow<'a, [u8]>> {
        let of = |operator: &'a Operator, bytes_max: Option<usize>| {
            let bytes = operator.bytes(facts)?;
            Some(match bytes_max {
                Some(most) if most < bytes.len() => bytes.get(..most).unwrap_or_default().to_vec().into(),
                _ => bytes,
            })
        };
        if let [Segment::Operator { operator, bytes_max }] = self.segments.as_slice() {
            return of(operator, *bytes_max);
        }
        let mut all = Vec::new();
        for segment in &self.segments {
            match segment {
                Segment::Text(text) => all.extend_from_slice(text.as_bytes()),
                Segment::Operator { operator, bytes_max } => {
                    all.extend_from_slice(of(operator, *bytes_max).as_deref().unwrap_or(missing));
                }
            }
        }
        Some(all.into())
    }

    /// Appends its value as JSON, `null` where it says nothing.
    pub(crate) fn write_json(&self, out: &mut Vec<u8>, facts: &Facts<'_>, omit_empty: bool) -> Written {
        let written = match self.segments.as_slice() {
            [Segment::Operator { operator, bytes_max: None }] => operator.write_json(out, facts),
            _ => match self.bytes(facts, if omit_empty { b"" } else { b"-" }) {
                Some(bytes) => {
                    append_json_bytes(out, &bytes);
                    Written::Something
                }
                None => Written::Nothing,
            },
        };
        if written == Written::Nothing {
            out.extend_from_slice(b"null");
        }
        written
    }

    /// Its value in JSON: a number where a single operator is one, `null` where a single operator has nothing to say.
    pub(crate) fn json(&self, facts: &Facts<'_>) -> Value {
        if let [Segment::Operator { operator, bytes_max: None }] = self.segments.as_slice()
            && let Some(number) = operator.number(facts)
        {
            return number.map_or(Value::Null, Value::from);
        }
        self.text(facts).map_or(Value::Null, Value::String)
    }

    /// Istio's default line (`meshConfig.accessLogFormat`), where [`cairn_telemetry::append_default_line`] does not do.
    pub(crate) fn istio() -> Result<Self, FormatError> {
        Self::parse(ISTIO)
    }
}

/// Istio's default line.
const ISTIO: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
    %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
    \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
    \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% \
    %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

/// Splits after the `%` that ends an operator: brackets hide those within them.
fn operator_text(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'%' if depth == 0 => return Some((text.get(..at)?, text.get(at + 1..)?)),
            _ => {}
        }
    }
    None
}

/// Reads `NAME`, `NAME(argument)`, `NAME:length` or `NAME(argument):length`.
fn operator(written: &str) -> Result<Segment, FormatError> {
    let bad =
        |reason: &str| FormatError::BadArgument { operator: written.to_owned(), reason: reason.to_owned() };
    let name_end = written.find(['(', ':']).unwrap_or(written.len());
    let (name, rest) = written.split_at(name_end);
    let (argument, rest) = match rest.strip_prefix('(') {
        Some(inner) => {
            let close = inner.rfind(')').ok_or_else(|| bad("the bracket is not closed"))?;
            (inner.get(..close), inner.get(close + 1..).unwrap_or_default())
        }
        None => (None, rest),
    };
    let bytes_max = match rest.strip_prefix(':') {
        Some(length) => Some(length.parse().map_err(|_| bad("the length must be a whole number"))?),
        None if rest.is_empty() => None,
        None => return Err(bad("something follows the bracket")),
    };
    let operator = parse_operator(written, name, argument)?;
    Ok(Segment::Operator { operator, bytes_max })
}

fn parse_operator(written: &str, name: &str, argument: Option<&str>) -> Result<Operator, FormatError> {
    let bad = |reason: String| FormatError::BadArgument { operator: written.to_owned(), reason };
    let needed =
        || argument.filter(|text| !text.is_empty()).ok_or_else(|| bad("needs an argument".to_owned()));
    let headers = |read: fn(&str) -> Option<Header>| {
        let (main, other) = match needed()?.split_once('?') {
            Some((main, other)) => (main, Some(other)),
            None => (needed()?, None),
        };
        let read =
            |name: &str| read(name).ok_or_else(|| bad(format!("`{name}` cannot be the name of a header")));
        Ok((read(main)?, other.map(read).transpose()?))
    };
    Ok(match name {
        "REQ" => {
            let (main, other) = headers(Header::of_request)?;
            Operator::Request(main, other)
        }
        "REQ_WITHOUT_QUERY" => {
            let (main, other) = headers(Header::of_request)?;
            Operator::RequestWithoutQuery(main, other)
        }
        "RESP" => {
            let (main, other) = headers(Header::of_response)?;
            Operator::Response(main, other)
        }
        "TRAILER" => {
            let (main, other) = headers(Header::of_response)?;
            Operator::Trailer(main, other)
        }
        "START_TIME" => {
            Operator::StartTime(crate::clock::TimeFormat::parse(argument.unwrap_or("")).map_err(bad)?)
        }
        "CEL" => Operator::Cel(Expression::parse(needed()?).map_err(|error| bad(error.to_string()))?.into()),
        "FILTER_STATE" => Operator::filter_state(needed()?).map_err(bad)?,
        "DYNAMIC_METADATA" => Operator::metadata(needed()?).map_err(bad)?,
        "METADATA" => Operator::metadata_of(needed()?).map_err(bad)?,
        "ENVIRONMENT" => Operator::Environment(std::env::var(needed()?).unwrap_or_default()),
        "GRPC_STATUS" => Operator::grpc_status(argument.unwrap_or("")).map_err(bad)?,
        name => match (Operator::plain(name), argument) {
            (Some(operator), None | Some("")) => operator,
            (Some(_), Some(_)) => return Err(bad("takes no argument".to_owned())),
            (None, _) => return Err(FormatError::UnknownOperator(written.to_owned())),
        },
    })
}

#[cfg(test)]
#[path = "format/tests.rs"]
mod tests;
