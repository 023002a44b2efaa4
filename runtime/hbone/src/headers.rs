//! What a CONNECT says besides its target: who asks, for which service, within which trace.

use cairn_mesh::{Identity, Workload, WorkloadKind};
use http::HeaderValue;
use std::fmt::Write;
use std::net::SocketAddr;

/// `forwarded`: the client's address, and the service it addressed if it did.
pub fn forwarded(client: SocketAddr, host: Option<&str>) -> HeaderValue {
    value(match host {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    })
}

/// The service named in `forwarded`, read as a ztunnel reads it: the first part that begins with `host=`.
pub fn forwarded_host(forwarded: &HeaderValue) -> Option<&str> {
    let parts = forwarded.to_str().ok()?.split(';');
    let host = parts.map(str::trim).find_map(|part| part.strip_prefix("host="))?;
    let host = host.strip_prefix('"').unwrap_or(host);
    let host = host.strip_suffix('"').unwrap_or(host);
    Some(host).filter(|host| !host.is_empty())
}

/// `baggage`: a workload's labels, in the order and with the keys that a ztunnel uses. What is empty is left out.
pub fn baggage(workload: &Workload) -> HeaderValue {
    let name_key = format!("k8s.{}.name", workload.kind.as_str());
    let members: [(&str, &str); 7] = [
        ("k8s.cluster.name", &workload.cluster_id),
        ("k8s.namespace.name", &workload.namespace),
        (&name_key, &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ];
    let mut text = String::with_capacity(256);
    for (key, member) in members {
        // Nothing is escaped on this wire, so what would change its meaning is left out too.
        if member.is_empty()
            || member.bytes().any(|byte| !byte.is_ascii_graphic() || matches!(byte, b',' | b'='))
        {
            continue;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(key);
        text.push('=');
        text.push_str(member);
    }
    value(text)
}

/// The workload that a peer's `baggage` describes, for metrics and logs only: whoever sends it may say anything. Read as a
/// ztunnel reads it; what is not said stays empty. `None` if it says nothing that is understood.
pub fn described(baggage: &HeaderValue, identity: &Identity) -> Option<Workload> {
    let text = baggage.to_str().ok()?;
    let mut workload = Workload { canonical_revision: "".into(), ..Workload::new("", "", identity.clone()) };
    let mut said = false;
    for member in text.split(',') {
        let Some((key, value)) = member.split_once('=') else { continue };
        let value = value.split('=').next().unwrap_or("");
        let mut name = |kind| {
            workload.kind = kind;
            workload.name = value.into();
            workload.workload_name = value.into();
        };
        match key {
            "k8s.deployment.name" => name(WorkloadKind::Deployment),
            "k8s.cronjob.name" => name(WorkloadKind::CronJob),
            "k8s.pod.name" => name(WorkloadKind::Pod),
            "k8s.job.name" => name(WorkloadKind::Job),
            "k8s.cluster.name" => workload.cluster_id = value.into(),
            "k8s.namespace.name" => workload.namespace = value.into(),
            "service.name" => workload.canonical_name = value.into(),
            "service.version" => workload.canonical_revision = value.into(),
            "cloud.region" => workload.locality.region = value.into(),
            "cloud.availability_zone" => workload.locality.zone = value.into(),
            _ => continue,
        }
        said = true;
    }
    said.then_some(workload)
}

/// `traceparent`: a new trace, not sampled. The ids are not secrets.
pub fn traceparent() -> HeaderValue {
    let mut text = String::with_capacity(55);
    // All-zero ids mean "none" (W3C Trace Context §3.2.2).
    let (trace, span) = (fastrand::u128(1..), fastrand::u64(1..));
    // Writing to a String cannot fail.
    let _ = write!(text, "00-{trace:032x}-{span:016x}-00");
    value(text)
}

/// A header's value; an empty one if the text cannot be one.
fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::{Identity, Locality};

    fn web() -> Workload {
        Workload {
            canonical_revision: "v1".into(),
            locality: Locality { region: "r".into(), zone: "z".into(), subzone: "".into() },
            ..Workload::new("uid", "web", Identity::new("cluster.local", "a", "x").unwrap())
        }
    }

    #[test]
    fn headers_are_those_of_a_ztunnel() {
        let labels = "k8s.cluster.name=Kubernetes,k8s.namespace.name=a,k8s.pod.name=web,service.name=web,\
                      service.version=v1,cloud.region=r,cloud.availability_zone=z";
        assert_eq!(baggage(&web()), labels);
        let client = "10.0.1.5:43210".parse().unwrap();
        assert_eq!(forwarded(client, None), "for=\"10.0.1.5:43210\"");
        let host = "echo.b.svc.cluster.local";
        assert_eq!(forwarded(client, Some(host)), "for=\"10.0.1.5:43210\";host=echo.b.svc.cluster.local");
        assert_eq!(forwarded_host(&forwarded(client, Some(host))), Some(host));
    }

    #[test]
    fn baggage_cannot_be_forged_by_a_label() {
        let workload = Workload { canonical_name: "web,k8s.namespace.name=admin".into(), ..web() };
        assert!(!baggage(&workload).to_str().unwrap().contains("admin"));
    }

    #[test]
    fn baggage_describes_its_workload() {
        let identity = Identity::new("cluster.local", "a", "x").unwrap();
        let found = described(&baggage(&web()), &identity).unwrap();
        let expected = Workload { uid: "".into(), ..web() };
        assert_eq!(found, expected);
        let odd =
            HeaderValue::from_static("k8s.job.name=j=k, service.name=not-trimmed,unknown=1,cloud.region");
        let found = described(&odd, &identity).unwrap();
        assert_eq!((&*found.name, found.kind, &*found.canonical_name), ("j", WorkloadKind::Job, ""));
        for nothing in ["", "unknown=1", "service.name"] {
            assert_eq!(described(&HeaderValue::from_static(nothing), &identity), None, "{nothing}");
        }
    }

    #[test]
    fn forwarded_host_is_the_first_unquoted() {
        for (text, expected) in [
            ("for=1;host=a;host=b", Some("a")),
            ("for=1; host=\"a\" ", Some("a")),
            ("for=1", None),
            ("host=", None),
            ("host=\"\"", None),
        ] {
            assert_eq!(forwarded_host(&HeaderValue::from_static(text)), expected, "{text}");
        }
    }

    #[test]
    fn traceparent_has_the_form_of_version_0() {
        let value = traceparent();
        let text = value.to_str().unwrap();
        let parts: Vec<&str> = text.split('-').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [2, 32, 16, 2], "{text}");
        assert!(parts.iter().all(|part| part.bytes().all(|byte| byte.is_ascii_hexdigit())));
        assert_ne!(traceparent(), value);
    }
}
