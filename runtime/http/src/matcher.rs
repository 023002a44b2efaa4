//! The conditions of a route, compiled: regular expressions built, names parsed.

use cairn_filter::{RequestHead, Token};
use cairn_mesh::{ClaimMatch, NameMatch, PathRule, RouteMatch, ValueMatch};
use http::{HeaderName, Method};
use regex::Regex;
use serde_json::Value;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// One alternative of a rule, compiled.
#[derive(Clone, Debug)]
pub(crate) struct Matcher {
    path: PathMatcher,
    method: Option<Method>,
    headers: Vec<NameMatcher<HeaderName>>,
    claims: Vec<ClaimMatcher>,
    query: Vec<NameMatcher<Arc<str>>>,
}

/// Why an alternative cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MatcherError {
    #[error("`{0}` is not a regular expression")]
    Regex(Arc<str>),
    #[error("`{0}` is not a header name")]
    HeaderName(Arc<str>),
    #[error("`{0}` is not a method")]
    Method(Arc<str>),
}

impl Matcher {
    pub(crate) fn compile(rule: &RouteMatch) -> Result<Self, MatcherError> {
        let path = PathMatcher::compile(&rule.path)?;
        let method = rule.method.as_ref().map(|method| {
            Method::from_bytes(method.as_bytes()).map_err(|_| MatcherError::Method(Arc::clone(method)))
        });
        let header = |rule: &NameMatch| {
            let name = HeaderName::from_bytes(rule.name.as_bytes())
                .map_err(|_| MatcherError::HeaderName(Arc::clone(&rule.name)))?;
            NameMatcher::compile(name, rule)
        };
        let query = |rule: &NameMatch| NameMatcher::compile(Arc::clone(&rule.name), rule);
        Ok(Self {
            path,
            method: method.transpose()?,
            headers: rule.headers.iter().map(header).collect::<Result<_, _>>()?,
            claims: rule.claims.iter().map(ClaimMatcher::compile).collect::<Result<_, _>>()?,
            query: rule.query.iter().map(query).collect::<Result<_, _>>()?,
        })
    }

    /// A matcher for an alternative that does not compile: by its path alone, and by any path if that is what does
    /// not compile. It stands in front of an error answer, so it may take too much but never too little.
    pub(crate) fn of_path_alone(rule: &RouteMatch) -> Self {
        let path = PathMatcher::compile(&rule.path).unwrap_or(PathMatcher::Prefix("".into()));
        Self { path, method: None, headers: Vec::new(), claims: Vec::new(), query: Vec::new() }
    }

    /// Whether the request matches; `token` is what is verified of the requester so far.
    pub(crate) fn matches(&self, head: &RequestHead, token: Option<&Token>) -> bool {
        self.path.matches(head.path.path())
            && self.method_matches(head)
            && self.headers.iter().all(|header| header_matches(header, head))
            && self.claims.iter().all(|claim| claim.matches(token))
            && self.query.iter().all(|parameter| parameter_matches(parameter, head))
    }

    /// What a request does not match by, the first that is looked at; `None` when it matches.
    pub(crate) fn miss(&self, head: &RequestHead, token: Option<&Token>) -> Option<String> {
        if !self.path.matches(head.path.path()) {
            return Some(format!("path: {} is not {}", head.path.path(), self.path));
        }
        if let Some(method) = self.method.as_ref().filter(|_| !self.method_matches(head)) {
            return Some(format!("method: {} is not {method}", head.method));
        }
        // Values may be secrets, so they are not told.
        if let Some(missed) = self.headers.iter().find(|header| !header_matches(header, head)) {
            return Some(missed.miss("header"));
        }
        if self.claims.iter().any(|claim| !claim.matches(token)) {
            return Some("claims: those asked for are not verified".to_owned());
        }
        let missed = self.query.iter().find(|parameter| !parameter_matches(parameter, head))?;
        Some(missed.miss("query parameter"))
    }

    fn method_matches(&self, head: &RequestHead) -> bool {
        self.method.as_ref().is_none_or(|method| *method == head.method)
    }

    /// The prefix that a rewrite replaces, if the path is matched by one.
    pub(crate) fn prefix(&self) -> Option<&Arc<str>> {
        match &self.path {
            PathMatcher::Prefix(prefix) => Some(prefix),
            PathMatcher::Exact(_) | PathMatcher::TextPrefix(_) | PathMatcher::Regex(_) => None,
        }
    }

    /// Whether filters may change the answer, by changing headers or by verifying a token.
    pub(crate) fn depends_on_filters(&self) -> bool {
        !self.headers.is_empty() || !self.claims.is_empty()
    }
}

/// A header or query parameter and its value.
#[derive(Clone, Debug)]
struct NameMatcher<N> {
    name: N,
    value: ValueMatcher,
    inverted: bool,
}

impl<N: fmt::Display> NameMatcher<N> {
    fn compile(name: N, rule: &NameMatch) -> Result<Self, MatcherError> {
        Ok(Self { name, value: ValueMatcher::compile(&rule.value)?, inverted: rule.inverted })
    }

    /// Where the value must be another, one that is missing is empty, as in Envoy.
    fn matches(&self, text: Option<&str>) -> bool {
        match (self.inverted, text, &self.value) {
            (false, text, _) => text.is_some_and(|text| self.value.matches(text)),
            (true, text, ValueMatcher::Present) => text.is_none(),
            (true, text, _) => !self.value.matches(text.unwrap_or_default()),
        }
    }

    /// Values may be secrets, so they are not told.
    fn miss(&self, what: &str) -> String {
        let reason =
            if self.inverted { "has the value excluded" } else { "absent, or not the value asked for" };
        format!("{what} {}: {reason}", self.name)
    }
}

fn header_matches(asked: &NameMatcher<HeaderName>, head: &RequestHead) -> bool {
    asked.matches(header(head, &asked.name).as_deref())
}

fn parameter_matches(asked: &NameMatcher<Arc<str>>, head: &RequestHead) -> bool {
    asked.matches(parameter(head.path.query().unwrap_or(""), &asked.name))
}

#[derive(Clone, Debug)]
enum PathMatcher {
    Exact(Arc<str>),
    /// Without a trailing `/`: the root is the empty text.
    Prefix(Arc<str>),
    TextPrefix(Arc<str>),
    Regex(Regex),
}

impl PathMatcher {
    fn compile(rule: &PathRule) -> Result<Self, MatcherError> {
        Ok(match rule {
            PathRule::Exact(path) => Self::Exact(Arc::clone(path)),
            PathRule::Prefix(prefix) => Self::Prefix(prefix.trim_end_matches('/').into()),
            PathRule::TextPrefix(prefix) => Self::TextPrefix(Arc::clone(prefix)),
            PathRule::Regex(expression) => Self::Regex(full_match(expression)?),
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *path,
            Self::Prefix(prefix) => {
                path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::TextPrefix(prefix) => path.starts_with(&**prefix),
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

/// A claim of the verified token and its value. No header stands for a claim.
#[derive(Clone, Debug)]
struct ClaimMatcher {
    path: Vec<Arc<str>>,
    value: ValueMatcher,
    inverted: bool,
}

impl ClaimMatcher {
    fn compile(rule: &ClaimMatch) -> Result<Self, MatcherError> {
        let value = ValueMatcher::compile(&rule.value)?;
        Ok(Self { path: rule.path.clone(), value, inverted: rule.inverted })
    }

    fn matches(&self, token: Option<&Token>) -> bool {
        let is_value = match token.and_then(|token| token.claim(&self.path)) {
            Some(Value::String(text)) => self.value.matches(text),
            Some(Value::Array(list)) => {
                list.iter().filter_map(Value::as_str).any(|text| self.value.matches(text))
            }
            _ => false,
        };
        is_value != self.inverted
    }
}

impl fmt::Display for PathMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => f.write_str(path),
            Self::Prefix(prefix) => write!(f, "{prefix}/…"),
            Self::TextPrefix(prefix) => write!(f, "{prefix}…"),
            Self::Regex(regex) => write!(f, "like {regex}"),
        }
    }
}

#[derive(Clone, Debug)]
enum ValueMatcher {
    Present,
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Regex(Regex),
}

impl ValueMatcher {
    fn compile(value: &ValueMatch) -> Result<Self, MatcherError> {
        Ok(match value {
            ValueMatch::Present => Self::Present,
            ValueMatch::Exact(text) => Self::Exact(Arc::clone(text)),
            ValueMatch::Prefix(text) => Self::Prefix(Arc::clone(text)),
            ValueMatch::Regex(expression) => Self::Regex(full_match(expression)?),
        })
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Present => true,
            Self::Exact(exact) => **exact == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Regex(regex) => regex.is_match(text),
        }
    }
}

/// An expression that must match the whole text, as RE2's full match in Envoy.
fn full_match(expression: &Arc<str>) -> Result<Regex, MatcherError> {
    Regex::new(&format!("^(?:{expression})$")).map_err(|_| MatcherError::Regex(Arc::clone(expression)))
}

/// A header's value; those of a repeated header joined by commas, as Envoy looks at them.
fn header<'a>(head: &'a RequestHead, name: &HeaderName) -> Option<Cow<'a, str>> {
    if *name == http::header::HOST {
        return head.authority.to_str().ok().map(Cow::Borrowed);
    }
    let mut values = head.headers.get_all(name).iter();
    let first = values.next()?.to_str().ok()?;
    let mut joined = Cow::Borrowed(first);
    for value in values {
        let joined = joined.to_mut();
        joined.push(',');
        joined.push_str(value.to_str().ok()?);
    }
    Some(joined)
}

/// The first value of a query parameter, as sent: not decoded.
fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
}
