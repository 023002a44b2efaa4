//! What a route changes: headers, host, path; and the redirect it may answer with.

use cairn_filter::{LocalReply, RequestHead};
use cairn_mesh::{HeaderChanges, PathRewrite, Redirect, RouteFilter};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// Header changes, compiled: set, then add, then remove.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeaderOps {
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
    remove: Vec<HeaderName>,
    /// `host` or `:authority` set: on a request it replaces the authority.
    authority: Option<HeaderValue>,
}

impl HeaderOps {
    /// Compiles `changes` and appends them. Names of pseudo-headers but `:authority` are dropped, as Istio does.
    ///
    /// # Errors
    /// The name or value that is none.
    pub(crate) fn extend(&mut self, changes: &HeaderChanges) -> Result<(), String> {
        for change in changes.set.iter().chain(&changes.add) {
            if matches!(&*change.name, "host" | ":authority") {
                self.authority = Some(value(&change.value)?);
            }
        }
        for (list, into) in [(&changes.set, &mut self.set), (&changes.add, &mut self.add)] {
            for change in list.iter().filter(|change| is_plain(&change.name)) {
                into.push((name(&change.name)?, value(&change.value)?));
            }
        }
        for removed in changes.remove.iter().filter(|removed| is_plain(removed)) {
            self.remove.push(name(removed)?);
        }
        Ok(())
    }

    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }

    pub(crate) fn apply_to_request(&self, head: &mut RequestHead) {
        self.apply(&mut head.headers);
        if let Some(authority) = &self.authority {
            head.authority = authority.clone();
        }
    }
}

fn is_plain(name: &str) -> bool {
    !name.starts_with(':') && name != "host"
}

fn name(text: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(text.as_bytes()).map_err(|_| format!("`{text}` is not a header name"))
}

fn value(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|_| format!("`{text}` is not a header value"))
}

/// Host and path changes, compiled.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostAndPath {
    pub(crate) authority: Option<HeaderValue>,
    pub(crate) path: Option<PathRewrite>,
}

impl HostAndPath {
    pub(crate) fn compile(rewrite: &cairn_mesh::Rewrite) -> Result<Self, String> {
        let authority = rewrite.hostname.as_ref().map(|host| value(host)).transpose()?;
        Ok(Self { authority, path: rewrite.path.clone() })
    }

    /// Applies to a request whose path was matched by `prefix`, if by one. A path that would be none stays.
    pub(crate) fn apply(&self, head: &mut RequestHead, prefix: Option<&str>) {
        if let Some(authority) = &self.authority {
            head.authority = authority.clone();
        }
        if let Some(path) = &self.path {
            let rewritten = rewritten_path(path, &head.path, prefix);
            if let Ok(path) = PathAndQuery::try_from(rewritten) {
                head.path = path;
            }
        }
    }
}

/// The new path, with the request's query. A prefix is replaced by whole segments: `/foo` by `/xyz` in `/foo/bar`
/// gives `/xyz/bar`, and by `/` gives `/bar` (Gateway API, `ReplacePrefixMatch`).
fn rewritten_path(rewrite: &PathRewrite, path: &PathAndQuery, prefix: Option<&str>) -> String {
    let mut out = match rewrite {
        PathRewrite::Full(full) => (**full).to_owned(),
        PathRewrite::Prefix(replacement) => {
            let prefix = prefix.unwrap_or("").trim_end_matches('/');
            let rest = path.path().strip_prefix(prefix).unwrap_or(path.path());
            let mut out = replacement.trim_end_matches('/').to_owned();
            out.push_str(rest);
            out
        }
    };
    if !out.starts_with('/') {
        out.insert(0, '/');
    }
    if let Some(query) = path.query() {
        out.push('?');
        out.push_str(query);
    }
    out
}

/// The redirect as an answer. `port` is the one that the client addressed; the port of the new location is the
/// rule's, else none when the rule names a scheme, else the client's; 80 of http and 443 of https go without saying.
pub(crate) fn redirect_reply(
    redirect: &Redirect,
    head: &RequestHead,
    prefix: Option<&str>,
    port: u16,
) -> LocalReply {
    let scheme = redirect.scheme.as_deref().or_else(|| head.scheme.to_str().ok()).unwrap_or("http");
    let authority = head.authority.to_str().unwrap_or("");
    let host = redirect.hostname.as_deref().unwrap_or_else(|| without_port(authority));
    let port = match (redirect.port, &redirect.scheme) {
        (Some(port), _) => Some(port),
        (None, Some(_)) => None,
        (None, None) => Some(port),
    };
    let port = port.filter(|port| !matches!((scheme, *port), ("http", 80) | ("https", 443)));
    let path = match &redirect.path {
        Some(rewrite) => rewritten_path(rewrite, &head.path, prefix),
        None => head.path.as_str().to_owned(),
    };
    let mut location = format!("{scheme}://{host}");
    if let Some(port) = port {
        location.push(':');
        location.push_str(&port.to_string());
    }
    location.push_str(&path);
    let status = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::FOUND);
    let mut reply = LocalReply::text(status, "", "direct_response");
    if let Ok(location) = HeaderValue::try_from(location) {
        reply.headers.insert(http::header::LOCATION, location);
    }
    reply
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.is_empty() => host,
        _ => authority,
    }
}

/// The header changes among `filters`, request's and response's; anything else is an error.
pub(crate) fn backend_ops(filters: &[RouteFilter]) -> Result<(HeaderOps, HeaderOps), String> {
    let (mut request, mut response) = (HeaderOps::default(), HeaderOps::default());
    for filter in filters {
        match filter {
            RouteFilter::RequestHeaders(changes) => request.extend(changes)?,
            RouteFilter::ResponseHeaders(changes) => response.extend(changes)?,
            RouteFilter::Redirect(_) | RouteFilter::Rewrite(_) => {
                return Err("a backend's filters may only change headers".into());
            }
        }
    }
    Ok((request, response))
}

#[cfg(test)]
#[path = "rewrite/tests.rs"]
mod tests;
