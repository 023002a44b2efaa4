//! Where tokens stand in a request: finding them, and taking them away before the request goes on.

use cairn_filter::RequestHead;
use cairn_mesh::TokenPlaces;
use http::header::{AUTHORIZATION, COOKIE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;
use std::borrow::Cow;

/// One place to look. Their order is Envoy's: headers by name and prefix, parameters by name, cookies by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A header, and what stands in its value before the token.
    Header(HeaderName, Box<str>),
    /// A query parameter.
    Param(Box<str>),
    /// A cookie.
    Cookie(Box<str>),
}

/// The places of a rule, or the usual ones when it names none. A name that no header can have finds nothing.
pub(super) fn places(from: &TokenPlaces) -> Vec<Place> {
    if from.is_empty() {
        return vec![Place::Header(AUTHORIZATION, "Bearer ".into()), Place::Param("access_token".into())];
    }
    let mut headers: Vec<(HeaderName, Box<str>)> = Vec::new();
    for header in &from.headers {
        if let Ok(name) = HeaderName::from_bytes(header.name.as_bytes()) {
            headers.push((name, (*header.prefix).into()));
        }
    }
    headers.sort_by(|a, b| (a.0.as_str(), &a.1).cmp(&(b.0.as_str(), &b.1)));
    headers.dedup();
    let sorted = |names: &[std::sync::Arc<str>]| {
        let mut names: Vec<Box<str>> = names.iter().map(|name| (**name).into()).collect();
        names.sort();
        names.dedup();
        names
    };
    let headers = headers.into_iter().map(|(name, prefix)| Place::Header(name, prefix));
    let params = sorted(&from.params).into_iter().map(Place::Param);
    headers.chain(params).chain(sorted(&from.cookies).into_iter().map(Place::Cookie)).collect()
}

impl Place {
    /// Calls `found` with each token at this place. What cannot be a token is one too: it is refused, not overlooked.
    pub(super) fn find<'a>(&self, head: &'a RequestHead, mut found: impl FnMut(Cow<'a, str>)) {
        match self {
            Self::Header(name, prefix) => {
                for value in head.headers.get_all(name) {
                    if let Some(token) = after_prefix(text_of(value), prefix) {
                        found(token);
                    }
                }
            }
            Self::Param(name) => {
                let mut params = pairs(head.path.query().unwrap_or_default());
                if let Some((_, value)) = params.find(|(key, _)| decoded(key) == **name) {
                    found(decoded(value));
                }
            }
            Self::Cookie(name) => {
                let mut cookies = head.headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
                let value = cookies.find_map(|text| {
                    let mut crumbs = text.split(';').filter_map(crumb);
                    crumbs.find(|(key, _)| *key == &**name).map(|(_, value)| value)
                });
                if let Some(value) = value {
                    found(Cow::Borrowed(value));
                }
            }
        }
    }

    /// Takes away what stands at this place, other values of the same header, parameter or cookie included.
    pub(super) fn clear(&self, head: &mut RequestHead) {
        match self {
            Self::Header(name, _) => {
                head.headers.remove(name);
            }
            Self::Param(name) => clear_param(head, name),
            Self::Cookie(name) => clear_cookie(&mut head.headers, name),
        }
    }
}

/// The value as text. What is not UTF-8 becomes what no token has.
fn text_of(value: &HeaderValue) -> Cow<'_, str> {
    // The whole is looked at at once, where the lossy way goes byte by byte.
    std::str::from_utf8(value.as_bytes())
        .map_or_else(|_| String::from_utf8_lossy(value.as_bytes()), Cow::Borrowed)
}

/// What follows `prefix`, from the first character on that a token may have; with no prefix, the whole value.
fn after_prefix<'a>(value: Cow<'a, str>, prefix: &str) -> Option<Cow<'a, str>> {
    if prefix.is_empty() {
        return Some(value);
    }
    let after = value.find(prefix)? + prefix.len();
    let is_of_tokens = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let Some(start) = value.get(after..)?.find(is_of_tokens) else { return Some(value) };
    Some(match value {
        Cow::Borrowed(text) => Cow::Borrowed(text.get(after + start..)?),
        Cow::Owned(text) => Cow::Owned(text.get(after + start..)?.to_owned()),
    })
}

fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

fn decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

/// `name=value` of a cookie header; the value may be quoted.
fn crumb(text: &str) -> Option<(&str, &str)> {
    let (name, value) = text.split_once('=')?;
    let bare = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
    Some((name.trim(), bare.unwrap_or(value)))
}

fn clear_param(head: &mut RequestHead, name: &str) {
    let Some(query) = head.path.query() else { return };
    let is_other = |pair: &&str| decoded(pair.split_once('=').map_or(*pair, |(key, _)| key)) != name;
    let rest: Vec<&str> = query.split('&').filter(is_other).collect();
    let path = head.path.path();
    let text = if rest.is_empty() { path.to_owned() } else { format!("{path}?{}", rest.join("&")) };
    // A part of a path that was one is one.
    if let Ok(path) = PathAndQuery::try_from(text) {
        head.path = path;
    }
}

fn clear_cookie(headers: &mut HeaderMap, name: &str) {
    let is_other = |part: &&str| crumb(part).is_none_or(|(key, _)| key != name);
    let mut kept = Vec::new();
    for value in headers.get_all(COOKIE) {
        let Ok(text) = value.to_str() else {
            kept.push(value.clone());
            continue;
        };
        let parts: Vec<&str> = text.split(';').filter(is_other).collect();
        let text = parts.join(";");
        if !text.trim().is_empty() {
            kept.extend(HeaderValue::from_str(text.trim_start()));
        }
    }
    headers.remove(COOKIE);
    for value in kept {
        headers.append(COOKIE, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::TokenHeader;
    use http::{Method, Version};

    fn head(path: &str, headers: &[(&str, &str)]) -> RequestHead {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
        }
        RequestHead {
            method: Method::GET,
            scheme: HeaderValue::from_static("http"),
            authority: HeaderValue::from_static("shop"),
            path: PathAndQuery::try_from(path).unwrap(),
            headers: map,
            version: Version::HTTP_11,
        }
    }

    fn found(place: &Place, head: &RequestHead) -> Vec<String> {
        let mut tokens = Vec::new();
        place.find(head, |token| tokens.push(token.into_owned()));
        tokens
    }

    #[test]
    fn tokens_are_found_where_the_rule_says() {
        let bearer = || Place::Header(AUTHORIZATION, "Bearer ".into());
        let raw = || Place::Header(HeaderName::from_static("x-token"), "".into());
        let param = || Place::Param("token".into());
        let cookie = || Place::Cookie("session".into());
        for (name, place, path, headers, expected) in [
            ("bearer", bearer(), "/", &[("authorization", "Bearer a.b.c")][..], &["a.b.c"][..]),
            ("basic is not ours", bearer(), "/", &[("authorization", "Basic eHg=")], &[]),
            ("letter case of the prefix counts", bearer(), "/", &[("authorization", "bearer a.b.c")], &[]),
            (
                "the prefix stands anywhere",
                bearer(),
                "/",
                &[("authorization", "x Bearer  a.b.c")],
                &["a.b.c"],
            ),
            ("nothing after the prefix", bearer(), "/", &[("authorization", "Bearer  ")], &["Bearer  "]),
            (
                "what follows belongs to it",
                bearer(),
                "/",
                &[("authorization", "Bearer a.b.c, d")],
                &["a.b.c, d"],
            ),
            ("not ASCII", bearer(), "/", &[("authorization", "Bearer é")], &["Bearer é"]),
            (
                "every value",
                bearer(),
                "/",
                &[("authorization", "Bearer a"), ("authorization", "Basic x"), ("authorization", "Bearer b")],
                &["a", "b"],
            ),
            ("without a prefix", raw(), "/", &[("x-token", "a.b.c")], &["a.b.c"]),
            ("an empty value is a bad token", raw(), "/", &[("x-token", "")], &[""]),
            ("no header", raw(), "/", &[], &[]),
            ("parameter", param(), "/?a=1&token=a.b.c&token=d", &[], &["a.b.c"]),
            ("parameter, encoded", param(), "/?%74oken=a%2Eb.c", &[], &["a.b.c"]),
            ("parameter without a value", param(), "/?token", &[], &[""]),
            ("another parameter", param(), "/?tokens=a", &[], &[]),
            ("cookie", cookie(), "/", &[("cookie", "a=b; session=a.b.c; session=d")], &["a.b.c"]),
            (
                "quoted cookie",
                cookie(),
                "/",
                &[("cookie", "a=b"), ("cookie", "session=\"a.b.c\"")],
                &["a.b.c"],
            ),
            ("letter case of a cookie counts", cookie(), "/", &[("cookie", "Session=a")], &[]),
        ] {
            assert_eq!(found(&place, &head(path, headers)), expected, "{name}");
        }
    }

    #[test]
    fn tokens_are_taken_away_and_nothing_else() {
        let bearer = || Place::Header(AUTHORIZATION, "Bearer ".into());
        let param = || Place::Param("t".into());
        let cookie = || Place::Cookie("s".into());
        for (name, place, path, headers, expected_path, expected_headers) in [
            (
                "header",
                bearer(),
                "/a?b=c",
                &[("authorization", "Bearer x"), ("a", "b")][..],
                "/a?b=c",
                &[("a", "b")][..],
            ),
            ("parameter", param(), "/a?b=%20c&t=x&&d", &[], "/a?b=%20c&&d", &[]),
            ("only parameter", param(), "/a?t=x", &[], "/a", &[]),
            ("each of the parameters", param(), "/a?t=x&%74=y&b", &[], "/a?b", &[]),
            ("cookie", cookie(), "/", &[("cookie", "a=b; s=x; c=d")], "/", &[("cookie", "a=b; c=d")]),
            ("first cookie", cookie(), "/", &[("cookie", "s=x; c=d")], "/", &[("cookie", "c=d")]),
            ("only cookie", cookie(), "/", &[("cookie", "s=x"), ("a", "b")], "/", &[("a", "b")]),
            ("no such thing", cookie(), "/?t", &[("cookie", "a=b")], "/?t", &[("cookie", "a=b")]),
        ] {
            let mut head = head(path, headers);
            place.clear(&mut head);
            assert_eq!(head.path.as_str(), expected_path, "{name}");
            let left: Vec<(&str, &str)> =
                head.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
            assert_eq!(left, expected_headers, "{name}");
            assert_eq!(found(&place, &head), [""; 0], "{name}");
        }
    }

    #[test]
    fn without_places_the_usual_ones_are_looked_at() {
        let usual = places(&TokenPlaces::default());
        assert_eq!(
            usual,
            [Place::Header(AUTHORIZATION, "Bearer ".into()), Place::Param("access_token".into())]
        );
        let header = |name: &str, prefix: &str| TokenHeader { name: name.into(), prefix: prefix.into() };
        let named = TokenPlaces {
            headers: vec![header("x-b", "B "), header("x-a", ""), header("x-b", "B ")],
            params: vec!["q".into(), "p".into()],
            cookies: Vec::new(),
        };
        let of =
            |name: &'static str, prefix: &str| Place::Header(HeaderName::from_static(name), prefix.into());
        let expected = [of("x-a", ""), of("x-b", "B "), Place::Param("p".into()), Place::Param("q".into())];
        assert_eq!(places(&named), expected);
    }
}
