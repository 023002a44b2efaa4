//! A whole mesh for a test: manifests in a directory of their own and a real `cairn up` that runs them.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// The blocks of loopback for the meshes of one run. Each also takes those ten and twenty above, so ten in a row fit;
/// three rows leave room for the others that tests use.
const BLOCKS: [std::ops::Range<u8>; 3] = [60..70, 130..140, 160..170];

static BLOCK: AtomicU8 = AtomicU8::new(0);

/// How long a mesh may take to come up, on a machine that is busy with other tests.
const START_MAX: Duration = Duration::from_secs(60);

/// How long something may take that should be quick.
pub const SOON: Duration = Duration::from_secs(10);

/// Runs a program while its standard input is open: however this process ends, that closes, and the program is told.
/// Then its directory is removed, unless something came through the input.
const LIFELINE: &str = r#"
home=$1; shift
"$@" </dev/null & program=$!
keep=$(cat)
kill -TERM "$program"; wait "$program"; status=$?
test -n "$keep" || rm -rf "$home"
exit "$status"
"#;

/// The program under test.
pub fn cairn() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let target = test.parent().and_then(Path::parent).context("the tests run from target/*/deps")?;
    let program = target.join("cairn");
    ensure!(program.exists(), "{} is missing; run `cargo build -p cairn`", program.display());
    Ok(program)
}

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// A block of loopback that no other mesh of this run has.
pub fn next_block() -> Result<u8> {
    let number = BLOCK.fetch_add(1, Ordering::Relaxed);
    let block = BLOCKS.into_iter().flatten().nth(number.into());
    block.with_context(|| format!("more than {number} meshes in one run"))
}

/// A running mesh. It ends when dropped, or with this process.
pub struct Mesh {
    home: tempfile::TempDir,
    block: u8,
    pods: BTreeMap<String, IpAddr>,
    services: BTreeMap<String, IpAddr>,
    process: Option<(Child, ChildStdin)>,
}

impl Mesh {
    /// Starts a mesh of `manifests`, texts by file name, and waits until it and its applications are ready.
    pub fn start(manifests: &[(&str, &str)], flags: &[&str]) -> Result<Self> {
        Self::start_with(manifests, flags, &[])
    }

    /// The same, with these in the environment of all its processes.
    pub fn start_with(
        manifests: &[(&str, &str)],
        flags: &[&str],
        environment: &[(&str, &OsStr)],
    ) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let block = next_block()?;
        let directory = home.path().join("manifests");
        std::fs::create_dir(&directory)?;
        let mut mesh = Self { home, block, pods: BTreeMap::new(), services: BTreeMap::new(), process: None };
        for (name, text) in manifests {
            mesh.write(name, text)?;
        }
        let log = File::create(mesh.home.path().join("up.log"))?;
        let mut child = Command::new("sh")
            .args(["-c", LIFELINE, "mesh"])
            .arg(mesh.home.path())
            .arg(cairn()?)
            .args(["--log-level", "info", "up"])
            .arg(&directory)
            .arg("--state")
            .arg(mesh.home.path().join("state"))
            .args(["--block", &block.to_string()])
            .args(flags)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run sh")?;
        let lifeline = child.stdin.take().context("no pipe")?;
        mesh.process = Some((child, lifeline));
        mesh.wait_until_up()?;
        mesh.read_addresses()?;
        mesh.wait_for_applications()?;
        Ok(mesh)
    }

    fn wait_until_up(&self) -> Result<()> {
        let up = until(START_MAX, || {
            let log = self.up_log()?;
            ensure!(!log.lines().any(|line| line.starts_with("cairn: ")), "cairn up failed:\n{log}");
            Ok(log.contains("Logs are in "))
        })?;
        ensure!(up, "the mesh was not up after {START_MAX:?}:\n{}", self.up_log()?);
        Ok(())
    }

    fn read_addresses(&mut self) -> Result<()> {
        let text = std::fs::read_to_string(self.home.path().join("state/addresses.json"))?;
        let book: Value = serde_json::from_str(&text)?;
        let read = |kind: &str| -> Result<BTreeMap<String, IpAddr>> {
            let entries = book[kind].as_object().context("no such kind of address")?;
            entries.iter().map(|(key, at)| Ok((key.clone(), at.as_str().unwrap_or("").parse()?))).collect()
        };
        (self.pods, self.services) = (read("pods")?, read("services")?);
        Ok(())
    }

    /// The echo applications are started with the proxies and may take longer.
    fn wait_for_applications(&self) -> Result<()> {
        let logs = std::fs::read_dir(self.home.path().join("state/logs"))?;
        let names: Vec<String> =
            logs.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        for name in names {
            let Some(pod) = name.strip_prefix("application.").and_then(|name| name.strip_suffix(".log"))
            else {
                continue;
            };
            let pod = pod.replacen('.', "/", 1);
            // Pods outside the mesh have their applications on their own addresses.
            let at = [self.twin(&pod, 8080)?, SocketAddr::new(self.pod(&pod)?, 8080)];
            let answers = || Ok(at.iter().any(|at| std::net::TcpStream::connect(at).is_ok()));
            ensure!(until(SOON, answers)?, "the application of {pod} does not answer on {at:?}");
        }
        Ok(())
    }

    /// Writes a manifest as careful editors do: beside it, then renamed into place.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let plugins = root().join("target/plugins");
        let text = text.replace("PLUGINS", &plugins.display().to_string());
        let new = self.home.path().join(name);
        std::fs::write(&new, text)?;
        std::fs::rename(&new, self.home.path().join("manifests").join(name)).context("cannot move a manifest")
    }

    /// The address of a pod, `namespace/name`. Of a Deployment, name it as the workload is called: `name-0`.
    pub fn pod(&self, name: &str) -> Result<IpAddr> {
        self.pods.get(name).copied().with_context(|| format!("no pod {name} among {:?}", self.pods))
    }

    /// A service's address and port.
    pub fn service(&self, name: &str, port: u16) -> Result<SocketAddr> {
        let address = self.services.get(name).with_context(|| format!("no service {name}"))?;
        Ok(SocketAddr::new(*address, port))
    }

    /// Where the application of a pod listens.
    pub fn twin(&self, pod: &str, port: u16) -> Result<SocketAddr> {
        let IpAddr::V4(address) = self.pod(pod)? else { bail!("{pod} is not IPv4") };
        let [a, b, c, d] = address.octets();
        Ok(SocketAddr::from(([a, b + 20, c, d], port)))
    }

    /// The ztunnel's address for operators.
    pub fn ztunnel(&self) -> IpAddr {
        IpAddr::from([127, self.block, 0, 2])
    }

    /// The address of the waypoint of a Gateway, `namespace/name`.
    pub fn waypoint(&self, gateway: &str) -> Result<IpAddr> {
        let of_gateway = |name: &&String| name.starts_with(gateway);
        let name = self.pods.keys().find(of_gateway).with_context(|| format!("no waypoint {gateway}"))?;
        self.pod(name)
    }

    /// What `cairn up` has said so far.
    pub fn up_log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.home.path().join("up.log"))?)
    }

    /// What a process of the mesh has said so far: `ztunnel`, `waypoint` and so on.
    pub fn log(&self, process: &str) -> Result<String> {
        let mut text = String::new();
        for entry in std::fs::read_dir(self.home.path().join("state/logs"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(process) {
                text += &std::fs::read_to_string(entry.path())?;
            }
        }
        Ok(text)
    }

    /// The directory of manifests.
    pub fn manifests(&self) -> PathBuf {
        self.home.path().join("manifests")
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.home.path().join("state")
    }

    /// Asks the mesh to stop, as SIGTERM to `cairn up` does, without waiting for it.
    pub fn begin_stop(&mut self) -> Result<Stopping> {
        let (child, mut lifeline) = self.process.take().context("stopped already")?;
        lifeline.write_all(b"keep the logs")?;
        drop(lifeline);
        Ok(Stopping { child })
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- cairn up ---\n{}", self.up_log().unwrap_or_default());
        }
        if let Some((mut child, lifeline)) = self.process.take() {
            drop(lifeline);
            // It ends by itself; were it to fail, there would be nothing left to do.
            let _status = child.wait();
        }
    }
}

/// A mesh that has been told to stop.
pub struct Stopping {
    child: Child,
}

impl Stopping {
    /// Waits for its end and returns whether `cairn up` ended well.
    pub fn wait(mut self) -> Result<bool> {
        Ok(self.child.wait()?.success())
    }
}

/// Whether a line of `/proc/net/tcp` is a connection to this port that stands.
pub fn is_established_to(line: &str, port: u16) -> bool {
    let mut words = line.split_whitespace().skip(2);
    let is_to = |remote: &str| remote.ends_with(&format!(":{port:04X}"));
    // 1 is TCP_ESTABLISHED.
    words.next().is_some_and(is_to) && words.next() == Some("01")
}

/// Looks at `is_so` until it is, or for as long as `limit`; returns whether it was.
pub fn until(limit: Duration, mut is_so: impl FnMut() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        if is_so()? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
