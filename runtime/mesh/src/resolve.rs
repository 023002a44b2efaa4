//! Names as clients in the mesh use them.

use crate::{Chooser, Snapshot};
use std::net::IpAddr;

/// Finds the address of a service by name, with the shorter forms that Kubernetes' DNS search list allows from
/// `namespace`.
pub fn resolve(
    snapshot: &Snapshot,
    name: &str,
    namespace: &str,
    chooser: &mut dyn Chooser,
) -> Option<IpAddr> {
    let name = name.trim_end_matches('.');
    let domain = &snapshot.settings().cluster_domain;
    let forms = [
        name.to_owned(),
        format!("{name}.{namespace}.svc.{domain}"),
        format!("{name}.svc.{domain}"),
        format!("{name}.{domain}"),
    ];
    forms.iter().find_map(|form| {
        let state = snapshot.service_named(form, namespace)?;
        if let Some(vip) = state.service.vips.first() {
            return Some(vip.address);
        }
        // A headless service has no VIP: one of its pods answers, as DNS would say.
        let count = u64::try_from(state.endpoints.len()).unwrap_or(u64::MAX).max(1);
        let index = usize::try_from(chooser.below(count)).ok()?;
        state.endpoints.get(index)?.workload.addresses.first().copied()
    })
}
