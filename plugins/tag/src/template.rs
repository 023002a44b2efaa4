//! Templates of header values: text with names in braces; `{{` is a brace.
//!
//! `source.principal`, `source.workload`, `source.namespace` and `source.address` name the client, `upstream.workload`,
//! `upstream.namespace` and `upstream.pod` who answers (in responses), `route` the route in force, `cluster` the
//! upstream's, `request.id`, `request.method` and `request.path` the request. What the proxy does not know becomes
//! `unknown`.

use cairn_sdk::Properties;

/// A parsed template.
#[derive(Debug)]
pub(crate) struct Template {
    parts: Vec<Part>,
}

#[derive(Debug)]
enum Part {
    Text(String),
    Name(Name),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    SourcePrincipal,
    SourceWorkload,
    SourceNamespace,
    SourceAddress,
    UpstreamWorkload,
    UpstreamNamespace,
    UpstreamPod,
    Route,
    Cluster,
    RequestId,
    RequestMethod,
    RequestPath,
}

const NAMES: [(&str, Name); 12] = [
    ("source.principal", Name::SourcePrincipal),
    ("source.workload", Name::SourceWorkload),
    ("source.namespace", Name::SourceNamespace),
    ("source.address", Name::SourceAddress),
    ("upstream.workload", Name::UpstreamWorkload),
    ("upstream.namespace", Name::UpstreamNamespace),
    ("upstream.pod", Name::UpstreamPod),
    ("route", Name::Route),
    ("cluster", Name::Cluster),
    ("request.id", Name::RequestId),
    ("request.method", Name::RequestMethod),
    ("request.path", Name::RequestPath),
];

impl Name {
    fn value(self, properties: Properties) -> Option<String> {
        match self {
            Self::SourcePrincipal => properties.source_principal(),
            Self::SourceWorkload => properties.source_workload().map(|workload| workload.workload),
            Self::SourceNamespace => properties.source_workload().map(|workload| workload.namespace),
            Self::SourceAddress => properties.source_address().map(|address| address.to_string()),
            Self::UpstreamWorkload => properties.upstream_workload().map(|workload| workload.workload),
            Self::UpstreamNamespace => properties.upstream_workload().map(|workload| workload.namespace),
            Self::UpstreamPod => properties.upstream_workload().map(|workload| workload.name),
            Self::Route => properties.route(),
            Self::Cluster => properties.cluster(),
            Self::RequestId => properties.request_id(),
            Self::RequestMethod => properties.text(&["request", "method"]),
            Self::RequestPath => properties.text(&["request", "path"]),
        }
    }
}

impl Template {
    /// Parses a template.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.chars().any(char::is_control) {
            return Err("a header's value has no control characters".to_owned());
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            push_text(&mut parts, before);
            if let Some(after) = after.strip_prefix('{') {
                push_text(&mut parts, "{");
                rest = after;
                continue;
            }
            let (name, after) = after.split_once('}').ok_or("a `{` is not closed")?;
            let known = NAMES.iter().find(|(known, _)| *known == name);
            let (_, name) = known.ok_or_else(|| format!("unknown `{name}`; known are {}", names()))?;
            parts.push(Part::Name(*name));
            rest = after;
        }
        push_text(&mut parts, rest);
        Ok(Self { parts })
    }

    /// The text with values in place of names.
    pub(crate) fn render(&self, known: Properties) -> String {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Name(name) => text.push_str(name.value(known).as_deref().unwrap_or("unknown")),
            }
        }
        text
    }
}

fn push_text(parts: &mut Vec<Part>, text: &str) {
    match parts.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Text(last)) => last.push_str(text),
        _ => parts.push(Part::Text(text.to_owned())),
    }
}

fn names() -> String {
    NAMES.map(|(name, _)| name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest};
    use cairn_sdk::{Flow, Plugin, Request};

    /// A plugin that renders its configuration.
    struct Render(Template);

    impl Plugin for Render {
        type Config = String;
        type Exchange = ();

        fn configure(template: String) -> Result<Self, String> {
            Template::parse(&template).map(Self)
        }

        fn on_request(&self, request: Request, (): &mut ()) -> Flow {
            request.set_header("x-rendered", self.0.render(request.properties()));
            Flow::Continue
        }
    }

    fn render(template: &str) -> String {
        let mut proxy = Proxy::<Render>::new(&format!("{template:?}")).unwrap();
        for path in [
            &["connection", "uri_san_peer_certificate"][..],
            &["xds", "route_name"],
            &["xds", "cluster_name"],
            &["request", "id"],
            &["request", "method"],
            &["request", "path"],
            &["filter_state", "downstream_peer", "workload"],
            &["filter_state", "downstream_peer", "namespace"],
            &["filter_state", "upstream_peer", "workload"],
            &["filter_state", "upstream_peer", "namespace"],
            &["filter_state", "upstream_peer", "name"],
        ] {
            proxy.property(path, "spiffe://some");
        }
        proxy.property(&["source", "address"], "127.0.0.1:80");
        let outcome = proxy.send(TestRequest::get("/"));
        outcome.upstream.and_then(|upstream| upstream.header("x-rendered")).unwrap_or_default()
    }

    #[test]
    fn every_name_has_a_value() {
        for (name, _) in NAMES {
            let rendered = render(&format!("{{{name}}}"));
            assert!(!rendered.is_empty() && rendered != "unknown", "{name}");
        }
        assert_eq!(render("a{{b}{{{route}"), "a{b}{spiffe://some");
    }
}
