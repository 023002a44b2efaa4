//! What a waypoint does not know: the policies of the ztunnels behind it. A ztunnel is asked about each connection that the
//! waypoint would open, and its words take the place of the waypoint's.

use anyhow::{Context, Result};
use cairn_waypoint::{Answer, End, Explanation, refusal};
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// Asks the ztunnel with this admin address about what is still open in `explanation`.
///
/// # Errors
/// When it does not answer.
pub async fn complete(explanation: &mut Explanation, admin: SocketAddr) -> Result<()> {
    let mut said = Vec::new();
    for step in &mut explanation.steps {
        let Some(ask) = step.ask.take() else { continue };
        let body = super::exchange(admin, "POST", "/explain", serde_json::to_vec(&ask)?).await?;
        let known: Explanation = serde_json::from_slice(&body).context("the ztunnel's answer is none")?;
        let last = known.steps.into_iter().next_back().context("the ztunnel's answer has no step")?;
        (step.outcome, step.lines) = (last.outcome, last.lines);
        said.push((refusal(&step.place), known.answer));
    }
    join(&mut explanation.answer, said);
    Ok(())
}

/// The answer, now that the ztunnels' are known; each with what was open without it.
fn join(answer: &mut Answer, said: Vec<(String, Answer)>) {
    let settled: BTreeSet<&str> = said.iter().map(|(open, _)| &**open).collect();
    answer.unless.retain(|unless| !settled.contains(&**unless));
    let refused: BTreeSet<&str> = (said.iter())
        .filter(|(_, answer)| answer.end != End::Passes)
        .map(|(_, answer)| &*answer.text)
        .collect();
    if refused.is_empty() {
        return;
    }
    let refused = refused.into_iter().collect::<Vec<_>>().join("; or ");
    let passes = said.iter().any(|(_, answer)| answer.end == End::Passes);
    if passes || answer.end != End::Passes {
        (answer.end, answer.status) = (End::Depends, None);
        answer.text = format!("{}; or 503: {refused}", answer.text);
    } else {
        // What the waypoint answers when it cannot connect.
        (answer.end, answer.status) = (End::Denied, Some(503));
        answer.text = format!("503: {refused}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(end: End, text: &str, unless: &[&str]) -> Answer {
        let unless = unless.iter().map(|text| (*text).to_owned()).collect();
        Answer { end, status: None, text: text.to_owned(), unless }
    }

    #[test]
    fn what_ztunnels_say_completes_the_answer() {
        let passes = |of: &str| (format!("{of} refuses"), answer(End::Passes, "reaches it", &[]));
        let denied = |of: &str| (format!("{of} refuses"), answer(End::Denied, &format!("{of} says no"), &[]));
        for (name, known, said, expected) in [
            (
                "it passes",
                answer(End::Passes, "reaches a", &["za refuses", "plugin decides otherwise"]),
                vec![passes("za")],
                answer(End::Passes, "reaches a", &["plugin decides otherwise"]),
            ),
            (
                "it is denied",
                answer(End::Passes, "reaches a", &["za refuses"]),
                vec![denied("za")],
                Answer { status: Some(503), ..answer(End::Denied, "503: za says no", &[]) },
            ),
            (
                "one of two is denied",
                answer(End::Passes, "reaches a; or reaches b", &["za refuses", "zb refuses"]),
                vec![passes("za"), denied("zb")],
                answer(End::Depends, "reaches a; or reaches b; or 503: zb says no", &[]),
            ),
            (
                "one way was no way before",
                answer(End::Depends, "reaches a; or 500", &["za refuses"]),
                vec![denied("za")],
                answer(End::Depends, "reaches a; or 500; or 503: za says no", &[]),
            ),
            ("nothing was open", answer(End::Denied, "403", &[]), vec![], answer(End::Denied, "403", &[])),
        ] {
            let mut joined = known;
            join(&mut joined, said);
            assert_eq!(joined, expected, "{name}");
        }
    }
}
