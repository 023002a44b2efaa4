//! `cairn plugin bench`: what a plugin costs, by itself, without a network.

use super::module::{Files, plugin};
use crate::output::Output;
use anyhow::{Context, Result};
use cairn_filter::{Connection, Exchange, NoCallout, Peer, Protocol, RequestHead, ResponseHead};
use cairn_wasm::{Engine, EngineSettings};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use serde::Serialize;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// `cairn plugin bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    files: Files,
    /// How many exchanges are measured.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rounds: u32,
    /// The path of the request.
    #[arg(long, default_value = "/items?page=1")]
    path: String,
    /// Headers of the request, `name: value`, beside a few usual ones.
    #[arg(long)]
    header: Vec<String>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// What was measured. Times of calls are nanoseconds of CPU per exchange.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    bytes: usize,
    compile_ms: f64,
    /// Until an instance is configured.
    start_ms: f64,
    rounds: u32,
    request_headers_ns: u64,
    response_headers_ns: u64,
    /// Making and ending the exchange's context.
    context_ns: u64,
    exchange_ns: u64,
    /// What the process holds more than before the plugin, in KiB; zero where the system does not tell.
    module_kib: u64,
    after_rounds_kib: u64,
}

/// Measures and prints.
///
/// # Errors
/// When the plugin does not start, or a request cannot be made.
pub fn run(options: &Options) -> Result<ExitCode> {
    let report = measure(options)?;
    match options.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text => {
            let Report { bytes, compile_ms, start_ms, rounds, .. } = report;
            println!("compile           {compile_ms:.1} ms for {bytes} bytes");
            println!("start             {start_ms:.2} ms until an instance is configured");
            println!("request headers   {} ns", report.request_headers_ns);
            println!("response headers  {} ns", report.response_headers_ns);
            println!("context           {} ns", report.context_ns);
            println!("exchange          {} ns of CPU, over {rounds} exchanges", report.exchange_ns);
            println!("memory            {} KiB for the module and an instance", report.module_kib);
            println!("                  {} KiB after all exchanges", report.after_rounds_kib);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(options: &Options) -> Result<Report> {
    let contents = options.files.read()?;
    let engine = Engine::new(EngineSettings::default())?;
    let before = anonymous_kib();
    let started = Instant::now();
    let module = engine.compile(&contents.module).context("the module does not compile")?;
    let compile_ms = millis(started.elapsed());
    let started = Instant::now();
    let plugin = plugin(&options.files.name(), &contents.config);
    let factory = engine.factory(module, &plugin).context("the plugin does not start")?;
    let start_ms = millis(started.elapsed());
    let module_kib = anonymous_kib().saturating_sub(before);
    let (connection, request) = (connection(), request(options)?);
    let mut sums = [0u64; 3];
    let warm = options.rounds / 10;
    for round in 0..options.rounds.saturating_add(warm) {
        if round == warm {
            sums = [0; 3];
        }
        let mut head = request.clone();
        let mut response = ResponseHead { status: StatusCode::OK, headers: HeaderMap::new() };
        let mut exchange =
            Exchange::new(Arc::clone(&connection), Protocol::Http11, Instant::now(), SystemTime::now());
        let start = cpu_nanos();
        let Some(mut filter) = factory.start(&exchange) else { continue };
        let asked = cpu_nanos();
        black_box(&filter.request_headers(&mut exchange, &mut head, true));
        let answered = cpu_nanos();
        black_box(&filter.response_headers(&mut exchange, &mut response, true));
        let finish = cpu_nanos();
        filter.finish(&mut exchange);
        let end = cpu_nanos();
        sums[0] += answered - asked;
        sums[1] += finish - answered;
        sums[2] += (asked - start) + (end - finish);
    }
    // Each difference holds one reading of the clock.
    let clock = clock_nanos();
    let per = |index: usize, readings: u64| {
        (sums[index] / u64::from(options.rounds)).saturating_sub(clock * readings)
    };
    let (request_headers_ns, response_headers_ns, context_ns) = (per(0, 1), per(1, 1), per(2, 2));
    Ok(Report {
        bytes: contents.module.len(),
        compile_ms,
        start_ms,
        rounds: options.rounds,
        request_headers_ns,
        response_headers_ns,
        context_ns,
        exchange_ns: request_headers_ns + response_headers_ns + context_ns,
        module_kib,
        after_rounds_kib: anonymous_kib().saturating_sub(before),
    })
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The CPU time of this thread, which other processes do not disturb.
fn cpu_nanos() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let whole = u64::try_from(time.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000);
    whole.saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// What reading the clock takes.
fn clock_nanos() -> u64 {
    const READINGS: u64 = 10_000;
    let start = cpu_nanos();
    for _ in 0..READINGS {
        black_box(cpu_nanos());
    }
    (cpu_nanos() - start) / READINGS
}

fn connection() -> Arc<Connection> {
    Arc::new(Connection {
        id: 1,
        worker: 0,
        source: Peer { address: ([10, 0, 0, 1], 5000).into(), identity: None, workload: None },
        destination: ([10, 0, 1, 1], 80).into(),
        service: None,
        local: None,
        callout: Arc::new(NoCallout),
    })
}

fn request(options: &Options) -> Result<RequestHead> {
    let usual = ["user-agent: load", "accept: */*", "x-request-id: 1234"].map(str::to_owned);
    let mut headers = HeaderMap::new();
    for header in usual.iter().chain(&options.header) {
        let (name, value) =
            header.split_once(':').with_context(|| format!("`{header}` is not `name: value`"))?;
        let name: HeaderName = name.trim().parse().with_context(|| format!("`{name}` names no header"))?;
        headers
            .append(name, value.trim().parse().with_context(|| format!("`{value}` is no header's value"))?);
    }
    let path: PathAndQuery =
        options.path.parse().with_context(|| format!("`{}` is no path", options.path))?;
    Ok(RequestHead {
        method: Method::GET,
        scheme: HeaderValue::from_static("http"),
        authority: HeaderValue::from_static("shop"),
        path,
        headers,
        version: Version::HTTP_11,
    })
}

/// Memory of the process that no file backs.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
