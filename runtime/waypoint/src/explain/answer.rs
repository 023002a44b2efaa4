//! What an explanation is made of, for people and machines.

use cairn_filter::Considered;
use cairn_mesh::L4Considered;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// What would become of a request, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The request in a few words.
    pub request: String,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// What the client gets.
    pub answer: Answer,
}

/// One thing that happens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// Where.
    pub place: String,
    /// What.
    pub what: String,
    /// What came of it.
    pub outcome: String,
    /// What was looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<Line>,
    /// What a ztunnel is to be asked to know more: the policies of ztunnels are not known here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ask: Option<Connection>,
}

/// A connection that a ztunnel decides on, in the words of its `POST /explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The identity that the tunnel's other end proves.
    pub from: Option<String>,
    /// Its address.
    pub source: IpAddr,
    /// The pod's address and port.
    pub to: SocketAddr,
}

/// What an answer is open to while the ztunnel called `place` was not asked.
pub fn refusal(place: &str) -> String {
    format!("the {place} refuses")
}

impl Step {
    pub(super) fn new(place: impl Into<String>, what: impl Into<String>, outcome: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into(), outcome: outcome.into(), lines: Vec::new(), ask: None }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// What it is.
    pub what: String,
    /// Whether it matched; `None` for what cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matched: Option<bool>,
    /// If not, what it failed on.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub because: String,
}

impl Line {
    pub(super) fn note(text: &str) -> Self {
        Self { what: text.to_owned(), matched: None, because: String::new() }
    }
}

pub(super) fn considered(one: Considered) -> Line {
    Line { what: one.what, matched: Some(one.matched), because: one.because }
}

pub(super) fn l4_considered(one: &L4Considered) -> Line {
    Line { what: one.what(), matched: Some(one.matched), because: one.because.clone() }
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// It reaches the application.
    Passes,
    /// It is denied.
    Denied,
    /// It is answered in the application's place.
    Replied,
    /// It cannot be sent.
    Fails,
    /// Some of several ways lead to the application.
    Depends,
    /// What happens further on is not known here.
    Unknown,
}

/// What the client gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// How it ends.
    pub end: End,
    /// The status, when the mesh gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// In words.
    pub text: String,
    /// What took no part here and could make it otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unless: Vec<String>,
}

impl Answer {
    fn new(end: End, status: Option<u16>, text: impl Into<String>) -> Self {
        Self { end, status, text: text.into(), unless: Vec::new() }
    }

    pub(super) fn passes(text: impl Into<String>) -> Self {
        Self::new(End::Passes, None, text)
    }

    pub(super) fn denied(status: Option<u16>, text: impl Into<String>) -> Self {
        Self::new(End::Denied, status, text)
    }

    pub(super) fn replied(status: u16, text: impl Into<String>) -> Self {
        Self::new(End::Replied, Some(status), text)
    }

    pub(super) fn fails(status: Option<u16>, text: impl Into<String>) -> Self {
        Self::new(End::Fails, status, text)
    }

    pub(super) fn unknown(text: impl Into<String>) -> Self {
        Self::new(End::Unknown, None, text)
    }

    /// The answer when one of several ways is taken.
    pub(super) fn of_several(answers: Vec<Self>) -> Self {
        let mut answers = answers.into_iter();
        let Some(first) = answers.next() else { return Self::fails(None, "there is no way on") };
        answers.fold(first, |known, other| {
            if known == other || known.text.contains(&other.text) {
                return known;
            }
            let same = (known.end, known.status) == (other.end, other.status);
            let (end, status) = if same { (known.end, known.status) } else { (End::Depends, None) };
            Self::new(end, status, format!("{}; or {}", known.text, other.text))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_ways_agree_or_it_depends() {
        let passes = || Answer::passes("reaches a");
        let denied = || Answer::denied(Some(503), "503");
        for (name, answers, end, text) in [
            ("one", vec![passes()], End::Passes, "reaches a"),
            ("the same twice", vec![passes(), passes()], End::Passes, "reaches a"),
            ("two ways", vec![passes(), Answer::passes("reaches b")], End::Passes, "reaches a; or reaches b"),
            ("one is denied", vec![passes(), denied()], End::Depends, "reaches a; or 503"),
            ("none", vec![], End::Fails, "there is no way on"),
        ] {
            let answer = Answer::of_several(answers);
            assert_eq!((answer.end, answer.text.as_str()), (end, text), "{name}");
        }
    }
}
