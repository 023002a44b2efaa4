//! AuthorizationPolicy as a filter: the compiled policies of a destination, asked once per request.

mod authorizer;
mod block_index;
mod check;
mod index;
mod l4;
mod request;
mod rule;
mod standings;
mod template;
mod text_index;

pub use authorizer::{Authorizer, Decision, Remarks, Standing};
pub use check::ConnectionFacts;
pub(crate) use l4::{no_request, policies as of_connections};
pub use request::Known;
pub(crate) use standings::Standings;

use cairn_filter::{
    Admission, Connection, Denial, Exchange, Factory, Filter, LocalReply, Phases, Rehearsal, RequestHead,
    Verdict,
};
use cairn_mesh::{AuthorizationPolicy, TrustDomains};
use std::sync::Arc;

const NAME: &str = "authorization";

/// A filter that enforces `policies`, which the caller has already chosen for this destination, in a mesh of these
/// trust domains.
pub fn authorization(policies: &[Arc<AuthorizationPolicy>], domains: &TrustDomains) -> Arc<dyn Factory> {
    let authorizer = Authorizer::compile(policies, domains);
    let standings = (!authorizer.is_empty()).then(Standings::new);
    let connections = Authorizer::compile(&of_connections(policies), domains);
    Arc::new(Authorize { shared: Arc::new(Shared { name: NAME.into(), authorizer }), connections, standings })
}

struct Authorize {
    shared: Arc<Shared>,
    /// The same policies as they judge connections that carry no HTTP.
    connections: Authorizer,
    /// `None` when there is nothing to enforce.
    standings: Option<Standings>,
}

struct Shared {
    name: Arc<str>,
    authorizer: Authorizer,
}

impl Factory for Authorize {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn phases(&self) -> Phases {
        Phases::REQUEST_HEADERS
    }

    fn start(&self, exchange: &Exchange) -> Option<Box<dyn Filter>> {
        let standing = self.standings.as_ref()?.of(&exchange.connection, &self.shared.authorizer);
        Some(Box::new(Authorization { shared: Arc::clone(&self.shared), standing }))
    }

    fn rehearse(&self, exchange: &Exchange, head: &RequestHead) -> Rehearsal {
        let authorizer = &self.shared.authorizer;
        let standing = authorizer.settle(ConnectionFacts::of(&exchange.connection));
        Rehearsal::Run(authorizer.consider(&standing, head, exchange))
    }

    fn admit(&self, connection: &Connection) -> Admission {
        let standing = self.connections.settle(ConnectionFacts::of(connection));
        match self.connections.decide(&standing, &no_request(), Known::default()) {
            Decision::Allow { by } => Admission::Pass(by),
            Decision::Deny { policy, reason } => {
                let policy = policy.map_or_else(|| "none".to_owned(), |id| id.to_string());
                Admission::Refuse(Denial { policy: policy.into(), reason })
            }
        }
    }
}

struct Authorization {
    shared: Arc<Shared>,
    standing: Arc<Standing>,
}

impl Filter for Authorization {
    fn request_headers(&mut self, exchange: &mut Exchange, head: &mut RequestHead, _end: bool) -> Verdict {
        let authorizer = &self.shared.authorizer;
        let remarks = authorizer.remarks(&self.standing, head, &*exchange);
        for line in remarks.lines {
            exchange.note(&self.shared.name, line);
        }
        exchange.metadata.merge_all(remarks.metadata);
        match authorizer.decide(&self.standing, head, &*exchange) {
            Decision::Allow { by } => {
                exchange.allowed_by = by;
                Verdict::Continue
            }
            Decision::Deny { policy, reason } => {
                let policy = policy.map_or_else(|| "none".to_owned(), |id| id.to_string());
                let details = format!("rbac_access_denied_matched_policy[{policy}]");
                exchange.denial = Some(Denial { policy: policy.into(), reason });
                Verdict::Reply(Box::new(LocalReply::access_denied(details)))
            }
        }
    }
}

#[cfg(test)]
#[path = "authorization/tests.rs"]
mod tests;
