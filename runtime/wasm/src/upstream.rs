//! The names by which plugins call other services.

use cairn_filter::Callout;
use http::Version;
use std::sync::Arc;

/// A service of the mesh that a plugin may ask.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Upstream {
    pub(crate) host: Arc<str>,
    pub(crate) port: u16,
    pub(crate) version: Version,
}

/// The service that a name means: a cluster as Istio names it (`outbound|80||host`), or, for people, `host:port`,
/// `service.namespace:port`, and `service:port` for one of the plugin's own namespace. A name alone, as plugins that were
/// made for a cluster of their own have it, means port 80.
pub(crate) fn find(callout: &dyn Callout, name: &str, namespace: &str) -> Option<Upstream> {
    let (host, port) = split(name)?;
    let local = |rest: &str| format!("{host}{rest}");
    let candidates = [
        host.to_owned(),
        local(".svc.cluster.local"),
        local(".cluster.local"),
        local(&format!(".{namespace}.svc.cluster.local")),
    ];
    candidates.into_iter().find_map(|host| {
        let version = callout.version(&host, None, port)?;
        Some(Upstream { host: host.into(), port, version })
    })
}

fn split(name: &str) -> Option<(&str, u16)> {
    let (host, port) = match name.strip_prefix("outbound|") {
        Some(cluster) => {
            let mut parts = cluster.splitn(3, '|');
            let (port, subset, host) = (parts.next()?, parts.next()?, parts.next()?);
            // Subsets are made by DestinationRules, which waypoints do not have.
            subset.is_empty().then_some((host, port))?
        }
        None => name.rsplit_once(':').unwrap_or((name, "80")),
    };
    let port = port.parse().ok()?;
    (!host.is_empty() && port != 0).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_filter::{CalloutFuture, CalloutRequest, NoCallout};

    /// Knows one service.
    #[derive(Debug)]
    struct One;

    impl Callout for One {
        fn call(&self, request: CalloutRequest) -> CalloutFuture {
            NoCallout.call(request)
        }

        fn version(&self, host: &str, _: Option<&str>, port: u16) -> Option<Version> {
            (host == "auth.shop.svc.cluster.local" && port == 80).then_some(Version::HTTP_11)
        }
    }

    #[test]
    fn a_service_has_many_names() {
        for (name, namespace, found) in [
            ("outbound|80||auth.shop.svc.cluster.local", "", true),
            ("auth.shop.svc.cluster.local:80", "", true),
            ("auth.shop.svc:80", "", true),
            ("auth.shop:80", "", true),
            ("auth:80", "shop", true),
            ("auth:80", "other", false),
            ("outbound|81||auth.shop.svc.cluster.local", "", false),
            ("outbound|80|v1|auth.shop.svc.cluster.local", "", false),
            ("outbound|80||", "", false),
            ("outbound|80", "", false),
            ("auth.shop", "", true),
            ("auth", "shop", true),
            ("auth", "other", false),
            ("auth.shop:x", "", false),
            ("auth.shop:65616", "", false),
            ("", "", false),
            (":80", "shop", false),
            ("127.0.0.1:80", "", false),
        ] {
            let upstream = find(&One, name, namespace);
            let expected =
                Upstream { host: "auth.shop.svc.cluster.local".into(), port: 80, version: Version::HTTP_11 };
            assert_eq!(upstream, found.then_some(expected), "{name}");
        }
    }
}
