//! Policies with action CUSTOM: a service outside is asked whether the requests and connections that they match may
//! pass.

mod grpc;
mod headers;
mod http;
mod query;

use crate::authorization::{self, Authorizer, ConnectionFacts, Known, Standing, Standings};
use ::http::StatusCode;
use cairn_filter::{
    Admission, AdmissionFuture, BodyRead, CalloutAnswer, CalloutError, CalloutRequest, Connection, Denial,
    Exchange, Factory, Filter, LocalReply, Phases, Rehearsal, RequestHead, ResponseHead, Verdict,
};
use cairn_mesh::{AuthorizationPolicy, AuthorizationProvider, CheckProtocol, CustomPolicy, TrustDomains};
use headers::HeaderChange;
use query::QueryChanges;
use serde_json::{Map, Value};
use std::sync::{Arc, Mutex, PoisonError};

/// The most bytes of a provider's answer.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A filter that asks the provider `name` about what `policies` match. Without a usable `provider` it refuses that.
pub fn external_authorization(
    name: &str,
    provider: Option<Arc<AuthorizationProvider>>,
    policies: &[Arc<CustomPolicy>],
    domains: &TrustDomains,
) -> Arc<dyn Factory> {
    let policies: Vec<Arc<AuthorizationPolicy>> =
        policies.iter().map(|custom| Arc::new(custom.policy.clone())).collect();
    let connections = Authorizer::compile(&authorization::of_connections(&policies), domains);
    let authorizer = Authorizer::compile(&policies, domains);
    let shared =
        Shared { name: format!("ext_authz/{name}").into(), provider_name: name.into(), provider, authorizer };
    Arc::new(External { shared: Arc::new(shared), connections, standings: Standings::new() })
}

struct External {
    shared: Arc<Shared>,
    /// The same rules as they match connections that carry no HTTP.
    connections: Authorizer,
    standings: Standings,
}

struct Shared {
    name: Arc<str>,
    provider_name: Arc<str>,
    provider: Option<Arc<AuthorizationProvider>>,
    authorizer: Authorizer,
}

/// What a provider decided.
#[derive(Debug)]
enum Decision {
    /// The request may pass, with these changes.
    Allow(Box<Changes>),
    /// It may not: the provider's own answer, and the status that the explanation names.
    Deny(Box<LocalReply>),
    /// It could not decide. What it answers where that means no, and the status of that, if it says one.
    Fail(Option<StatusCode>, Box<LocalReply>),
}

/// What a provider changes of an exchange that it lets pass.
#[derive(Debug, Default)]
struct Changes {
    request: Vec<HeaderChange>,
    removed: Vec<::http::HeaderName>,
    response: Vec<HeaderChange>,
    query: QueryChanges,
    /// What later filters and the log may know.
    metadata: Map<String, Value>,
    /// What the provider asked for that is not done, for the explanation.
    left_out: Vec<String>,
}

/// What is said of a provider that answers with an error of its own.
const REPORTED: &str = "it reports an error";

/// Where Envoy keeps what providers say.
const METADATA: &str = "envoy.filters.http.ext_authz";

/// Envoy's `%RESPONSE_CODE_DETAILS%` of the answers made here.
const DENIED: &str = "ext_authz_denied";
const ERROR: &str = "ext_authz_error";
const TOO_LARGE: &str = "request_payload_too_large";

impl External {
    /// The rule that a connection without HTTP matches.
    fn rule_of(&self, connection: &Connection) -> Option<Arc<str>> {
        let standing = self.connections.settle(ConnectionFacts::of(connection));
        self.connections.denying(&standing, &authorization::no_request(), Known::default())
    }
}

impl Factory for External {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn phases(&self) -> Phases {
        Phases::REQUEST_HEADERS | Phases::RESPONSE_HEADERS
    }

    fn start(&self, exchange: &Exchange) -> Option<Box<dyn Filter>> {
        let standing = self.standings.of(&exchange.connection, &self.shared.authorizer);
        let shared = Arc::clone(&self.shared);
        Some(Box::new(Asking {
            shared,
            standing,
            rule: None,
            has_body: false,
            answer: None,
            response: Vec::new(),
        }))
    }

    fn rehearse(&self, exchange: &Exchange, head: &RequestHead) -> Rehearsal {
        let standing = self.standings.of(&exchange.connection, &self.shared.authorizer);
        let rule = self.shared.authorizer.denying(&standing, head, exchange);
        match (rule, &self.shared.provider) {
            (Some(rule), Some(_)) => {
                Rehearsal::Withheld(format!("{rule} asks provider {}", self.shared.provider_name))
            }
            _ => Rehearsal::Run(Vec::new()),
        }
    }

    fn admit(&self, connection: &Connection) -> Admission {
        match (&self.shared.provider, self.rule_of(connection)) {
            (None, Some(rule)) => Admission::Refuse(self.shared.unusable(&rule)),
            _ => Admission::Pass(None),
        }
    }

    /// Only gRPC has words for a connection: a provider over HTTP is not asked about it (Istio leaves it out there).
    fn ask(&self, connection: &Connection) -> Option<AdmissionFuture> {
        let provider =
            self.shared.provider.clone().filter(|provider| provider.protocol == CheckProtocol::Grpc)?;
        let rule = self.rule_of(connection)?;
        let call = connection.callout.call(grpc::question(&provider, grpc::of_connection(connection)));
        let shared = Arc::clone(&self.shared);
        Some(Box::pin(async move {
            let refuse = |reason| Admission::Refuse(Denial { policy: rule.to_string().into(), reason });
            match call.await.map_err(|error| error.to_string()).and_then(|answer| grpc::decision(&answer)) {
                Ok(Decision::Allow(_)) => Admission::Pass(None),
                Ok(Decision::Fail(..)) | Err(_) if provider.fail_open => Admission::Pass(None),
                Ok(Decision::Fail(..)) => refuse(shared.no_answer(REPORTED)),
                Ok(Decision::Deny(_)) => refuse(format!("provider {} refused it", shared.provider_name)),
                Err(error) => refuse(shared.no_answer(&error)),
            }
        }))
    }
}

impl Shared {
    fn unusable(&self, rule: &str) -> Denial {
        let reason =
            format!("provider {} is not known, or cannot be used as it is configured", self.provider_name);
        Denial { policy: rule.to_owned().into(), reason }
    }

    fn no_answer(&self, error: &str) -> String {
        format!("provider {} did not answer: {error}", self.provider_name)
    }
}

/// Where the answer is put while the exchange is held.
type Slot = Arc<Mutex<Option<Result<CalloutAnswer, CalloutError>>>>;

/// The filter at work on one request.
struct Asking {
    shared: Arc<Shared>,
    standing: Arc<Standing>,
    /// The rule that matched.
    rule: Option<Arc<str>>,
    has_body: bool,
    /// Set once the provider is asked.
    answer: Option<Slot>,
    /// What the provider adds to the response of a request that it lets pass.
    response: Vec<HeaderChange>,
}

impl Filter for Asking {
    fn request_headers(
        &mut self,
        exchange: &mut Exchange,
        head: &mut RequestHead,
        end_of_stream: bool,
    ) -> Verdict {
        if self.answer.is_some() {
            return self.answered(exchange, head);
        }
        let Some(rule) = self.shared.authorizer.denying(&self.standing, head, &*exchange) else {
            return Verdict::Continue;
        };
        let Some(provider) = &self.shared.provider else { return self.refuse_unusable(exchange, &rule) };
        let wanted = provider.body.filter(|_| !end_of_stream);
        (self.rule, self.has_body) = (Some(rule), !end_of_stream);
        match wanted {
            Some(body) => Verdict::ReadBody { bytes_max: body.bytes_max },
            None => self.ask(exchange, head, None),
        }
    }

    fn request_read(&mut self, exchange: &mut Exchange, head: &mut RequestHead, body: &BodyRead) -> Verdict {
        if self.answer.is_some() {
            return self.answered(exchange, head);
        }
        let limit = self.shared.provider.as_ref().and_then(|provider| provider.body);
        match limit.filter(|limit| !body.is_whole && !limit.allow_partial) {
            Some(limit) => {
                let reason = format!(
                    "its body is longer than the {} bytes that provider {} is told",
                    limit.bytes_max, self.shared.provider_name
                );
                let reply = LocalReply::text(StatusCode::PAYLOAD_TOO_LARGE, "Payload Too Large", TOO_LARGE);
                self.refuse(exchange, reason, reply)
            }
            None => self.ask(exchange, head, Some(body)),
        }
    }

    fn response_headers(&mut self, _: &mut Exchange, head: &mut ResponseHead, _: bool) -> Verdict {
        for change in self.response.drain(..) {
            change.apply(&mut head.headers);
        }
        Verdict::Continue
    }
}

impl Asking {
    fn ask(&mut self, exchange: &mut Exchange, head: &RequestHead, body: Option<&BodyRead>) -> Verdict {
        let question = match self.question(exchange, head, body) {
            Ok(question) => question,
            Err(reason) => return self.without_answer(exchange, &reason),
        };
        let slot = Slot::default();
        self.answer = Some(Arc::clone(&slot));
        let call = exchange.connection.callout.call(question);
        Verdict::Wait(Box::pin(async move {
            let answer = call.await;
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        }))
    }

    fn question(
        &self,
        exchange: &Exchange,
        head: &RequestHead,
        body: Option<&BodyRead>,
    ) -> Result<CalloutRequest, String> {
        let Some(provider) = &self.shared.provider else { return Err("it is not known".to_owned()) };
        match &provider.protocol {
            CheckProtocol::Grpc => {
                let as_bytes = provider.body.is_some_and(|body| body.as_bytes);
                let told = grpc::Told { has_body: self.has_body, body, as_bytes };
                Ok(grpc::question(provider, grpc::of_request(exchange, head, &told)))
            }
            CheckProtocol::Http(check) => http::question(provider, check, head, body),
        }
    }

    fn answered(&mut self, exchange: &mut Exchange, head: &mut RequestHead) -> Verdict {
        let answer =
            self.answer.as_ref().and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
        let Some(answer) = answer else {
            return self.without_answer(exchange, "the question was given up");
        };
        let decision = answer.map_err(|error| error.to_string()).and_then(|answer| self.decision(&answer));
        match decision {
            Ok(Decision::Allow(changes)) => {
                self.allow(exchange, head, *changes);
                Verdict::Continue
            }
            Ok(Decision::Deny(reply)) => {
                let reason =
                    format!("provider {} answered {}", self.shared.provider_name, reply.status.as_u16());
                self.refuse(exchange, reason, *reply)
            }
            Ok(Decision::Fail(status, reply)) => match self.without_answer(exchange, REPORTED) {
                Verdict::Reply(own) => {
                    Verdict::Reply(Box::new(LocalReply { status: status.unwrap_or(own.status), ..*reply }))
                }
                verdict => verdict,
            },
            Err(reason) => self.without_answer(exchange, &reason),
        }
    }

    fn decision(&self, answer: &CalloutAnswer) -> Result<Decision, String> {
        match self.shared.provider.as_ref().map(|provider| &provider.protocol) {
            Some(CheckProtocol::Http(check)) => http::decision(check, answer),
            Some(CheckProtocol::Grpc) | None => grpc::decision(answer),
        }
    }

    fn allow(&mut self, exchange: &mut Exchange, head: &mut RequestHead, changes: Changes) {
        for name in &changes.removed {
            head.headers.remove(name);
        }
        for change in changes.request {
            change.apply(&mut head.headers);
        }
        head.path = changes.query.apply(&head.path);
        self.response = changes.response;
        if !changes.metadata.is_empty() {
            exchange.metadata.merge(METADATA, changes.metadata);
        }
        exchange.note(&self.shared.name, format!("provider {} let it pass", self.shared.provider_name));
        for what in changes.left_out {
            exchange.note(
                &self.shared.name,
                format!("not done for provider {}: {what}", self.shared.provider_name),
            );
        }
    }

    fn without_answer(&self, exchange: &mut Exchange, error: &str) -> Verdict {
        let reason = self.shared.no_answer(error);
        let provider = self.shared.provider.as_ref();
        if provider.is_some_and(|provider| provider.fail_open) {
            exchange.note(&self.shared.name, format!("{reason}; it passes, as failOpen says"));
            return Verdict::Continue;
        }
        let status = provider.and_then(|provider| StatusCode::from_u16(provider.status_on_error).ok());
        self.refuse(exchange, reason, LocalReply::text(status.unwrap_or(StatusCode::FORBIDDEN), "", ERROR))
    }

    fn refuse_unusable(&self, exchange: &mut Exchange, rule: &str) -> Verdict {
        let name = &self.shared.provider_name;
        let details = format!(
            "rbac_access_denied_matched_policy[istio-ext-authz-{name}-{rule}-deny-due-to-bad-CUSTOM-action]"
        );
        exchange.denial = Some(self.shared.unusable(rule));
        Verdict::Reply(Box::new(LocalReply::access_denied(details)))
    }

    fn refuse(&self, exchange: &mut Exchange, reason: String, reply: LocalReply) -> Verdict {
        let policy = self.rule.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
        exchange.denial = Some(Denial { policy: policy.into(), reason });
        Verdict::Reply(Box::new(reply))
    }
}

#[cfg(test)]
#[path = "ext_authz/tests.rs"]
mod tests;
