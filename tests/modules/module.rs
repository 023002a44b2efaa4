//! A module: where it is, and what is known of it.

use crate::catalogue::{Known, known};
use crate::run::Line;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// A module with its configuration.
#[derive(Clone)]
pub struct Module {
    /// Its file's name, without the ending.
    pub name: String,
    pub file: PathBuf,
    /// What is known of it.
    pub known: Known,
}

impl Module {
    /// The module in `file`, and beside it, if it is there, its configuration in a file that ends in `.config` or `.json`.
    ///
    /// # Errors
    /// When the file is not there.
    pub fn at(file: &Path) -> Result<Self> {
        let name = file.file_stem().and_then(|stem| stem.to_str()).context("a file name")?.to_owned();
        std::fs::metadata(file).with_context(|| format!("no {}", file.display()))?;
        let mut known = known(&name);
        for ending in ["config", "json"] {
            if let Ok(text) = std::fs::read_to_string(file.with_extension(ending)) {
                known.config = text;
            }
        }
        Ok(Self { name, file: file.to_owned(), known })
    }

    /// Lines that are compared: all but those that come whenever they come.
    pub fn of_requests(&self, lines: Vec<Line>) -> Vec<Line> {
        let is_loose = |line: &Line| self.known.loose.iter().any(|text| line.text.contains(text));
        lines.into_iter().filter(|line| !is_loose(line)).collect()
    }

    /// Lines as they are compared.
    pub fn comparable(&self, lines: &[Line]) -> Vec<Line> {
        let text = |line: &Line| printable(&steady(line.text.trim_end()).replace('\n', "\\n"));
        lines.iter().map(|line| Line { level: line.level.clone(), text: text(line) }).collect()
    }
}

/// A line as our host writes it: what steers terminals is spelled out, and a line has an end.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars().take(LINE_CHARS_MAX) {
        if c.is_control() && c != '\t' { printable.extend(c.escape_default()) } else { printable.push(c) }
    }
    printable
}

/// So much of a line is compared.
const LINE_CHARS_MAX: usize = 2000;

/// A line without what the clock says in it.
fn steady(text: &str) -> String {
    for name in ["date", "x-envoy-upstream-service-time"] {
        if let Some(at) = text.find(&format!("{name}: ")).or_else(|| text.find(&format!("{name} -> "))) {
            return format!("{}{name}: *", &text[..at]);
        }
    }
    text.to_owned()
}
