//! Our own decision on the same bytes: the policies decoded, compiled and put into a chain as the waypoint does, and
//! the request served by the HTTP engine.

use crate::provider::Asking;
use crate::scenario::{
    AUDITED, Answer, Ask, DETAILS, Outcome, PASSED, SEEN, Scenario, TRIAL_ALLOW, TRIAL_DENY, seen_name,
};
use crate::{custom, http2};
use anyhow::{Context, Result, bail, ensure};
use arc_swap::ArcSwap;
use cairn_builtin::{TokenCache, authentication, authorization, external_authorization, inline_keys};
use cairn_filter::{
    Admission, Chain, Connection, Exchange, Factory, Filter, LocalReply, Peer, Phases, Position, RequestHead,
    ResponseHead, Slot, Verdict, sort_factories,
};
use cairn_http::{RouteTable, Site, SiteHandle, Worker, WorkerSettings, serve};
use cairn_manifest::{Object, decode};
use cairn_mesh::{AppProtocol, Change, Identity, JwtRule, KeyPlace, MeshSettings, ResourceName, Snapshot};
use cairn_net::{Drain, DrainTrigger, drain};
use cairn_telemetry::{Telemetry, TelemetrySettings};
use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// The engine, without a mesh behind it: what passes is answered here.
pub struct Ours {
    worker: Arc<Worker>,
    drain: Drain,
    _trigger: DrainTrigger,
}

impl Ours {
    pub fn new() -> Self {
        let settings = TelemetrySettings { access_log: false, ..TelemetrySettings::default() };
        let telemetry = Telemetry::new("differential", "0", &settings, std::io::sink());
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let worker = Worker::new(WorkerSettings::default(), snapshot, None, telemetry);
        let (_trigger, drain) = drain();
        Self { worker, drain, _trigger }
    }

    /// What becomes of a request to `site`.
    pub async fn ask(&self, site: &SiteHandle, index: usize, ask: &Ask) -> Result<Outcome> {
        let pinned = site.load_full();
        if pinned.protocol == AppProtocol::Tcp {
            return Ok(match pinned.chain.admit(&connection(ask)?) {
                Admission::Pass(_) => Outcome::passes(),
                Admission::Refuse(_) => Outcome::Closed,
            });
        }
        Ok(Answer::outcome(self.answer(site, index, ask).await?, ask))
    }

    /// The answer itself.
    pub async fn answer(&self, site: &SiteHandle, index: usize, ask: &Ask) -> Result<Option<Answer>> {
        let connection = connection(ask)?;
        let (mut client, server) = tokio::io::duplex(64 << 10);
        let (site, worker) = (Arc::clone(site), Arc::clone(&self.worker));
        let served = tokio::spawn(serve(server, Arc::new(connection), site, worker, self.drain.clone()));
        let asking = async move {
            if ask.http2 {
                return http2::answer(client, ask, index).await;
            }
            client.write_all(&ask.bytes(index)).await?;
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await?;
            anyhow::Ok(Answer::parse(&answer))
        };
        let answer = tokio::time::timeout(ANSWER_MAX, asking).await.with_context(|| ask.to_string())??;
        served.await.context("the engine panicked")?;
        Ok(answer)
    }
}

/// The connection that a request comes on.
fn connection(ask: &Ask) -> Result<Connection> {
    let identity = ask.peer.as_deref().map(str::parse::<Identity>).transpose()?;
    Ok(Connection {
        id: 1,
        worker: 0,
        source: Peer { address: ask.source, identity, workload: None },
        destination: ask.destination,
        service: None,
        local: None,
        callout: Arc::new(Asking),
    })
}

/// What is done with requests under the policies of `scenario`.
///
/// # Errors
/// When a policy is refused in reading, with the reason.
pub fn site(scenario: &Scenario) -> Result<SiteHandle> {
    let mut domains = scenario.trust_domains.iter().map(|name| Arc::from(name.as_str()));
    let settings = MeshSettings {
        path_normalization: scenario.normalization,
        trust_domain: domains.next().context("a trust domain")?,
        trust_domain_aliases: domains.collect(),
        ..MeshSettings::default()
    };
    let (mut policies, mut authentications, mut asked) = (Vec::new(), Vec::new(), BTreeMap::new());
    for value in &scenario.objects {
        match change(&object(value)?, &settings)? {
            Change::Policy(policy) => policies.push(Arc::new(policy)),
            Change::CustomPolicy(policy) => {
                asked.entry(Arc::clone(&policy.provider)).or_insert_with(Vec::new).push(Arc::new(policy));
            }
            Change::RequestAuthentication(authentication) => {
                let is_inline = |rule: &JwtRule| matches!(rule.keys, KeyPlace::Inline(_));
                ensure!(authentication.rules.iter().all(is_inline), "no keys are fetched here");
                authentications.push(Arc::new(authentication));
            }
            other => bail!("a policy became {other:?}"),
        }
    }
    let mut keys = |_: &ResourceName, rule: &JwtRule| match &rule.keys {
        KeyPlace::Inline(text) => inline_keys(text),
        KeyPlace::Uri(_) | KeyPlace::Discovery => inline_keys(""),
    };
    let cache = Arc::new(TokenCache::default());
    let slot = |position, factory| Slot { position, priority: 0, factory };
    let mut chain: Vec<Arc<dyn Factory>> = vec![Arc::new(Probe)];
    let domains = settings.trust_domains();
    let mut slots = vec![
        slot(Position::Authentication, authentication(&authentications, &mut keys, &cache)),
        slot(Position::Authorization, authorization(&policies, &domains)),
    ];
    slots.extend(asked.into_iter().map(|(name, policies)| {
        let provider = custom::provider(&name);
        slot(Position::Custom, external_authorization(&name, provider, &policies, &domains))
    }));
    chain.extend(sort_factories(slots));
    chain.push(Arc::new(Upstream));
    Ok(Arc::new(ArcSwap::from_pointee(Site {
        chain: Chain::new(chain),
        routes: RouteTable::compile(&[], None, 80, "cluster.local"),
        service: None,
        port: 80,
        protocol: if scenario.tcp { AppProtocol::Tcp } else { AppProtocol::Http11 },
        normalization: scenario.normalization,
        explain_to: Arc::default(),
        viewpoint: None,
        observer: None,
    })))
}

/// The object as the directory's reader makes it.
fn object(value: &Value) -> Result<Object> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let api_version = text(&value["apiVersion"]);
    let (group, version) = api_version.split_once('/').context("an apiVersion")?;
    let metadata = &value["metadata"];
    let annotations = metadata["annotations"].as_object().into_iter().flatten();
    Ok(Object {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: text(&value["kind"]),
        name: ResourceName::new(text(&metadata["namespace"]), text(&metadata["name"])),
        labels: BTreeMap::new(),
        annotations: annotations.map(|(key, value)| (key.clone(), text(value))).collect(),
        created: String::new(),
        owner: None,
        spec: value["spec"].clone(),
        broken: None,
        origin: None,
    })
}

/// What a waypoint makes of a policy.
fn change(object: &Object, settings: &MeshSettings) -> Result<Change> {
    let decoded = decode(object, settings);
    let said = || decoded.findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    ensure!(!decoded.broken, "{object} is refused: {}", said());
    decoded.changes.into_iter().next().with_context(|| format!("{object} has no effect"))
}

/// Stands first and puts on the answer what the exchange's record says.
struct Probe;

impl Factory for Probe {
    fn name(&self) -> &str {
        "probe"
    }

    fn phases(&self) -> Phases {
        Phases::RESPONSE_HEADERS
    }

    fn start(&self, _: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(Self))
    }
}

impl Filter for Probe {
    fn response_headers(&mut self, exchange: &mut Exchange, head: &mut ResponseHead, _: bool) -> Verdict {
        let noted = |test: &dyn Fn(&str) -> bool| exchange.notes.iter().any(|note| test(&note.text));
        let audited = noted(&|text| text.starts_with("audit: "));
        let by_allow = noted(&|text| text.starts_with("dry run: would deny, "));
        let by_deny = noted(&|text| text.starts_with("dry run: ") && text.ends_with(" would deny"));
        let said = [
            (DETAILS, Some(exchange.details.to_string())),
            (AUDITED, audited.then(|| "true".to_owned())),
            (TRIAL_ALLOW, by_allow.then(|| "denied".to_owned())),
            (TRIAL_DENY, by_deny.then(|| "denied".to_owned())),
        ];
        for (name, text) in said {
            if let Some(value) = text.and_then(|text| HeaderValue::from_str(&text).ok()) {
                head.headers.insert(name, value);
            }
        }
        Verdict::Continue
    }
}

/// Stands last and answers what has passed.
struct Upstream;

impl Factory for Upstream {
    fn name(&self) -> &str {
        "upstream"
    }

    fn phases(&self) -> Phases {
        Phases::REQUEST_HEADERS
    }

    fn start(&self, _: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(Self))
    }
}

impl Filter for Upstream {
    fn request_headers(&mut self, _: &mut Exchange, head: &mut RequestHead, _: bool) -> Verdict {
        let mut reply = LocalReply::text(StatusCode::OK, "", PASSED);
        for name in SEEN {
            let value = match name {
                ":path" => HeaderValue::from_str(head.path.as_str()).ok(),
                // Envoy keeps these in one.
                "authorization" | "x-forwarded-for" => joined(head, name),
                other => head.headers.get(other).cloned(),
            };
            if let (Some(value), Ok(name)) = (value, HeaderName::try_from(seen_name(name))) {
                reply.headers.insert(name, value);
            }
        }
        Verdict::Reply(Box::new(reply))
    }
}

fn joined(head: &RequestHead, name: &str) -> Option<HeaderValue> {
    let lines = head.headers.get_all(name).iter().map(HeaderValue::as_bytes).filter(|line| !line.is_empty());
    HeaderValue::from_bytes(&lines.collect::<Vec<_>>().join(&b","[..])).ok()
}
