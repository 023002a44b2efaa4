//! Findings for people: each with the line that it is about and what would mend it.

use cairn_manifest::Diagnostic;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// The most characters of a line that are shown.
const LINE_CHARS_MAX: usize = 120;

/// All findings, one after the other.
pub fn render(diagnostics: &[Diagnostic]) -> String {
    let mut files: BTreeMap<&Path, Vec<String>> = BTreeMap::new();
    let mut text = String::new();
    for diagnostic in diagnostics {
        let lines = files.entry(&diagnostic.file).or_insert_with(|| lines(&diagnostic.file));
        one(&mut text, diagnostic, lines);
    }
    text
}

fn lines(file: &Path) -> Vec<String> {
    // A file that cannot be read has been reported; its findings stand without its text.
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn one(text: &mut String, diagnostic: &Diagnostic, lines: &[String]) {
    let _always = writeln!(text, "{diagnostic}");
    let (line, column) = (diagnostic.line as usize, diagnostic.column as usize);
    let margin = " ".repeat(line.to_string().len().max(3));
    if let Some(source) = line.checked_sub(1).and_then(|index| lines.get(index)) {
        let shown: String = source.chars().take(LINE_CHARS_MAX).map(printable).collect();
        let _always = writeln!(text, "{line:>width$} | {shown}", width = margin.len());
        if (1..=shown.chars().count()).contains(&column) {
            let _always = writeln!(text, "{margin} | {}^", " ".repeat(column - 1));
        }
    }
    if let Some(fix) = diagnostic.fix() {
        let _always = writeln!(text, "{margin} = fix: {fix}");
    }
}

/// A terminal must not act on what a manifest holds.
fn printable(character: char) -> char {
    match character {
        '\t' => ' ',
        other if other.is_control() => '\u{fffd}',
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_manifest::Severity;

    #[test]
    fn a_finding_shows_its_line_and_its_mending() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.yaml");
        std::fs::write(&file, "kind: X\nspec:\n  a: \u{1b}[31mred\n").unwrap();
        let finding = |line, column| Diagnostic {
            severity: Severity::Error,
            file: file.as_path().into(),
            line,
            column,
            object: None,
            field: "spec.a".to_owned(),
            reason: "is wrong".to_owned(),
            code: "invalid-value",
            fix: Some("make it right".to_owned()),
        };
        let place = file.display().to_string();
        for (name, found, expected) in [
            (
                "with its place",
                finding(3, 6),
                format!(
                    "{place}:3:6: error: spec.a: is wrong [invalid-value]\n  3 |   a: \u{fffd}[31mred\n    |      ^\n    \
                     = fix: make it right\n"
                ),
            ),
            (
                "without a place",
                finding(0, 0),
                format!("{place}: error: spec.a: is wrong [invalid-value]\n    = fix: make it right\n"),
            ),
        ] {
            assert_eq!(render(&[found]), expected, "{name}");
        }
    }
}
