//! A proxy made of memory, to test plugins natively.

use crate::{Flow, Host, Plugin, Request, Response, Side, config};

/// Configures a plugin from JSON as a proxy would.
///
/// # Errors
/// The text that a proxy's log would show.
pub fn configure<P: Plugin>(json: &str) -> Result<P, String> {
    config::configure(json.as_bytes())
}

/// One exchange: its headers and properties, and what plugins made of them.
#[derive(Clone, Debug, Default)]
pub struct TestExchange<E = ()> {
    request: Vec<(String, Vec<u8>)>,
    response: Vec<(String, Vec<u8>)>,
    properties: Vec<(Vec<String>, Vec<u8>)>,
    exchange: E,
}

impl<E: Default> TestExchange<E> {
    /// A request over HTTP to the authority `test`.
    pub fn new(method: &str, path: &str) -> Self {
        let pseudo = [(":authority", "test"), (":path", path), (":method", method), (":scheme", "http")];
        let request = pseudo.map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec())).to_vec();
        Self { request, response: Vec::new(), properties: Vec::new(), exchange: E::default() }
    }

    /// The same with one more header in the request.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.add_header(Side::Request, name, value.as_ref());
        self
    }

    /// The same with a property.
    #[must_use]
    pub fn with_property(mut self, path: &[&str], value: impl AsRef<[u8]>) -> Self {
        self.set_property(path, value.as_ref());
        self
    }

    /// Shows the request to a plugin.
    pub fn request<P: Plugin<Exchange = E>>(&mut self, plugin: &P) -> Flow {
        let mut exchange = std::mem::take(&mut self.exchange);
        let flow = plugin.on_request(&mut Request::new(self), &mut exchange);
        self.exchange = exchange;
        flow
    }

    /// Shows a response with this status and these headers to a plugin.
    pub fn response<P: Plugin<Exchange = E>>(
        &mut self,
        plugin: &P,
        status: u16,
        headers: &[(&str, &str)],
    ) -> Flow {
        self.response = vec![(":status".to_owned(), status.to_string().into_bytes())];
        for (name, value) in headers {
            self.add_header(Side::Response, name, value.as_bytes());
        }
        let mut exchange = std::mem::take(&mut self.exchange);
        let flow = plugin.on_response(&mut Response::new(self), &mut exchange);
        self.exchange = exchange;
        flow
    }

    /// The values of a request header as text.
    pub fn request_header(&self, name: &str) -> Vec<String> {
        values(&self.request, name)
    }

    /// The values of a response header as text.
    pub fn response_header(&self, name: &str) -> Vec<String> {
        values(&self.response, name)
    }

    fn map(&self, side: Side) -> &Vec<(String, Vec<u8>)> {
        match side {
            Side::Request => &self.request,
            Side::Response => &self.response,
        }
    }

    fn map_mut(&mut self, side: Side) -> &mut Vec<(String, Vec<u8>)> {
        match side {
            Side::Request => &mut self.request,
            Side::Response => &mut self.response,
        }
    }
}

fn values(map: &[(String, Vec<u8>)], name: &str) -> Vec<String> {
    let same = map.iter().filter(|(present, _)| present.eq_ignore_ascii_case(name));
    same.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect()
}

/// Proxies take `host` for `:authority`, and lower-case names.
fn canonical(side: Side, name: &str) -> String {
    match (side, name.to_ascii_lowercase()) {
        (Side::Request, name) if name == "host" => ":authority".to_owned(),
        (_, name) => name,
    }
}

impl<E: Default> Host for TestExchange<E> {
    fn headers(&self, side: Side) -> Vec<(String, Vec<u8>)> {
        self.map(side).clone()
    }

    fn header(&self, side: Side, name: &str) -> Option<Vec<u8>> {
        let name = canonical(side, name);
        self.map(side).iter().find(|(present, _)| *present == name).map(|(_, value)| value.clone())
    }

    fn set_header(&mut self, side: Side, name: &str, value: &[u8]) {
        let name = canonical(side, name);
        let map = self.map_mut(side);
        match map.iter().position(|(present, _)| *present == name) {
            Some(first) => {
                let mut index = 0;
                map.retain(|(present, _)| {
                    index += 1;
                    index - 1 == first || *present != name
                });
                map[first].1 = value.to_vec();
            }
            None => map.push((name, value.to_vec())),
        }
    }

    fn add_header(&mut self, side: Side, name: &str, value: &[u8]) {
        let name = canonical(side, name);
        self.map_mut(side).push((name, value.to_vec()));
    }

    fn remove_header(&mut self, side: Side, name: &str) {
        let name = canonical(side, name);
        self.map_mut(side).retain(|(present, _)| *present != name);
    }

    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        self.properties.iter().find(|(present, _)| present == path).map(|(_, value)| value.clone())
    }

    fn set_property(&mut self, path: &[&str], value: &[u8]) {
        self.properties.retain(|(present, _)| present != path);
        self.properties.push((path.iter().map(|&segment| segment.to_owned()).collect(), value.to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reply;
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        #[serde(default)]
        limits: Vec<Limit>,
    }

    #[derive(Deserialize)]
    struct Limit {
        most: u32,
    }

    /// Refuses the path that is as long as its limit, and remembers the path for the response.
    #[derive(Debug)]
    struct Lengths {
        most: usize,
    }

    impl Plugin for Lengths {
        type Config = Config;
        type Exchange = Option<String>;

        fn configure(config: Config) -> Result<Self, String> {
            let most = config.limits.iter().map(|limit| limit.most).max().unwrap_or(100);
            if most == 0 { Err("limits: all are zero".to_owned()) } else { Ok(Self { most: most as usize }) }
        }

        fn on_request(&self, request: &mut Request<'_>, exchange: &mut Option<String>) -> Flow {
            *exchange = Some(request.path());
            if request.path().len() > self.most { Flow::Reply(Reply::text(414, "")) } else { Flow::Continue }
        }

        fn on_response(&self, response: &mut Response<'_>, exchange: &mut Option<String>) -> Flow {
            response.add_header("X-Path", exchange.as_deref().unwrap_or("none"));
            Flow::Continue
        }
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            (r#"{"limits": [{"most": 1}, {"most": "x"}]}"#, "configuration: limits[1].most: invalid type"),
            (r#"{"limit": []}"#, "configuration: limit: unknown field `limit`"),
            (r#"{"limits": [{"most": 0}]}"#, "configuration: limits: all are zero"),
            ("{", "configuration: "),
            ("{} {}", "configuration: trailing characters"),
        ];
        for (json, error) in cases {
            let found = configure::<Lengths>(json).unwrap_err();
            assert!(found.starts_with(error), "{json}: {found}");
        }
        assert_eq!(configure::<Lengths>("").unwrap().most, 100);
    }

    #[test]
    fn state_lasts_from_request_to_response() {
        let plugin = configure::<Lengths>(r#"{"limits": [{"most": 3}]}"#).unwrap();
        let mut exchange = TestExchange::new("GET", "/abc");
        assert_eq!(exchange.request(&plugin), Flow::Reply(Reply::text(414, "")));
        let mut exchange = TestExchange::new("GET", "/a");
        assert_eq!(exchange.request(&plugin), Flow::Continue);
        assert_eq!(exchange.response(&plugin, 200, &[]), Flow::Continue);
        assert_eq!(exchange.response_header("x-path"), ["/a"]);
    }

    #[test]
    fn headers_behave_as_in_a_proxy() {
        let mut exchange =
            TestExchange::<()>::new("GET", "/").with_header("X-A", "1").with_header("x-a", b"\xff");
        let mut request = Request::new(&mut exchange);
        assert_eq!(request.header("x-A"), Some(b"1".to_vec()));
        request.set_header("X-a", "2");
        request.set_header("Host", "other");
        assert_eq!(request.authority(), "other");
        request.remove_header("X-missing");
        assert_eq!(exchange.request_header("x-a"), ["2"]);
        assert_eq!(exchange.request_header("host"), Vec::<String>::new());
    }

    #[test]
    fn properties_are_typed() {
        let exchange = TestExchange::<()>::new("GET", "/")
            .with_property(&["source", "address"], "10.0.0.1:5")
            .with_property(&["connection", "uri_san_peer_certificate"], "spiffe://cluster.local/ns/a/sa/b")
            .with_property(&["filter_state", "downstream_peer", "workload"], "web")
            .with_property(&["filter_state", "downstream_peer", "namespace"], "a")
            .with_property(&["request", "time"], 1_000_000_000i64.to_le_bytes());
        let properties = crate::Properties::new(&exchange);
        assert_eq!(properties.source_address(), "10.0.0.1:5".parse().ok());
        assert_eq!(properties.source_principal().as_deref(), Some("cluster.local/ns/a/sa/b"));
        assert_eq!(properties.source_workload().map(|workload| workload.workload).as_deref(), Some("web"));
        assert_eq!(properties.upstream_workload(), None);
        let second = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1);
        assert_eq!(properties.request_time(), Some(second));
    }
}
