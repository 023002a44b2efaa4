//! Text into documents: values, and where each of them stands. The first step of every reading.

use crate::field::{FieldPath, Step};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;
use std::fmt;

/// How deep a document may nest. Kubernetes objects stay below 20.
const DEPTH_MAX: usize = 64;

/// Where a value stands in its file, and where what is in it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    line: u32,
    column: u32,
    children: Vec<(Step, Position)>,
}

impl Position {
    /// A place of which nothing inside is known.
    pub(crate) fn point(line: u32, column: u32) -> Self {
        Self { line, column, children: Vec::new() }
    }

    /// The line, from 1; 0 when unknown.
    pub fn line(&self) -> u32 {
        self.line
    }

    /// Line and column, from 1, of the place, or of the nearest place around it that the file has.
    pub fn find(&self, path: &FieldPath) -> (u32, u32) {
        let found = self.descend(path.steps());
        (found.line, found.column)
    }

    fn descend(&self, steps: &[Step]) -> &Self {
        let Some((first, rest)) = steps.split_first() else { return self };
        match self.child(first) {
            Some(child) => child.descend(rest),
            None => self,
        }
    }

    /// The position of what is one step below.
    pub(crate) fn child(&self, step: &Step) -> Option<&Self> {
        self.children.iter().find(|(own, _)| own == step).map(|(_, child)| child)
    }
}

/// One document of a file.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) value: Value,
    pub(crate) position: Position,
}

/// A document that is not YAML.
#[derive(Debug)]
pub(crate) struct BrokenDocument<'a> {
    /// Its text.
    pub(crate) text: &'a str,
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) reason: String,
}

/// Reads every document of a file; one that does not parse costs only itself. JSON is read as the YAML it is.
pub(crate) fn documents(text: &str) -> Vec<Result<Document, BrokenDocument<'_>>> {
    split(text).filter_map(|(first_line, text)| document(text, first_line).transpose()).collect()
}

/// Cuts at lines that begin with `---`, which no content of a document may (YAML 1.2.2 §9.1.2).
fn split(text: &str) -> impl Iterator<Item = (u32, &str)> {
    let mut starts = vec![(1, 0)];
    let mut offset = 0;
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && offset > 0 {
            starts.push((number, offset));
        }
        offset += line.len();
    }
    let ends: Vec<usize> = starts.iter().skip(1).map(|(_, start)| *start).chain([text.len()]).collect();
    starts.into_iter().zip(ends).map(|((line, start), end)| (line, text.get(start..end).unwrap_or_default()))
}

/// Whether the text holds only comments, directives and document markers.
fn is_blank(text: &str) -> bool {
    text.lines().all(|line| {
        let line = line.strip_prefix("---").unwrap_or(line).trim();
        line.is_empty() || line == "..." || line.starts_with(['#', '%'])
    })
}

fn document(text: &str, first_line: u32) -> Result<Option<Document>, BrokenDocument<'_>> {
    if is_blank(text) {
        return Ok(None);
    }
    let options = serde_saphyr::options! {
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        budget: serde_saphyr::budget! { max_depth: DEPTH_MAX },
    };
    let broken = |error: serde_saphyr::Error| {
        let location = error.location();
        BrokenDocument {
            text,
            line: location.map_or(first_line, |at| at.line() as u32 + first_line - 1),
            column: location.map_or(1, |at| at.column() as u32),
            reason: first_line_of(&error.without_snippet().to_string()),
        }
    };
    let root: Spanned<Content> = serde_saphyr::from_str_with_options(text, options).map_err(broken)?;
    if matches!(root.value, Content::Null) {
        return Ok(None);
    }
    let (value, position) = place(root, first_line);
    Ok(Some(Document { value, position }))
}

fn first_line_of(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// A value whose parts know where they stand.
enum Content {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Spanned<Content>>),
    Map(Vec<(Spanned<String>, Spanned<Content>)>),
}

/// Takes a value and its positions apart. An entry of a map stands where its key does.
fn place(node: Spanned<Content>, first_line: u32) -> (Value, Position) {
    let at = |location: serde_saphyr::Location| {
        (location.line() as u32 + first_line - 1, location.column() as u32)
    };
    let (line, column) = at(node.referenced);
    let mut position = Position { line, column, children: Vec::new() };
    let value = match node.value {
        Content::Null => Value::Null,
        Content::Bool(value) => Value::Bool(value),
        Content::Number(value) => Value::Number(value),
        Content::Text(value) => Value::String(value),
        Content::List(items) => {
            let mut values = Vec::with_capacity(items.len());
            for (index, item) in items.into_iter().enumerate() {
                let (value, child) = place(item, first_line);
                position.children.push((Step::Index(index), child));
                values.push(value);
            }
            Value::Array(values)
        }
        Content::Map(entries) => {
            let mut values = Map::with_capacity(entries.len());
            for (key, entry) in entries {
                let (value, mut child) = place(entry, first_line);
                (child.line, child.column) = at(key.referenced);
                position.children.push((Step::Key(key.value.as_str().into()), child));
                values.insert(key.value, value);
            }
            Value::Object(values)
        }
    };
    (value, position)
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Content, E> {
        Number::from_f64(value).map(Content::Number).ok_or_else(|| E::custom("a number must be finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(Content::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Content, E> {
        Ok(Content::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Content::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Content, A::Error> {
        let mut map: Vec<(Spanned<String>, Spanned<Content>)> = Vec::new();
        while let Some(key) = entries.next_key()? {
            map.push((key, entries.next_value()?));
        }
        if map.len() > u16::MAX as usize {
            return Err(A::Error::custom("a map has more than 65,535 entries"));
        }
        Ok(Content::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Document {
        let mut all = documents(text);
        assert_eq!(all.len(), 1, "{text}");
        all.remove(0).unwrap()
    }

    #[test]
    fn value_keeps_its_type() {
        for (name, text, expected) in [
            ("text", "a: x", serde_json::json!({"a": "x"})),
            ("quoted number", "a: \"80\"", serde_json::json!({"a": "80"})),
            ("number", "a: 80", serde_json::json!({"a": 80})),
            ("negative", "a: -1", serde_json::json!({"a": -1})),
            ("float", "a: 1.5", serde_json::json!({"a": 1.5})),
            ("bool", "a: true", serde_json::json!({"a": true})),
            ("yes is text", "a: yes", serde_json::json!({"a": "yes"})),
            ("null", "a:", serde_json::json!({"a": null})),
            ("a commit with digits only and a zero first", "a: 0123", serde_json::json!({"a": "0123"})),
            ("block", "a: |\n  x\n  y\n", serde_json::json!({"a": "x\ny\n"})),
            ("anchor", "a: &x [1]\nb: *x", serde_json::json!({"a": [1], "b": [1]})),
            ("json", "{\n\t\"a\": [1, {\"b\": null}]\n}", serde_json::json!({"a": [1, {"b": null}]})),
            ("number as a key", "80: x", serde_json::json!({"80": "x"})),
        ] {
            assert_eq!(one(text).value, expected, "{name}");
        }
    }

    #[test]
    fn places_are_found_in_the_file() {
        let text = "# comment\n---\nspec:\n  rules:\n  - from:\n    - source:\n        principals:\n        - a\n        - \"*\"\n";
        let position = one(text).position;
        let rules = FieldPath::of(&["spec", "rules"]);
        let principals = rules.index(0).key("from").index(0).key("source").key("principals");
        for (name, path, expected) in [
            ("root", FieldPath::root(), (3, 1)),
            ("key", FieldPath::of(&["spec"]), (3, 1)),
            ("nested key", rules.clone(), (4, 3)),
            ("element", rules.index(0), (5, 5)),
            ("deep key", principals.clone(), (7, 9)),
            ("scalar", principals.index(1), (9, 11)),
            ("absent: the nearest around it", principals.index(7).key("x"), (7, 9)),
        ] {
            assert_eq!(position.find(&path), expected, "{name}");
        }
    }

    #[test]
    fn a_broken_document_costs_only_itself() {
        let text = "a: 1\n---\nb: [1\n---\n# nothing\n---\n---\nc: 2\n--- {d: 3}\n";
        let all = documents(text);
        assert_eq!(all.len(), 4);
        assert_eq!(all[0].as_ref().unwrap().value, serde_json::json!({"a": 1}));
        let broken = all[1].as_ref().unwrap_err();
        assert!((2..=4).contains(&broken.line), "{broken:?}");
        assert!(!broken.reason.is_empty());
        assert_eq!(all[2].as_ref().unwrap().value, serde_json::json!({"c": 2}));
        assert_eq!(all[2].as_ref().unwrap().position.find(&FieldPath::of(&["c"])), (8, 1));
        assert_eq!(all[3].as_ref().unwrap().value, serde_json::json!({"d": 3}));
    }

    #[test]
    fn duplicate_keys_and_deep_nesting_are_refused() {
        for text in ["a: 1\na: 2", &"[".repeat(5000), &format!("{}{}", "[".repeat(500), "]".repeat(500))] {
            assert!(documents(text)[0].is_err());
        }
    }
}
