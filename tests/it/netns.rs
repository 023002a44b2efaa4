//! The mesh in network namespaces: redirection is real, and clients and applications know nothing of the mesh. What
//! goes where is what the ambient documentation says (traffic routing: in mesh, out of mesh, waypoint enabled).
//!
//! Needs root, `ip` and `nft`; where these are missing each test says `skipped:` and why.

use anyhow::{Context, Result, bail, ensure};
use cairn_net::Namespace;
use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long a mesh may take to come up or to end.
const START_MAX: Duration = Duration::from_secs(60);

/// How long anything else may take.
const SOON: Duration = Duration::from_secs(30);

/// How long one attempt at it may take: several fit in what all may take.
const TRY_MAX: Duration = Duration::from_secs(8);

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// The port of every application here.
const APPLICATION: u16 = 8080;

/// The ztunnel's ports for operators are on this address of the node.
const ZTUNNEL: &str = "10.244.0.2:15000";

/// Runs a program while its standard input is open: however this process ends, that closes, and the program is told.
pub(crate) const LIFELINE: &str =
    r#""$@" </dev/null & program=$!; cat >/dev/null; kill -TERM "$program"; wait "$program""#;

/// A namespace in the mesh and one outside; the policies say what each application takes.
const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Namespace
metadata: { name: outside }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: waypoint, namespace: shop, labels: { istio.io/waypoint-for: service } }
spec:
  gatewayClassName: istio-waypoint
  listeners: [{ name: mesh, port: 15008, protocol: HBONE }]
---
# The waypoint of `open` denies a path; its pods take anything.
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-secrets, namespace: shop }
spec:
  targetRefs: [{ group: "", kind: Service, name: open }]
  action: DENY
  rules: [{ to: [{ operation: { paths: ["/secret*"] } }] }]
---
# The pods of `closed` take traffic from their waypoint only.
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: only-the-waypoint, namespace: shop }
spec:
  selector: { matchLabels: { app: closed } }
  rules: [{ from: [{ source: { principals: [cluster.local/ns/shop/sa/waypoint] } }] }]
---
# The pods of `named` take traffic from whoever has a name.
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: any-identity, namespace: shop }
spec:
  selector: { matchLabels: { app: named } }
  rules: [{ from: [{ source: { principals: ["*"] } }] }]
"#;

/// An application with a service: namespace, name and the service's labels.
const APPLICATIONS: [(&str, &str, &str); 5] = [
    ("shop", "open", "istio.io/use-waypoint: waypoint"),
    ("shop", "closed", "istio.io/use-waypoint: waypoint"),
    ("shop", "named", ""),
    ("shop", "steady", ""),
    ("outside", "server", ""),
];

#[test]
fn a_client_in_the_mesh_goes_through_the_waypoint_by_vip() {
    let Some(mesh) = shared() else { return };
    let to = mesh.service("shop/open");
    let (allowed, source) = mesh.ask("shop/client", to, "/public").unwrap();
    assert_eq!((allowed.status, allowed.peer()), (200, Some(mesh.pod("shop/waypoint-0"))), "{allowed:?}");
    let record = mesh.record(source, "outbound");
    assert_eq!(record["way"], "waypoint", "{record}");
    assert_eq!(record["authority"], to.to_string(), "{record}");
    let (denied, _) = mesh.ask("shop/client", to, "/secret").unwrap();
    assert_eq!((denied.status, denied.body.trim()), (403, "RBAC: access denied"));
}

#[test]
fn a_client_in_the_mesh_goes_straight_to_a_pod() {
    let Some(mesh) = shared() else { return };
    let to = mesh.application("shop/open");
    // The waypoint is for the service: by pod address its policies do not count.
    let (answer, source) = mesh.ask("shop/client", to, "/secret").unwrap();
    assert_eq!((answer.status, answer.peer()), (200, Some(mesh.pod("shop/client"))), "{answer:?}");
    let record = mesh.record(source, "outbound");
    assert_eq!(record["way"], "direct", "{record}");
    assert_eq!(record["authority"], to.to_string(), "{record}");
    assert_eq!(record["destination"], SocketAddr::new(to.ip(), 15008).to_string(), "{record}");
    assert_eq!(record["sourceIdentity"], "spiffe://cluster.local/ns/shop/sa/client", "{record}");
    // Replies and large bodies find their way as well.
    let body = vec![b'x'; 4 << 20];
    let mut connection = mesh.connect("shop/client", to).unwrap();
    let answer = exchange(&mut connection, "/", &body).unwrap();
    assert!(answer.body.contains(&format!("body-bytes: {}\n", body.len())), "{answer:?}");
}

#[test]
fn a_client_outside_the_mesh_bypasses_the_waypoint() {
    let Some(mesh) = shared() else { return };
    for to in [mesh.application("shop/open"), mesh.service("shop/open")] {
        let path = format!("/secret?to={to}");
        let (answer, source) = mesh.ask("outside/client", to, &path).unwrap();
        assert_eq!(
            (answer.status, answer.peer()),
            (200, Some(mesh.pod("outside/client"))),
            "{to}: {answer:?}"
        );
        let record = mesh.record(source, "inbound");
        assert_eq!(
            (&record["way"], &record["sourceIdentity"]),
            (&"plaintext".into(), &Value::Null),
            "{to}: {record}"
        );
        let waypoint = SocketAddr::new(mesh.pod("shop/waypoint-0"), 15000);
        let exchanges = mesh.json(waypoint, "/exchanges").unwrap();
        assert!(!exchanges.to_string().contains(&path), "{to}: {exchanges}");
    }
}

#[test]
fn a_policy_that_needs_an_identity_refuses_plaintext() {
    let Some(mesh) = shared() else { return };
    for to in [mesh.application("shop/named"), mesh.service("shop/named")] {
        let (answer, _) = mesh.ask("shop/client", to, "/").unwrap();
        assert_eq!((answer.status, answer.peer()), (200, Some(mesh.pod("shop/client"))), "{to}: {answer:?}");
        mesh.assert_refused("outside/client", to, "inbound", "shop/any-identity");
    }
}

#[test]
fn a_policy_for_the_waypoint_only_refuses_every_other_way() {
    let Some(mesh) = shared() else { return };
    let (pod, vip) = (mesh.application("shop/closed"), mesh.service("shop/closed"));
    let (answer, _) = mesh.ask("shop/client", vip, "/").unwrap();
    assert_eq!((answer.status, answer.peer()), (200, Some(mesh.pod("shop/waypoint-0"))), "{answer:?}");
    mesh.assert_refused("shop/client", pod, "outbound", "403");
    mesh.assert_refused("outside/client", pod, "inbound", "shop/only-the-waypoint");
    mesh.assert_refused("outside/client", vip, "inbound", "shop/only-the-waypoint");
}

#[test]
fn a_server_outside_the_mesh_is_reached_in_plaintext() {
    let Some(mesh) = shared() else { return };
    for to in [mesh.application("outside/server"), mesh.service("outside/server")] {
        let (answer, source) = mesh.ask("shop/client", to, "/").unwrap();
        assert_eq!((answer.status, answer.peer()), (200, Some(mesh.pod("shop/client"))), "{to}: {answer:?}");
        let record = mesh.record(source, "outbound");
        assert_eq!((&record["way"], &record["authority"]), (&"plain".into(), &"".into()), "{to}: {record}");
        assert_eq!(record["destinationWorkload"], "outside/server", "{to}: {record}");
    }
}

#[test]
fn a_pod_reaches_itself_by_its_service() {
    let Some(mesh) = shared() else { return };
    for pod in ["shop/named", "outside/server"] {
        let (answer, _) = mesh.ask(pod, mesh.service(pod), "/").unwrap();
        assert_eq!(answer.status, 200, "{pod}: {answer:?}");
    }
}

#[test]
fn the_ztunnels_own_ports_are_no_destination() {
    let Some(mesh) = shared() else { return };
    for (client, port) in [("outside/client", 15001), ("outside/client", 15006), ("shop/open", 15001)] {
        let to = SocketAddr::new(mesh.pod("shop/open"), port);
        let answer = mesh.ask(client, to, "/");
        assert!(answer.is_err(), "{client} to {to}: {answer:?}");
    }
    let (answer, _) = mesh.ask("outside/client", mesh.application("shop/open"), "/").unwrap();
    assert_eq!(answer.status, 200, "the ztunnel is well: {answer:?}");
}

#[test]
fn an_open_connection_is_cut_by_the_policy_that_concerns_it_and_by_no_other() {
    let Some(mesh) = shared() else { return };
    let to = mesh.application("shop/steady");
    let mut tunnelled = mesh.connect("shop/client", to).unwrap();
    let mut plain = mesh.connect("outside/client", to).unwrap();
    let mut ask_both = || (ask(&mut tunnelled), ask(&mut plain));
    assert!(matches!(ask_both(), (Ok(200), Ok(200))), "{:?}", ask_both());
    let policy = |name: &str, app: &str, from: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{ name: {name}, namespace: shop }}\nspec:\n  selector: {{ matchLabels: {{ app: {app} }} }}\n  \
             action: DENY\n  rules: [{{ from: [{{ source: {{ {from} }} }}] }}]\n"
        )
    };
    mesh.write("edit-1.yaml", &policy("of-others", "nobody", "namespaces: [shop]")).unwrap();
    mesh.wait_for_policy("of-others");
    assert!(matches!(ask_both(), (Ok(200), Ok(200))), "another's policy: {:?}", ask_both());
    mesh.write(
        "edit-2.yaml",
        &policy("no-client", "steady", "principals: [cluster.local/ns/shop/sa/client]"),
    )
    .unwrap();
    mesh.wait_for_policy("no-client");
    assert!(is_cut(&mut tunnelled), "the tunnelled connection goes on");
    assert!(matches!(ask(&mut plain), Ok(200)), "the policy is about another client: {:?}", ask(&mut plain));
    mesh.assert_refused("shop/client", to, "outbound", "403");
    let address = mesh.pod("outside/client");
    mesh.write("edit-3.yaml", &policy("no-stranger", "steady", &format!("ipBlocks: [{address}]"))).unwrap();
    mesh.wait_for_policy("no-stranger");
    assert!(is_cut(&mut plain), "the plaintext connection goes on");
    mesh.assert_refused("outside/client", to, "inbound", "shop/no-stranger");
}

#[test]
fn pods_come_and_go_with_their_manifests() {
    let Some(mesh) = shared() else { return };
    let file = mesh.namespace_file("shop/late");
    for round in ["first", "again"] {
        mesh.write("late.yaml", &pod("shop", "late", "")).unwrap();
        let answer = || mesh.ask("shop/late", mesh.service("shop/open"), "/");
        let answered = || matches!(answer(), Ok((answer, _)) if answer.status == 200);
        assert!(within(SOON, answered), "{round}: {:?}: {}", answer(), mesh.up_log());
        std::fs::remove_file(mesh.home.path().join("manifests/late.yaml")).unwrap();
        assert!(within(SOON, || !file.exists()), "{round}: {} is still there", file.display());
    }
}

#[test]
fn nothing_remains_of_a_mesh_and_none_takes_another_ones_names() {
    if skipped() {
        return;
    }
    let mut mesh = Mesh::start().unwrap();
    let second = mesh.up(&[]).unwrap().wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("is in use by"), "{}: {said}", second.status);
    let (answer, _) = mesh.ask("shop/client", mesh.service("shop/open"), "/").unwrap();
    assert_eq!(answer.status, 200, "the first mesh is well: {answer:?}");
    let status = mesh.stop().unwrap();
    assert!(status.success(), "{status}: {}", mesh.up_log());
    assert_eq!(mesh.leftovers(), Vec::<String>::new());
}

#[test]
fn nothing_remains_of_a_start_that_fails() {
    if skipped() {
        return;
    }
    let mesh = Mesh::prepare().unwrap();
    let only_ip = mesh.home.path().join("bin");
    std::fs::create_dir(&only_ip).unwrap();
    std::os::unix::fs::symlink(find_program("ip").unwrap(), only_ip.join("ip")).unwrap();
    let output = mesh.up(&[("PATH", &only_ip)]).unwrap().wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("cannot run nft"), "{}: {said}", output.status);
    assert_eq!(mesh.leftovers(), Vec::<String>::new());
}

#[test]
fn nothing_remains_of_a_start_that_is_interrupted() {
    if skipped() {
        return;
    }
    for stage in ["shop.client", "outside.server"] {
        let mesh = Mesh::prepare().unwrap();
        let mut child = mesh.up(&[]).unwrap();
        let reached = within(START_MAX, || mesh.namespace_file(&stage.replacen('.', "/", 1)).exists());
        assert!(reached, "no namespace of {stage}");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let ended = within(START_MAX, || child.try_wait().unwrap().is_some());
        assert!(ended, "{stage}: still running");
        assert!(child.wait().unwrap().success(), "{stage}: it was asked to end");
        assert_eq!(mesh.leftovers(), Vec::<String>::new(), "{stage}");
    }
}

// What the tests stand on.

/// The mesh that tests share while any of them runs; `None`, and said why, where there can be none.
fn shared() -> Option<Arc<Mesh>> {
    static SHARED: Mutex<Weak<Mesh>> = Mutex::new(Weak::new());
    if skipped() {
        return None;
    }
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    Some(shared.upgrade().unwrap_or_else(|| {
        let mesh = Arc::new(Mesh::start().unwrap());
        *shared = Arc::downgrade(&mesh);
        mesh
    }))
}

/// Whether this machine cannot run these tests; says why.
pub(crate) fn skipped() -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if find_program("ip").is_none() || find_program("nft").is_none() {
        "needs ip and nft"
    } else {
        return false;
    };
    cairn_tests::skipped(reason);
    true
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.exists())
}

/// Waits for something to become true; whether it did.
pub(crate) fn within(limit: Duration, mut happened: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if happened() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn pod(namespace: &str, name: &str, annotations: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, namespace: {namespace}, labels: {{ app: {name} }}, \
         annotations: {{ {annotations} }} }}\nspec:\n  serviceAccountName: {name}\n  containers:\n    \
         - {{ name: main, image: example/main, ports: [{{ containerPort: {APPLICATION} }}] }}\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {{ name: {name}, namespace: {namespace} }}\n"
    )
}

fn service(namespace: &str, name: &str, labels: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {namespace}, labels: {{ {labels} }} }}\n\
         spec: {{ selector: {{ app: {name} }}, ports: [{{ name: http, port: 80, targetPort: {APPLICATION} }}] }}\n"
    )
}

/// A `cairn up --netns` with a directory of its own. It ends when dropped, or with this process.
struct Mesh {
    home: tempfile::TempDir,
    prefix: String,
    process: Option<(Child, ChildStdin)>,
}

impl Mesh {
    /// Writes the manifests.
    fn prepare() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("cairn-t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mesh = Self { home: tempfile::tempdir()?, prefix, process: None };
        std::fs::create_dir(mesh.home.path().join("manifests"))?;
        let mut manifests = MESH.to_owned();
        for (namespace, name, labels) in APPLICATIONS {
            manifests += &pod(namespace, name, "cairn.dev/run: echo");
            manifests += &service(namespace, name, labels);
        }
        manifests += &pod("shop", "client", "");
        manifests += &pod("outside", "client", "");
        mesh.write("mesh.yaml", &manifests)?;
        Ok(mesh)
    }

    /// Starts a mesh and waits until it and its applications answer.
    fn start() -> Result<Self> {
        let mut mesh = Self::prepare()?;
        let log = File::create(mesh.home.path().join("up.log"))?;
        let mut child = Command::new("sh")
            .args(["-c", LIFELINE, "mesh"])
            .arg(cairn()?)
            .args(mesh.arguments())
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let lifeline = child.stdin.take().context("no pipe")?;
        mesh.process = Some((child, lifeline));
        let ended = |log: &str| log.lines().any(|line| line.starts_with("cairn: "));
        within(START_MAX, || mesh.up_log().contains("Logs are in ") || ended(&mesh.up_log()));
        ensure!(mesh.up_log().contains("Logs are in "), "the mesh did not come up: {}", mesh.up_log());
        for (namespace, name, _) in APPLICATIONS {
            let pod = format!("{namespace}/{name}");
            let answers = within(SOON, || mesh.connect(&pod, mesh.application(&pod)).is_ok());
            ensure!(answers, "the application of {pod} does not listen: {}", mesh.up_log());
        }
        Ok(mesh)
    }

    /// Runs `cairn up` without more ado, with these in its environment.
    fn up(&self, environment: &[(&str, &Path)]) -> Result<Child> {
        let mut command = Command::new(cairn()?);
        command.args(self.arguments()).envs(environment.iter().copied());
        Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
    }

    fn arguments(&self) -> Vec<String> {
        let file = |name: &str| self.home.path().join(name).display().to_string();
        let (manifests, state) = (file("manifests"), file("state"));
        ["up", &manifests, "--state", &state, "--netns", "--netns-prefix", &self.prefix]
            .map(str::to_owned)
            .to_vec()
    }

    /// Asks the mesh to end, as SIGTERM does, and waits for it.
    fn stop(&mut self) -> Result<ExitStatus> {
        let (mut child, lifeline) = self.process.take().context("stopped already")?;
        drop(lifeline);
        if !within(START_MAX, || matches!(child.try_wait(), Ok(Some(_)))) {
            child.kill()?;
            bail!("the mesh did not end: {}", self.up_log());
        }
        Ok(child.wait()?)
    }

    /// Namespaces, links and processes that should not be there once the mesh has ended.
    fn leftovers(&self) -> Vec<String> {
        let names = |directory: &str| {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        let home = self.home.path().display().to_string();
        let mut found = names(NAMESPACES);
        found.retain(|name| name.starts_with(&self.prefix));
        found.extend(names("/sys/class/net").into_iter().filter(|link| link.starts_with("cairn")));
        found.extend(names("/proc").into_iter().filter_map(|pid| {
            let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
            command.contains(&home).then(|| format!("process {pid}: {}", command.replace('\0', " ")))
        }));
        found
    }

    /// Writes a manifest as careful editors do: beside it, then renamed into place.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let new = self.home.path().join(name);
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(&new, self.home.path().join("manifests").join(name))?)
    }

    fn up_log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("up.log")).unwrap_or_default()
    }

    /// What the tables that `cairn up` prints say of `namespace/name`, in the first form that fits.
    fn told<T: std::str::FromStr>(&self, name: &str) -> T {
        let log = self.up_log();
        let mut rows = log.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let found = rows.find_map(|row| match row[..] {
            [first, address, ..] if first == name => address.parse().ok(),
            _ => None,
        });
        found.unwrap_or_else(|| panic!("no {name}: {log}"))
    }

    fn pod(&self, name: &str) -> IpAddr {
        self.told(name)
    }

    fn service(&self, name: &str) -> SocketAddr {
        self.told(name)
    }

    fn application(&self, pod: &str) -> SocketAddr {
        SocketAddr::new(self.pod(pod), APPLICATION)
    }

    fn namespace_file(&self, pod: &str) -> PathBuf {
        Path::new(NAMESPACES).join(format!("{}-pod-{}", self.prefix, pod.replacen('/', ".", 1)))
    }

    /// Connects as a program in a pod would.
    fn connect(&self, pod: &str, to: SocketAddr) -> Result<TcpStream> {
        connect_in(&self.namespace_file(pod), to)
    }

    /// Asks on a connection of its own, of which it tells the client's address.
    fn ask(&self, pod: &str, to: SocketAddr, path: &str) -> Result<(Answer, SocketAddr)> {
        let mut connection = self.connect(pod, to)?;
        let answer = exchange(&mut connection, path, b"")?;
        Ok((answer, connection.local_addr()?))
    }

    /// A connection is closed without an answer, for a reason that the ztunnel tells.
    fn assert_refused(&self, pod: &str, to: SocketAddr, direction: &str, reason: &str) {
        let mut connection = self.connect(pod, to).unwrap();
        let source = connection.local_addr().unwrap();
        let answer = exchange(&mut connection, "/", b"");
        assert!(answer.is_err(), "{pod} to {to} was not refused: {answer:?}");
        let record = self.record(source, direction);
        let told = record["error"].as_str().unwrap_or_default();
        assert!(told.contains(reason), "{pod} to {to} was refused for another reason: {record}");
    }

    /// What the ztunnel recorded of the connection that came from `source`.
    fn record(&self, source: SocketAddr, direction: &str) -> Value {
        let source = Value::from(source.to_string());
        let (mut found, mut last) = (None, Value::Null);
        within(SOON, || {
            last = self.json(ZTUNNEL.parse().unwrap(), "/connections").unwrap();
            let mut records = last.as_array().into_iter().flatten();
            found = records
                .find(|record| record["source"] == source && record["direction"] == direction)
                .cloned();
            found.is_some()
        });
        found.unwrap_or_else(|| panic!("no {direction} record of {source}: {last:#}"))
    }

    /// Waits until the ztunnel has a policy.
    fn wait_for_policy(&self, name: &str) {
        let mut last = Value::Null;
        let known = within(SOON, || {
            last = self.json(ZTUNNEL.parse().unwrap(), "/config_dump").unwrap()["policies"].take();
            last.as_array().into_iter().flatten().any(|policy| policy["name"] == name)
        });
        assert!(known, "the ztunnel has no policy {name}: {last:#}");
    }

    /// Fetches from a port for operators, as someone on the node would.
    fn json(&self, at: SocketAddr, path: &str) -> Result<Value> {
        let node = Path::new(NAMESPACES).join(format!("{}-node", self.prefix));
        let answer = exchange(&mut connect_in(&node, at)?, path, b"")?;
        ensure!(answer.status == 200, "{at}{path}: {answer:?}");
        Ok(serde_json::from_str(&answer.body)?)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if self.process.is_some()
            && let Err(error) = self.stop()
        {
            eprintln!("{error:#}");
        }
    }
}

/// The program under test.
fn cairn() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let target = test.parent().and_then(Path::parent).context("the tests run from target/*/deps")?;
    let program = target.join("cairn");
    ensure!(program.exists(), "{} is missing; run `cargo build -p cairn`", program.display());
    Ok(program)
}

pub(crate) fn connect_in(namespace: &Path, to: SocketAddr) -> Result<TcpStream> {
    let namespace = Namespace::open(namespace)?;
    let connected = namespace.within(|| TcpStream::connect_timeout(&to, TRY_MAX))?;
    let connection = connected.with_context(|| format!("cannot connect to {to}"))?;
    connection.set_read_timeout(Some(TRY_MAX))?;
    connection.set_write_timeout(Some(TRY_MAX))?;
    Ok(connection)
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    /// Who the application says connected to it.
    fn peer(&self) -> Option<IpAddr> {
        self.body.lines().find_map(|line| line.strip_prefix("peer: "))?.parse().ok()
    }
}

/// One request and its answer, leaving the connection open.
pub(crate) fn exchange(connection: &mut TcpStream, path: &str, body: &[u8]) -> Result<Answer> {
    let host = connection.peer_addr()?;
    let method = if body.is_empty() { "GET" } else { "POST" };
    write!(connection, "{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {}\r\n\r\n", body.len())?;
    connection.write_all(body)?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        connection.read_exact(&mut byte).context("no whole answer")?;
        head.extend(byte);
    }
    let head = String::from_utf8(head)?.to_ascii_lowercase();
    let status = head.split_whitespace().nth(1).context("no status")?.parse()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")).context("no length")?;
    let mut body = vec![0; length.trim().parse()?];
    connection.read_exact(&mut body).context("no whole body")?;
    Ok(Answer { status, body: String::from_utf8(body)? })
}

fn ask(connection: &mut TcpStream) -> Result<u16> {
    Ok(exchange(connection, "/", b"")?.status)
}

/// Whether the other side ends the connection by itself.
fn is_cut(connection: &mut TcpStream) -> bool {
    match connection.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
