//! Instances for single exchanges, made of a snapshot that was taken when the plugin had been configured.

use crate::host::{Declared, Expressions};
use crate::instance::{Crash, Instance};
use crate::lease::Leases;
use crate::log::Sampled;
use crate::module::Module;
use crate::state::{Facts, Properties};
use std::sync::Arc;
use std::time::Duration;

/// What the host keeps for a plugin that has been configured, and what its memory speaks of by number. Metrics, queues and shared
/// data are the process's and have the same numbers everywhere; calls, timers and queues to be told of stay with
/// the instance that asked.
pub(crate) struct HostState {
    pub(crate) declared: Declared,
    pub(crate) expressions: Expressions,
    pub(crate) root_properties: Properties,
    /// It was told the time, or random bytes: no other start comes to the same snapshot.
    pub(crate) is_unique: bool,
    /// It has called other services, and will not know the answers in instances of exchanges.
    pub(crate) waits: bool,
}

/// Makes instances for single exchanges.
pub(crate) struct Clones {
    module: Arc<Module>,
    host: HostState,
    /// Says that instances crash.
    crash_sampled: Sampled,
}

/// Why there is no instance.
pub(crate) enum NoClone {
    /// Too many exchanges have one, or those that they have take all the memory there is for them.
    Full,
    /// It did not come to its first callback.
    Crash(Crash),
}

impl Clones {
    pub(crate) fn new(module: Arc<Module>, host: HostState) -> Self {
        Self { module, host, crash_sampled: Sampled::every(Duration::from_secs(1)) }
    }

    /// Whether the plugin has called other services while it was configured.
    pub(crate) fn wait_in_vain(&self) -> bool {
        self.host.waits
    }

    pub(crate) fn make(&self, facts: &Arc<Facts>, leases: &Arc<Leases>) -> Result<Instance, NoClone> {
        let lease = leases.take().ok_or(NoClone::Full)?;
        Instance::clone_of(&self.module, facts, &self.host, lease)
    }

    /// Whether the next crash is worth a line: one exchange may crash after the other.
    pub(crate) fn warns(&self) -> bool {
        self.crash_sampled.passes()
    }
}
