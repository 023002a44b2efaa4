//! Tags requests and responses with what the proxy knows about them, and refuses requests that lack a header.
//!
//! ```json
//! {
//!   "request": [{"header": "x-client", "value": "{source.workload}.{source.namespace}"}],
//!   "response": [{"header": "x-served-by", "value": "{upstream.workload}"}],
//!   "require": [{"header": "x-team", "status": 400, "body": "say your team in x-team"}]
//! }
//! ```
//!
//! Values are templates; what they may name is listed in `template.rs`. A tag replaces what the client or the upstream
//! sent under its name, so nobody can forge it.

mod template;

use cairn_sdk::{Flow, Plugin, Reply, Request, Response, log};
use serde::Deserialize;
use template::Template;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Headers set on requests.
    #[serde(default)]
    request: Vec<Tag>,
    /// Headers set on responses.
    #[serde(default)]
    response: Vec<Tag>,
    /// Headers that requests must have.
    #[serde(default)]
    require: Vec<Requirement>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tag {
    header: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Requirement {
    header: String,
    #[serde(default = "default_status")]
    status: u16,
    #[serde(default)]
    body: String,
}

fn default_status() -> u16 {
    400
}

/// The plugin.
pub struct Tagger {
    request: Vec<(String, Template)>,
    response: Vec<(String, Template)>,
    require: Vec<Requirement>,
}

#[cairn_sdk::plugin]
impl Plugin for Tagger {
    type Config = Config;
    type Exchange = ();

    fn configure(config: Config) -> Result<Self, String> {
        let require = config.require.into_iter().map(requirement).collect::<Result<_, _>>()?;
        Ok(Self {
            request: tags("request", config.request)?,
            response: tags("response", config.response)?,
            require,
        })
    }

    fn on_request(&self, request: Request, (): &mut ()) -> Flow {
        for required in &self.require {
            if request.header(&required.header).is_none_or(|value| value.is_empty()) {
                log::debug!("refused a request without {}", required.header);
                return Reply::text(required.status, required.body.clone()).into();
            }
        }
        let known = request.properties();
        let tags: Vec<_> = self.request.iter().map(|(_, value)| value.render(known)).collect();
        for ((header, _), value) in self.request.iter().zip(tags) {
            request.set_header(header, value);
        }
        Flow::Continue
    }

    fn on_response(&self, response: Response, (): &mut ()) -> Flow {
        let known = response.properties();
        for (header, value) in &self.response {
            response.set_header(header, value.render(known));
        }
        Flow::Continue
    }
}

fn tags(side: &str, tags: Vec<Tag>) -> Result<Vec<(String, Template)>, String> {
    let parse = |(index, tag): (usize, Tag)| {
        let at = |what: &str, error: String| format!("{side}[{index}].{what}: {error}");
        let header = header_name(&tag.header).map_err(|error| at("header", error))?;
        let value = Template::parse(&tag.value).map_err(|error| at("value", error))?;
        Ok((header, value))
    };
    tags.into_iter().enumerate().map(parse).collect()
}

fn requirement(required: Requirement) -> Result<Requirement, String> {
    let header = header_name(&required.header).map_err(|error| format!("require: {error}"))?;
    if !(400..600).contains(&required.status) {
        return Err(format!("require: {} is not a status of failure", required.status));
    }
    Ok(Requirement { header, ..required })
}

/// A header's name in lower case, if it is one (RFC 9110 §5.6.2, token).
fn header_name(name: &str) -> Result<String, String> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    if name.is_empty() || !name.chars().all(is_token) {
        return Err(format!("`{name}` is not the name of a header"));
    }
    Ok(name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest, TestResponse};

    fn from_web(config: &str) -> Proxy<Tagger> {
        let mut proxy = Proxy::new(config).unwrap();
        proxy.property(&["connection", "uri_san_peer_certificate"], "spiffe://cluster.local/ns/shop/sa/web");
        proxy.property(&["filter_state", "downstream_peer", "workload"], "web");
        proxy.property(&["filter_state", "downstream_peer", "namespace"], "shop");
        proxy
    }

    #[test]
    fn tags_replace_what_was_sent() {
        let mut proxy = from_web(
            r#"{
            "request": [{"header": "X-Client", "value": "{source.workload}.{source.namespace} as {source.principal}"}],
            "response": [{"header": "x-served-by", "value": "{upstream.workload}"}]
        }"#,
        );
        proxy.upstream(|_| TestResponse::new(200).header("x-served-by", "forged"));
        let request = TestRequest::get("/items?x=1").header("x-client", "forged").header("x-client", "twice");
        let outcome = proxy.send(request);
        assert_eq!(outcome.header_values("x-served-by"), ["unknown"], "no upstream was chosen");
        let tagged = outcome.upstream.unwrap().header_values("x-client");
        assert_eq!(tagged, ["web.shop as cluster.local/ns/shop/sa/web"]);
    }

    #[test]
    fn requests_without_a_required_header_are_refused() {
        let mut proxy = from_web(
            r#"{"require": [{"header": "x-team", "status": 403, "body": "whose?"}],
                "request": [{"header": "x-seen", "value": "yes"}]}"#,
        );
        let request = || TestRequest::get("/items");
        for refused in [request(), request().header("x-team", "")] {
            let outcome = proxy.send(refused);
            assert_eq!((outcome.status, outcome.text()), (403, "whose?".to_owned()));
            assert!(outcome.upstream.is_none());
        }
        let upstream = proxy.send(request().header("x-team", "blue")).upstream.unwrap();
        assert_eq!(upstream.header("x-seen").as_deref(), Some("yes"));
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (r#"{"request": [{"header": "x y", "value": ""}]}"#, "request[0].header: `x y` is not"),
            (
                r#"{"response": [{"header": "x", "value": "{source.shoe}"}]}"#,
                "response[0].value: unknown `source.shoe`",
            ),
            (
                r#"{"response": [{"header": "x", "value": "{source"}]}"#,
                "response[0].value: a `{` is not closed",
            ),
            (r#"{"response": [{"header": "x", "value": "a\nb"}]}"#, "response[0].value: "),
            (r#"{"require": [{"header": "x", "status": 200}]}"#, "require: 200 is not"),
            (r#"{"requests": []}"#, "requests: unknown field"),
        ];
        for (json, error) in cases {
            let found = Proxy::<Tagger>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(&format!("configuration: {error}")), "{json}: {found}");
        }
        assert!(Proxy::<Tagger>::new("").is_ok());
    }
}
