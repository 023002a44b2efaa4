//! The answer in place of policies that cannot be enforced: nothing passes unprotected, and nobody wonders why.

use cairn_filter::{
    Admission, Connection, Denial, Exchange, Factory, Filter, LocalReply, Phases, Rehearsal, RequestHead,
    Verdict,
};
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

    fn rehearse(&self, _exchange: &Exchange, _head: &RequestHead) -> Rehearsal {
        Rehearsal::Run(Vec::new())
    }

    fn admit(&self, _connection: &Connection) -> Admission {
        match &self.denial {
            Some(denial) => Admission::Refuse(Denial::clone(denial)),
            None => Admission::Pass(None),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_filter::{Peer, Protocol};
    use http::{HeaderMap, HeaderValue, Method, Version};
    use std::net::SocketAddr;
    use std::time::{Instant, SystemTime};

    fn exchange() -> Exchange {
        let address = SocketAddr::from(([10, 0, 0, 1], 1));
        let connection = Connection {
            id: 1,
            worker: 0,
            source: Peer { address, identity: None, workload: None },
            destination: address,
            service: None,
            local: None,
            callout: Arc::new(cairn_filter::NoCallout),
        };
        Exchange::new(Arc::new(connection), Protocol::Http11, Instant::now(), SystemTime::now())
    }

    fn head() -> RequestHead {
        RequestHead {
            method: Method::GET,
            scheme: HeaderValue::from_static("http"),
            authority: HeaderValue::from_static("shop"),
            path: http::uri::PathAndQuery::from_static("/"),
            headers: HeaderMap::new(),
            version: Version::HTTP_11,
        }
    }

    fn what(name: &str) -> Arc<Unenforceable> {
        Arc::new(Unenforceable {
            what: format!("RequestAuthentication shop/{name}").into(),
            targets: Vec::new(),
            namespace: "shop".into(),
            reason: "tokens are not verified yet".into(),
        })
    }

    #[test]
    fn every_request_is_answered_503_with_the_reason_in_the_log_only() {
        let factory = unenforceable(&[what("one"), what("two")]);
        let mut exchange = exchange();
        let mut filter = factory.start(&exchange).unwrap();
        let Verdict::Reply(reply) = filter.request_headers(&mut exchange, &mut head(), true) else {
            panic!("it answers");
        };
        assert_eq!((reply.status, &*reply.body), (StatusCode::SERVICE_UNAVAILABLE, BODY.as_bytes()));
        let denial = exchange.denial.unwrap();
        assert_eq!(denial.policy, "RequestAuthentication shop/one");
        assert_eq!(
            denial.reason,
            "RequestAuthentication shop/one: tokens are not verified yet; \
             RequestAuthentication shop/two: tokens are not verified yet"
        );
    }

    #[test]
    fn nothing_unenforceable_answers_nothing() {
        assert!(unenforceable(&[]).start(&exchange()).is_none());
    }
}
