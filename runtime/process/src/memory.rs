//! `/debug/memory`: what the process holds in memory, by what is behind it.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::collections::BTreeMap;

/// Where Linux tells of each mapping of this process.
const MAPPINGS: &str = "/proc/self/smaps";

/// Memory in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Held {
    /// In memory now.
    resident_kib: u64,
    /// Of that, what is this process's alone and was written to: what ending it would free.
    private_dirty_kib: u64,
    /// Written out to make room.
    swapped_kib: u64,
}

/// What is held in all, and by what is behind it: `heap` for what was allocated, `stack` for the first thread's stack, else a
/// file's path.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    total: Held,
    by_mapping: BTreeMap<String, Held>,
}

/// Answers with what is held now.
pub(crate) async fn memory() -> Response {
    match tokio::task::spawn_blocking(|| std::fs::read_to_string(MAPPINGS)).await {
        Ok(Ok(text)) => Json(read(&text)).into_response(),
        Ok(Err(error)) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{MAPPINGS} cannot be read: {error}\n")).into_response()
        }
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

fn read(text: &str) -> Memory {
    let mut memory = Memory::default();
    let mut name = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(field) = first.strip_suffix(':') else {
            // The first line of a mapping: addresses, permissions, offset, device, inode, and the path if there is one.
            let path: Vec<&str> = words.skip(4).collect();
            name = named(&path.join(" "));
            continue;
        };
        let kib = words.next().and_then(|number| number.parse().ok()).unwrap_or(0);
        if kib == 0 {
            continue;
        }
        let of: fn(&mut Held) -> &mut u64 = match field {
            "Rss" => |held| &mut held.resident_kib,
            "Private_Dirty" => |held| &mut held.private_dirty_kib,
            "Swap" => |held| &mut held.swapped_kib,
            _ => continue,
        };
        *of(&mut memory.total) += kib;
        *of(memory.by_mapping.entry(name.clone()).or_default()) += kib;
    }
    memory
}

/// What a mapping's memory is for.
fn named(path: &str) -> String {
    match path {
        // Allocators and threads take it where they like.
        "" | "[heap]" => "heap".to_owned(),
        path if path.starts_with("[anon") => "heap".to_owned(),
        path => path.trim_start_matches('[').trim_end_matches(']').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_summed_by_what_is_behind_it() {
        let text = "\
55d0-55e0 r-xp 00001000 fe:00 42 /usr/bin/ztunnel
Size:               4096 kB
Rss:                2048 kB
Private_Dirty:         0 kB
55e0-55f0 rw-p 00001000 fe:00 42 /usr/bin/ztunnel
Rss:                  64 kB
Private_Dirty:        32 kB
VmFlags: rd wr mr mw me ac sd
5600-5700 rw-p 00000000 00:00 0 [heap]
Rss:                 100 kB
Private_Dirty:       100 kB
7f00-7f10 rw-p 00000000 00:00 0
Rss:                  20 kB
Private_Dirty:        20 kB
Swap:                  4 kB
7f10-7f20 r--p 00000000 00:00 7 /lib/a file (deleted)
Rss:                   8 kB
";
        let memory = read(text);
        let held = |resident_kib, private_dirty_kib, swapped_kib| Held {
            resident_kib,
            private_dirty_kib,
            swapped_kib,
        };
        assert_eq!(memory.total, held(2240, 152, 4));
        let of = |name: &str| memory.by_mapping.get(name).copied();
        assert_eq!(of("/usr/bin/ztunnel"), Some(held(2112, 32, 0)));
        assert_eq!(of("heap"), Some(held(120, 120, 4)));
        assert_eq!(of("/lib/a file (deleted)"), Some(held(8, 0, 0)));
    }

    #[tokio::test]
    async fn this_process_holds_its_own_program_and_what_it_allocated() {
        let answer = memory().await;
        assert_eq!(answer.status(), StatusCode::OK);
        let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        let memory: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let resident = |name: &str| memory["byMapping"][name]["residentKib"].as_u64().unwrap_or(0);
        let program = std::env::current_exe().unwrap();
        assert!(resident("heap") > 0 && resident(program.to_str().unwrap()) > 0, "{memory}");
        let total = memory["total"]["residentKib"].as_u64().unwrap();
        assert!(total >= resident("heap") + resident(program.to_str().unwrap()), "{memory}");
    }
}
