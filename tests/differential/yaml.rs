//! Policies as people write them, for what is printed.

use serde_json::Value;

/// `value` as YAML, one line per entry.
pub fn text(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out);
    out
}

fn write(value: &Value, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                out.push_str(&format!("{indent}{}:", scalar(key)));
                entry(value, depth + 1, out);
            }
        }
        Value::Array(items) => {
            for item in items {
                out.push_str(&format!("{indent}-"));
                entry(item, depth + 1, out);
            }
        }
        other => out.push_str(&format!("{indent}{other}\n")),
    }
}

fn entry(value: &Value, depth: usize, out: &mut String) {
    let texts = |items: &[Value]| items.iter().map(Value::to_string).collect::<Vec<_>>().join(", ");
    match value {
        Value::Object(map) if map.is_empty() => out.push_str(" {}\n"),
        Value::Array(items) if items.iter().all(|item| !item.is_object() && !item.is_array()) => {
            out.push_str(&format!(" [{}]\n", texts(items)));
        }
        Value::Object(_) | Value::Array(_) => {
            out.push('\n');
            write(value, depth, out);
        }
        other => out.push_str(&format!(" {other}\n")),
    }
}

fn scalar(key: &str) -> String {
    let plain = key.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if plain { key.to_owned() } else { Value::from(key).to_string() }
}
