//! Findings for code scanning: the Static Analysis Results Interchange Format, version 2.1.0 (OASIS).
//!
//! A `fix` of SARIF is an edit of files; ours are advice, so they stand in the message and in `properties.fix`.

use cairn_manifest::{CODES, Code, Diagnostic, Severity};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;

const SCHEMA: &str = "https://json.schemastore.org/sarif-2.1.0.json";

/// The log of one run.
pub fn log(diagnostics: &[Diagnostic]) -> Value {
    json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "cairn check",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": CODES.iter().map(rule).collect::<Vec<_>>(),
            } },
            "columnKind": "unicodeCodePoints",
            "results": diagnostics.iter().map(result).collect::<Vec<_>>(),
        }],
    })
}

fn rule(code: &Code) -> Value {
    json!({
        "id": code.name,
        "shortDescription": { "text": code.meaning },
        "help": { "text": code.fix },
        "defaultConfiguration": { "level": level(code.severity) },
    })
}

fn level(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Info => "note",
    }
}

fn result(diagnostic: &Diagnostic) -> Value {
    let mut text = String::new();
    for part in
        diagnostic.object.iter().chain([&diagnostic.field].into_iter().filter(|field| !field.is_empty()))
    {
        let _always = write!(text, "{part}: ");
    }
    text.push_str(&diagnostic.reason);
    if let Some(fix) = diagnostic.fix() {
        let _always = write!(text, ". Fix: {fix}");
    }
    let mut result = json!({
        "ruleId": diagnostic.code,
        "level": level(diagnostic.severity),
        "message": { "text": text },
        "locations": [location(diagnostic)],
        "properties": { "fix": diagnostic.fix() },
    });
    // A code that is not in the list has no rule to point to.
    if let Some(index) = CODES.iter().position(|code| code.name == diagnostic.code) {
        result["ruleIndex"] = index.into();
    }
    result
}

fn location(diagnostic: &Diagnostic) -> Value {
    let mut physical = json!({ "artifactLocation": { "uri": uri(&diagnostic.file) } });
    if diagnostic.line > 0 {
        physical["region"] = json!({ "startLine": diagnostic.line, "startColumn": diagnostic.column.max(1) });
    }
    let mut location = json!({ "physicalLocation": physical });
    if let Some(object) = &diagnostic.object {
        let name = match diagnostic.field.is_empty() {
            true => object.clone(),
            false => format!("{object}: {}", diagnostic.field),
        };
        location["logicalLocations"] = json!([{ "fullyQualifiedName": name, "kind": "object" }]);
    }
    location
}

/// A path as a URI reference (RFC 3986): what is relative stays so, as code scanning wants it.
fn uri(path: &Path) -> String {
    let mut text = String::new();
    if path.is_absolute() {
        text.push_str("file://");
    }
    for byte in path.display().to_string().trim_start_matches("./").bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' | b'~' => text.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => text.push(char::from(byte)),
            byte => {
                let _always = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(line: u32) -> Diagnostic {
        Diagnostic {
            severity: Severity::Warning,
            file: Path::new("./a b/c.yaml").into(),
            line,
            column: 0,
            object: Some("AuthorizationPolicy shop/p".to_owned()),
            field: "spec.rules[0]".to_owned(),
            reason: "changes nothing".to_owned(),
            code: "shadowed-rule",
            fix: None,
        }
    }

    /// What the published schema requires of the parts that we write, and how it bounds them.
    fn check(log: &Value) -> Result<(), String> {
        let text = |value: &Value, what: &str| {
            value
                .as_str()
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
                .ok_or(format!("no {what}: {value}"))
        };
        if log["version"] != "2.1.0" {
            return Err("version".to_owned());
        }
        let levels = ["none", "note", "warning", "error"];
        for run in log["runs"].as_array().ok_or("no runs")? {
            let driver = &run["tool"]["driver"];
            text(&driver["name"], "name of the driver")?;
            let rules = driver["rules"].as_array().ok_or("no rules")?;
            for rule in rules {
                text(&rule["id"], "id of a rule")?;
                text(&rule["shortDescription"]["text"], "description")?;
                text(&rule["help"]["text"], "help")?;
                let level = text(&rule["defaultConfiguration"]["level"], "level")?;
                levels.contains(&&*level).then_some(()).ok_or(level)?;
            }
            if !["utf16CodeUnits", "unicodeCodePoints"].contains(&&*text(&run["columnKind"], "columnKind")?) {
                return Err("columnKind".to_owned());
            }
            for result in run["results"].as_array().ok_or("no results")? {
                text(&result["message"]["text"], "message")?;
                let level = text(&result["level"], "level")?;
                levels.contains(&&*level).then_some(()).ok_or(level)?;
                let id = text(&result["ruleId"], "ruleId")?;
                if let Some(index) = result["ruleIndex"].as_u64() {
                    let rule = rules.get(index as usize).ok_or("ruleIndex is out of range")?;
                    (rule["id"] == *id).then_some(()).ok_or("ruleIndex is another's")?;
                }
                for location in result["locations"].as_array().ok_or("no locations")? {
                    let physical = &location["physicalLocation"];
                    let uri = text(&physical["artifactLocation"]["uri"], "uri")?;
                    (!uri.contains(' ')).then_some(()).ok_or("uri is none")?;
                    let region = &physical["region"];
                    let is_place = |key: &str| region[key].as_u64().is_some_and(|number| number >= 1);
                    let placed = region.is_null() || (is_place("startLine") && is_place("startColumn"));
                    placed.then_some(()).ok_or("region")?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn the_log_has_what_the_schema_asks_for() {
        let whole = log(&[finding(3), finding(0), Diagnostic { code: "not-listed", ..finding(1) }]);
        assert_eq!(check(&whole), Ok(()));
        let result = &whole["runs"][0]["results"][0];
        assert_eq!(
            result["message"]["text"],
            "AuthorizationPolicy shop/p: spec.rules[0]: changes nothing. Fix: Remove it, or make the wider rule narrower."
        );
        assert_eq!(result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"], "a%20b/c.yaml");
        assert_eq!(uri(Path::new("/a/b.yaml")), "file:///a/b.yaml");
    }

    #[test]
    fn the_check_of_the_log_finds_what_is_missing() {
        for (name, spoil) in [
            ("version", (|log: &mut Value| log["version"] = "2.0".into()) as fn(&mut Value)),
            ("driver", |log| log["runs"][0]["tool"]["driver"]["name"] = Value::Null),
            ("message", |log| log["runs"][0]["results"][0]["message"] = Value::Null),
            ("level", |log| log["runs"][0]["results"][0]["level"] = "bad".into()),
            ("rule index", |log| log["runs"][0]["results"][0]["ruleIndex"] = 0.into()),
            ("line", |log| {
                log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] =
                    0.into();
            }),
        ] {
            let mut log = log(&[finding(3)]);
            spoil(&mut log);
            assert!(check(&log).is_err(), "{name}");
        }
    }
}
