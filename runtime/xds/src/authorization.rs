//! L4 policies (`istio.security.Authorization`) and the model, both ways.
//!
//! What a policy says and we do not understand is never skipped silently. In an ALLOW policy an unknown condition
//! counts as false, so the match allows nothing; in a DENY policy it counts as true, so the known part alone denies.
//! Both are reported.

use crate::ResourceError;
use crate::unknown::{AUTHORIZATION, CLAUSE, MATCH, RULE, contents, has_unknown};
use crate::workload::{ip, ip_bytes};
use cairn_mesh::{
    Authorization, Clause, L4Match, L4Rule, PolicyAction, ResourceName, Scope, ServiceAccount, TextMatch,
    Values,
};
use cairn_proto::security as wire;
use cairn_proto::security::string_match::MatchType;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prost::Message;

/// A policy that was read, and what of it was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadAuthorization {
    /// The policy, on the safe side of what was not understood.
    pub policy: Authorization,
    /// What was not understood, one sentence each.
    pub not_understood: Vec<String>,
}

/// Reads a policy from the bytes of an `istio.security.Authorization`.
///
/// # Errors
/// When the bytes are no such message, its name is missing, or its scope or action is not known.
pub fn authorization_from_bytes(bytes: &[u8]) -> Result<ReadAuthorization, ResourceError> {
    let from = wire::Authorization::decode(bytes)?;
    for (field, value) in [("name", &from.name), ("namespace", &from.namespace)] {
        if value.is_empty() {
            return Err(ResourceError::Missing { field });
        }
    }
    let scope = scope(from.scope)?;
    let action = match wire::Action::try_from(from.action) {
        Ok(wire::Action::Allow) => PolicyAction::Allow,
        Ok(wire::Action::Deny) => PolicyAction::Deny,
        Err(_) => return Err(ResourceError::value("action", from.action)),
    };
    let mut reader = Reader { action, not_understood: Vec::new() };
    let whole_unknown = has_unknown(bytes, &AUTHORIZATION);
    if whole_unknown {
        reader.report("the policy", "an unknown field");
    }
    let mut rules: Vec<L4Rule> = from
        .rules
        .iter()
        .zip(contents(bytes, 5))
        .enumerate()
        .map(|(index, (rule, bytes))| reader.rule(index, rule, bytes))
        .collect();
    if whole_unknown && action == PolicyAction::Allow {
        for rule in &mut rules {
            rule.clauses.push(never());
        }
    }
    let name = ResourceName::new(from.namespace, from.name);
    let policy = Authorization { name, scope, action, rules, dry_run: from.dry_run };
    Ok(ReadAuthorization { policy, not_understood: reader.not_understood })
}

/// What stands in for a policy that cannot be read and of which no earlier version is known: it denies everything
/// in its scope, or in its namespace when the scope cannot be read either.
pub(crate) fn stand_in(name: ResourceName, bytes: &[u8]) -> Authorization {
    let scope = wire::Authorization::decode(bytes).ok().and_then(|policy| scope(policy.scope).ok());
    Authorization {
        name,
        scope: scope.unwrap_or(Scope::Namespace),
        action: PolicyAction::Deny,
        rules: vec![L4Rule::default()],
        dry_run: false,
    }
}

/// A policy in its wire form; `None` for AUDIT, which this API does not have.
pub fn authorization_to_proto(from: &Authorization) -> Option<wire::Authorization> {
    let action = match from.action {
        PolicyAction::Allow => wire::Action::Allow,
        PolicyAction::Deny => wire::Action::Deny,
        PolicyAction::Audit => return None,
    };
    let scope = match from.scope {
        Scope::Global => wire::Scope::Global,
        Scope::Namespace => wire::Scope::Namespace,
        Scope::WorkloadSelector => wire::Scope::WorkloadSelector,
    };
    let clause =
        |clause: &Clause| wire::Clause { matches: clause.matches.iter().map(match_to_proto).collect() };
    let rule = |rule: &L4Rule| wire::Rule { clauses: rule.clauses.iter().map(clause).collect() };
    Some(wire::Authorization {
        name: from.name.name.to_string(),
        namespace: from.name.namespace.to_string(),
        scope: scope.into(),
        action: action.into(),
        rules: from.rules.iter().map(rule).collect(),
        dry_run: from.dry_run,
        extensions: Vec::new(),
    })
}

fn scope(value: i32) -> Result<Scope, ResourceError> {
    match wire::Scope::try_from(value) {
        Ok(wire::Scope::Global) => Ok(Scope::Global),
        Ok(wire::Scope::Namespace) => Ok(Scope::Namespace),
        Ok(wire::Scope::WorkloadSelector) => Ok(Scope::WorkloadSelector),
        Err(_) => Err(ResourceError::value("scope", value)),
    }
}

/// A clause that nothing satisfies.
fn never() -> Clause {
    Clause { matches: vec![L4Match { never: true, ..L4Match::default() }] }
}

/// Reads the parts of one policy, whose action decides what an unknown condition means.
struct Reader {
    action: PolicyAction,
    not_understood: Vec<String>,
}

impl Reader {
    fn report(&mut self, place: &str, what: &str) {
        let effect = match self.action {
            PolicyAction::Allow => "it allows nothing there",
            PolicyAction::Deny | PolicyAction::Audit => "it matches on the known part",
        };
        self.not_understood.push(format!("{place} has {what}: {effect}"));
    }

    fn rule(&mut self, index: usize, from: &wire::Rule, bytes: &[u8]) -> L4Rule {
        let place = format!("rule {index}");
        let mut clauses: Vec<Clause> = from
            .clauses
            .iter()
            .zip(contents(bytes, 1))
            .enumerate()
            .map(|(index, (clause, bytes))| self.clause(&format!("{place} clause {index}"), clause, bytes))
            .collect();
        if has_unknown(bytes, &RULE) {
            self.report(&place, "an unknown field");
            if self.action == PolicyAction::Allow {
                clauses.push(never());
            }
        }
        L4Rule { clauses }
    }

    fn clause(&mut self, place: &str, from: &wire::Clause, bytes: &[u8]) -> Clause {
        if has_unknown(bytes, &CLAUSE) {
            self.report(place, "an unknown field");
            if self.action == PolicyAction::Allow {
                return never();
            }
        }
        let matches = from
            .matches
            .iter()
            .zip(contents(bytes, 2))
            .enumerate()
            .map(|(index, (from, bytes))| self.one_match(&format!("{place} match {index}"), from, bytes))
            .collect();
        Clause { matches }
    }

    fn one_match(&mut self, place: &str, from: &wire::Match, bytes: &[u8]) -> L4Match {
        let mut unreadable = Vec::new();
        if has_unknown(bytes, &MATCH) {
            unreadable.push("an unknown field");
        }
        let texts = (&*from.namespaces, &*from.not_namespaces);
        let namespaces = values(texts, text, "a string match of unknown type", &mut unreadable);
        let texts = (&*from.principals, &*from.not_principals);
        let principals = values(texts, text, "a string match of unknown type", &mut unreadable);
        let accounts = (&*from.service_accounts, &*from.not_service_accounts);
        let service_accounts = values(accounts, account, "an empty service account", &mut unreadable);
        let blocks = (&*from.source_ips, &*from.not_source_ips);
        let source_ips = values(blocks, block, "a malformed address", &mut unreadable);
        let blocks = (&*from.destination_ips, &*from.not_destination_ips);
        let destination_ips = values(blocks, block, "a malformed address", &mut unreadable);
        let ports = (&*from.destination_ports, &*from.not_destination_ports);
        let port = |port: &u32| u16::try_from(*port).ok();
        let destination_ports = values(ports, port, "a port above 65535", &mut unreadable);
        let mut read = L4Match {
            namespaces,
            principals,
            service_accounts,
            source_ips,
            destination_ips,
            destination_ports,
            never: false,
        };
        if unreadable.is_empty() {
            return read;
        }
        for what in unreadable {
            self.report(place, what);
        }
        match self.action {
            PolicyAction::Allow => read.never = true,
            // Nothing is left of it: an empty match would never match, so it is spelled out that all do.
            _ if read == L4Match::default() => {
                read.source_ips.any = vec![Ipv4Net::default().into(), Ipv6Net::default().into()];
            }
            _ => {}
        }
        read
    }
}

/// Reads a list and its negation; values that cannot be read are left out and reported once.
fn values<W, T>(
    (any, none): (&[W], &[W]),
    read: impl Fn(&W) -> Option<T>,
    otherwise: &'static str,
    unreadable: &mut Vec<&'static str>,
) -> Values<T> {
    let values =
        Values { any: any.iter().filter_map(&read).collect(), none: none.iter().filter_map(&read).collect() };
    if values.any.len() + values.none.len() < any.len() + none.len() {
        unreadable.push(otherwise);
    }
    values
}

fn text(from: &wire::StringMatch) -> Option<TextMatch> {
    Some(match from.match_type.as_ref()? {
        MatchType::Exact(text) => TextMatch::Exact(text.as_str().into()),
        MatchType::Prefix(text) => TextMatch::Prefix(text.as_str().into()),
        MatchType::Suffix(text) => TextMatch::Suffix(text.as_str().into()),
        MatchType::Presence(()) => TextMatch::Present,
    })
}

fn account(from: &wire::ServiceAccountMatch) -> Option<ServiceAccount> {
    let named = !from.namespace.is_empty() && !from.service_account.is_empty();
    named.then(|| ServiceAccount {
        namespace: from.namespace.as_str().into(),
        name: from.service_account.as_str().into(),
    })
}

fn block(from: &wire::Address) -> Option<IpNet> {
    let length = u8::try_from(from.length).ok()?;
    // A 16-byte form of an IPv4 address counts its prefix in 128 bits.
    let shift = if from.address.len() == 16 { 96 } else { 0 };
    match ip(&from.address, "address").ok()? {
        std::net::IpAddr::V4(v4) => Some(Ipv4Net::new(v4, length.checked_sub(shift)?).ok()?.into()),
        std::net::IpAddr::V6(v6) => Some(Ipv6Net::new(v6, length).ok()?.into()),
    }
}

fn match_to_proto(from: &L4Match) -> wire::Match {
    if from.never {
        // A match without fields never matches, which says the same.
        return wire::Match::default();
    }
    let texts = |values: &[TextMatch]| values.iter().map(text_to_proto).collect();
    let accounts = |values: &[ServiceAccount]| {
        let account = |account: &ServiceAccount| wire::ServiceAccountMatch {
            namespace: account.namespace.to_string(),
            service_account: account.name.to_string(),
        };
        values.iter().map(account).collect()
    };
    let blocks = |values: &[IpNet]| {
        let block = |block: &IpNet| wire::Address {
            address: ip_bytes(&block.addr()),
            length: block.prefix_len().into(),
        };
        values.iter().map(block).collect()
    };
    let ports = |values: &[u16]| values.iter().map(|port| u32::from(*port)).collect();
    wire::Match {
        namespaces: texts(&from.namespaces.any),
        not_namespaces: texts(&from.namespaces.none),
        principals: texts(&from.principals.any),
        not_principals: texts(&from.principals.none),
        source_ips: blocks(&from.source_ips.any),
        not_source_ips: blocks(&from.source_ips.none),
        destination_ips: blocks(&from.destination_ips.any),
        not_destination_ips: blocks(&from.destination_ips.none),
        destination_ports: ports(&from.destination_ports.any),
        not_destination_ports: ports(&from.destination_ports.none),
        service_accounts: accounts(&from.service_accounts.any),
        not_service_accounts: accounts(&from.service_accounts.none),
        extensions: Vec::new(),
    }
}

fn text_to_proto(from: &TextMatch) -> wire::StringMatch {
    let kind = match from {
        TextMatch::Exact(text) => MatchType::Exact(text.to_string()),
        TextMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
        TextMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
        TextMatch::Present => MatchType::Presence(()),
    };
    wire::StringMatch { match_type: Some(kind) }
}

#[cfg(test)]
#[path = "authorization/tests.rs"]
mod tests;
