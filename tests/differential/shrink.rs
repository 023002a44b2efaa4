//! Makes a scenario smaller, one step at a time, for as long as both sides still disagree on it.

use crate::scenario::{Ask, Scenario};
use serde_json::Value;

/// All scenarios that are one step smaller.
pub fn smaller(scenario: &Scenario) -> Vec<Scenario> {
    let mut all = Vec::new();
    for index in 0..scenario.objects.len() {
        if scenario.objects.len() > 1 {
            let mut fewer = scenario.clone();
            fewer.objects.remove(index);
            all.push(fewer);
        }
        for spec in smaller_values(&scenario.objects[index]["spec"]) {
            let mut other = scenario.clone();
            other.objects[index]["spec"] = spec;
            all.push(other);
        }
        let annotations = &scenario.objects[index]["metadata"]["annotations"];
        if !annotations.is_null() {
            let mut other = scenario.clone();
            other.objects[index]["metadata"].as_object_mut().expect("a map").remove("annotations");
            all.push(other);
        }
    }
    for ask in scenario.asks.iter().flat_map(smaller_asks) {
        all.push(Scenario { asks: vec![ask], ..scenario.clone() });
    }
    all
}

/// A value without one of its entries, or with one of them smaller.
fn smaller_values(value: &Value) -> Vec<Value> {
    let mut all = Vec::new();
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let mut without = map.clone();
                if key != "targetRefs" {
                    without.remove(key);
                    all.push(without.clone().into());
                    all.extend(smaller_values(inner).into_iter().map(|inner| {
                        let mut with = map.clone();
                        with.insert(key.clone(), inner);
                        with.into()
                    }));
                }
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                let mut without = items.clone();
                without.remove(index);
                all.push(without.into());
                all.extend(smaller_values(inner).into_iter().map(|inner| {
                    let mut with = items.clone();
                    with[index] = inner;
                    with.into()
                }));
            }
        }
        _ => {}
    }
    all
}

fn smaller_asks(ask: &Ask) -> Vec<Ask> {
    let mut all = Vec::new();
    for (index, (name, _)) in ask.headers.iter().enumerate() {
        if name != "host" {
            let mut fewer = ask.clone();
            fewer.headers.remove(index);
            all.push(fewer);
        }
    }
    if !ask.body.is_empty() {
        all.push(Ask { body: String::new(), ..ask.clone() });
    }
    if ask.http2 {
        all.push(Ask { http2: false, ..ask.clone() });
    }
    if ask.method != "GET" {
        all.push(Ask { method: "GET".to_owned(), ..ask.clone() });
    }
    if ask.peer.is_some() {
        all.push(Ask { peer: None, ..ask.clone() });
    }
    for (at, character) in ask.target.char_indices().skip(1) {
        let mut shorter = ask.target.clone();
        shorter.replace_range(at..at + character.len_utf8(), "");
        all.push(Ask { target: shorter, ..ask.clone() });
    }
    all
}
