//! Filters at a rehearsal: what they would do to an exchange, told to people who ask why. No byte goes anywhere.

use crate::{Chain, Exchange, LocalReply, Phases, RequestHead, Verdict};

/// One thing that a filter looks at, such as a rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Considered {
    /// What it is, `ALLOW get-only rule 0`.
    pub what: String,
    /// Whether it matches.
    pub matched: bool,
    /// If it does not, what it fails on.
    pub because: String,
}

/// How a filter takes part in a rehearsal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rehearsal {
    /// As always: it touches nothing but the exchange. What it looks at.
    Run(Vec<Considered>),
    /// Not at all: it would run code that is not ours, or ask others. What it would do.
    Withheld(String),
}

/// What one filter came to.
#[derive(Debug)]
pub enum Judgement {
    /// It let the exchange pass.
    Passed,
    /// It took no part, for this reason; what it would decide is not known.
    Withheld(String),
    /// It answered.
    Replied(Box<LocalReply>),
    /// It ended the exchange without an answer.
    Ended,
}

/// One filter at a rehearsal.
#[derive(Debug)]
pub struct Rehearsed {
    /// The filter's name.
    pub filter: String,
    /// What it looked at.
    pub considered: Vec<Considered>,
    /// What it came to.
    pub judgement: Judgement,
}

impl Chain {
    /// Runs the request phase of those filters that may be, in their order, up to the first that answers.
    pub fn rehearse(&self, exchange: &mut Exchange, head: &mut RequestHead) -> Vec<Rehearsed> {
        // As with a real exchange, all begin before the first is run.
        let started: Vec<_> = self.factories().map(|factory| (factory, factory.start(exchange))).collect();
        let mut rehearsed = Vec::new();
        for (factory, filter) in started {
            let Some(mut filter) = filter else { continue };
            if !factory.phases().contains(Phases::REQUEST_HEADERS) {
                continue;
            }
            let (considered, judgement) = match factory.rehearse(exchange, head) {
                Rehearsal::Withheld(reason) => (Vec::new(), Judgement::Withheld(reason)),
                Rehearsal::Run(considered) => {
                    let judgement = match filter.request_headers(exchange, head, true) {
                        Verdict::Continue => Judgement::Passed,
                        Verdict::Reply(reply) => Judgement::Replied(reply),
                        Verdict::Reset => Judgement::Ended,
                        Verdict::Wait(_) | Verdict::Hold(_) => {
                            Judgement::Withheld("it waits for an answer from elsewhere".to_owned())
                        }
                        Verdict::ReadBody { .. } => {
                            Judgement::Withheld("it looks at the request's body".to_owned())
                        }
                    };
                    (considered, judgement)
                }
            };
            let ends = matches!(judgement, Judgement::Replied(_) | Judgement::Ended);
            rehearsed.push(Rehearsed { filter: factory.name().to_owned(), considered, judgement });
            if ends {
                break;
            }
        }
        rehearsed
    }
}
