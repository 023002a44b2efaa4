//! Path templates: `{*}` is one segment, `{**}` any number of them.

use std::sync::Arc;

/// A compiled template.
#[derive(Debug)]
pub(crate) struct Template {
    /// What the path begins with.
    head: Vec<Piece>,
    /// What it ends with, last segment first, if the template has a `{**}` in between.
    tail: Option<Vec<Piece>>,
    text: Arc<str>,
}

/// One segment.
#[derive(Debug)]
enum Piece {
    /// This text.
    Literal(Box<str>),
    /// Any text but none.
    One,
}

impl Piece {
    fn new(segment: &str) -> Self {
        if segment == "{*}" { Self::One } else { Self::Literal(segment.into()) }
    }

    fn matches(&self, segment: &str) -> bool {
        match self {
            Self::Literal(text) => **text == *segment,
            Self::One => !segment.is_empty() && is_plain(segment),
        }
    }
}

/// Whether an operator may stand for `text`: it has only characters that the path of a URI may have (RFC 3986 §3.3),
/// as Envoy's templates ask.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;:@=".contains(&byte))
}

impl Template {
    /// Compiles a template that has been checked: operators are whole segments, and at most one is `{**}`.
    pub(crate) fn new(text: &Arc<str>) -> Self {
        let mut segments = text.split('/');
        let head =
            segments.by_ref().take_while(|segment| *segment != "{**}").map(Piece::new).collect::<Vec<_>>();
        let has_any = text.split('/').count() > head.len();
        let tail = has_any.then(|| segments.rev().map(Piece::new).collect());
        Self { head, tail, text: Arc::clone(text) }
    }

    /// The template as written.
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it matches the whole of `path`. `{**}` takes the place of at least one segment, which may be empty:
    /// `/a/{**}` matches `/a/` and not `/a`.
    pub(crate) fn matches(&self, path: &str) -> bool {
        let count = path.split('/').count();
        let mut segments = path.split('/');
        let begins =
            self.head.iter().all(|piece| segments.next().is_some_and(|segment| piece.matches(segment)));
        match &self.tail {
            None => begins && count == self.head.len(),
            Some(tail) => {
                let mut last = path.rsplit('/');
                begins
                    && count > self.head.len() + tail.len()
                    && tail.iter().all(|piece| last.next().is_some_and(|segment| piece.matches(segment)))
                    && segments.take(count - self.head.len() - tail.len()).all(is_plain)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Template;

    #[test]
    fn template_matches_whole_segments() {
        for (template, path, expected) in [
            ("/allow/admin/{**}", "/allow/admin", false),
            ("/allow/admin/{**}", "/allow/admin/", true),
            ("/allow/admin/{**}", "/allow/admin/temp", true),
            ("/allow/admin/{**}", "/allow/admin/temp.txt", true),
            ("/allow/admin/{**}", "/allow/admin/foo/temp.txt", true),
            ("/allow/admin/{**}", "/allow", false),
            ("/allow/admin/{**}", "/allow/user/", false),
            ("/foo/{*}/bar/{**}", "/foo/buzz/bar/bat.txt", true),
            ("/foo/{*}/bar/{**}", "/foo/buzz/bar/bat.temp.txt", true),
            ("/foo/{*}/bar/{**}", "/foo/buzz/bar/bat/fuzz.txt", true),
            ("/foo/{*}/bar/{**}", "/foo/buzz/bar/bat", true),
            ("/foo/{*}/bar/{**}", "/foo/bar/bat.txt", false),
            ("/foo/{*}/bar/{**}", "/foo//bar/bat.txt", false),
            ("/store/{**}/cart", "/store/cart", false),
            ("/store/{**}/cart", "/store//cart", true),
            ("/store/{**}/cart", "/store/foo/cart", true),
            ("/store/{**}/cart", "/store/foo/bar/cart", true),
            ("/store/{**}/cart", "/store/foo/cart/", false),
            ("/foo/{**}/", "/foo/bar/", true),
            ("/foo/{**}/", "/foo//", true),
            ("/foo/{**}/", "/foo/bar", false),
            ("/foo/{*}", "/foo/bar", true),
            ("/foo/{*}", "/foo/bar/baz", false),
            ("/foo/{*}", "/foo/", false),
            ("/foo/{*}", "/foo", false),
            ("/{**}/cart", "/a/b/cart", true),
            ("/{**}/cart", "/cart", false),
            ("/{**}", "/", true),
            ("/{**}", "", false),
            ("/{*}", "/a%20!$&'()+,;:@=~", true),
            ("/{*}", "/a*", true),
            ("/{*}", "/a[1]", false),
            ("/{*}", r"/\", false),
            ("/{**}", "/a/b|c", false),
            ("/{**}/c", "/a/b^/c", false),
        ] {
            assert_eq!(Template::new(&template.into()).matches(path), expected, "{template} {path}");
        }
    }
}
