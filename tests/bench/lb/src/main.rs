//! lb: loopback load tool for mesh data planes.
//! Transports: direct TCP | SOCKS5 (ztunnel outbound) | HBONE (HTTP/2 CONNECT over mTLS).
//! Every number it prints carries the CPU time of the proxy under test (sum of
//! /proc/PID/task/*/schedstat, ns) so that "CPU us per request" is the primary figure.
use anyhow::{anyhow, bail, Context, Result};
use bytes::{Buf, Bytes, BytesMut};
use clap::{Args, Parser, Subcommand, ValueEnum};
use hdrhistogram::Histogram;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

#[derive(Parser)]
#[command(about = "loopback load tool: direct / SOCKS5 / HBONE; prints one JSON line")]
struct Cli {
    #[command(subcommand)]
    cmd: Cmd,
}
#[derive(Subcommand)]
enum Cmd {
    /// Backend: HTTP/1.1 fixed answer on --http, bulk sink/source on --bulk (first byte U=up D=down)
    Backend {
        #[arg(long, default_value = "127.0.0.1:9000")]
        http: SocketAddr,
        #[arg(long, default_value = "127.0.0.1:9001")]
        bulk: SocketAddr,
        #[arg(long, default_value_t = 128)]
        body: usize,
    },
    /// Closed-loop (or --rate paced) keep-alive HTTP/1.1 requests over N connections/streams
    Load(LoadArgs),
    /// One-way bulk transfer over N connections/streams
    Bulk(BulkArgs),
    /// New connection (or CONNECT stream, or full mTLS tunnel) + 1 request + close, in a loop
    Connrate(LoadArgs),
    /// Open N connections/streams (1 request each), hold, report proxy RSS before/after
    Hold(LoadArgs),
    /// Assemble a WebAssembly text file (the smallest plugins are written as text)
    Assemble { text: std::path::PathBuf, binary: std::path::PathBuf },
    /// Run a command and report the CPU used meanwhile by --pid
    Meter {
        #[arg(long, value_delimiter = ',')]
        pid: Vec<u32>,
        #[arg(trailing_var_arg = true)]
        cmd: Vec<String>,
    },
}
#[derive(Clone, Copy, ValueEnum, PartialEq, Debug)]
enum Transport {
    Direct,
    Socks5,
    Hbone,
    /// Connrate only: a new TCP+mTLS+h2 tunnel for each request
    HboneFull,
}
#[derive(Args, Clone)]
struct Common {
    #[arg(long, value_enum, default_value = "direct")]
    transport: Transport,
    /// TCP address of the proxy (or of the backend for direct)
    #[arg(long)]
    target: SocketAddr,
    /// final destination: SOCKS5 address or CONNECT :authority
    #[arg(long, default_value = "127.0.0.1:9000")]
    authority: String,
    #[arg(long, default_value_t = 5.0)]
    duration: f64,
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// connections (streams for hbone)
    #[arg(long, short = 'c', default_value_t = 16)]
    conns: usize,
    /// hbone: number of mTLS connections that carry the streams (0: one per 100 streams)
    #[arg(long, default_value_t = 0)]
    tunnels: usize,
    /// processes whose CPU and RSS are reported
    #[arg(long, value_delimiter = ',')]
    pid: Vec<u32>,
    #[arg(long, env = "LB_CERT", default_value = "")]
    cert: String,
    #[arg(long, env = "LB_KEY", default_value = "")]
    key: String,
    #[arg(long, default_value_t = 4 << 20)]
    h2_stream_window: u32,
    #[arg(long, default_value_t = 16 << 20)]
    h2_conn_window: u32,
    #[arg(long, default_value_t = 1 << 20)]
    h2_frame: u32,
    /// source addresses used round-robin (helps port exhaustion in connrate): 127.0.0.1
    #[arg(long, default_value = "")]
    label: String,
}
#[derive(Args, Clone)]
struct LoadArgs {
    #[command(flatten)]
    c: Common,
    #[arg(long, default_value = "/")]
    path: String,
    #[arg(long, default_value = "backend.local")]
    host: String,
    /// extra header lines "name: value"
    #[arg(long, short = 'H')]
    header: Vec<String>,
    /// total requests/s, 0 = closed loop
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
}
#[derive(Args, Clone)]
struct BulkArgs {
    #[command(flatten)]
    c: Common,
    #[arg(long, default_value = "up")]
    dir: String,
    #[arg(long, default_value_t = 131072)]
    chunk: usize,
}

// ---------- process accounting ----------
#[derive(Clone, Copy, Default)]
struct Cpu {
    ns: u64,
    utime: u64,
    stime: u64,
}
fn cpu_of(pids: &[u32]) -> Cpu {
    let mut c = Cpu::default();
    for p in pids {
        if let Ok(rd) = std::fs::read_dir(format!("/proc/{p}/task")) {
            for t in rd.flatten() {
                if let Ok(s) = std::fs::read_to_string(t.path().join("schedstat")) {
                    c.ns += s.split(' ').next().and_then(|x| x.parse::<u64>().ok()).unwrap_or(0);
                }
            }
        }
        if let Ok(s) = std::fs::read_to_string(format!("/proc/{p}/stat")) {
            if let Some(i) = s.rfind(')') {
                let f: Vec<&str> = s[i + 2..].split(' ').collect();
                c.utime += f[11].parse::<u64>().unwrap_or(0);
                c.stime += f[12].parse::<u64>().unwrap_or(0);
            }
        }
    }
    c
}
fn rss_kib(pids: &[u32]) -> u64 {
    let mut r = 0;
    for p in pids {
        if let Ok(s) = std::fs::read_to_string(format!("/proc/{p}/status")) {
            for l in s.lines() {
                if let Some(v) = l.strip_prefix("VmRSS:") {
                    r += v.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0);
                }
            }
        }
    }
    r
}

// ---------- transports ----------
struct H2c {
    send: h2::SendStream<Bytes>,
    recv: h2::RecvStream,
}
enum Conn {
    Tcp(TcpStream),
    H2(H2c),
}
#[derive(Debug)]
struct NoServerName(Arc<rustls::crypto::CryptoProvider>);
impl rustls::client::danger::ServerCertVerifier for NoServerName {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        m: &[u8],
        c: &rustls::pki_types::CertificateDer<'_>,
        d: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(m, c, d, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        m: &[u8],
        c: &rustls::pki_types::CertificateDer<'_>,
        d: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(m, c, d, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
struct Env {
    c: Common,
    tls: Option<tokio_rustls::TlsConnector>,
    pool: RefCell<Vec<h2::client::SendRequest<Bytes>>>,
    next: Cell<usize>,
}
impl Env {
    async fn new(c: &Common) -> Result<Rc<Env>> {
        let tls = if matches!(c.transport, Transport::Hbone | Transport::HboneFull) {
            let prov = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let certs = rustls_pemfile::certs(&mut std::io::BufReader::new(std::fs::File::open(&c.cert)?))
                .collect::<std::result::Result<Vec<_>, _>>()?;
            let key = rustls_pemfile::private_key(&mut std::io::BufReader::new(std::fs::File::open(&c.key)?))?
                .context("no key")?;
            let mut cfg = rustls::ClientConfig::builder_with_provider(prov.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(NoServerName(prov)))
                .with_client_auth_cert(certs, key)?;
            cfg.alpn_protocols = vec![b"h2".to_vec()];
            cfg.resumption = rustls::client::Resumption::disabled();
            Some(tokio_rustls::TlsConnector::from(Arc::new(cfg)))
        } else {
            None
        };
        let e = Rc::new(Env { c: c.clone(), tls, pool: RefCell::new(vec![]), next: Cell::new(0) });
        if c.transport == Transport::Hbone {
            let n = if c.tunnels > 0 { c.tunnels } else { c.conns.div_ceil(100) };
            for _ in 0..n {
                let sr = e.tunnel().await?;
                e.pool.borrow_mut().push(sr);
            }
        }
        Ok(e)
    }
    async fn tcp(&self) -> Result<TcpStream> {
        let s = TcpStream::connect(self.c.target).await?;
        s.set_nodelay(true)?;
        Ok(s)
    }
    async fn tunnel(&self) -> Result<h2::client::SendRequest<Bytes>> {
        let t = self.tcp().await?;
        let name = rustls::pki_types::ServerName::try_from("hbone.local")?;
        let s = self.tls.as_ref().unwrap().connect(name, t).await.context("tls")?;
        let (sr, conn) = h2::client::Builder::new()
            .initial_window_size(self.c.h2_stream_window)
            .initial_connection_window_size(self.c.h2_conn_window)
            .max_frame_size(self.c.h2_frame)
            .max_send_buffer_size(1 << 20)
            .initial_max_send_streams(1000)
            .handshake::<_, Bytes>(s)
            .await?;
        tokio::task::spawn_local(async move {
            let _ = conn.await;
        });
        Ok(sr)
    }
    async fn connect_on(&self, sr: h2::client::SendRequest<Bytes>) -> Result<Conn> {
        let mut sr = sr.ready().await?;
        let req = http::Request::builder()
            .method("CONNECT")
            .version(http::Version::HTTP_2)
            .uri(http::Uri::builder().authority(self.c.authority.as_str()).build()?)
            .body(())?;
        let (fut, send) = sr.send_request(req, false)?;
        let resp = fut.await?;
        if resp.status() != 200 {
            bail!("CONNECT status {}", resp.status());
        }
        Ok(Conn::H2(H2c { send, recv: resp.into_body() }))
    }
    async fn open(&self) -> Result<Conn> {
        match self.c.transport {
            Transport::Direct => Ok(Conn::Tcp(self.tcp().await?)),
            Transport::Socks5 => {
                let mut s = self.tcp().await?;
                let a: SocketAddr = self.c.authority.parse().context("socks5 needs ip:port")?;
                let SocketAddr::V4(a) = a else { bail!("v4 only") };
                s.write_all(&[5, 1, 0]).await?;
                let mut b = [0u8; 2];
                s.read_exact(&mut b).await?;
                let mut r = vec![5, 1, 0, 1];
                r.extend_from_slice(&a.ip().octets());
                r.extend_from_slice(&a.port().to_be_bytes());
                s.write_all(&r).await?;
                let mut b = [0u8; 10];
                s.read_exact(&mut b).await?;
                if b[1] != 0 {
                    bail!("socks5 reply {}", b[1]);
                }
                Ok(Conn::Tcp(s))
            }
            Transport::Hbone => {
                let i = self.next.get();
                self.next.set(i + 1);
                let sr = {
                    let p = self.pool.borrow();
                    p[i % p.len()].clone()
                };
                self.connect_on(sr).await
            }
            Transport::HboneFull => {
                let sr = self.tunnel().await?;
                self.connect_on(sr).await
            }
        }
    }
}
impl Conn {
    async fn send(&mut self, b: &Bytes) -> Result<()> {
        match self {
            Conn::Tcp(s) => s.write_all(b).await.map_err(Into::into),
            Conn::H2(h) => {
                h.send.send_data(b.clone(), false)?;
                Ok(())
            }
        }
    }
    async fn recv(&mut self, buf: &mut BytesMut) -> Result<usize> {
        match self {
            Conn::Tcp(s) => Ok(s.read_buf(buf).await?),
            Conn::H2(h) => loop {
                match h.recv.data().await {
                    None => return Ok(0),
                    Some(d) => {
                        let d = d?;
                        if d.is_empty() {
                            continue;
                        }
                        h.recv.flow_control().release_capacity(d.len())?;
                        buf.extend_from_slice(&d);
                        return Ok(d.len());
                    }
                }
            },
        }
    }
    /// one HTTP/1.1 round trip; returns the status
    async fn roundtrip(&mut self, req: &Bytes, buf: &mut BytesMut) -> Result<u16> {
        self.send(req).await?;
        loop {
            if let Some((status, hlen, clen)) = parse_head(buf)? {
                let total = hlen + clen;
                while buf.len() < total {
                    if self.recv(buf).await? == 0 {
                        bail!("eof in body");
                    }
                }
                buf.advance(total);
                return Ok(status);
            }
            if self.recv(buf).await? == 0 {
                bail!("eof");
            }
        }
    }
    async fn close(self) {
        match self {
            Conn::Tcp(mut s) => {
                let _ = s.shutdown().await;
            }
            Conn::H2(mut h) => {
                let _ = h.send.send_data(Bytes::new(), true);
                // drain to end of stream so the proxy closes cleanly
                let _ = tokio::time::timeout(Duration::from_millis(200), async {
                    while let Some(Ok(_)) = h.recv.data().await {}
                })
                .await;
            }
        }
    }
}
fn parse_head(b: &[u8]) -> Result<Option<(u16, usize, usize)>> {
    let Some(end) = memchr::memmem::find(b, b"\r\n\r\n") else { return Ok(None) };
    if b.len() < 12 || &b[..5] != b"HTTP/" {
        bail!("not http");
    }
    let status = std::str::from_utf8(&b[9..12])?.parse::<u16>()?;
    let mut clen = 0;
    let mut i = 0;
    while i < end {
        let e = memchr::memmem::find(&b[i..end + 2], b"\r\n").map(|x| x + i).unwrap_or(end);
        let l = &b[i..e];
        if l.len() > 15 && l[..15].eq_ignore_ascii_case(b"content-length:") {
            clen = std::str::from_utf8(&l[15..])?.trim().parse()?;
        }
        i = e + 2;
    }
    Ok(Some((status, end + 4, clen)))
}

fn build_req(a: &LoadArgs) -> Bytes {
    let mut s = format!("GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: lb/0.1\r\nAccept: */*\r\n", a.path, a.host);
    for h in &a.header {
        s.push_str(h);
        s.push_str("\r\n");
    }
    s.push_str("\r\n");
    Bytes::from(s)
}

struct Stats {
    h: Histogram<u64>,
    n: u64,
    errors: u64,
    non2xx: u64,
    first_err: Option<String>,
}
impl Stats {
    fn new() -> Rc<RefCell<Stats>> {
        Rc::new(RefCell::new(Stats {
            h: Histogram::new_with_bounds(100, 60_000_000_000, 3).unwrap(),
            n: 0,
            errors: 0,
            non2xx: 0,
            first_err: None,
        }))
    }
    fn err(&mut self, e: anyhow::Error) {
        self.errors += 1;
        if self.first_err.is_none() {
            self.first_err = Some(format!("{e:#}"));
        }
    }
    fn ok(&mut self, st: u16, t: Duration) {
        self.n += 1;
        if !(200..300).contains(&st) {
            self.non2xx += 1;
        }
        self.h.saturating_record(t.as_nanos() as u64);
    }
}
struct Win {
    on: Cell<bool>,
    stop: Cell<bool>,
}

fn finish(kind: &str, c: &Common, s: &Stats, el: f64, a: Cpu, b: Cpu, me: (Cpu, Cpu), extra: serde_json::Value) {
    let us = |x: u64| (x as f64 / 1000.0 * 10.0).round() / 10.0;
    let q = |p: f64| us(s.h.value_at_quantile(p));
    let n = s.n.max(1) as f64;
    let d = (b.ns - a.ns) as f64;
    let (u, sy) = ((b.utime - a.utime) as f64, (b.stime - a.stime) as f64);
    let r3 = |x: f64| (x * 1000.0).round() / 1000.0;
    let mut j = serde_json::json!({
        "kind": kind, "label": c.label, "transport": format!("{:?}", c.transport), "conns": c.conns,
        "secs": r3(el), "n": s.n, "rps": (s.n as f64 / el).round(),
        "p50_us": q(0.5), "p90_us": q(0.9), "p99_us": q(0.99), "p999_us": q(0.999), "max_us": us(s.h.max()),
        "mean_us": us(s.h.mean() as u64),
        "errors": s.errors, "non2xx": s.non2xx, "first_err": s.first_err,
        "cpu_us_per_req": if c.pid.is_empty() { serde_json::Value::Null } else { r3(d / 1000.0 / n).into() },
        "cpu_cores": r3(d / 1e9 / el),
        "sys_share": if u + sy > 0.0 { r3(sy / (u + sy)) } else { 0.0 },
        "client_cpu_us_per_req": r3((me.1.ns - me.0.ns) as f64 / 1000.0 / n),
        "rss_kib": rss_kib(&c.pid),
    });
    if let (Some(o), Some(x)) = (j.as_object_mut(), extra.as_object()) {
        for (k, v) in x {
            o.insert(k.clone(), v.clone());
        }
    }
    println!("{j}");
}

async fn run_window(c: &Common, w: &Rc<Win>) -> (f64, Cpu, Cpu, (Cpu, Cpu)) {
    let mypid = [std::process::id()];
    tokio::time::sleep(Duration::from_secs_f64(c.warmup)).await;
    let a = cpu_of(&c.pid);
    let m0 = cpu_of(&mypid);
    let t0 = Instant::now();
    w.on.set(true);
    tokio::time::sleep(Duration::from_secs_f64(c.duration)).await;
    w.on.set(false);
    let el = t0.elapsed().as_secs_f64();
    let b = cpu_of(&c.pid);
    let m1 = cpu_of(&mypid);
    w.stop.set(true);
    (el, a, b, (m0, m1))
}

async fn load(a: LoadArgs) -> Result<()> {
    let env = Env::new(&a.c).await?;
    let req = build_req(&a);
    let st = Stats::new();
    let w = Rc::new(Win { on: Cell::new(false), stop: Cell::new(false) });
    let iv = if a.rate > 0.0 { Some(Duration::from_secs_f64(a.c.conns as f64 / a.rate)) } else { None };
    let t_open = Instant::now();
    let mut conns = Vec::new();
    for _ in 0..a.c.conns {
        conns.push(env.open().await?);
    }
    let open_s = t_open.elapsed().as_secs_f64();
    let start = Instant::now() + Duration::from_millis(20);
    for (i, mut conn) in conns.into_iter().enumerate() {
        let (env, req, st, w) = (env.clone(), req.clone(), st.clone(), w.clone());
        let total = a.c.conns as u32;
        tokio::task::spawn_local(async move {
            let mut buf = BytesMut::with_capacity(8192);
            let mut due = iv.map(|v| start + v * i as u32 / total);
            while !w.stop.get() {
                let mut t0 = Instant::now();
                if let Some(d) = due {
                    if t0 < d {
                        tokio::time::sleep_until(d.into()).await;
                        t0 = Instant::now();
                    } else {
                        t0 = d; // late because the previous answer was late: count the wait
                    }
                    due = Some(d + iv.unwrap());
                    if w.stop.get() {
                        break;
                    }
                }
                let r = conn.roundtrip(&req, &mut buf).await;
                let dt = t0.elapsed();
                if w.on.get() {
                    match r {
                        Ok(s) => st.borrow_mut().ok(s, dt),
                        Err(ref _e) => {}
                    }
                }
                if let Err(e) = r {
                    if w.stop.get() {
                        break;
                    }
                    st.borrow_mut().err(e);
                    buf.clear();
                    match env.open().await {
                        Ok(c) => conn = c,
                        Err(e) => {
                            st.borrow_mut().err(e);
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    }
                }
            }
        });
    }
    let (el, x, y, me) = run_window(&a.c, &w).await;
    let s = st.borrow();
    finish("load", &a.c, &s, el, x, y, me, serde_json::json!({"rate": a.rate, "open_all_s": open_s}));
    Ok(())
}

async fn connrate(a: LoadArgs) -> Result<()> {
    let env = Env::new(&a.c).await?;
    let req = build_req(&a);
    let st = Stats::new();
    let w = Rc::new(Win { on: Cell::new(false), stop: Cell::new(false) });
    for _ in 0..a.c.conns {
        let (env, req, st, w) = (env.clone(), req.clone(), st.clone(), w.clone());
        tokio::task::spawn_local(async move {
            let mut buf = BytesMut::with_capacity(8192);
            while !w.stop.get() {
                let t0 = Instant::now();
                buf.clear();
                let r = async {
                    let mut c = env.open().await?;
                    let s = c.roundtrip(&req, &mut buf).await?;
                    Ok::<_, anyhow::Error>((c, s))
                }
                .await;
                let dt = t0.elapsed();
                match r {
                    Ok((c, s)) => {
                        if w.on.get() {
                            st.borrow_mut().ok(s, dt)
                        }
                        c.close().await
                    }
                    Err(e) => {
                        if w.stop.get() {
                            break;
                        }
                        st.borrow_mut().err(e);
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            }
        });
    }
    let (el, x, y, me) = run_window(&a.c, &w).await;
    let s = st.borrow();
    finish("connrate", &a.c, &s, el, x, y, me, serde_json::json!({}));
    Ok(())
}

async fn hold(a: LoadArgs) -> Result<()> {
    let r0 = rss_kib(&a.c.pid);
    let c0 = cpu_of(&a.c.pid);
    let env = Env::new(&a.c).await?;
    let req = build_req(&a);
    let mut v = Vec::new();
    let mut buf = BytesMut::with_capacity(8192);
    let t0 = Instant::now();
    for _ in 0..a.c.conns {
        let mut c = env.open().await?;
        let s = c.roundtrip(&req, &mut buf).await?;
        if s != 200 {
            bail!("status {s}");
        }
        v.push(c);
    }
    let open = t0.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs_f64(a.c.warmup)).await;
    let r1 = rss_kib(&a.c.pid);
    let c1 = cpu_of(&a.c.pid);
    tokio::time::sleep(Duration::from_secs_f64(a.c.duration)).await;
    let c2 = cpu_of(&a.c.pid);
    println!(
        "{}",
        serde_json::json!({"kind":"hold","label":a.c.label,"conns":a.c.conns,"rss_before_kib":r0,"rss_held_kib":r1,
        "bytes_per_conn": (r1 as f64 - r0 as f64)*1024.0/a.c.conns as f64, "open_s":open,
        "cpu_us_per_open": (c1.ns-c0.ns) as f64/1000.0/a.c.conns as f64,
        "idle_cpu_ms_per_s": (c2.ns-c1.ns) as f64/1e6/a.c.duration})
    );
    drop(v);
    Ok(())
}

async fn bulk(a: BulkArgs) -> Result<()> {
    let env = Env::new(&a.c).await?;
    let w = Rc::new(Win { on: Cell::new(false), stop: Cell::new(false) });
    let n = Rc::new(Cell::new(0u64));
    let up = a.dir == "up";
    let data = Bytes::from(vec![0x5au8; a.chunk]);
    for _ in 0..a.c.conns {
        let mut c = env.open().await?;
        c.send(&Bytes::from_static(if up { b"U" } else { b"D" })).await?;
        let (w, n, data, chunk) = (w.clone(), n.clone(), data.clone(), a.chunk);
        tokio::task::spawn_local(async move {
            let mut rb = vec![0u8; 256 * 1024];
            while !w.stop.get() {
                let k = match &mut c {
                    Conn::Tcp(s) if up => match s.write(&data).await {
                        Ok(k) => k,
                        Err(_) => break,
                    },
                    Conn::Tcp(s) => match s.read(&mut rb).await {
                        Ok(0) | Err(_) => break,
                        Ok(k) => k,
                    },
                    Conn::H2(h) if up => {
                        h.send.reserve_capacity(chunk);
                        let cap = match poll_fn(|cx| h.send.poll_capacity(cx)).await {
                            Some(Ok(x)) => x,
                            _ => break,
                        };
                        let k = cap.min(chunk);
                        if k == 0 {
                            continue;
                        }
                        if h.send.send_data(data.slice(..k), false).is_err() {
                            break;
                        }
                        k
                    }
                    Conn::H2(h) => match h.recv.data().await {
                        Some(Ok(d)) => {
                            let _ = h.recv.flow_control().release_capacity(d.len());
                            d.len()
                        }
                        _ => break,
                    },
                };
                if w.on.get() {
                    n.set(n.get() + k as u64);
                }
            }
        });
    }
    let (el, x, y, me) = run_window(&a.c, &w).await;
    let gb = n.get() as f64 / 1e9;
    let d = (y.ns - x.ns) as f64;
    println!(
        "{}",
        serde_json::json!({"kind":"bulk","label":a.c.label,"dir":a.dir,"conns":a.c.conns,"transport":format!("{:?}",a.c.transport),
        "GBps": gb/el, "Gbps": gb*8.0/el, "cpu_s_per_GB": d/1e9/gb, "GB_per_cpu_s": gb/(d/1e9), "cpu_cores": d/1e9/el,
        "client_cpu_s_per_GB": (me.1.ns-me.0.ns) as f64/1e9/gb, "rss_kib": rss_kib(&a.c.pid)})
    );
    Ok(())
}

async fn backend(http: SocketAddr, bulk: SocketAddr, body: usize) -> Result<()> {
    let resp = Bytes::from(format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {body}\r\n\r\n{}",
        "x".repeat(body)
    ));
    let lb = TcpListener::bind(bulk).await?;
    tokio::task::spawn_local(async move {
        loop {
            let Ok((mut s, _)) = lb.accept().await else { continue };
            let _ = s.set_nodelay(true);
            tokio::task::spawn_local(async move {
                let mut m = [0u8; 1];
                if s.read_exact(&mut m).await.is_err() {
                    return;
                }
                let mut b = vec![0x5au8; 256 * 1024];
                if m[0] == b'U' {
                    while let Ok(k) = s.read(&mut b).await {
                        if k == 0 {
                            break;
                        }
                    }
                } else {
                    while s.write_all(&b).await.is_ok() {}
                }
            });
        }
    });
    let sock = tokio::net::TcpSocket::new_v4()?;
    sock.set_reuseaddr(true)?;
    sock.bind(http)?;
    let l = sock.listen(8192)?;
    loop {
        let Ok((mut s, _)) = l.accept().await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let _ = s.set_nodelay(true);
        let resp = resp.clone();
        tokio::task::spawn_local(async move {
            let mut buf = BytesMut::with_capacity(4096);
            loop {
                match s.read_buf(&mut buf).await {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
                while let Some(i) = memchr::memmem::find(&buf, b"\r\n\r\n") {
                    buf.advance(i + 4);
                    if s.write_all(&resp).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    unsafe {
        let r = libc::rlimit { rlim_cur: 200_000, rlim_max: 200_000 };
        libc::setrlimit(libc::RLIMIT_NOFILE, &r);
    }
    if let Cmd::Assemble { text, binary } = &cli.cmd {
        let bytes = wat::parse_file(text).with_context(|| text.display().to_string())?;
        return std::fs::write(binary, bytes).with_context(|| binary.display().to_string());
    }
    if let Cmd::Meter { pid, cmd } = &cli.cmd {
        let a = cpu_of(pid);
        let t = Instant::now();
        let st = std::process::Command::new(&cmd[0]).args(&cmd[1..]).status()?;
        let b = cpu_of(pid);
        println!(
            "{}",
            serde_json::json!({"kind":"meter","secs":t.elapsed().as_secs_f64(),"cpu_ns":b.ns-a.ns,
            "utime_ticks":b.utime-a.utime,"stime_ticks":b.stime-a.stime,"rc":st.code(),"rss_kib":rss_kib(pid)})
        );
        return Ok(());
    }
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ls = LocalSet::new();
    let r = ls.block_on(&rt, async move {
        match cli.cmd {
            Cmd::Backend { http, bulk: b, body } => backend(http, b, body).await,
            Cmd::Load(a) => load(a).await,
            Cmd::Connrate(a) => connrate(a).await,
            Cmd::Hold(a) => hold(a).await,
            Cmd::Bulk(a) => bulk(a).await,
            Cmd::Meter { .. } | Cmd::Assemble { .. } => Err(anyhow!("handled above")),
        }
    });
    if let Err(e) = &r {
        println!("{}", serde_json::json!({"kind":"error","error":format!("{e:#}")}));
        std::process::exit(1);
    }
    std::process::exit(0)
}
