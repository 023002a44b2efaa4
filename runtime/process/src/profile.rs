//! `/debug/pprof/profile`: where the process spends its processor time, for Go's pprof and whatever reads its form.
//!
//! Threads are interrupted by SIGPROF while they run and note where they are; nothing of it happens while nobody asks. Who
//! asked once makes the process some 70 MiB larger, for that is where they note it. Guests of the plugin host have no frames
//! that could be told apart: they are one.

mod form;

use axum::extract::Query;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use form::Profile;
use pprof::ProfilerGuardBuilder;
use prost::Message;
use serde::Deserialize;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;

/// How long is looked at most: names of functions are looked up afterwards, and an answer may take 30 s.
const SECONDS_MAX: u64 = 20;
/// How often a second each running thread is looked at, unless asked for otherwise, and at most. Not a round number, so that
/// what happens a hundred times a second is not always met, or never.
const FREQUENCY: u32 = 99;
const FREQUENCY_MAX: u32 = 999;

/// Whoever interrupts threads is one at a time.
static TURN: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(1)));

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Asked {
    seconds: Option<u64>,
    hz: Option<u32>,
}

/// Looks for some seconds (10, unless asked for otherwise) and answers with a profile of processor time.
pub(crate) async fn profile(Query(asked): Query<Asked>) -> Response {
    let Ok(turn) = Arc::clone(&TURN).try_acquire_owned() else {
        return (StatusCode::CONFLICT, "another profile is being taken\n").into_response();
    };
    let period = Duration::from_secs(asked.seconds.unwrap_or(10).clamp(1, SECONDS_MAX));
    let frequency = asked.hz.unwrap_or(FREQUENCY).clamp(1, FREQUENCY_MAX);
    let taken = tokio::task::spawn_blocking(move || {
        let taken = take(period, frequency);
        drop(turn);
        taken
    });
    match taken.await.unwrap_or(Err(pprof::Error::NotRunning)) {
        Ok(profile) => {
            let headers = [
                (header::CONTENT_TYPE, "application/octet-stream"),
                (header::CONTENT_DISPOSITION, "attachment; filename=\"profile.pb\""),
            ];
            (headers, profile.encode_to_vec()).into_response()
        }
        Err(error) => {
            let text =
                format!("no profile could be taken: {error} (it needs a directory for temporary files)\n");
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

fn take(period: Duration, frequency: u32) -> Result<Profile, pprof::Error> {
    let begun = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let builder = ProfilerGuardBuilder::default().frequency(frequency.cast_signed());
    // Who is interrupted while it looks for frames itself holds a lock that looking for frames needs.
    let guard = builder.blocklist(&["libc", "libgcc", "pthread", "vdso"]).build()?;
    std::thread::sleep(period);
    let report = guard.report().build()?;
    Ok(Profile::of(&report, begun, period, frequency))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[inline(never)]
    fn busy_for_the_profile(ended: &AtomicBool) -> u64 {
        let mut sum = 0u64;
        while !ended.load(Ordering::Relaxed) {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
        }
        sum
    }

    #[tokio::test]
    async fn what_runs_is_named_and_only_one_profile_is_taken_at_a_time() {
        let ended = Arc::new(AtomicBool::new(false));
        let busy = std::thread::Builder::new().name("busy".into());
        let thread = busy.spawn({
            let ended = Arc::clone(&ended);
            move || busy_for_the_profile(&ended)
        });
        let asked = || Query(Asked { seconds: Some(1), hz: Some(500) });
        let (first, second) = tokio::join!(profile(asked()), profile(asked()));
        ended.store(true, Ordering::Relaxed);
        thread.unwrap().join().unwrap();
        assert_eq!((first.status(), second.status()), (StatusCode::OK, StatusCode::CONFLICT));
        let body = axum::body::to_bytes(first.into_body(), 64 << 20).await.unwrap();
        let profile = Profile::decode(body).unwrap();
        let names = profile.string_table.iter();
        assert_eq!(names.clone().filter(|name| name.contains("busy_for_the_profile")).count(), 1);
        assert!(names.clone().any(|name| name == "busy"), "the thread's name");
        assert_eq!(profile.string_table.first().map(String::as_str), Some(""));
        let nanos: i64 = profile.sample.iter().filter_map(|sample| sample.value.get(1)).sum();
        assert!(nanos > 0, "{nanos}");
    }
}
