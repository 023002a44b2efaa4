//! A finished exchange for the targets that write about one, with texts of an attacker's in it.

use cairn_mesh::{Identity, TelemetryPlan, Workload};
use cairn_observe::{Observer, Outputs, Own};
use cairn_telemetry::{HttpRecord, HttpScope, Observe, PeerLabels, Telemetry, TelemetrySettings};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// What a client and an upstream say: each line is a header of both, and the first also path, authority and agent.
pub struct Said {
    first: String,
    headers: HeaderMap,
    claims: Map<String, Value>,
}

/// Values are cut here, as a peer's head is by HTTP's limits.
const VALUE_BYTES_MAX: usize = 256;
/// And there are at most so many.
const VALUES_MAX: usize = 16;

impl Said {
    /// Reads lines of `name: value`. What HTTP forbids is as if it were not said.
    pub fn read(text: &[u8]) -> Self {
        let (mut headers, mut claims) = (HeaderMap::new(), Map::new());
        let mut first = String::new();
        for line in text.split(|byte| *byte == b'\n').take(VALUES_MAX) {
            let line = &line[..line.len().min(VALUE_BYTES_MAX)];
            if first.is_empty() {
                first = String::from_utf8_lossy(line).chars().filter(|c| !c.is_control()).collect();
            }
            let at = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
            let (name, value) = (&line[..at], line.get(at + 1..).unwrap_or_default());
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
                claims.insert(name.to_string(), String::from_utf8_lossy(value.as_bytes()).into());
                headers.append(name, value);
            }
        }
        Self { first, headers, claims }
    }

    /// What is written, and the values of the labels of one's own, when an exchange that says this is over.
    pub fn observed(&self, plan: &TelemetryPlan) -> (Vec<u8>, Vec<Arc<str>>) {
        let written = Written::default();
        let telemetry = Telemetry::new("waypoint", "1", &TelemetrySettings::default(), written.clone());
        let own = Arc::new(Own::default());
        let outputs = Outputs::new(Arc::clone(&telemetry), Arc::clone(&own), drop);
        let observer = Observer::compile(plan, &own, &outputs);
        let mut values = Vec::new();
        if let Some(workload) = workload() {
            let labels = PeerLabels::of(Some(&workload), Some(&workload.identity));
            let scope = HttpScope::new(&telemetry.metrics, labels, None);
            let record = self.record(&workload);
            observer.label_values(&scope, &record, &mut values);
            telemetry.record_http(&scope, &record, Some(&observer));
        }
        // The log's thread ends, and has written all, once nobody can add to it.
        drop((observer, outputs, telemetry));
        let lines = std::mem::take(&mut *written.0.lock().unwrap_or_else(PoisonError::into_inner));
        (lines, values)
    }

    fn record<'a>(&'a self, upstream: &'a Arc<Workload>) -> HttpRecord<'a> {
        let address = |port| SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1), port));
        HttpRecord {
            duration: Duration::from_millis(12),
            upstream_duration: Some(Duration::from_millis(11)),
            request_id: Some(self.first.as_bytes()),
            method: "GET",
            path: &self.first,
            protocol: "HTTP/1.1",
            authority: &self.first,
            user_agent: Some(self.first.as_bytes()),
            forwarded_for: Some(self.first.as_bytes()),
            status: 200,
            details: "via_upstream",
            request_headers: Some(&self.headers),
            response_headers: Some(&self.headers),
            response_trailers: Some(&self.headers),
            claims: Some(&self.claims),
            token_principal: &self.first,
            upstream: Some(address(8080)),
            upstream_workload: Some(upstream),
            cluster: "inbound-vip|80|http|web.shop.svc.cluster.local",
            route: "default",
            ..HttpRecord::new(SystemTime::UNIX_EPOCH, address(40_000), address(80))
        }
    }
}

fn workload() -> Option<Arc<Workload>> {
    let identity = Identity::new("cluster.local", "shop", "web").ok()?;
    Some(Arc::new(Workload::new("web", "web", identity)))
}

/// Memory in place of a log's file.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
