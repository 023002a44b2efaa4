//! The numbers of ABI 0.2.1 that the SDK uses, and what a proxy may answer.

/// Why a proxy did not do what was asked of it (`proxy_status_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostError {
    /// There is no such thing: header, property, key, cluster or function.
    NotFound,
    /// An argument makes no sense to the proxy, or not at this time.
    BadArgument,
    /// The value exists and cannot be written out.
    Serialization,
    /// The argument could not be read.
    Parse,
    /// The queue is empty.
    Empty,
    /// The value has been changed by somebody else.
    CasMismatch,
    /// The proxy failed.
    Internal,
    /// The proxy does not have the function.
    Unimplemented,
    /// Another status, by its number.
    Other(u32),
}

impl HostError {
    /// The error of a status, or that it is none.
    pub(crate) fn check(status: u32) -> Result<(), Self> {
        Err(match status {
            0 => return Ok(()),
            1 => Self::NotFound,
            2 => Self::BadArgument,
            3 => Self::Serialization,
            4 => Self::Parse,
            7 => Self::Empty,
            8 => Self::CasMismatch,
            10 => Self::Internal,
            12 => Self::Unimplemented,
            other => Self::Other(other),
        })
    }
}

impl std::fmt::Display for HostError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotFound => f.write_str("not found"),
            Self::BadArgument => f.write_str("bad argument"),
            Self::Serialization => f.write_str("value cannot be serialized"),
            Self::Parse => f.write_str("argument cannot be parsed"),
            Self::Empty => f.write_str("empty"),
            Self::CasMismatch => f.write_str("changed meanwhile"),
            Self::Internal => f.write_str("internal failure"),
            Self::Unimplemented => f.write_str("not implemented"),
            Self::Other(status) => write!(f, "status {status}"),
        }
    }
}

impl std::error::Error for HostError {}

/// What goes on, or ends (`proxy_stream_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Request = 0,
    Response = 1,
    /// What the client of a connection sends.
    Downstream = 2,
    /// What the server of a connection sends.
    Upstream = 3,
}

impl Stream {
    pub(crate) fn buffer(self) -> Buffer {
        match self {
            Self::Request => Buffer::RequestBody,
            Self::Response => Buffer::ResponseBody,
            Self::Downstream => Buffer::DownstreamData,
            Self::Upstream => Buffer::UpstreamData,
        }
    }
}

/// Which half of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Request = 0,
    Response = 1,
}

impl Side {
    pub(crate) fn headers(self) -> Map {
        match self {
            Self::Request => Map::RequestHeaders,
            Self::Response => Map::ResponseHeaders,
        }
    }

    pub(crate) fn trailers(self) -> Map {
        match self {
            Self::Request => Map::RequestTrailers,
            Self::Response => Map::ResponseTrailers,
        }
    }

    pub(crate) fn stream(self) -> Stream {
        match self {
            Self::Request => Stream::Request,
            Self::Response => Stream::Response,
        }
    }

    pub(crate) fn body(self) -> Buffer {
        self.stream().buffer()
    }
}

/// Header maps (`proxy_map_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Map {
    RequestHeaders = 0,
    RequestTrailers = 1,
    ResponseHeaders = 2,
    ResponseTrailers = 3,
    AnswerHeaders = 6,
    AnswerTrailers = 7,
}

/// Buffers (`proxy_buffer_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Buffer {
    RequestBody = 0,
    ResponseBody = 1,
    DownstreamData = 2,
    UpstreamData = 3,
    AnswerBody = 4,
    GrpcMessage = 5,
    PluginConfiguration = 7,
}

/// Metrics (`proxy_metric_type_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MetricKind {
    Counter = 0,
    Gauge = 1,
    Histogram = 2,
}

/// What a callback answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Continue = 0,
    Pause = 1,
}

/// Headers, trailers or metadata in order.
pub(crate) type Pairs = Vec<(String, Vec<u8>)>;

/// Writes pairs as the ABI wants them: count, lengths, then each name and value with a NUL behind it.
#[cfg_attr(not(target_arch = "wasm32"), allow(dead_code))]
pub(crate) fn write_pairs<N: AsRef<[u8]>, V: AsRef<[u8]>>(pairs: &[(N, V)]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + pairs.len() * 48);
    let mut push_length = |length: usize| bytes.extend_from_slice(&(length as u32).to_le_bytes());
    push_length(pairs.len());
    for (name, value) in pairs {
        push_length(name.as_ref().len());
        push_length(value.as_ref().len());
    }
    for (name, value) in pairs {
        for part in [name.as_ref(), value.as_ref()] {
            bytes.extend_from_slice(part);
            bytes.push(0);
        }
    }
    bytes
}

/// Reads pairs. What does not hold together ends them early.
#[cfg_attr(not(target_arch = "wasm32"), allow(dead_code))]
pub(crate) fn read_pairs(bytes: &[u8]) -> Pairs {
    let number = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let count = number(0).unwrap_or(0);
    // Each pair takes eight bytes of lengths and two of NULs, so the count is no way to ask for much memory.
    let mut pairs = Vec::with_capacity(count.min(bytes.len() / 10));
    let mut at = count.saturating_mul(8).saturating_add(4);
    for index in 0..count {
        let (Some(name), Some(value)) = (number(4 + index * 8), number(8 + index * 8)) else { break };
        let Some(end) = at.checked_add(name).and_then(|end| end.checked_add(value)?.checked_add(2)) else {
            break;
        };
        let Some(pair) = bytes.get(at..end) else { break };
        let text = String::from_utf8_lossy(&pair[..name]).into_owned();
        pairs.push((text, pair[name + 1..name + 1 + value].to_vec()));
        at = end;
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_survive_the_way_there_and_back() {
        let pairs = vec![
            (":path".to_owned(), b"/".to_vec()),
            ("x".to_owned(), Vec::new()),
            ("x".to_owned(), b"\xff\0".to_vec()),
        ];
        assert_eq!(read_pairs(&write_pairs(&pairs)), pairs);
        assert_eq!(read_pairs(&[]), Pairs::new());
        assert_eq!(read_pairs(&[0]), Pairs::new());
    }

    #[test]
    fn broken_pairs_end_early_and_ask_for_no_memory() {
        let whole = write_pairs(&[("a", "1"), ("b", "2")]);
        for length in 0..whole.len() {
            assert!(read_pairs(&whole[..length]).len() < 2, "{length}");
        }
        assert_eq!(read_pairs(&[0xff; 64]), Pairs::new());
    }

    #[test]
    fn statuses_have_names() {
        assert_eq!(HostError::check(0), Ok(()));
        assert_eq!(HostError::check(8), Err(HostError::CasMismatch));
        assert_eq!(HostError::check(99), Err(HostError::Other(99)));
    }
}
