//! What policies that decide nothing say of a request, for people and by Envoy's names.

use cairn_filter::Metadata;
use std::sync::Arc;

/// Where Envoy's RBAC filter writes, and the prefix that Istio gives to what its trial rules say.
const RBAC: &str = "envoy.filters.http.rbac";
const TRIAL_PREFIX: &str = "istio_dry_run_";

/// Where Envoy's AUDIT rules ask for a line in the access log.
const COMMON: &str = "envoy.common";
const LOG_HINT: &str = "access_log_hint";

/// What AUDIT policies and policies on trial say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remarks {
    /// For people, one line each.
    pub lines: Vec<String>,
    /// By Envoy's names, for the log and other filters.
    pub metadata: Metadata,
}

impl Remarks {
    pub(super) fn audited(&mut self, rule: &Arc<str>) {
        self.lines.push(format!("audit: {rule} matched"));
        self.metadata.set(COMMON, LOG_HINT, true);
    }

    /// Notes what the policies on trial of `action` (`allow` or `deny`) would do: the rule that matches, and whether they
    /// would let the request pass.
    pub(super) fn on_trial(&mut self, action: &str, rule: Option<&Arc<str>>, passes: bool) {
        if let Some(rule) = rule {
            self.metadata.set(RBAC, format!("{TRIAL_PREFIX}{action}_shadow_effective_policy_id"), &**rule);
        }
        let result = if passes { "allowed" } else { "denied" };
        self.metadata.set(RBAC, format!("{TRIAL_PREFIX}{action}_shadow_engine_result"), result);
    }
}
