//! The answer in place of policies that cannot be enforced: nothing passes unprotected, and nobody wonders why.

use cairn_filter::{Denial, Exchange, Factory, Filter, LocalReply, Phases, RequestHead, Verdict};
use cairn_mesh::Unenforceable;
use http::StatusCode;
use std::sync::Arc;

const NAME: &str = "unenforceable";

/// What the peer reads; which policy it is stays in the log.
const BODY: &str = "policy not enforceable";

/// Envoy has no word for this, so it is ours.
const DETAILS: &str = "policy_not_enforceable";

/// A filter that answers every request 503, because `what` is attached to its destination and cannot be enforced.
/// The reasons are in the exchange's denial. With nothing in `what` it lets everything pass.
pub fn unenforceable(what: &[Arc<Unenforceable>]) -> Arc<dyn Factory> {
    let denial = what.first().map(|first| {
        let reasons: Vec<String> =
            what.iter().map(|each| format!("{}: {}", each.what, each.reason)).collect();
        Denial { policy: first.what.to_string().into(), reason: reasons.join("; ") }
    });
    Arc::new(Refuse { denial: denial.map(Arc::new) })
}

struct Refuse {
    denial: Option<Arc<Denial>>,
}

impl Factory for Refuse {
    fn name(&self) -> &str {
        NAME
    }

    fn phases(&self) -> Phases {
        Phases::REQUEST_HEADERS
    }

    fn start(&self, _exchange: &Exchange) -> Option<Box<dyn Filter>> {
        let denial = Arc::clone(self.denial.as_ref()?);
        Some(Box::new(Refusal { denial }))
    }
}

struct Refusal {
    denial: Arc<Denial>,
}

impl Filter for Refusal {
    fn request_headers(&mut self, exchange: &mut Exchange, _head: &mut RequestHead, _end: bool) -> Verdict {
        exchange.denial = Some(Denial::clone(&self.denial));
        Verdict::Reply(Box::new(LocalReply::text(StatusCode::SERVICE_UNAVAILABLE, BODY, DETAILS)))
    }
}
