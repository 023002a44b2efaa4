//! Splits visitors among variants and keeps each where it is, by a cookie. A header names the variant, for routes to match.
//!
//! ```json
//! {
//!   "experiment": "checkout",
//!   "variants": [{"name": "a", "weight": 9}, {"name": "b", "weight": 1}],
//!   "header": "x-checkout", "cookie": "checkout", "maxAge": 2592000
//! }
//! ```

use cairn_sdk::{Counter, Flow, HeaderName, Plugin, Request, Response, random};
use serde::Deserialize;

/// The configuration.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// The name in metrics, and of the cookie unless `cookie` says otherwise.
    experiment: String,
    variants: Vec<Variant>,
    /// The header that names the variant. What clients send in it is replaced.
    #[serde(default = "default_header")]
    header: String,
    cookie: Option<String>,
    /// How long browsers keep it, in seconds. None is until they are closed.
    max_age: Option<u32>,
    /// A header by which testers choose a variant; no cookie is set then.
    force_header: Option<HeaderName>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Variant {
    name: String,
    #[serde(default = "default_weight")]
    weight: u32,
}

fn default_header() -> String {
    "x-variant".to_owned()
}

fn default_weight() -> u32 {
    1
}

/// The plugin.
pub struct Variants {
    experiment: String,
    variants: Vec<Variant>,
    total: u64,
    header: HeaderName,
    cookie: String,
    attributes: String,
    force_header: Option<HeaderName>,
    requests: Counter,
}

/// The variant that the visitor was newly given.
type Given = Option<String>;

#[cairn_sdk::plugin]
impl Plugin for Variants {
    type Config = Config;
    type Exchange = Given;

    fn configure(config: Config) -> Result<Self, String> {
        let cookie = config.cookie.unwrap_or_else(|| config.experiment.clone());
        let is_token = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        let names = config.variants.iter().map(|variant| variant.name.as_str());
        if let Some(name) =
            names.chain([cookie.as_str(), config.experiment.as_str()]).find(|name| !is_token(name))
        {
            return Err(format!("`{name}`: names are letters, digits, dashes, dots and underscores"));
        }
        let total = config.variants.iter().map(|variant| u64::from(variant.weight)).sum();
        if total == 0 {
            return Err("variants: none has a weight".to_owned());
        }
        let lasts = config.max_age.map(|seconds| format!("; Max-Age={seconds}")).unwrap_or_default();
        Ok(Self {
            header: HeaderName::try_from(config.header).map_err(|error| format!("header: {error}"))?,
            attributes: format!("; Path=/{lasts}; HttpOnly; SameSite=Lax"),
            experiment: config.experiment,
            variants: config.variants,
            total,
            cookie,
            force_header: config.force_header,
            requests: Counter::new("ab_requests_total", &["experiment", "variant"]),
        })
    }

    fn on_request(&self, request: Request, given: &mut Given) -> Flow {
        let forced = self.force_header.as_ref().and_then(|header| request.header_text(header.as_str()));
        let chosen =
            forced.and_then(|name| self.known(&name)).or_else(|| self.known(&request.cookie(&self.cookie)?));
        let variant = chosen.unwrap_or_else(|| {
            let variant = self.draw(random());
            *given = Some(variant.to_owned());
            variant
        });
        self.requests.add(1, &[&self.experiment, variant]);
        request.set_header(self.header.as_str(), variant);
        Flow::Continue
    }

    fn on_response(&self, response: Response, given: &mut Given) -> Flow {
        if let Some(variant) = given {
            response.add_header("set-cookie", format!("{}={variant}{}", self.cookie, self.attributes));
        }
        Flow::Continue
    }
}

impl Variants {
    /// A variant by its name. One without weight has ended: its visitors are given another.
    fn known(&self, name: &str) -> Option<&str> {
        let variant = self.variants.iter().find(|variant| variant.name == name && variant.weight > 0)?;
        Some(&variant.name)
    }

    fn draw(&self, random: u64) -> &str {
        let mut left = ((u128::from(random) * u128::from(self.total)) >> 64) as u64;
        for variant in &self.variants {
            match left.checked_sub(u64::from(variant.weight)) {
                Some(rest) => left = rest,
                None => return &variant.name,
            }
        }
        // The weights add up to the total, which is above what was drawn.
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_sdk::testing::{Proxy, TestRequest};

    const CONFIG: &str = r#"{"experiment": "checkout", "header": "X-Checkout", "maxAge": 60, "forceHeader": "x-force",
        "variants": [{"name": "a", "weight": 9}, {"name": "b"}, {"name": "ended", "weight": 0}]}"#;

    #[test]
    fn visitors_are_split_by_weight_and_stay() {
        let mut proxy = Proxy::<Variants>::new(CONFIG).unwrap();
        let mut b = 0;
        for _ in 0..2000 {
            let outcome = proxy.send(TestRequest::get("/").header("x-checkout", "forged"));
            let cookie = outcome.header("set-cookie").unwrap();
            let variant = outcome.upstream.unwrap().header_values("x-checkout");
            assert_eq!(
                cookie,
                format!("checkout={}; Path=/; Max-Age=60; HttpOnly; SameSite=Lax", variant[0])
            );
            b += usize::from(variant == ["b"]);
        }
        assert!((130..270).contains(&b), "{b}");
        for variant in ["a", "b"] {
            let outcome =
                proxy.send(TestRequest::get("/").header("cookie", format!("x=1; checkout={variant}")));
            assert_eq!(outcome.header("set-cookie"), None);
            assert_eq!(outcome.upstream.unwrap().header("x-checkout").as_deref(), Some(variant));
        }
    }

    #[test]
    fn a_variant_that_is_none_is_drawn_anew() {
        let mut proxy = Proxy::<Variants>::new(CONFIG).unwrap();
        for cookie in ["checkout=ended", "checkout=<script>", "checkout="] {
            let outcome = proxy.send(TestRequest::get("/").header("cookie", cookie));
            assert!(outcome.header("set-cookie").is_some(), "{cookie}");
        }
        let forced = proxy.send(TestRequest::get("/").header("x-force", "b").header("cookie", "checkout=a"));
        assert_eq!(forced.header("set-cookie"), None);
        assert_eq!(forced.upstream.unwrap().header("x-checkout").as_deref(), Some("b"));
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused() {
        let cases = [
            (r#"{"experiment": "e", "variants": []}"#, "configuration: variants: "),
            (r#"{"experiment": "e", "variants": [{"name": "a;b"}]}"#, "configuration: `a;b`: "),
            (r#"{"experiment": "", "variants": [{"name": "a"}]}"#, "configuration: ``: "),
            (r#"{"experiment": "e", "header": " ", "variants": [{"name": "a"}]}"#, "configuration: header: "),
        ];
        for (json, error) in cases {
            let found = Proxy::<Variants>::new(json).err().unwrap_or_default();
            assert!(found.starts_with(error), "{json}: {found}");
        }
    }
}
