//! Looking into an instance that has been configured, and making others that begin where it stands.

use super::{Instance, call, callbacks, crash, prepare};
use crate::abi::{Callback, VM_CONTEXT};
use crate::budget::out_of_time;
use crate::clones::{HostState, NoClone};
use crate::lease::Lease;
use crate::module::{Module, ON_CLONE};
use crate::snapshot::{self, Frozen, Opened, SnapshotError, Value};
use crate::state::{Facts, State};
use std::sync::Arc;
use wasmtime::{Store, Val};

impl Instance {
    /// The module of this instance, such that its instances begin where this one stands, and what the host keeps for it.
    ///
    /// # Errors
    /// When that is not all there is.
    pub(crate) fn frozen(&mut self, opened: &Opened) -> Result<(Vec<u8>, HostState), SnapshotError> {
        let mut globals = Vec::with_capacity(opened.globals.len());
        for index in opened.globals.iter().copied() {
            let global = self.guest.get_global(&mut self.store, &snapshot::export_name(index));
            let value = match global.map(|global| global.get(&mut self.store)) {
                Some(Val::I32(value)) => Value::I32(value),
                Some(Val::I64(value)) => Value::I64(value),
                Some(Val::F32(bits)) => Value::F32(bits),
                Some(Val::F64(bits)) => Value::F64(bits),
                Some(Val::V128(bits)) => Value::V128(bits.as_u128()),
                _ => return Err(SnapshotError::Reference(index)),
            };
            globals.push((index, value));
        }
        let state = self.store.data();
        let memory = state.memory.ok_or(SnapshotError::Memory)?.data(&self.store);
        let module = snapshot::freeze(&opened.module, &Frozen { memory, globals })?;
        let host = HostState {
            declared: state.declared.clone(),
            expressions: state.expressions.clone(),
            root_properties: state.root_properties.clone(),
            is_unique: state.is_unique,
            waits: state.outside.has_calls(),
        };
        Ok((module, host))
    }

    /// An instance of a module that [`Instance::frozen`] made.
    ///
    /// # Errors
    /// When there is no memory left for it, or it crashes.
    pub(crate) fn clone_of(
        module: &Module,
        facts: &Arc<Facts>,
        host: &HostState,
        lease: Lease,
    ) -> Result<Self, NoClone> {
        let mut state = State::new(Arc::clone(facts));
        state.limits.lease = Some(lease);
        state.declared = host.declared.clone();
        state.expressions = host.expressions.clone();
        state.root_properties = host.root_properties.clone();
        let mut store = Store::new(module.pre.module().engine(), state);
        store.limiter(|state| &mut state.limits);
        store.epoch_deadline_callback(out_of_time);
        prepare(&mut store, Callback::Start, VM_CONTEXT, facts.deadline);
        let guest = module.pre.instantiate(&mut store);
        let guest = guest.map_err(|error| match store.data().limits.is_refused() {
            true => NoClone::Full,
            false => NoClone::Crash(crash(&store, Callback::Start, facts.deadline, &error)),
        })?;
        store.data_mut().memory = guest.get_memory(&mut store, "memory");
        store.data_mut().allocate = guest.get_typed_func(&mut store, module.exports.allocator).ok();
        if module.exports.clone
            && let Ok(cloned) = guest.get_typed_func::<(), ()>(&mut store, ON_CLONE)
        {
            call(&mut store, &cloned, (), Callback::Start, VM_CONTEXT).map_err(NoClone::Crash)?;
        }
        let callbacks = callbacks(&mut store, &guest);
        Ok(Self::of(store, guest, callbacks, module.exports))
    }
}
