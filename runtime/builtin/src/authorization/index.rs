//! Finds the rules that a request can match, so that a thousand rules cost what a few do.
//!
//! Most rules demand one thing that few others do: a path, a header, a claim. Each rule is filed under the demand that
//! it shares with the fewest, and only rules filed under what a request has are tried on it.

use super::block_index::BlockIndex;
use super::request::{Asked, OfRequest, Path};
use super::rule::{Checks, Rule};
use super::text_index::TextIndex;
use cairn_mesh::{ClaimPath, RequestPrincipal, TextMatch};
use http::HeaderName;
use ipnet::IpNet;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;

/// Rules by what they demand.
#[derive(Debug, Default)]
pub(super) struct Index {
    paths: TextIndex,
    hosts: TextIndex,
    methods: TextIndex,
    issuers: TextIndex,
    subjects: TextIndex,
    headers: HashMap<HeaderName, TextIndex>,
    claims: HashMap<ClaimPath, TextIndex>,
    remote_ips: BlockIndex,
    /// Rules that demand nothing that is looked up.
    others: Vec<u32>,
}

/// What of a request a demand is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Attribute<'a> {
    Path,
    Host,
    Method,
    Issuer,
    Subject,
    Header(&'a HeaderName),
    Claim(&'a ClaimPath),
    RemoteIp,
}

/// A text, or what it begins or ends with, or the block that an address is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Suffix(&'a str),
    Block(IpNet),
}

/// A request matches only when one of the keys matches the attribute.
struct Demand<'a> {
    attribute: Attribute<'a>,
    keys: Vec<Key<'a>>,
}

impl Index {
    /// Files `rules` by their position.
    pub(super) fn new(rules: &[Rule]) -> Self {
        let demands: Vec<Vec<Demand<'_>>> = rules.iter().map(demands).collect();
        let mut shared: HashMap<(Attribute<'_>, Key<'_>), usize> = HashMap::new();
        for demand in demands.iter().flatten() {
            for key in &demand.keys {
                *shared.entry((demand.attribute, *key)).or_default() += 1;
            }
        }
        let cost = |demand: &&Demand<'_>| {
            let cost =
                |key| shared.get(&(demand.attribute, key)).copied().unwrap_or_default() * key.breadth();
            demand.keys.iter().copied().map(cost).max().unwrap_or_default()
        };
        let mut index = Self::default();
        for (demands, position) in demands.iter().zip(0..) {
            match demands.iter().min_by_key(cost) {
                Some(demand) => index.file(demand, position),
                None => index.others.push(position),
            }
        }
        index.seal();
        index
    }

    fn file(&mut self, demand: &Demand<'_>, position: u32) {
        let texts = match demand.attribute {
            Attribute::Path => &mut self.paths,
            Attribute::Host => &mut self.hosts,
            Attribute::Method => &mut self.methods,
            Attribute::Issuer => &mut self.issuers,
            Attribute::Subject => &mut self.subjects,
            Attribute::Header(name) => self.headers.entry(name.clone()).or_default(),
            Attribute::Claim(path) => self.claims.entry(path.clone()).or_default(),
            Attribute::RemoteIp => {
                for key in &demand.keys {
                    if let Key::Block(block) = key {
                        self.remote_ips.insert(*block, position);
                    }
                }
                return;
            }
        };
        for key in &demand.keys {
            texts.insert(*key, position);
        }
    }

    fn seal(&mut self) {
        let one =
            [&mut self.paths, &mut self.hosts, &mut self.methods, &mut self.issuers, &mut self.subjects];
        let many = self.headers.values_mut().chain(self.claims.values_mut());
        one.into_iter().chain(many).for_each(TextIndex::seal);
    }

    /// Calls `each` with the positions of rules that the request may match, in rising order within one call. No other
    /// rule matches.
    pub(super) fn candidates(&self, asked: &Asked<'_>, each: &mut impl FnMut(&[u32])) {
        each(&self.others);
        self.paths.find(asked.head.path.path(), each);
        self.methods.find(asked.head.method.as_str(), each);
        if !self.hosts.is_empty() {
            self.hosts.find(&lower_case(asked.host()), each);
        }
        self.by_header(asked, each);
        if !self.remote_ips.is_empty() {
            self.remote_ips.find(asked.remote_ip(), each);
        }
        if asked.known.token.is_some() {
            self.by_token(asked, each);
        }
    }

    /// Goes through whichever are fewer: the headers that rules ask for, or the request's.
    fn by_header(&self, asked: &Asked<'_>, each: &mut impl FnMut(&[u32])) {
        let headers = &asked.head.headers;
        let mut look = |name: &HeaderName, texts: &TextIndex| {
            asked.header(name, |value| texts.find(value, each));
        };
        if self.headers.len() <= headers.keys_len() {
            self.headers.iter().for_each(|(name, texts)| look(name, texts));
        } else {
            for name in headers.keys() {
                if let Some(texts) = self.headers.get(name) {
                    look(name, texts);
                }
            }
        }
    }

    fn by_token(&self, asked: &Asked<'_>, each: &mut impl FnMut(&[u32])) {
        let (issuer, subject) = asked.issuer_and_subject();
        if let Some(issuer) = issuer {
            self.issuers.find(issuer, each);
        }
        if let Some(subject) = subject {
            self.subjects.find(subject, each);
        }
        for (path, texts) in &self.claims {
            match asked.claim(path) {
                Some(Value::String(text)) => texts.find(text, each),
                Some(Value::Array(list)) => {
                    list.iter().filter_map(Value::as_str).for_each(|text| texts.find(text, each));
                }
                _ => {}
            }
        }
    }
}

impl Key<'_> {
    /// How many more requests it lets through than an exact text, roughly.
    fn breadth(self) -> usize {
        match self {
            Self::Exact(_) => 1,
            Self::Block(block) if block.prefix_len() == block.max_prefix_len() => 1,
            Self::Block(block) if block.prefix_len() > 0 => 2,
            Self::Prefix(text) | Self::Suffix(text) if text.len() > 1 => 2,
            Self::Prefix(_) | Self::Suffix(_) | Self::Block(_) => 1_000,
        }
    }
}

fn lower_case(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) { text.to_ascii_lowercase().into() } else { text }
}

/// Everything that a rule demands of every request.
fn demands(rule: &Rule) -> Vec<Demand<'_>> {
    let mut demands: Vec<Demand<'_>> = rule.when.request.iter().flat_map(of_check).collect();
    demands.extend(of_alternatives(&rule.to));
    demands.extend(of_alternatives(&rule.from));
    demands
}

/// What all alternatives demand one thing or another of.
fn of_alternatives(alternatives: &[Checks]) -> Vec<Demand<'_>> {
    let mut each = alternatives.iter().map(|checks| checks.request.iter().flat_map(of_check).collect());
    let Some(mut common): Option<Vec<Demand<'_>>> = each.next() else { return Vec::new() };
    for others in each {
        common.retain_mut(|demand| {
            let same = others.iter().find(|other| other.attribute == demand.attribute);
            same.map(|other| demand.keys.extend(&other.keys)).is_some()
        });
    }
    common
}

fn of_check(check: &OfRequest) -> Vec<Demand<'_>> {
    match check {
        OfRequest::Host(values) => texts(Attribute::Host, &values.any),
        OfRequest::Method(values) => texts(Attribute::Method, &values.any),
        OfRequest::Header(header, values) => match header.name_in_map() {
            Some(name) => texts(Attribute::Header(name), &values.any),
            None => Vec::new(),
        },
        OfRequest::Claim(claim, values) => texts(Attribute::Claim(&claim.path), &values.any),
        OfRequest::Path(values) if !values.any.is_empty() => {
            vec![Demand { attribute: Attribute::Path, keys: values.any.iter().map(path_key).collect() }]
        }
        OfRequest::RequestPrincipal(values) if !values.any.is_empty() => {
            let keys =
                |part: fn(&RequestPrincipal) -> &TextMatch| values.any.iter().map(part).map(key).collect();
            vec![
                Demand { attribute: Attribute::Subject, keys: keys(RequestPrincipal::subject) },
                Demand { attribute: Attribute::Issuer, keys: keys(RequestPrincipal::issuer) },
            ]
        }
        OfRequest::RemoteIp(values) if !values.any.is_empty() => {
            let keys = values.any.iter().copied().map(Key::Block).collect();
            vec![Demand { attribute: Attribute::RemoteIp, keys }]
        }
        OfRequest::Path(_)
        | OfRequest::RequestPrincipal(_)
        | OfRequest::RemoteIp(_)
        | OfRequest::Metadata(..) => Vec::new(),
    }
}

fn texts<'a>(attribute: Attribute<'a>, any: &'a [TextMatch]) -> Vec<Demand<'a>> {
    let keys: Vec<Key<'a>> = any.iter().map(key).collect();
    if keys.is_empty() { Vec::new() } else { vec![Demand { attribute, keys }] }
}

fn key(text: &TextMatch) -> Key<'_> {
    match text {
        TextMatch::Exact(text) => Key::Exact(text),
        TextMatch::Prefix(text) => Key::Prefix(text),
        TextMatch::Suffix(text) => Key::Suffix(text),
        TextMatch::Present => Key::Prefix(""),
    }
}

/// A template is filed under what it begins with, or under what it ends with when that says more.
fn path_key(path: &Path) -> Key<'_> {
    match path {
        Path::Text(text) => key(text),
        Path::Template(template) => {
            let text = template.as_str();
            let begins = text.split('{').next().unwrap_or_default();
            let ends = text.rsplit('}').next().unwrap_or_default();
            if begins.len() >= ends.len() { Key::Prefix(begins) } else { Key::Suffix(ends) }
        }
    }
}
