//! Changes that a provider makes of a request's query.

use http::uri::PathAndQuery;

/// The most parameters of one answer.
const CHANGES_MAX: usize = 64;

/// Parameters to be set, and then others to be removed, as the request writes them: nothing is decoded or encoded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct QueryChanges {
    set: Vec<(String, String)>,
    removed: Vec<String>,
}

impl QueryChanges {
    /// The changes; a parameter that cannot stand in a query is named in `left_out`.
    pub(super) fn new(
        set: impl IntoIterator<Item = (String, String)>,
        removed: impl IntoIterator<Item = String>,
        left_out: &mut Vec<String>,
    ) -> Self {
        let mut refuse = |name: &str| left_out.push(format!("query parameter {}", name.escape_debug()));
        let mut changes = Self::default();
        for (name, value) in set.into_iter().take(CHANGES_MAX) {
            if is_part(&name) && !name.contains('=') && is_part(&value) {
                changes.set.push((name, value));
            } else {
                refuse(&name);
            }
        }
        changes.removed = removed.into_iter().take(CHANGES_MAX).collect();
        changes
    }

    /// The path, changed. A parameter that is set takes the place of the first of its name, or comes last; others keep
    /// their places.
    pub(super) fn apply(&self, path: &PathAndQuery) -> PathAndQuery {
        if *self == Self::default() {
            return path.clone();
        }
        let query = path.query().filter(|query| !query.is_empty());
        let mut pairs: Vec<(&str, String)> = (query.into_iter().flat_map(|query| query.split('&')))
            .map(|pair| (name(pair), pair.to_owned()))
            .collect();
        for (key, value) in &self.set {
            let written = format!("{key}={value}");
            match pairs.iter().position(|(name, _)| name == key) {
                Some(at) => {
                    let mut place = 0..;
                    pairs.retain(|(name, _)| place.next().is_some_and(|here| here <= at) || name != key);
                    if let Some(pair) = pairs.get_mut(at) {
                        pair.1 = written;
                    }
                }
                None => pairs.push((key, written)),
            }
        }
        pairs.retain(|(name, _)| !self.removed.iter().any(|removed| removed == name));
        let query: Vec<String> = pairs.into_iter().map(|(_, pair)| pair).collect();
        let text = match query.is_empty() {
            true => path.path().to_owned(),
            false => format!("{}?{}", path.path(), query.join("&")),
        };
        // Its parts were looked at, so it is one.
        PathAndQuery::try_from(text).unwrap_or_else(|_| path.clone())
    }
}

fn name(pair: &str) -> &str {
    pair.split_once('=').map_or(pair, |(name, _)| name)
}

/// Whether a text may stand in a query and ends nothing there.
fn is_part(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'&' | b'#' | b'"' | b'<' | b'>'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_and_then_removed() {
        for (path, set, removed, expected) in [
            ("/a", &[][..], &[][..], "/a"),
            ("/a", &[("x", "1")], &[], "/a?x=1"),
            ("/a?", &[("x", "1")], &[], "/a?x=1"),
            ("/a?y&x=0&z=2", &[("x", "1")], &[], "/a?y&x=1&z=2"),
            ("/a?x=0&y=1&x=2", &[("x", "1")], &[], "/a?x=1&y=1"),
            ("/a?x=0&y=1&x=2", &[], &["x"], "/a?y=1"),
            ("/a?x=0", &[], &["x"], "/a"),
            ("/a?x", &[("y", "1")], &["x", "y"], "/a"),
            ("/a?xy=0", &[], &["x"], "/a?xy=0"),
            ("/a?x=%20", &[("y", "a%20b")], &[], "/a?x=%20&y=a%20b"),
        ] {
            let set = set.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let removed = removed.iter().map(|name| (*name).to_owned());
            let mut left_out = Vec::new();
            let changes = QueryChanges::new(set, removed, &mut left_out);
            assert_eq!(changes.apply(&path.parse().unwrap()), expected, "{path}");
            assert_eq!(left_out, [""; 0], "{path}");
        }
    }

    #[test]
    fn what_would_end_the_query_is_left_out() {
        for (name, value) in
            [("x", "1&admin=1"), ("a=b", "1"), ("x", "a b"), ("x#", "1"), ("x", "\r\n"), ("é", "1")]
        {
            let mut left_out = Vec::new();
            let changes = QueryChanges::new([(name.to_owned(), value.to_owned())], [], &mut left_out);
            assert_eq!((changes, left_out.len()), (QueryChanges::default(), 1), "{name}={value}");
        }
    }
}
