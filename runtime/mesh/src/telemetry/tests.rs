//! The merge of Telemetry resources and mesh settings, as a table.

use super::*;

fn named(names: &[&str]) -> Vec<Arc<str>> {
    names.iter().map(|name| Arc::from(*name)).collect()
}

fn log(providers: &[&str], disabled: Option<bool>, filter: Option<&str>) -> AccessLogging {
    AccessLogging { providers: named(providers), disabled, filter: filter.map(Arc::from) }
}

fn otel_log(name: &str) -> Arc<TelemetryProvider> {
    let at = ProviderAddress { host: "collector".into(), namespace: None, port: 4317 };
    let kind = TelemetryProviderKind::OtelLog(OtelLog {
        at,
        log_name: "l".into(),
        body: None,
        attributes: Vec::new(),
    });
    Arc::new(TelemetryProvider { name: name.into(), kind })
}

fn zipkin(name: &str) -> Arc<TelemetryProvider> {
    let kind = TelemetryProviderKind::Zipkin(ZipkinTrace {
        at: ProviderAddress { host: "zipkin".into(), namespace: None, port: 9411 },
        path: "/api/v2/spans".into(),
        tag_bytes_max: 256,
        wide_ids: false,
        with_w3c: false,
        timeout: Duration::from_secs(5),
        headers: Vec::new(),
    });
    Arc::new(TelemetryProvider { name: name.into(), kind })
}

fn defaults() -> TelemetryDefaults {
    let mut defaults = TelemetryDefaults::default();
    defaults.providers.extend([otel_log("otel"), zipkin("zip"), zipkin("zap")]);
    defaults
}

fn policy(fill: impl FnOnce(&mut TelemetryPolicy)) -> Arc<TelemetryPolicy> {
    let mut policy = TelemetryPolicy {
        name: ResourceName::new("n", "t"),
        created: "".into(),
        targets: Vec::new(),
        access_logging: Vec::new(),
        metrics: Vec::new(),
        tracing: Vec::new(),
    };
    fill(&mut policy);
    Arc::new(policy)
}

fn said_of_logs(plan: &TelemetryPlan) -> Vec<String> {
    let target = |to: &LogTarget| match to {
        LogTarget::Own => "own".to_owned(),
        LogTarget::File(file) => format!("file {}", file.path),
        LogTarget::Provider(provider) => provider.name.to_string(),
    };
    let filter = |filter: &Option<Arc<str>>| filter.as_ref().map_or(String::new(), |f| format!(" if {f}"));
    plan.logs.iter().map(|log| target(&log.to) + &filter(&log.filter)).collect()
}

#[test]
fn access_logs_follow_the_nearest_resource_that_speaks_of_them() {
    let file = |path: &str| {
        Some(Arc::new(FileLog { path: path.into(), format: LogFormat::DefaultText, omit_empty: false }))
    };
    let with = |change: fn(&mut TelemetryDefaults)| {
        let mut it = defaults();
        change(&mut it);
        it
    };
    let by_name = |it: &mut TelemetryDefaults| it.access_logging = Some(named(&["envoy"]));
    for (name, defaults, levels, expected) in [
        ("nobody says anything", defaults(), vec![], vec!["own"]),
        (
            "the mesh names a file",
            TelemetryDefaults { file: file("/x"), ..defaults() },
            vec![],
            vec!["file /x"],
        ),
        ("the mesh switches it off", TelemetryDefaults { file: file(""), ..defaults() }, vec![], vec![]),
        ("the mesh has a default provider", with(by_name), vec![], vec!["envoy"]),
        ("a resource names a provider", defaults(), vec![vec![log(&["otel"], None, None)]], vec!["otel"]),
        ("letter case is ignored", defaults(), vec![vec![log(&["OTEL"], None, None)]], vec!["otel"]),
        ("an unknown provider is left out", defaults(), vec![vec![log(&["nobody"], None, None)]], vec![]),
        ("one that takes no logs is left out", defaults(), vec![vec![log(&["zip"], None, None)]], vec![]),
        ("switched off without a name", defaults(), vec![vec![log(&[], Some(true), None)]], vec![]),
        (
            "a child's providers replace its parent's",
            defaults(),
            vec![vec![log(&["envoy"], None, None)], vec![log(&["otel"], None, None)]],
            vec!["otel"],
        ),
        (
            "a child switches its parent's off",
            defaults(),
            vec![vec![log(&["envoy", "otel"], None, None)], vec![log(&[], Some(true), None)]],
            vec![],
        ),
        (
            "and its own child on again",
            with(by_name),
            vec![vec![log(&[], Some(true), None)], vec![log(&[], Some(false), None)]],
            vec!["envoy"],
        ),
        (
            "a child filters what it inherits",
            with(by_name),
            vec![vec![log(&[], None, Some("a"))]],
            vec!["envoy if a"],
        ),
        (
            "a filter is inherited",
            defaults(),
            vec![vec![log(&["envoy"], None, Some("a"))], vec![log(&[], Some(false), None)]],
            vec!["envoy if a"],
        ),
        (
            "naming the provider again drops the filter",
            defaults(),
            vec![vec![log(&["envoy"], None, Some("a"))], vec![log(&["envoy"], None, None)]],
            vec!["envoy"],
        ),
        (
            "two entries, two providers",
            defaults(),
            vec![vec![log(&["envoy"], None, Some("a")), log(&["otel"], None, Some("b"))]],
            vec!["envoy if a", "otel if b"],
        ),
        (
            "one of two is off",
            defaults(),
            vec![vec![log(&["envoy"], Some(true), None), log(&["otel"], None, None)]],
            vec!["otel"],
        ),
    ] {
        let policies: Vec<_> =
            levels.into_iter().map(|entries| policy(|it| it.access_logging = entries)).collect();
        assert_eq!(said_of_logs(&TelemetryPlan::merge(&policies, &defaults)), expected, "{name}");
    }
}

fn change(metric: Option<Metric>, disabled: Option<bool>, tags: &[(&str, Option<&str>)]) -> MetricOverride {
    let tag = |(name, value): &(&str, Option<&str>)| {
        let change = value.map_or(TagChange::Remove, |value| TagChange::Upsert(value.into()));
        (Arc::from(*name), change)
    };
    MetricOverride { metric, disabled, tags: tags.iter().map(tag).collect() }
}

fn metrics_of(levels: Vec<Vec<MetricOverride>>, defaults: &TelemetryDefaults) -> MetricsPlan {
    let policies: Vec<_> = levels
        .into_iter()
        .map(|overrides| {
            policy(|it| it.metrics = vec![MetricsChange { overrides, ..MetricsChange::default() }])
        })
        .collect();
    TelemetryPlan::merge(&policies, defaults).metrics
}

#[test]
fn metrics_are_switched_one_by_one_and_all_at_once() {
    use Metric::{RequestCount, RequestSize};
    let count = |disabled| change(Some(RequestCount), Some(disabled), &[]);
    let all = |disabled| change(None, Some(disabled), &[]);
    let all_but_count: Vec<Metric> =
        Metric::ALL.into_iter().map(|(_, metric)| metric).filter(|one| *one != RequestCount).collect();
    let none = Vec::new();
    for (name, levels, disabled, enabled) in [
        ("nothing said", vec![], none.clone(), true),
        ("one off", vec![vec![count(true)]], vec![RequestCount], true),
        ("on again below", vec![vec![count(true)], vec![count(false)]], none.clone(), true),
        (
            "one's own wins over all, whatever the order",
            vec![vec![count(false), all(true)]],
            all_but_count,
            true,
        ),
        (
            "all below wins over one above",
            vec![vec![count(true), change(Some(RequestSize), Some(true), &[])], vec![all(false)]],
            none,
            true,
        ),
        (
            "all off",
            vec![vec![all(true)]],
            Metric::ALL.into_iter().map(|(_, metric)| metric).collect(),
            false,
        ),
    ] {
        let plan = metrics_of(levels, &defaults());
        assert_eq!((plan.disabled, plan.enabled), (disabled, enabled), "{name}");
    }
}

#[test]
fn labels_merge_tag_by_tag() {
    let upsert = |value: &str| TagChange::Upsert(value.into());
    let plan = metrics_of(
        vec![
            vec![change(None, None, &[("a", Some("1")), ("b", Some("2"))])],
            vec![change(Some(Metric::RequestCount), None, &[("b", None), ("c", Some("3"))])],
        ],
        &defaults(),
    );
    let of = |metric| plan.tags[&metric].iter().map(|(name, tag)| (&**name, tag.clone())).collect::<Vec<_>>();
    assert_eq!(of(Metric::RequestCount), [("a", upsert("1")), ("b", TagChange::Remove), ("c", upsert("3"))]);
    assert_eq!(of(Metric::TcpSent), [("a", upsert("1")), ("b", upsert("2"))]);
}

#[test]
fn metrics_need_a_prometheus_provider() {
    let plan = |providers: &[&str], defaults: &TelemetryDefaults| {
        let change = MetricsChange { providers: named(providers), ..MetricsChange::default() };
        TelemetryPlan::merge(&[policy(|it| it.metrics = vec![change])], defaults).metrics.enabled
    };
    let without = TelemetryDefaults { metrics: Vec::new(), ..defaults() };
    for (name, enabled, expected) in [
        ("by default", plan(&[], &defaults()), true),
        ("named", plan(&["prometheus"], &without), true),
        ("not by default", plan(&[], &without), false),
        ("another", plan(&["otel"], &defaults()), false),
    ] {
        assert_eq!(enabled, expected, "{name}");
    }
}

#[test]
fn the_reporting_interval_is_the_nearest_ones() {
    let with = |seconds: Option<u64>| {
        let interval = seconds.map(Duration::from_secs);
        policy(|it| it.metrics = vec![MetricsChange { interval, ..MetricsChange::default() }])
    };
    for (levels, expected) in
        [(vec![None], 5), (vec![Some(9)], 9), (vec![Some(9), None], 9), (vec![Some(9), Some(1)], 1)]
    {
        let policies: Vec<_> = levels.iter().map(|seconds| with(*seconds)).collect();
        let plan = TelemetryPlan::merge(&policies, &defaults());
        assert_eq!(plan.metrics.interval, Duration::from_secs(expected), "{levels:?}");
    }
}

#[test]
fn tracing_settings_are_overridden_one_by_one_and_tags_as_a_whole() {
    let tags = |name: &str| Some(BTreeMap::from([(Arc::from(name), SpanTag::Literal("v".into()))]));
    let far = TracingChange {
        providers: named(&["zip"]),
        sampling: Some(5000),
        tags: tags("far"),
        use_request_id: Some(false),
        ..TracingChange::default()
    };
    let near = TracingChange { tags: tags("near"), istio_tags: Some(false), ..TracingChange::default() };
    let far = policy(|it| it.tracing = vec![far]);
    let near = policy(|it| it.tracing = vec![near]);
    let plan = TelemetryPlan::merge(&[Arc::clone(&far), near], &defaults()).tracing.unwrap();
    assert_eq!((&*plan.provider.name, plan.sampling), ("zip", 5000));
    assert_eq!(plan.tags.keys().map(|name| &**name).collect::<Vec<_>>(), ["near"]);
    assert_eq!(
        (plan.use_request_id, plan.istio_tags, plan.report, plan.propagate),
        (false, false, true, true)
    );

    let silent = TracingChange { disable_reporting: Some(true), ..TracingChange::default() };
    let silent = policy(|it| it.tracing = vec![silent]);
    assert!(!TelemetryPlan::merge(&[far, silent], &defaults()).tracing.unwrap().report);
}

#[test]
fn tracing_needs_a_provider_that_takes_spans_and_samples_one_percent() {
    let plan = |defaults: &TelemetryDefaults, providers: &[&str]| {
        let change = TracingChange { providers: named(providers), ..TracingChange::default() };
        TelemetryPlan::merge(&[policy(|it| it.tracing = vec![change])], defaults).tracing
    };
    assert_eq!(plan(&defaults(), &[]), None);
    assert_eq!(plan(&defaults(), &["otel"]), None, "it takes logs");
    assert_eq!(plan(&defaults(), &["nobody"]), None);
    let by_default = TelemetryDefaults { tracing: named(&["zip"]), ..defaults() };
    assert_eq!(plan(&by_default, &[]).unwrap().sampling, 100);
    assert_eq!(&*plan(&by_default, &["zap", "zip"]).unwrap().provider.name, "zap", "the first is used");
}
