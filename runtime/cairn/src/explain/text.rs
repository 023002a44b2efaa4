//! An explanation for people.

use cairn_waypoint::{Explanation, Line, Step};
use std::fmt::Write;

/// The whole explanation.
pub fn render(explanation: &Explanation) -> String {
    let Explanation { request, steps, answer } = explanation;
    let mut text = format!("{request}\n\n");
    let mut place = "";
    for step in steps {
        if step.place != place {
            place = &step.place;
            line(&mut text, 0, place);
        }
        one(&mut text, step);
    }
    let _always = write!(text, "\n=> {}\n", printable(&answer.text));
    for unless in &answer.unless {
        line(&mut text, 1, &format!("unless {unless}"));
    }
    text
}

fn one(text: &mut String, step: &Step) {
    line(text, 1, &format!("{}: {}", step.what, step.outcome));
    for Line { what, matched, because } in &step.lines {
        let said = match (matched, because.is_empty()) {
            (None, _) => what.clone(),
            (Some(true), _) => format!("{what}: matches"),
            (Some(false), true) => format!("{what}: does not match"),
            (Some(false), false) => format!("{what}: no, {because}"),
        };
        line(text, 2, &said);
    }
}

fn line(text: &mut String, depth: usize, said: &str) {
    let _always = writeln!(text, "{}{}", "  ".repeat(depth), printable(said));
}

/// A terminal must not act on what a request or a manifest holds.
fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}
