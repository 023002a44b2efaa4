//! The last denials of each service, so that one that denies a lot does not push out the only denial of another.

use crate::http_record::{HttpRecord, HttpScope};
use crate::tcp_record::{TcpRecord, copy_text};
use cairn_mesh::Identity;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::SystemTime;

/// How many denials are kept per service.
const PER_SERVICE: usize = 16;

/// How many services denials are kept of; past that, the one that has denied nothing for the longest is forgotten.
const SERVICES_MAX: usize = 256;

/// One request or connection that was denied.
#[derive(Clone, Debug)]
pub struct Denied {
    /// When it arrived.
    pub at: SystemTime,
    /// The client's address.
    pub source: Option<SocketAddr>,
    /// The client's identity.
    pub source_identity: Option<Identity>,
    /// The service addressed: its hostname, or an address.
    pub service: String,
    /// Where the client meant to go.
    pub destination: Option<SocketAddr>,
    /// The method; empty for a connection without HTTP.
    pub method: String,
    /// Host or `:authority`.
    pub authority: String,
    /// The path with its query.
    pub path: String,
    /// The status; 0 for a connection without HTTP.
    pub status: u16,
    /// Who denied it.
    pub policy: String,
    /// Why.
    pub reason: String,
}

impl Default for Denied {
    fn default() -> Self {
        Self {
            at: SystemTime::UNIX_EPOCH,
            source: None,
            source_identity: None,
            service: String::new(),
            destination: None,
            method: String::new(),
            authority: String::new(),
            path: String::new(),
            status: 0,
            policy: String::new(),
            reason: String::new(),
        }
    }
}

impl Denied {
    fn refill(&mut self, scope: &HttpScope, record: &HttpRecord<'_>, (policy, reason): (&str, &str)) {
        self.at = record.started;
        self.source = Some(record.downstream);
        self.source_identity.clone_from(&scope.source().principal);
        self.destination = Some(record.local);
        copy_text(&mut self.method, record.method);
        copy_text(&mut self.authority, record.authority);
        copy_text(&mut self.path, record.path);
        self.status = record.status;
        copy_text(&mut self.policy, policy);
        copy_text(&mut self.reason, reason);
    }
}

/// The last denials of each service.
#[derive(Debug, Default)]
pub struct Denials {
    services: Mutex<Services>,
}

#[derive(Debug, Default)]
struct Services {
    /// Counts denials, for their order.
    count: u64,
    by_name: HashMap<String, Shelf>,
}

/// The denials of one service: a ring.
#[derive(Debug, Default)]
struct Shelf {
    last: u64,
    slots: Vec<(u64, Denied)>,
    next: usize,
}

impl Denials {
    /// Adds a denial by `service`: `fill` writes it over the service's oldest.
    pub fn push(&self, service: &str, fill: impl FnOnce(&mut Denied)) {
        let mut services = self.services.lock();
        services.count += 1;
        let count = services.count;
        let shelf = services.shelf(service);
        shelf.last = count;
        let at = shelf.next;
        shelf.next = (at + 1) % PER_SERVICE;
        if at == shelf.slots.len() {
            shelf.slots.push(Default::default());
        }
        if let Some((number, denied)) = shelf.slots.get_mut(at) {
            *number = count;
            copy_text(&mut denied.service, service);
            fill(denied);
        }
    }

    /// Adds an exchange, if it was denied.
    pub(crate) fn push_http(&self, scope: &HttpScope, record: &HttpRecord<'_>) {
        let Some(denial) = record.denial else { return };
        let fill = |denied: &mut Denied| denied.refill(scope, record, denial);
        match scope.service() {
            Some(service) => self.push(&service.hostname, fill),
            None => self.push(&record.local.to_string(), fill),
        }
    }

    /// Adds a connection without HTTP, if it was denied.
    pub(crate) fn push_tcp(&self, record: &TcpRecord<'_>) {
        if record.decision != "deny" {
            return;
        }
        let service = record.service.map_or(record.hbone_authority, |service| &service.hostname);
        self.push(service, |denied| {
            denied.at = record.started;
            denied.source = Some(record.source);
            denied.source_identity = record.source_identity.cloned();
            denied.destination = Some(record.destination);
            denied.method.clear();
            denied.authority.clear();
            denied.path.clear();
            denied.status = 0;
            copy_text(&mut denied.policy, record.policy);
            copy_text(&mut denied.reason, record.error);
        });
    }

    /// All denials, or those by services that `wanted` names, newest first.
    pub fn list(&self, wanted: impl Fn(&str) -> bool) -> Vec<Denied> {
        let services = self.services.lock();
        let shelves = services.by_name.iter().filter(|(name, _)| wanted(name));
        let mut all: Vec<(u64, Denied)> =
            shelves.flat_map(|(_, shelf)| shelf.slots.iter().cloned()).collect();
        drop(services);
        all.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        all.into_iter().map(|(_, denied)| denied).collect()
    }
}

impl Services {
    fn shelf(&mut self, service: &str) -> &mut Shelf {
        if !self.by_name.contains_key(service) && self.by_name.len() >= SERVICES_MAX {
            let oldest = self.by_name.iter().min_by_key(|(_, shelf)| shelf.last);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.by_name.remove(&oldest);
            }
        }
        self.by_name.entry(service.to_owned()).or_default()
    }
}

/// Whether an operator who writes `wanted` means the service with this hostname: `catalog.shop.svc.cluster.local`, a
/// shorter form of it, or `shop/catalog`.
pub fn is_service(hostname: &str, wanted: &str) -> bool {
    let wanted = match wanted.split_once('/') {
        Some((namespace, name)) => format!("{name}.{namespace}"),
        None => wanted.to_ascii_lowercase(),
    };
    hostname.strip_prefix(&*wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(denials: &Denials, service: &str, reason: &str) {
        denials.push(service, |denied| reason.clone_into(&mut denied.reason));
    }

    fn reasons(denials: &Denials, service: &str) -> Vec<String> {
        denials.list(|name| name == service).into_iter().map(|denied| denied.reason).collect()
    }

    #[test]
    fn each_service_keeps_its_last_denials() {
        let denials = Denials::default();
        push(&denials, "quiet", "once");
        for number in 0..PER_SERVICE + 3 {
            push(&denials, "busy", &number.to_string());
        }
        assert_eq!(reasons(&denials, "quiet"), ["once"]);
        let busy = reasons(&denials, "busy");
        assert_eq!((busy.len(), busy[0].as_str()), (PER_SERVICE, "18"), "newest first");
        assert_eq!(busy[PER_SERVICE - 1], "3", "the oldest are gone");
        let all = denials.list(|_| true);
        assert_eq!((all.len(), all[PER_SERVICE].service.as_str()), (PER_SERVICE + 1, "quiet"));
    }

    #[test]
    fn a_service_is_named_as_short_as_one_likes() {
        for (wanted, expected) in [
            ("catalog", true),
            ("catalog.shop", true),
            ("Catalog.shop.svc.cluster.local", true),
            ("shop/catalog", true),
            ("shop/cat", false),
            ("cat", false),
            ("catalog.bank", false),
        ] {
            assert_eq!(is_service("catalog.shop.svc.cluster.local", wanted), expected, "{wanted}");
        }
    }

    #[test]
    fn the_service_that_has_been_quiet_the_longest_is_forgotten() {
        let denials = Denials::default();
        for number in 0..SERVICES_MAX {
            push(&denials, &format!("service-{number}"), "x");
        }
        push(&denials, "service-0", "again");
        push(&denials, "new", "x");
        assert_eq!(reasons(&denials, "service-1"), [""; 0]);
        assert_eq!(reasons(&denials, "service-0"), ["again", "x"]);
        assert_eq!(reasons(&denials, "new"), ["x"]);
    }
}
