//! What every host function answers, well called and badly: the guest with which our host is held to its table
//! (`runtime/wasm/src/tests/matrix/table.rs`) makes the same calls in stock Envoy.

#[path = "../../runtime/wasm/src/tests/matrix/guest.rs"]
mod guest;

use crate::ask::{Ask, Version};
use crate::client;
use crate::envoy::{Envoy, cluster, filters};
use crate::upstream::Upstream;
use anyhow::{Context, Result, ensure};
use guest::table::ROWS;
use guest::{Arg, Cell, Function, When, cells, module};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Functions that Envoy offers modules of ABI 0.1.0 only.
const OLDER: [&str; 4] = [
    "proxy_get_configuration",
    "proxy_continue_request",
    "proxy_continue_response",
    "proxy_clear_route_cache",
];

/// Whether Envoy survives the call: an answer to a request that is over and deleted is its end, and so is a response that is to
/// go on and has not come.
fn is_survived(cell: &Cell<'_>) -> bool {
    match cell.row.name {
        "proxy_send_local_response" => cell.when != When::Delete,
        "proxy_continue_response" => cell.when != When::Headers,
        _ => true,
    }
}

/// Why our answer is another, if it is meant to be.
fn meant(cell: &Cell<'_>, envoy: &str) -> Option<&'static str> {
    match (cell.row.name, cell.expected, envoy) {
        (_, "6" | "21", _) if cell.bad.is_some() => {
            Some("every pointer is looked at, also where nothing is written")
        }
        ("proxy_get_header_map_size" | "proxy_get_header_map_value", "0" | "1", "2")
            if cell.when == When::Delete =>
        {
            Some("headers can be read for as long as the stream is there")
        }
        ("proxy_done", "0", "1") => Some("a stream whose end was put off is found"),
        ("proxy_set_property", "0", "1") => Some("a property can be set outside of streams"),
        ("proc_exit", "T", "0") => Some("a guest that exits is at its end"),
        _ => None,
    }
}

#[tokio::test]
async fn host_functions_answer_what_they_answer_in_envoy() -> Result<()> {
    let Some(program) = cairn_tests::envoy::program() else {
        cairn_tests::skipped("no Envoy in target/peers; `tests/peers` installs it");
        return Ok(());
    };
    let (upstream, folder) = (Upstream::start().await?, tempfile::tempdir()?);
    let guests = [Guest::new("newer", folder.path())?, Guest::new("older", folder.path())?];
    let listeners = guests.iter().map(Guest::listener).collect();
    let clusters =
        [("Http1", Version::Http1), ("auth.shop:80", Version::Http1), ("auth.shop:81", Version::Http2)];
    let clusters = clusters.map(|(name, version)| cluster(name, upstream.address, version));
    let asking = Asking { envoy: Envoy::run(&program, listeners, clusters.into()).await?, upstream };
    let (mut wrong, mut intended) = (Vec::new(), BTreeMap::<_, usize>::new());
    let mut count = 0;
    for guest in &guests {
        for (index, cell) in guest.cells.iter().enumerate() {
            count += 1;
            let said = asking.status(guest.name, index, cell).await.with_context(|| cell.name.clone())?;
            match meant(cell, &said) {
                _ if said == cell.expected => {}
                Some(why) => *intended.entry(why).or_default() += 1,
                None => {
                    wrong.push(format!("{} {:?}: {said}, not {}", cell.name, cell.row.args, cell.expected))
                }
            }
        }
    }
    println!("{count} calls, intended differences: {intended:#?}");
    ensure!(intended.len() == 5, "a difference is none any more: {intended:#?}");
    ensure!(wrong.is_empty(), "{} of {count} calls:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

/// A guest that makes calls of the table: all that there are in newer versions of the ABI, or those that there are no more.
struct Guest {
    name: &'static str,
    cells: Vec<Cell<'static>>,
    file: PathBuf,
}

impl Guest {
    fn new(name: &'static str, folder: &Path) -> Result<Self> {
        let is_older = name == "older";
        let mut cells = cells();
        cells.retain(|cell| OLDER.contains(&cell.row.name) == is_older && is_survived(cell));
        let mut text = module(&cells, &functions(is_older));
        if is_older {
            let headers = r#"(export "proxy_on_request_headers") (param $own i32) (param i32"#;
            ensure!(text.contains(headers), "the guest's callback is another");
            text = text.replace(&format!("{headers} i32)"), &format!("{headers})"));
            text = text.replace("proxy_abi_version_0_2_1", "proxy_abi_version_0_1_0");
        }
        let file = folder.join(name).with_extension("wasm");
        std::fs::write(&file, wat::parse_str(text)?)?;
        Ok(Self { name, cells, file })
    }

    fn listener(&self) -> Value {
        json!({
            "name": self.name,
            "address": cairn_tests::envoy::loopback(0),
            "filter_chains": [{ "filters": filters(Version::Http1, "", "a", &self.file) }],
        })
    }
}

/// The host functions of the table, as Envoy offers them.
fn functions(is_older: bool) -> Vec<Function> {
    let mut known = BTreeSet::new();
    let rows = ROWS.iter().filter(|row| OLDER.contains(&row.name) == is_older && known.insert(row.name));
    let function = |row: &guest::Row| {
        let is_env = row.name.starts_with("proxy_")
            || ["emscripten_notify_memory_growth", "pthread_equal"].contains(&row.name);
        let words = |arg: &Arg| match arg {
            Arg::L(_) => vec!["i64"],
            Arg::In(_) | Arg::Room(_) | Arg::Slices(_) => vec!["i32", "i32"],
            Arg::N(_) | Arg::Out | Arg::Id | Arg::Got | Arg::Context => vec!["i32"],
        };
        Function {
            from: if is_env { "env" } else { "wasi_snapshot_preview1" }.to_owned(),
            name: row.name.to_owned(),
            params: row.args.iter().flat_map(words).collect(),
            has_result: !["emscripten_notify_memory_growth", "proc_exit"].contains(&row.name),
        }
    };
    rows.map(function).collect()
}

/// A call is made in the second request, and told with the third, where it answers the second.
const TELLING_MAX: usize = 2;

struct Asking {
    envoy: Envoy,
    upstream: Upstream,
}

impl Asking {
    /// What a call answers.
    async fn status(&self, guest: &str, index: usize, cell: &Cell<'_>) -> Result<String> {
        let code = format!("{}{index:04}", cell.when.letter());
        let first = self.ask(guest, &[("x-in", "hello"), ("x-cell", &code)]).await?;
        // What comes later, and what lets the request go, is told with the next one.
        let is_at_once = matches!(cell.when, When::Configure | When::Headers);
        let mut told = first.filter(|_| is_at_once);
        for _ in 0..TELLING_MAX {
            if told.is_none() {
                told = self.ask(guest, &[("x-in", "hello")]).await?;
            }
        }
        let told = told.context("it is not told")?;
        let told = told.trim_start_matches('0');
        Ok(if told.is_empty() { "0".to_owned() } else { told.to_owned() })
    }

    /// The status that the guest put into a request, if that went upstream.
    async fn ask(&self, guest: &str, headers: &[(&'static str, &str)]) -> Result<Option<String>> {
        self.upstream.prepare(&Default::default());
        // Without a length, which changes of the body would make wrong.
        let ask = Ask::post("/echo", "").pieces(&["hel", "lo"]);
        let ask = headers.iter().fold(ask, |ask, (name, value)| ask.header(name, *value));
        client::send(self.envoy.listener(guest)?, &ask).await?;
        self.envoy.idle().await?;
        let seen = self.upstream.seen();
        let headers = seen.iter().filter(|seen| seen.by == "upstream").flat_map(|seen| &seen.headers);
        Ok(headers.filter(|(name, _)| name == "x-status").map(|(_, value)| value.clone()).next_back())
    }
}
