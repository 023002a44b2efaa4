//! For tests: a finished exchange with something in every place.

use crate::Own;
use crate::facts::Facts;
use cairn_mesh::{Identity, Workload};
use cairn_telemetry::{HttpRecord, HttpScope, Metrics, MetricsSettings, PeerLabels, Trace};
use http::HeaderMap;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What a record borrows.
pub(crate) struct Exchange {
    own: Own,
    scope: HttpScope,
    upstream: Arc<Workload>,
    request: HeaderMap,
    response: HeaderMap,
    trailers: HeaderMap,
    claims: Map<String, Value>,
    metadata: Map<String, Value>,
    trace: Trace,
}

pub(crate) fn workload(name: &str) -> Arc<Workload> {
    let identity = Identity::new("cluster.local", "shop", name).unwrap();
    let mut workload = Workload::new(format!("uid-{name}"), format!("{name}-0"), identity);
    workload.workload_name = name.into();
    workload.canonical_name = format!("{name}-app").into();
    workload.canonical_revision = "v1".into();
    Arc::new(workload)
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

impl Exchange {
    pub(crate) fn new() -> Self {
        let source = workload("web");
        let metrics = Metrics::new("waypoint", "1", MetricsSettings::default());
        let Value::Object(claims) = json!({"iss": "me", "groups": ["a", "b"], "deep": {"n": 7}}) else {
            panic!("an object")
        };
        let rbac = json!({"istio_dry_run_allow_shadow_engine_result": "denied"});
        let metadata = Map::from_iter([("envoy.filters.http.rbac".to_owned(), rbac)]);
        Self {
            own: Own {
                node_id: "waypoint~10.0.0.9~wp-0.shop~shop.svc.cluster.local".into(),
                namespace: "shop".into(),
                name: "wp".into(),
                identity: "spiffe://cluster.local/ns/shop/sa/wp".into(),
                cluster_id: "c1".into(),
                mesh_id: "cluster.local".into(),
                hostname: "host".into(),
            },
            scope: HttpScope::new(&metrics, PeerLabels::of(Some(&source), Some(&source.identity)), None),
            upstream: workload("cart"),
            request: headers(&[("x-team", "blue"), ("x-long", "abcdefgh"), ("referer", "there")]),
            response: headers(&[("x-out", "1"), ("content-type", "text/plain")]),
            trailers: headers(&[("x-end", "2")]),
            claims,
            metadata,
            trace: Trace {
                trace_id: 0xabc,
                span_id: 1,
                parent_id: 0,
                sampled: true,
                narrow: false,
                state: String::new(),
            },
        }
    }

    pub(crate) fn own(&self) -> &Own {
        &self.own
    }

    pub(crate) fn record(&self) -> HttpRecord<'_> {
        HttpRecord {
            duration: Duration::from_micros(12_900),
            upstream_duration: Some(Duration::from_millis(11)),
            first_byte: Some(Duration::from_micros(10_500)),
            backend_latency: Some(Duration::from_micros(11_250)),
            request_id: Some(b"0a1b"),
            method: "GET",
            path: "/a/b?c=d",
            protocol: "HTTP/1.1",
            authority: "cart:80",
            user_agent: Some(b"curl/8"),
            status: 200,
            details: "via_upstream",
            request_body_bytes: 3,
            response_body_bytes: 5,
            request_bytes: 103,
            response_bytes: 95,
            attempts: 1,
            request_headers: Some(&self.request),
            response_headers: Some(&self.response),
            response_trailers: Some(&self.trailers),
            claims: Some(&self.claims),
            metadata: Some(&self.metadata),
            token_principal: "me/you",
            trace: Some(&self.trace),
            connection_id: 42,
            upstream: Some("10.0.0.2:8080".parse().unwrap()),
            upstream_local: Some("10.0.0.9:50000".parse().unwrap()),
            upstream_workload: Some(&self.upstream),
            cluster: "inbound-vip|80|http|cart",
            route: "shop/r/0",
            ..HttpRecord::new(
                SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_225_599_007),
                "10.0.0.1:4000".parse().unwrap(),
                "10.96.0.1:80".parse().unwrap(),
            )
        }
    }

    pub(crate) fn with<T>(
        &self,
        change: impl FnOnce(&mut HttpRecord<'_>),
        see: impl FnOnce(&Facts<'_>) -> T,
    ) -> T {
        let mut record = self.record();
        change(&mut record);
        self.see(&record, see)
    }

    pub(crate) fn see<T>(&self, record: &HttpRecord<'_>, see: impl FnOnce(&Facts<'_>) -> T) -> T {
        see(&Facts { own: &self.own, scope: &self.scope, record })
    }
}
