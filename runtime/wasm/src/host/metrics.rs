//! Metrics that the guest defines.

use super::Guest;
use super::memory::{check, read, split, write, write_u32};
use crate::abi::{Done, Status, answer};
use crate::metrics::Metric;
use crate::state::State;
use std::sync::Arc;
use wasmtime::Linker;

pub(super) fn define(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap(
        "env",
        "proxy_define_metric",
        |mut guest: Guest<'_>, kind: u32, name: u32, name_length: u32, id_at: u32| {
            answer(define_metric(&mut guest, kind, (name, name_length), id_at))
        },
    )?;
    linker.func_wrap("env", "proxy_increment_metric", |mut guest: Guest<'_>, id: u32, delta: i64| {
        answer(find(guest.data_mut(), id).and_then(|metric| metric.increment(delta)).map_err(Into::into))
    })?;
    linker.func_wrap("env", "proxy_record_metric", |mut guest: Guest<'_>, id: u32, value: u64| {
        answer(find(guest.data_mut(), id).map(|metric| metric.record(value)).map_err(Into::into))
    })?;
    linker.func_wrap("env", "proxy_get_metric", |mut guest: Guest<'_>, id: u32, value_at: u32| {
        answer(get_metric(&mut guest, id, value_at))
    })?;
    Ok(())
}

fn define_metric(guest: &mut Guest<'_>, kind: u32, name: (u32, u32), id_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, id_at, 4)?;
    let id =
        state.facts.environment.metrics.define(kind, read(memory, name.0, name.1)?, &state.facts.counters)?;
    Ok(write_u32(memory, id_at, id)?)
}

fn get_metric(guest: &mut Guest<'_>, id: u32, value_at: u32) -> Done {
    let (memory, state) = split(guest)?;
    check(memory, value_at, 8)?;
    let value = find(state, id)?.value()?;
    Ok(write(memory, value_at, &value.to_le_bytes())?)
}

/// The metric with this id; the first look-up of each is kept in the instance.
fn find(state: &mut State, id: u32) -> Result<&Metric, Status> {
    let State { metrics, facts, .. } = state;
    let registry = &facts.environment.metrics;
    let index = (id >> 2) as usize;
    if metrics.get(index).is_none_or(Option::is_none) {
        let metric: Arc<Metric> = registry.find(id).ok_or(Status::NotFound)?;
        if metrics.len() <= index {
            metrics.resize(index + 1, None);
        }
        metrics[index] = Some(metric);
    }
    match metrics.get(index) {
        Some(Some(metric)) if metric.kind_number() == id & 3 => Ok(metric),
        _ => Err(Status::NotFound),
    }
}
