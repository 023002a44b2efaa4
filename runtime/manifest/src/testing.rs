//! For tests: objects from text, and findings as short lines.

use crate::diagnostic::{Diagnostic, Finding};
use crate::document::documents;
use crate::object::{self, Object};
use std::path::Path;
use std::sync::Arc;

/// All objects of a text; every document must be good.
pub(crate) fn objects(text: &str) -> Vec<Object> {
    let file: Arc<Path> = Path::new("test.yaml").into();
    let documents = documents(text).into_iter().map(|document| document.unwrap());
    documents.flat_map(|document| object::objects(document, &file)).map(Result::unwrap).collect()
}

/// The only object of a text.
pub(crate) fn object(text: &str) -> Object {
    let mut all = objects(text);
    assert_eq!(all.len(), 1, "{text}");
    all.remove(0)
}

/// `error unknown-field spec.x`.
pub(crate) fn short(finding: &Finding) -> String {
    format!("{} {} {}", finding.severity, finding.code, finding.field)
}

/// `12:3 error unknown-field spec.x`.
pub(crate) fn short_placed(diagnostic: &Diagnostic) -> String {
    let Diagnostic { line, column, severity, code, field, .. } = diagnostic;
    format!("{line}:{column} {severity} {code} {field}")
}
