//! What is said about manifests: findings inside an object, and diagnostics that also name file and line.

use crate::codes::Code;
use crate::field::FieldPath;
use crate::object::Object;
use serde::Serialize;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something is not in effect as written.
    Error,
    /// Something is in effect, perhaps not as meant.
    Warning,
    /// Good to know.
    Info,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
        })
    }
}

/// One thing found at a field of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What kind of thing it is, `unknown-field`, for filters and documentation.
    pub code: &'static str,
    /// Where.
    pub field: FieldPath,
    /// What is the matter, one line.
    pub reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, reason, .. } = self;
        if field.steps().is_empty() { f.write_str(reason) } else { write!(f, "{field}: {reason}") }
    }
}

/// A finding and where it is in the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The file, or the directory when no file is meant.
    pub file: Arc<Path>,
    /// The line, from 1; 0 when no line is meant.
    pub line: u32,
    /// The column, from 1; 0 when no column is meant.
    pub column: u32,
    /// The object, `AuthorizationPolicy ns/name`.
    pub object: Option<String>,
    /// The field, `spec.rules[0].from[0].source.principals[1]`; empty for the whole object.
    pub field: String,
    /// What is the matter, one line.
    pub reason: String,
    /// What kind of thing it is, `unknown-field`.
    pub code: &'static str,
    /// What would mend it, one line; `None`: as [`crate::CODES`] says of the code.
    pub fix: Option<String>,
}

impl Diagnostic {
    /// About a file as a whole.
    pub(crate) fn file(severity: Severity, code: &'static str, file: Arc<Path>, reason: String) -> Self {
        Self {
            severity,
            file,
            line: 0,
            column: 0,
            object: None,
            field: String::new(),
            reason,
            code,
            fix: None,
        }
    }

    /// `finding`, made in `object`.
    pub fn at(object: &Object, finding: &Finding) -> Self {
        let (line, column) =
            object.origin.as_ref().map_or((0, 0), |origin| origin.position.find(&finding.field));
        Self {
            severity: finding.severity,
            file: object
                .origin
                .as_ref()
                .map_or_else(|| Path::new("").into(), |origin| Arc::clone(&origin.file)),
            line,
            column,
            object: Some(object.to_string()),
            field: finding.field.to_string(),
            reason: finding.reason.clone(),
            code: finding.code,
            fix: None,
        }
    }

    /// The form written as JSON.
    pub fn view(&self) -> DiagnosticView<'_> {
        DiagnosticView {
            severity: self.severity.to_string(),
            file: self.file.display().to_string(),
            line: self.line,
            column: self.column,
            object: self.object.as_deref(),
            field: &self.field,
            reason: &self.reason,
            code: self.code,
            fix: self.fix(),
        }
    }

    /// What would mend it: its own advice, or that of its code.
    pub fn fix(&self) -> Option<&str> {
        self.fix.as_deref().or_else(|| Code::named(self.code).map(|code| code.fix))
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        write!(f, " {}: ", self.severity)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{} [{}]", self.reason, self.code)
    }
}

/// A diagnostic as JSON.
#[derive(Debug, Serialize)]
pub struct DiagnosticView<'a> {
    severity: String,
    file: String,
    line: u32,
    column: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    field: &'a str,
    reason: &'a str,
    code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<&'a str>,
}
