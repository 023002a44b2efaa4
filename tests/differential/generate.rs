//! Makes up policies and requests from a seed: every field and every form of value that AuthorizationPolicy has, over
//! few enough words that requests and policies meet.

use crate::http2;
use crate::scenario::{Ask, Scenario};
use cairn_mesh::PathNormalization;
use fastrand::Rng;
use serde_json::{Map, Value, json};
use std::net::SocketAddr;

const TRUST_DOMAINS: [&str; 4] = ["cluster.local", "cluster", "td.local", "old-td"];
const NAMESPACES: [&str; 6] = ["shop", "shop-eu", "eu-shop", "bank", "a.b", "web"];
const ACCOUNTS: [&str; 5] = ["web", "web-2", "api", "default", "shop"];
const HOSTS: [&str; 8] =
    ["a.com", "A.Com", "b.a.com", "a.com:8080", "prefix.x", "deny.host", "10.1.0.1:80", "[2001:db8::5]:80"];
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
const PATHS: [&str; 14] = [
    "/",
    "/allow",
    "/allow/",
    "/allow/admin",
    "/allow/admin/x.txt",
    "/public/a",
    "/private",
    "/store/a/cart",
    "/store//cart",
    "/a/b/c",
    "/Allow",
    "/pkg.Svc/Method",
    "/a;x=y/b",
    "/a%2Fb",
];
const HEADERS: [&str; 12] = [
    "x-foo",
    "X-Foo",
    "x-bar",
    "user-agent",
    "authorization",
    "cookie",
    "content-type",
    "host",
    ":authority",
    ":method",
    ":path",
    "x-request-id",
];
const VALUES: [&str; 9] = ["foo", "bar", "foobar", "", "foo,bar", "Foo", "f*o", "a b", "é"];
const SOURCES: [&str; 8] = [
    "10.0.0.1",
    "10.0.1.77",
    "172.17.72.46",
    "192.168.5.233",
    "192.168.6.1",
    "2001:db8::1",
    "2001:db8:0:1::7",
    "fd00::9",
];
const BLOCKS: [&str; 14] = [
    "10.0.0.1",
    "10.0.0.1/32",
    "10.0.0.0/23",
    "10.0.1.77/24",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "172.17.72.46",
    "192.168.4.0/23",
    "2001:db8::/32",
    "2001:db8::1",
    "2001:db8:0:1::/64",
    "::/0",
    "10.1.0.1",
    "2001:db8::5",
];
const PORTS: [u16; 4] = [80, 8080, 443, 9000];
const SEGMENTS: [&str; 8] = ["a", "b", "allow", "store", "cart", "x.txt", "~u", "A"];
const CONDITIONS: [&str; 11] = [
    "request.headers",
    "request.headers",
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "destination.ip",
    "destination.port",
    "connection.sni",
];

/// Makes up scenarios.
pub struct Generator {
    rng: Rng,
}

impl Generator {
    /// The same seed gives the same scenarios.
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::with_seed(seed) }
    }

    /// A scenario with this many requests.
    pub fn scenario(&mut self, asks: usize) -> Scenario {
        let normalization = *self.pick(&[
            PathNormalization::Base,
            PathNormalization::Base,
            PathNormalization::None,
            PathNormalization::MergeSlashes,
            PathNormalization::DecodeAndMergeSlashes,
        ]);
        let count = self.rng.usize(1..=4);
        let objects = (0..count).map(|index| self.policy(index)).collect();
        let asks = (0..asks).map(|_| self.ask()).collect();
        let trust_domains = self.trust_domains();
        Scenario { normalization, trust_domains, tcp: false, objects, asks }
    }

    /// A scenario of connections without HTTP.
    pub fn connections(&mut self, asks: usize) -> Scenario {
        let scenario = self.scenario(asks);
        Scenario { normalization: PathNormalization::Base, tcp: true, ..scenario }
    }

    /// Mostly one; else a mesh that was renamed, or that has names which are alike.
    fn trust_domains(&mut self) -> Vec<String> {
        let names = match self.rng.u32(..10) {
            0..=5 => &["cluster.local"][..],
            6 | 7 => &["td.local", "old-td"],
            8 => &["cluster.local", "cluster"],
            _ => &["old-td", "td.local", "cluster.local"],
        };
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// A number of this range.
    pub fn number(&mut self, range: std::ops::RangeInclusive<usize>) -> usize {
        self.rng.usize(range)
    }

    /// Whether something happens that does so in `percent` of all cases.
    pub fn chance(&mut self, percent: u32) -> bool {
        self.rng.u32(..100) < percent
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.rng.usize(..from.len())]
    }

    fn policy(&mut self, index: usize) -> Value {
        let root = self.chance(20);
        let action = *self.pick(&["ALLOW", "ALLOW", "ALLOW", "DENY", "DENY", "AUDIT"]);
        let (namespace, target) = match root {
            true => ("istio-system", json!({ "kind": "GatewayClass", "name": "istio-waypoint" })),
            false => ("shop", json!({ "kind": "Gateway", "name": "waypoint" })),
        };
        let mut target = target;
        target["group"] = "gateway.networking.k8s.io".into();
        let count = match self.rng.u32(..20) {
            0 | 1 => 12,
            2 if action != "DENY" => 0,
            other => 1 + other as usize % 4,
        };
        let rules: Vec<Value> = (0..count).map(|_| self.rule()).collect();
        let mut spec = json!({ "targetRefs": [target], "action": action });
        if !rules.is_empty() {
            spec["rules"] = rules.into();
        }
        if action == "ALLOW" && self.chance(30) {
            spec.as_object_mut().expect("a map").remove("action");
        }
        let mut metadata = json!({ "name": format!("p{index}"), "namespace": namespace });
        if action != "AUDIT" && self.chance(10) {
            metadata["annotations"] = json!({ "istio.io/dry-run": "true" });
        }
        json!({
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": metadata,
            "spec": spec,
        })
    }

    fn rule(&mut self) -> Value {
        let mut rule = Map::new();
        if self.chance(45) {
            let count = self.rng.usize(1..=2);
            let from: Vec<Value> = (0..count).map(|_| json!({ "source": self.source() })).collect();
            rule.insert("from".into(), from.into());
        }
        if self.chance(60) {
            let count = self.rng.usize(1..=2);
            let to: Vec<Value> = (0..count).map(|_| json!({ "operation": self.operation() })).collect();
            rule.insert("to".into(), to.into());
        }
        if self.chance(30) {
            let count = self.rng.usize(1..=2);
            let when: Vec<Value> = (0..count).map(|_| self.condition()).collect();
            rule.insert("when".into(), when.into());
        }
        // One that asks for nothing matches everything: seldom.
        if rule.is_empty() && self.chance(85) {
            return self.rule();
        }
        rule.into()
    }

    fn source(&mut self) -> Value {
        const FIELDS: [(&str, &str); 6] = [
            ("principals", "notPrincipals"),
            ("namespaces", "notNamespaces"),
            ("ipBlocks", "notIpBlocks"),
            ("remoteIpBlocks", "notRemoteIpBlocks"),
            ("trustDomains", "notTrustDomains"),
            ("serviceAccounts", "notServiceAccounts"),
        ];
        let mut fields = Map::new();
        let count = self.rng.usize(1..=2);
        for _ in 0..count {
            let (any, none) = *self.pick(&FIELDS);
            // Istio refuses these together.
            let accounts = fields.keys().any(|key| key.contains("erviceAccounts"));
            let names = fields.keys().any(|key| key.contains("rincipals") || key.contains("amespaces"));
            let name = any == "principals" || any == "namespaces";
            if (accounts && name) || (names && any == "serviceAccounts") {
                continue;
            }
            self.field(&mut fields, any, none, any);
        }
        fields.into()
    }

    fn operation(&mut self) -> Value {
        const FIELDS: [(&str, &str); 5] = [
            ("hosts", "notHosts"),
            ("ports", "notPorts"),
            ("methods", "notMethods"),
            ("paths", "notPaths"),
            ("paths", "notPaths"),
        ];
        let mut fields = Map::new();
        let count = self.rng.usize(1..=2);
        for _ in 0..count {
            let (any, none) = *self.pick(&FIELDS);
            self.field(&mut fields, any, none, any);
        }
        fields.into()
    }

    fn condition(&mut self) -> Value {
        let kind = *self.pick(&CONDITIONS);
        let mut condition = Map::new();
        let key = match kind {
            "request.headers" if self.chance(40) => "request.headers[x-foo]".to_owned(),
            "request.headers" => format!("request.headers[{}]", self.pick(&HEADERS)),
            other => other.to_owned(),
        };
        condition.insert("key".into(), key.into());
        self.field(&mut condition, "values", "notValues", kind);
        condition.into()
    }

    /// Sets a field, its opposite, or both, to values of `kind`.
    fn field(&mut self, fields: &mut Map<String, Value>, any: &str, none: &str, kind: &str) {
        let (first, second) = match self.rng.u32(..10) {
            0..=5 => (true, false),
            6..=8 => (false, true),
            _ => (true, true),
        };
        for (name, wanted) in [(any, first), (none, second)] {
            if wanted {
                let count = self.rng.usize(1..=3);
                let values: Vec<Value> = (0..count).map(|_| self.value(kind).into()).collect();
                fields.insert(name.to_owned(), values.into());
            }
        }
    }

    /// A value as policies may have it.
    fn value(&mut self, kind: &str) -> String {
        match kind {
            "principals" | "source.principal" => {
                let identity = self.identity();
                self.pattern(&identity)
            }
            "namespaces" | "source.namespace" => {
                let namespace = *self.pick(&NAMESPACES);
                self.glob(namespace)
            }
            "serviceAccounts" | "source.serviceAccount" => match self.chance(30) {
                true => (*self.pick(&ACCOUNTS)).to_owned(),
                false => format!("{}/{}", self.pick(&NAMESPACES), self.pick(&ACCOUNTS)),
            },
            "trustDomains" | "source.trustDomain" => {
                let domain = *self.pick(&TRUST_DOMAINS);
                match self.rng.u32(..10) {
                    0 => "*".to_owned(),
                    1 | 2 => format!("{}*", self.cut(domain).0),
                    3 | 4 => format!("*{}", self.cut(domain).1),
                    _ => domain.to_owned(),
                }
            }
            "ipBlocks" | "remoteIpBlocks" | "source.ip" | "remote.ip" | "destination.ip" => {
                (*self.pick(&BLOCKS)).to_owned()
            }
            "hosts" => {
                let host = *self.pick(&HOSTS);
                self.pattern(host)
            }
            "ports" | "destination.port" => self.pick(&PORTS).to_string(),
            "methods" => {
                let method = *self.pick(&METHODS);
                self.pattern(method)
            }
            "paths" => match self.chance(35) {
                true => self.template(),
                false => {
                    let path = *self.pick(&PATHS);
                    self.pattern(path)
                }
            },
            "request.headers" => {
                let words = [&VALUES[..], &METHODS[..2], &HOSTS[..3], &PATHS[1..3]].concat();
                let word = *self.pick(&words);
                self.pattern(if word.is_empty() { "foo" } else { word })
            }
            _ => self.pattern("a.com"),
        }
    }

    /// One of the forms that a text in a policy can have.
    pub fn pattern(&mut self, word: &str) -> String {
        match self.rng.u32(..20) {
            0..=8 => word.to_owned(),
            9..=12 => format!("{}*", self.cut(word).0),
            13..=16 => format!("*{}", self.cut(word).1),
            17 => "*".to_owned(),
            18 => format!("*{}*", self.cut(word).1),
            _ => {
                let (start, end) = self.cut(word);
                format!("{start}*{end}")
            }
        }
    }

    /// A `*` anywhere, or several.
    fn glob(&mut self, word: &str) -> String {
        match self.rng.u32(..10) {
            0..=4 => word.to_owned(),
            5 => "*".to_owned(),
            6 => format!("*{}*", self.cut(word).1),
            _ => {
                let (start, end) = self.cut(word);
                format!("{start}*{end}")
            }
        }
    }

    /// A word in two parts, either of which may be empty.
    fn cut<'a>(&mut self, word: &'a str) -> (&'a str, &'a str) {
        let ends: Vec<usize> = (0..=word.len()).filter(|at| word.is_char_boundary(*at)).collect();
        word.split_at(*self.pick(&ends))
    }

    fn template(&mut self) -> String {
        let mut segments: Vec<&str> = Vec::new();
        let count = self.rng.usize(1..=3);
        for _ in 0..count {
            let is_operator = self.chance(40);
            segments.push(if is_operator { "{*}" } else { *self.pick(&SEGMENTS) });
        }
        if self.chance(50) || !segments.contains(&"{*}") {
            segments.push("{**}");
            match self.rng.u32(..6) {
                0 => segments.push(""),
                1 | 2 => segments.push(*self.pick(&SEGMENTS)),
                _ => {}
            }
        }
        format!("/{}", segments.join("/"))
    }

    fn identity(&mut self) -> String {
        let (domain, namespace) = (*self.pick(&TRUST_DOMAINS), *self.pick(&NAMESPACES));
        format!("{domain}/ns/{namespace}/sa/{}", self.pick(&ACCOUNTS))
    }

    /// A request to a path in which nothing is odd.
    pub fn plain_ask(&mut self) -> Ask {
        Ask { target: (*self.pick(&PATHS[..6])).to_owned(), ..self.ask() }
    }

    fn ask(&mut self) -> Ask {
        let peer = match self.chance(10) {
            true => None,
            false => Some(format!("spiffe://{}", self.identity())),
        };
        let address: std::net::IpAddr = self.pick(&SOURCES).parse().expect("an address");
        let reached = if address.is_ipv4() { "10.1.0.1" } else { "2001:db8::5" };
        let destination = (reached.parse::<std::net::IpAddr>().expect("an address"), *self.pick(&PORTS));
        let mut headers = vec![("host".to_owned(), (*self.pick(&HOSTS)).to_owned())];
        let count = self.rng.usize(..=3);
        for _ in 0..count {
            // Often the same one again.
            let name = if self.chance(50) { "x-foo" } else { *self.pick(&HEADERS[..7]) };
            headers.push((name.to_owned(), (*self.pick(&VALUES)).to_owned()));
        }
        if self.chance(25) {
            headers.push(("x-forwarded-for".to_owned(), self.forwarded_for()));
        }
        if self.chance(10) {
            headers.push(("content-type".to_owned(), (*self.pick(&GRPC)).to_owned()));
        }
        let method = *self.pick(&METHODS);
        let target = self.target();
        let mut ask = Ask {
            peer,
            source: SocketAddr::new(address, 40_000),
            destination: destination.into(),
            method: method.to_owned(),
            target,
            headers,
            body: String::new(),
            http2: self.chance(30),
        };
        ask.http2 &= http2::request(&ask, 0).is_some();
        ask
    }

    fn forwarded_for(&mut self) -> String {
        let count = self.rng.usize(1..=2);
        let list: Vec<&str> = (0..count)
            .map(|_| match self.chance(85) {
                true => *self.pick(&SOURCES),
                false => *self.pick(&ODD_ADDRESSES),
            })
            .collect();
        list.join(*self.pick(&[", ", ",", " , "]))
    }

    /// A path, and often something that is done to one.
    fn target(&mut self) -> String {
        let mut path = match self.chance(50) {
            true => (*self.pick(&PATHS)).to_owned(),
            false => {
                let count = self.rng.usize(1..=4);
                (0..count).map(|_| format!("/{}", self.pick(&SEGMENTS))).collect()
            }
        };
        if self.chance(40) {
            let at = self.rng.usize(1..=path.len());
            let odd = *self.pick(&ODD);
            path.insert_str(at, odd);
        }
        if self.chance(15) {
            let other = *self.pick(&["%61", "%41", "A"]);
            path = path.replace('a', other);
        }
        if self.chance(20) {
            path += *self.pick(&["?", "?x=y", "?x=/../a", "?a=%2F//b", "#top", "?x#y", "#?x"]);
        }
        path
    }
}

/// Types of gRPC, and what only looks like one.
const GRPC: [&str; 4] =
    ["application/grpc", "application/grpc+proto", "application/grpc-web", "application/grpc;x"];

/// What X-Forwarded-For should not hold.
const ODD_ADDRESSES: [&str; 8] = [
    "unknown",
    "",
    "10.0.0.1:80",
    "[2001:db8::1]",
    "[2001:db8::1]:80",
    "10.0.0",
    "::ffff:10.0.0.1",
    "010.0.0.1",
];

/// What a path may have in the middle or at its end.
const ODD: [&str; 48] = [
    "/",
    "//",
    "/.",
    "/./",
    "/..",
    "/../",
    "/../../",
    "%2e%2e/",
    "/%2E./",
    "/.%2e/",
    "\\",
    "\\..\\",
    "%2f",
    "%5C",
    "%2F..%2F",
    "%252f",
    "%7e",
    "%%32e",
    "%zz",
    "%",
    ";",
    "/...",
    "*",
    "[",
    "]",
    "|",
    "^",
    "\"",
    "{",
    "}",
    "`",
    "<",
    ">",
    "é",
    "+",
    "$",
    "!",
    "'",
    "(",
    ":",
    "@",
    "=",
    "%00",
    "%c3%a9",
    "%2%65",
    "%%32%65",
    "%2",
    "%25%32%66",
];
