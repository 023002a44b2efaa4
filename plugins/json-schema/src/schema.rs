//! JSON Schema 2020-12, compiled: `type`, `enum`, `const`, the limits of numbers, strings, arrays and objects, `pattern`,
//! `properties`, `patternProperties`, `additionalProperties`, `required`, `propertyNames`, `items`, `prefixItems`, `contains`,
//! `uniqueItems`, `allOf`, `anyOf`, `oneOf`, `not`, `if`, and `$ref` to what is under `$defs`. Annotations are skipped. Any
//! other keyword is refused: a schema must not promise what is not checked.

use regex_lite::Regex;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// How deep schemas refer and bodies nest.
const DEPTH_MAX: usize = 64;

/// A compiled schema with its definitions.
#[derive(Debug)]
pub(crate) struct Schema {
    root: Node,
    definitions: BTreeMap<String, Node>,
}

/// What a place must fulfil.
#[derive(Debug)]
enum Node {
    /// `true` and `false`.
    Always(bool),
    Rules(Vec<Rule>),
}

#[derive(Debug)]
enum Rule {
    Types(Vec<String>),
    Enum(Vec<Value>),
    Number { limit: f64, is_ok: fn(f64, f64) -> bool, says: &'static str },
    Size { of: Sized, limit: usize, is_most: bool },
    Pattern(Regex),
    Unique,
    Required(Vec<String>),
    Properties { named: BTreeMap<String, Node>, patterns: Vec<(Regex, Node)>, others: Option<Box<Node>> },
    Names(Box<Node>),
    Items { first: Vec<Node>, others: Option<Box<Node>> },
    Contains(Box<Node>),
    All(Vec<Node>),
    Any(Vec<Node>),
    One(Vec<Node>),
    Not(Box<Node>),
    If { condition: Box<Node>, then: Option<Box<Node>>, otherwise: Option<Box<Node>> },
    Ref(String),
}

#[derive(Clone, Copy, Debug)]
enum Sized {
    Text,
    Array,
    Object,
}

const ANNOTATIONS: [&str; 13] = [
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "format",
];
/// Keywords that others read.
const COMPANIONS: [&str; 5] = ["patternProperties", "additionalProperties", "then", "else", "prefixItems"];

impl Schema {
    /// Compiles a schema. The error begins with the place, `.properties.a: …`.
    pub(crate) fn compile(schema: &Value) -> Result<Self, String> {
        let mut definitions = BTreeMap::new();
        for holder in ["$defs", "definitions"] {
            for (name, definition) in schema.get(holder).and_then(Value::as_object).into_iter().flatten() {
                let node =
                    Node::compile(definition, 0).map_err(|error| format!(".{holder}.{name}{error}"))?;
                definitions.insert(format!("#/{holder}/{name}"), node);
            }
        }
        let compiled = Self { root: Node::compile(schema, 0)?, definitions };
        compiled.root.each_reference(&mut |reference| match reference {
            "#" => Ok(()),
            reference if compiled.definitions.contains_key(reference) => Ok(()),
            reference => Err(format!(": there is no `{reference}`")),
        })?;
        Ok(compiled)
    }

    /// Whether a value fulfils it. The error begins with the place in the value.
    pub(crate) fn check(&self, value: &Value) -> Result<(), String> {
        self.root.check(value, self, 0).map_err(|error| error.trim_start_matches(['.', ':', ' ']).to_owned())
    }
}

impl Node {
    fn compile(schema: &Value, depth: usize) -> Result<Self, String> {
        if depth > DEPTH_MAX {
            return Err(": the schema nests too deep".to_owned());
        }
        let keywords = match schema {
            Value::Bool(always) => return Ok(Self::Always(*always)),
            Value::Object(keywords) => keywords,
            _ => return Err(": a schema is an object, true or false".to_owned()),
        };
        let mut rules = Vec::new();
        for (keyword, value) in keywords {
            if !ANNOTATIONS.contains(&keyword.as_str()) {
                let rule = rule(keyword, value, keywords, depth + 1)
                    .map_err(|error| format!(".{keyword}{error}"))?;
                rules.extend(rule);
            }
        }
        Ok(Self::Rules(rules))
    }

    fn boxed(schema: &Value, depth: usize) -> Result<Box<Self>, String> {
        Self::compile(schema, depth).map(Box::new)
    }

    fn list(value: &Value, depth: usize) -> Result<Vec<Self>, String> {
        let schemas = value.as_array().filter(|schemas| !schemas.is_empty());
        let schemas = schemas.ok_or(": it is a list of schemas")?;
        let compile =
            |(index, schema)| Self::compile(schema, depth).map_err(|error| format!("[{index}]{error}"));
        schemas.iter().enumerate().map(compile).collect()
    }

    fn each_reference(&self, see: &mut dyn FnMut(&str) -> Result<(), String>) -> Result<(), String> {
        let Self::Rules(rules) = self else { return Ok(()) };
        for rule in rules {
            if let Rule::Ref(reference) = rule {
                see(reference)?;
            }
            for node in rule.children() {
                node.each_reference(see)?;
            }
        }
        Ok(())
    }

    fn check(&self, value: &Value, schema: &Schema, depth: usize) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err(": it nests too deep".to_owned());
        }
        match self {
            Self::Always(true) => Ok(()),
            Self::Always(false) => Err(": it may not be there".to_owned()),
            Self::Rules(rules) => rules.iter().try_for_each(|rule| rule.check(value, schema, depth + 1)),
        }
    }

    fn fits(&self, value: &Value, schema: &Schema, depth: usize) -> bool {
        self.check(value, schema, depth).is_ok()
    }
}

/// The rule of a keyword; none for one that another reads.
fn rule(
    keyword: &str,
    value: &Value,
    all: &Map<String, Value>,
    depth: usize,
) -> Result<Option<Rule>, String> {
    let number = || value.as_f64().ok_or(": it is a number");
    let size = || value.as_u64().and_then(|size| usize::try_from(size).ok()).ok_or(": it is a whole number");
    let limit = |is_ok, says| number().map(|limit| Rule::Number { limit, is_ok, says });
    let sized = |of, is_most| size().map(|limit| Rule::Size { of, limit, is_most });
    let rule = match keyword {
        "type" => Rule::Types(types(value)?),
        "enum" => Rule::Enum(value.as_array().ok_or(": it is a list")?.clone()),
        "const" => Rule::Enum(vec![value.clone()]),
        "minimum" => limit(|value, limit| value >= limit, "below")?,
        "maximum" => limit(|value, limit| value <= limit, "above")?,
        "exclusiveMinimum" => limit(|value, limit| value > limit, "not above")?,
        "exclusiveMaximum" => limit(|value, limit| value < limit, "not below")?,
        "multipleOf" if number()? > 0.0 => limit(|value, of| (value / of).fract() == 0.0, "no multiple of")?,
        "minLength" => sized(Sized::Text, false)?,
        "maxLength" => sized(Sized::Text, true)?,
        "minItems" => sized(Sized::Array, false)?,
        "maxItems" => sized(Sized::Array, true)?,
        "minProperties" => sized(Sized::Object, false)?,
        "maxProperties" => sized(Sized::Object, true)?,
        "pattern" => Rule::Pattern(regex(value)?),
        "uniqueItems" => return Ok((value == &Value::Bool(true)).then_some(Rule::Unique)),
        "required" => Rule::Required(texts(value)?),
        "properties" => properties(all, depth)?,
        "patternProperties" | "additionalProperties" if !all.contains_key("properties") => {
            // Whichever comes first stands for both.
            let is_first = keyword == "patternProperties" || !all.contains_key("patternProperties");
            return is_first.then(|| properties(all, depth)).transpose();
        }
        "propertyNames" => Rule::Names(Node::boxed(value, depth)?),
        "items" => items(all, depth)?,
        "prefixItems" if !all.contains_key("items") => items(all, depth)?,
        "contains" => Rule::Contains(Node::boxed(value, depth)?),
        "allOf" => Rule::All(Node::list(value, depth)?),
        "anyOf" => Rule::Any(Node::list(value, depth)?),
        "oneOf" => Rule::One(Node::list(value, depth)?),
        "not" => Rule::Not(Node::boxed(value, depth)?),
        "if" => {
            let part = |name: &str| all.get(name).map(|schema| Node::boxed(schema, depth)).transpose();
            Rule::If { condition: Node::boxed(value, depth)?, then: part("then")?, otherwise: part("else")? }
        }
        "$ref" => Rule::Ref(value.as_str().ok_or(": it is text")?.to_owned()),
        keyword if COMPANIONS.contains(&keyword) => return Ok(None),
        _ => return Err(": this keyword is not supported".to_owned()),
    };
    Ok(Some(rule))
}

fn types(value: &Value) -> Result<Vec<String>, String> {
    let types = if value.is_string() { texts(&Value::Array(vec![value.clone()]))? } else { texts(value)? };
    let known = ["null", "boolean", "object", "array", "number", "integer", "string"];
    match types.iter().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(format!(": there is no type `{name}`")),
        None => Ok(types),
    }
}

fn texts(value: &Value) -> Result<Vec<String>, String> {
    let texts = value.as_array().ok_or(": it is a list of texts")?;
    let text =
        |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| ": it is a list of texts".to_owned());
    texts.iter().map(text).collect()
}

fn regex(value: &Value) -> Result<Regex, String> {
    let text = value.as_str().ok_or(": it is text")?;
    Regex::new(text).map_err(|error| format!(": {error}"))
}

fn properties(all: &Map<String, Value>, depth: usize) -> Result<Rule, String> {
    let part = |name: &str| all.get(name).map(|part| part.as_object().ok_or(": it is an object")).transpose();
    let mut named = BTreeMap::new();
    for (name, schema) in part("properties")?.into_iter().flatten() {
        let node = Node::compile(schema, depth).map_err(|error| format!(".{name}{error}"))?;
        named.insert(name.clone(), node);
    }
    let mut patterns = Vec::new();
    for (pattern, schema) in part("patternProperties")?.into_iter().flatten() {
        let regex = Regex::new(pattern).map_err(|error| format!(": `{pattern}`: {error}"))?;
        patterns.push((regex, Node::compile(schema, depth)?));
    }
    let others = all.get("additionalProperties").map(|schema| Node::boxed(schema, depth)).transpose()?;
    Ok(Rule::Properties { named, patterns, others })
}

fn items(all: &Map<String, Value>, depth: usize) -> Result<Rule, String> {
    let first = all.get("prefixItems").map(|list| Node::list(list, depth)).transpose()?.unwrap_or_default();
    let others = all.get("items").map(|schema| Node::boxed(schema, depth)).transpose()?;
    Ok(Rule::Items { first, others })
}

impl Rule {
    fn children(&self) -> Vec<&Node> {
        match self {
            Self::Properties { named, patterns, others } => {
                named.values().chain(patterns.iter().map(|(_, node)| node)).chain(others.as_deref()).collect()
            }
            Self::Items { first, others } => first.iter().chain(others.as_deref()).collect(),
            Self::Names(node) | Self::Contains(node) | Self::Not(node) => vec![node],
            Self::All(nodes) | Self::Any(nodes) | Self::One(nodes) => nodes.iter().collect(),
            Self::If { condition, then, otherwise } => [Some(condition), then.as_ref(), otherwise.as_ref()]
                .into_iter()
                .flatten()
                .map(Box::as_ref)
                .collect(),
            _ => Vec::new(),
        }
    }

    fn check(&self, value: &Value, schema: &Schema, depth: usize) -> Result<(), String> {
        let fits = |node: &Node| node.fits(value, schema, depth);
        let holds = match self {
            Self::Types(types) => return check_type(value, types),
            Self::Enum(values) => values.iter().any(|allowed| is_same(allowed, value)),
            Self::Number { limit, is_ok, says } => match value.as_f64() {
                Some(number) if !is_ok(number, *limit) => return Err(format!(": it is {says} {limit}")),
                _ => true,
            },
            Self::Size { of, limit, is_most } => return check_size(value, *of, *limit, *is_most),
            Self::Pattern(regex) => value.as_str().is_none_or(|text| regex.is_match(text)),
            Self::Unique => value.as_array().is_none_or(|items| is_unique(items)),
            Self::Required(names) => {
                let object = value.as_object();
                let missing =
                    names.iter().find(|name| object.is_some_and(|object| !object.contains_key(*name)));
                return missing.map_or(Ok(()), |name| Err(format!(".{name}: it is missing")));
            }
            Self::Properties { .. } => return self.check_properties(value, schema, depth),
            Self::Names(node) => {
                let mut names = value.as_object().into_iter().flat_map(Map::keys);
                names.all(|name| node.fits(&Value::String(name.clone()), schema, depth))
            }
            Self::Items { first, others } => {
                return check_items(value, (first, others.as_deref()), schema, depth);
            }
            Self::Contains(node) => {
                value.as_array().is_none_or(|items| items.iter().any(|item| node.fits(item, schema, depth)))
            }
            Self::All(nodes) => return nodes.iter().try_for_each(|node| node.check(value, schema, depth)),
            Self::Any(nodes) => nodes.iter().any(fits),
            Self::One(nodes) => nodes.iter().filter(|node| fits(node)).count() == 1,
            Self::Not(node) => !fits(node),
            Self::If { condition, then, otherwise } => {
                let branch = if fits(condition) { then } else { otherwise };
                return branch.as_ref().map_or(Ok(()), |node| node.check(value, schema, depth));
            }
            Self::Ref(reference) => {
                let node =
                    if reference == "#" { Some(&schema.root) } else { schema.definitions.get(reference) };
                return node.map_or(Ok(()), |node| node.check(value, schema, depth));
            }
        };
        if holds { Ok(()) } else { Err(self.says()) }
    }

    fn says(&self) -> String {
        let says = match self {
            Self::Enum(_) => "it is none of the values that are allowed",
            Self::Pattern(regex) => return format!(": it does not match `{}`", regex.as_str()),
            Self::Unique => "an item is there twice",
            Self::Names(_) => "a name is not allowed",
            Self::Contains(_) => "no item is as one must be",
            Self::Any(_) => "it fits none of what is allowed",
            Self::One(_) => "it does not fit exactly one of what is allowed",
            _ => "it is what is not allowed",
        };
        format!(": {says}")
    }

    fn check_properties(&self, value: &Value, schema: &Schema, depth: usize) -> Result<(), String> {
        let Self::Properties { named, patterns, others } = self else { return Ok(()) };
        for (name, value) in value.as_object().into_iter().flatten() {
            let matching = patterns.iter().filter(|(regex, _)| regex.is_match(name)).map(|(_, node)| node);
            let mut nodes: Vec<&Node> = named.get(name).into_iter().chain(matching).collect();
            if nodes.is_empty() {
                nodes.extend(others.as_deref());
            }
            let at = |error| format!(".{name}{error}");
            nodes.into_iter().try_for_each(|node| node.check(value, schema, depth)).map_err(at)?;
        }
        Ok(())
    }
}

fn check_items(
    value: &Value,
    (first, others): (&[Node], Option<&Node>),
    schema: &Schema,
    depth: usize,
) -> Result<(), String> {
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        if let Some(node) = first.get(index).or(others) {
            node.check(item, schema, depth).map_err(|error| format!("[{index}]{error}"))?;
        }
    }
    Ok(())
}

fn check_type(value: &Value, types: &[String]) -> Result<(), String> {
    let is = |name: &str| match (name, value) {
        ("null", Value::Null) | ("boolean", Value::Bool(_)) | ("object", Value::Object(_)) => true,
        ("array", Value::Array(_)) | ("string", Value::String(_)) | ("number", Value::Number(_)) => true,
        // 1.0 is an integer there.
        ("integer", Value::Number(number)) => number.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => false,
    };
    if types.iter().any(|name| is(name)) {
        Ok(())
    } else {
        Err(format!(": it is not of type {}", types.join(" or ")))
    }
}

fn check_size(value: &Value, of: Sized, limit: usize, is_most: bool) -> Result<(), String> {
    let (size, what) = match (of, value) {
        (Sized::Text, Value::String(text)) => (text.chars().count(), "characters"),
        (Sized::Array, Value::Array(items)) => (items.len(), "items"),
        (Sized::Object, Value::Object(object)) => (object.len(), "properties"),
        _ => return Ok(()),
    };
    match is_most {
        true if size > limit => Err(format!(": it has more than {limit} {what}")),
        false if size < limit => Err(format!(": it has less than {limit} {what}")),
        _ => Ok(()),
    }
}

/// Numbers are the same however they are written.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(name, a)| b.get(name).is_some_and(|b| is_same(a, b)))
        }
        (a, b) => a == b,
    }
}

/// Sorted by how they are written, equal items stand side by side, but for numbers written differently, which are compared.
fn is_unique(items: &[Value]) -> bool {
    const COMPARED_MAX: usize = 64;
    if items.len() <= COMPARED_MAX {
        return (1..items.len())
            .all(|index| !items[..index].iter().any(|earlier| is_same(earlier, &items[index])));
    }
    let mut written: Vec<String> = items.iter().map(ToString::to_string).collect();
    written.sort_unstable();
    written.windows(2).all(|pair| pair[0] != pair[1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A schema, values that fulfil it, and values that do not with what is said.
    #[test]
    fn keywords_mean_what_the_standard_says() {
        let cases = [
            (
                json!({"type": ["string", "null"]}),
                vec![json!("a"), json!(null)],
                vec![(json!(1), "it is not of type string or null")],
            ),
            (
                json!({"type": "integer"}),
                vec![json!(1), json!(1.0)],
                vec![(json!(1.5), "it is not of type integer")],
            ),
            (
                json!({"enum": [1, "a", {"b": [1]}]}),
                vec![json!(1.0), json!({"b": [1]})],
                vec![(json!("b"), "it is none")],
            ),
            (json!({"const": null}), vec![json!(null)], vec![(json!(0), "it is none")]),
            (
                json!({"minimum": 1, "exclusiveMaximum": 3}),
                vec![json!(1), json!(2.9), json!("x")],
                vec![(json!(0), "it is below 1"), (json!(3), "it is not below 3")],
            ),
            (json!({"multipleOf": 0.5}), vec![json!(1.5)], vec![(json!(1.2), "it is no multiple of 0.5")]),
            (
                json!({"minLength": 2, "maxLength": 3}),
                vec![json!("äö"), json!(1)],
                vec![(json!("a"), "it has less than 2"), (json!("abcd"), "it has more than 3")],
            ),
            (
                json!({"pattern": "^a+$"}),
                vec![json!("aa"), json!(5)],
                vec![(json!("ab"), "it does not match `^a+$`")],
            ),
            (
                json!({"uniqueItems": true, "maxItems": 3}),
                vec![json!([1, "1"])],
                vec![(json!([1, 1.0]), "an item is there twice"), (json!([1, 2, 3, 4]), "it has more")],
            ),
            (
                json!({"required": ["a"]}),
                vec![json!({"a": null}), json!([])],
                vec![(json!({}), "a: it is missing")],
            ),
            (
                json!({"properties": {"a": {"type": "string"}}, "patternProperties": {"^x": {"type": "number"}}, "additionalProperties": false}),
                vec![json!({"a": "1", "x1": 1})],
                vec![
                    (json!({"a": 1}), "a: it is not of type"),
                    (json!({"xa": "1"}), "xa: it is not"),
                    (json!({"b": 1}), "b: it may not be there"),
                ],
            ),
            (
                json!({"additionalProperties": {"type": "number"}}),
                vec![json!({"a": 1})],
                vec![(json!({"a": "1"}), "a: it is not")],
            ),
            (
                json!({"propertyNames": {"maxLength": 1}}),
                vec![json!({"a": 1})],
                vec![(json!({"ab": 1}), "a name is not allowed")],
            ),
            (
                json!({"prefixItems": [{"const": 1}], "items": {"type": "string"}}),
                vec![json!([1, "a"]), json!([])],
                vec![(json!([2]), "[0]: it is none"), (json!([1, 2]), "[1]: it is not")],
            ),
            (json!({"contains": {"const": 1}}), vec![json!([2, 1])], vec![(json!([2]), "no item")]),
            (
                json!({"allOf": [{"minimum": 1}, {"maximum": 2}]}),
                vec![json!(2)],
                vec![(json!(3), "it is above 2")],
            ),
            (
                json!({"anyOf": [{"const": 1}, {"type": "string"}]}),
                vec![json!(1), json!("a")],
                vec![(json!(2), "it fits none")],
            ),
            (
                json!({"oneOf": [{"minimum": 1}, {"minimum": 5}]}),
                vec![json!(3)],
                vec![(json!(7), "it does not fit exactly one"), (json!(0), "it does not fit")],
            ),
            (
                json!({"not": {"type": "null"}}),
                vec![json!(1)],
                vec![(json!(null), "it is what is not allowed")],
            ),
            (
                json!({"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["c"]}}),
                vec![json!({"a": 1, "b": 1}), json!({"c": 1})],
                vec![(json!({"a": 1}), "b: it is missing"), (json!({}), "c: it is missing")],
            ),
            (
                json!({"$defs": {"tree": {"properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}}, "$ref": "#/$defs/tree"}),
                vec![json!({"kids": [{"kids": []}]})],
                vec![(json!({"kids": [{"kids": 1}]}), "kids[0].kids: it is not of type array")],
            ),
            (json!(false), vec![], vec![(json!(1), "it may not be there")]),
        ];
        for (schema, good, bad) in cases {
            let compiled = Schema::compile(&schema).unwrap();
            for value in good {
                assert_eq!(compiled.check(&value), Ok(()), "{schema} {value}");
            }
            for (value, says) in bad {
                let found = compiled.check(&value).unwrap_err();
                assert!(found.starts_with(says), "{schema} {value}: {found}");
            }
        }
    }

    #[test]
    fn recursion_has_an_end() {
        let endless = Schema::compile(&json!({"$ref": "#"})).unwrap();
        assert_eq!(endless.check(&json!(1)), Err("it nests too deep".to_owned()));
        let deep = (0..200).fold(json!({}), |inner, _| json!({"not": inner}));
        assert!(Schema::compile(&deep).unwrap_err().ends_with(": the schema nests too deep"));
    }

    #[test]
    fn schemas_that_promise_too_much_are_refused() {
        let cases = [
            (json!({"unevaluatedProperties": false}), ".unevaluatedProperties: this keyword"),
            (json!({"properties": {"a": {"type": "text"}}}), ".properties.a.type: there is no type `text`"),
            (json!({"pattern": "("}), ".pattern: "),
            (json!({"items": [1]}), ".items: a schema is an object"),
            (json!({"anyOf": []}), ".anyOf: it is a list"),
            (json!({"$ref": "#/$defs/none"}), ": there is no `#/$defs/none`"),
            (json!({"not": {"$ref": "http://elsewhere"}}), ": there is no `http://elsewhere`"),
            (json!({"multipleOf": 0}), ".multipleOf: "),
            (json!(1), ": a schema is an object"),
        ];
        for (schema, error) in cases {
            let found = Schema::compile(&schema).unwrap_err();
            assert!(found.starts_with(error), "{schema}: {found}");
        }
    }
}
