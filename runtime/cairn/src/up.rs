//! `cairn up`: the whole mesh of a directory of manifests on this machine.

use crate::addresses::{Addresses, Block};
use crate::child::{tied_to_us, with_all_it_starts};
use crate::client::{self, Way};
use crate::control::{Addressing, Control, Reading};
use crate::forward::Forwarders;
use crate::netns::Network;
use crate::supervise::{Program, Supervisor};
use anyhow::{Context, Error, Result, anyhow, ensure};
use cairn_manifest::{GatewayEntry, Object, Watch};
use cairn_mesh::{TunnelProtocol, Workload};
use cairn_net::ListenOptions;
use cairn_xds::{Mesh, Role, ServeError};
use cairn_ztunnel::namespace_file;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// `cairn up`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// The directory (or file) of manifests.
    pub directory: PathBuf,
    /// Where addresses, tokens, the CA and logs are kept.
    #[arg(long, env = "CAIRN_STATE", default_value = ".cairn")]
    pub state: PathBuf,
    /// The block of loopback used: pods in 127.N/16, services ten above, applications twenty above.
    #[arg(long, default_value_t = 10)]
    pub block: u8,
    /// Gives each pod a network namespace with real redirection. Needs root.
    #[arg(long)]
    pub netns: bool,
    /// With --netns: what the namespaces' names begin with.
    #[arg(long, default_value = "cairn")]
    pub netns_prefix: String,
    /// Runs the commands that pods' `cairn.dev/command` annotations give. They run as you.
    #[arg(long)]
    pub run: bool,
    /// A CA certificate to use in place of a self-made one, PEM.
    #[arg(long, requires = "ca_key")]
    pub ca_cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long, requires = "ca_cert")]
    pub ca_key: Option<PathBuf>,
    /// Lifetime of certificates in seconds.
    #[arg(long, default_value_t = 86_400)]
    pub certificate_seconds: u64,
    /// Worker threads of each proxy.
    #[arg(long)]
    pub workers: Option<usize>,
}

/// The port of xDS and CA.
const XDS_PORT: u16 = 15012;

/// How long the mesh may take to come up.
const START_MAX: Duration = Duration::from_secs(60);

/// How long proxies of an earlier mesh may take to end: they drain for 5 seconds.
const FREE_MAX: Duration = Duration::from_secs(7);

/// How long connecting on this machine takes at most.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// The pause after manifests could not be followed, before the next try; it doubles up to [`RETRY_PAUSE_MAX`].
const RETRY_PAUSE: Duration = Duration::from_secs(1);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(30);

/// The annotation that asks for an application of ours: its value is `echo`.
const RUN: &str = "cairn.dev/run";

/// The annotation that gives a command to run.
const COMMAND: &str = "cairn.dev/command";

/// A running mesh.
pub struct Up {
    /// The mesh as its control plane knows it.
    pub mesh: Arc<Mesh>,
    /// How operators' ports are reached.
    pub way: Way,
    /// The addresses of ztunnels' ports for operators, by node.
    pub ztunnels: BTreeMap<String, IpAddr>,
    /// The waypoints.
    pub waypoints: BTreeMap<String, IpAddr>,
    /// What pods' applications must listen on, by pod, and whether something of ours does.
    pub applications: Vec<(String, Vec<SocketAddr>, bool)>,
    /// Where the logs are.
    pub logs: PathBuf,
    stop: oneshot::Sender<()>,
    task: Option<JoinHandle<Result<()>>>,
}

impl Up {
    /// Starts the mesh, without waiting until it is ready. Dropping the future leaves no process running.
    ///
    /// # Errors
    /// When the directory has errors that leave no mesh, or a port is taken.
    pub async fn launch(options: Options) -> Result<Self> {
        let mut runner = Runner::open(options)?;
        let reading = runner.prepare()?;
        let way = Way::Direct(runner.network.as_ref().map(Network::node).transpose()?);
        let waypoints = runner.waypoints(&reading);
        for address in reading.ztunnels.values().chain(waypoints.values()) {
            wait_until_free(&way, *address, FREE_MAX).await?;
        }
        // From here on there are processes; nothing below waits.
        runner.apply(&reading)?;
        let (stop, stopped) = oneshot::channel();
        Ok(Self {
            mesh: Arc::clone(&runner.control.mesh),
            way,
            ztunnels: reading.ztunnels,
            waypoints,
            applications: runner.applications.clone(),
            logs: runner.logs.clone(),
            stop,
            task: Some(tokio::spawn(runner.run(stopped))),
        })
    }

    /// Waits until every proxy is ready.
    ///
    /// # Errors
    /// When one is not in time.
    pub fn ready(&self) -> impl Future<Output = Result<()>> + use<> {
        let (way, logs) = (self.way.clone(), self.logs.clone());
        let proxies: Vec<IpAddr> = self.ztunnels.values().chain(self.waypoints.values()).copied().collect();
        async move {
            for address in proxies {
                client::wait_ready(&way, address, START_MAX)
                    .await
                    .with_context(|| format!("the mesh did not come up; see {}", logs.display()))?;
            }
            Ok(())
        }
    }

    /// Resolves with the reason when the mesh ends without having been told to.
    pub async fn broken(&mut self) -> Error {
        let Some(task) = &mut self.task else { return std::future::pending().await };
        let ended = task.await;
        self.task = None;
        match ended {
            Ok(Ok(())) => anyhow!("the mesh ended"),
            Ok(Err(error)) => error,
            Err(error) => Error::new(error).context("the mesh broke"),
        }
    }

    /// Ends every process of the mesh.
    pub async fn stop(self) {
        // A runner that is gone has stopped already.
        let _stopped = self.stop.send(());
        if let Some(task) = self.task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the mesh did not stop cleanly");
        }
    }
}

/// Waits for at most `limit` until nobody answers where a proxy is to be: that one would be taken for ours. One that
/// hangs and answers nothing is in the way as well.
async fn wait_until_free(way: &Way, address: IpAddr, limit: Duration) -> Result<()> {
    let at = SocketAddr::new(address, client::READINESS_PORT);
    let deadline = tokio::time::Instant::now() + limit;
    while !matches!(tokio::time::timeout(CONNECT_MAX, client::connect(way, at)).await, Ok(Err(_))) {
        ensure!(
            tokio::time::Instant::now() < deadline,
            "{at} is in use by another program: end the mesh that runs there, or choose another block"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// `cairn up`: runs until SIGTERM or SIGINT.
///
/// # Errors
/// When the mesh cannot be started, or its control plane ends.
pub async fn run(options: Options) -> Result<()> {
    // A signal may come before all is up: what has been started by then must end too.
    let stop = cairn_process::stop_signal();
    tokio::pin!(stop);
    let mut up = tokio::select! {
        biased;
        signal = &mut stop => return signal.map(drop).context("cannot watch for signals"),
        up = Up::launch(options) => up?,
    };
    let ended = until_told(&mut up, stop.as_mut()).await;
    if let Ok(signal) = &ended {
        println!("{signal}: stopping");
    }
    up.stop().await;
    ended.map(drop)
}

/// Waits until the mesh is ready, says so, and waits until told to stop.
async fn until_told(
    up: &mut Up,
    mut stop: Pin<&mut impl Future<Output = std::io::Result<&'static str>>>,
) -> Result<&'static str> {
    let ready = up.ready();
    tokio::select! {
        biased;
        signal = stop.as_mut() => return signal.context("cannot watch for signals"),
        error = up.broken() => return Err(error),
        ready = ready => ready?,
    }
    describe(up);
    tokio::select! {
        biased;
        signal = stop => signal.context("cannot watch for signals"),
        error = up.broken() => Err(error),
    }
}

/// Prints who is where.
fn describe(up: &Up) {
    let snapshot = up.mesh.snapshot();
    let mut workloads: Vec<&Arc<Workload>> = snapshot.workloads().collect();
    workloads.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    println!("{:<36} {:<16} IDENTITY", "POD", "ADDRESS");
    for workload in workloads {
        let address = workload.addresses.first().map_or_else(|| "-".to_owned(), ToString::to_string);
        let meshed = workload.protocol == TunnelProtocol::Hbone;
        let identity = if meshed { workload.identity.as_str() } else { "(not in the mesh)" };
        println!("{:<36} {address:<16} {identity}", format!("{}/{}", workload.namespace, workload.name));
    }
    let mut services: Vec<_> = snapshot.services().collect();
    services.sort_by_key(|state| state.service.key());
    println!("\n{:<36} {:<24} ENDPOINTS", "SERVICE", "ADDRESS");
    for state in services {
        let service = &state.service;
        for port in &service.ports {
            let vip = service
                .vips
                .first()
                .map_or_else(|| "-".to_owned(), |vip| format!("{}:{}", vip.address, port.port));
            println!(
                "{:<36} {vip:<24} {}",
                format!("{}/{}", service.namespace, service.name),
                state.endpoints.len()
            );
        }
    }
    for (pod, addresses, ours) in &up.applications {
        if !ours && !addresses.is_empty() {
            let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            println!("\nThe application of {pod} is yours to start: let it listen on {}.", list.join(", "));
        }
    }
    println!("\nLogs are in {}.", up.logs.display());
}

/// What keeps a mesh running.
struct Runner {
    options: Options,
    control: Control,
    block: Block,
    watch: Watch,
    network: Option<Network>,
    forwarders: Option<Forwarders>,
    supervisor: Supervisor,
    server: JoinHandle<Result<(), ServeError>>,
    applications: Vec<(String, Vec<SocketAddr>, bool)>,
    executable: PathBuf,
    logs: PathBuf,
}

impl Runner {
    fn open(options: Options) -> Result<Self> {
        let block = if options.netns { Block::namespaces() } else { Block::loopback(options.block)? };
        std::fs::create_dir_all(&options.state)
            .with_context(|| format!("cannot create {}", options.state.display()))?;
        let state = options.state.canonicalize()?;
        let options = Options { state: state.clone(), ..options };
        let ca = options.ca_cert.as_deref().zip(options.ca_key.as_deref());
        let addresses = Addresses::open(&state, block)?;
        let control = Control::open(&options.directory, &state, Addressing::Block(addresses), ca)?;
        let watch = Watch::start(&options.directory).context("cannot watch the manifests")?;
        let logs = state.join("logs");
        std::fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let network = options
            .netns
            .then(|| Network::create(&options.netns_prefix, block.node(), &state))
            .transpose()?;
        let forwarders = (!options.netns).then(|| Forwarders::new(Arc::clone(&control.mesh)));
        let server = serve(&control, block.node(), network.as_ref())?;
        Ok(Self {
            block,
            control,
            watch,
            network,
            forwarders,
            supervisor: Supervisor::default(),
            server,
            applications: Vec::new(),
            executable: std::env::current_exe().context("where am I?")?,
            logs,
            options,
        })
    }

    /// Reads the manifests and prepares what their mesh will need.
    fn prepare(&mut self) -> Result<Reading> {
        let reading = self.control.read()?;
        // A pod's namespace is there before its ztunnel hears of the pod.
        if let Some(network) = &mut self.network {
            network.follow(&self.control.mesh.snapshot())?;
        }
        Ok(reading)
    }

    /// Makes the mesh be what was read.
    fn apply(&mut self, reading: &Reading) -> Result<()> {
        self.control.publish(reading);
        let programs = self.programs(reading)?;
        self.control.retain_tokens(|name| programs.contains_key(name));
        self.supervisor.keep(programs);
        if let Some(forwarders) = &mut self.forwarders {
            forwarders.follow();
        }
        Ok(())
    }

    async fn run(mut self, stop: oneshot::Receiver<()>) -> Result<()> {
        let ended = self.follow(stop).await;
        self.supervisor.stop().await;
        self.server.abort();
        ended
    }

    /// Follows the manifests until told to stop.
    async fn follow(&mut self, mut stop: oneshot::Receiver<()>) -> Result<()> {
        let mut retry = None;
        loop {
            let again = async {
                match retry {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = &mut stop => return Ok(()),
                ended = &mut self.server => return Err(match ended {
                    Ok(Ok(())) => anyhow!("the xDS server ended"),
                    Ok(Err(error)) => Error::new(error).context("the xDS server ended"),
                    Err(error) => Error::new(error).context("the xDS server broke"),
                }),
                () = self.watch.changed() => {}
                () = again => {}
            }
            let followed = self.prepare().and_then(|reading| self.apply(&reading));
            retry = followed.err().map(|error| {
                let pause = retry.map_or(RETRY_PAUSE, |before| (before * 2).min(RETRY_PAUSE_MAX));
                tracing::error!(
                    error = format!("{error:#}"),
                    ?pause,
                    "manifests cannot be followed, will retry"
                );
                pause
            });
        }
    }

    fn waypoints(&self, reading: &Reading) -> BTreeMap<String, IpAddr> {
        let address =
            |gateway: &GatewayEntry| Some((gateway.name.to_string(), waypoint_address(reading, gateway)?));
        reading.world.gateways.iter().filter_map(address).collect()
    }

    fn programs(&mut self, reading: &Reading) -> Result<BTreeMap<String, Program>> {
        let mut programs = BTreeMap::new();
        for (node, address) in &reading.ztunnels {
            programs.insert(format!("ztunnel.{node}"), self.ztunnel(node, *address)?);
        }
        for gateway in &reading.world.gateways {
            if let Some(address) = waypoint_address(reading, gateway) {
                let name = waypoint_name(gateway);
                let program = self.waypoint(&name, gateway, address, reading)?;
                programs.insert(name, program);
            }
        }
        self.applications.clear();
        for workload in &reading.world.workloads {
            if !workload.native_tunnel
                && let Some((name, program)) = self.application(workload, reading)
            {
                programs.insert(name, program);
            }
        }
        Ok(programs)
    }

    fn ztunnel(&mut self, node: &str, address: IpAddr) -> Result<Program> {
        let name = format!("ztunnel.{node}");
        let token = self.control.token(&name, Role::Ztunnel { node: node.to_owned() })?;
        let mut flags = self.common("ztunnel", &token);
        flags.extend(["--node", node, "--address"].map(OsString::from));
        flags.push(address.to_string().into());
        flags.extend(["--admin-address".into(), OsString::from(address.to_string())]);
        match &self.network {
            Some(network) => {
                flags.extend(["--capture", "namespaces", "--netns-directory"].map(OsString::from));
                flags.push(network.links().into());
                flags = network.enter_node().into_iter().map(OsString::from).chain(flags).collect();
            }
            None => flags.extend(["--twin-addresses", "true"].map(OsString::from)),
        }
        Ok(self.program(&name, flags))
    }

    fn waypoint(
        &mut self,
        name: &str,
        gateway: &GatewayEntry,
        address: IpAddr,
        reading: &Reading,
    ) -> Result<Program> {
        let role = Role::Waypoint { gateway: gateway.name.clone(), identity: gateway.identity.clone() };
        let token = self.control.token(name, role)?;
        let mut flags = self.common("waypoint", &token);
        let pairs = [
            ("--gateway", gateway.name.to_string()),
            ("--address", address.to_string()),
            ("--admin-address", address.to_string()),
            ("--trust-domain", gateway.identity.trust_domain().to_owned()),
            ("--service-account", gateway.identity.service_account().to_owned()),
        ];
        flags.extend(["--state-directory".into(), self.options.state.join("waypoints").join(name).into()]);
        flags.extend(pairs.into_iter().flat_map(|(flag, value)| [OsString::from(flag), value.into()]));
        flags.extend(["--jwks-cache".into(), self.options.state.join("jwks").join(name).into()]);
        if let Some(network) = &self.network {
            let uid = gateway.workloads.first();
            let pod = reading
                .world
                .workloads
                .iter()
                .find(|workload| Some(&*workload.uid) == uid.map(String::as_str));
            if let Some(pod) = pod {
                let enter = network.enter_pod(&pod.namespace, &pod.name);
                flags = enter.into_iter().map(OsString::from).chain(flags).collect();
            }
        }
        Ok(self.program(name, flags))
    }

    /// What every proxy is told.
    fn common(&self, role: &str, token: &std::path::Path) -> Vec<OsString> {
        let mut flags: Vec<OsString> = vec![self.executable.clone().into(), role.into()];
        let xds = format!("https://{}:{XDS_PORT}", self.block.node());
        flags.extend(["--xds-address".into(), xds.into()]);
        flags.extend(["--xds-root".into(), self.control.root_file().into()]);
        flags.extend(["--token".into(), token.into()]);
        flags.extend(["--certificate-seconds".into(), self.options.certificate_seconds.to_string().into()]);
        if let Some(workers) = self.options.workers {
            flags.extend(["--workers".into(), workers.to_string().into()]);
        }
        flags
    }

    /// A program that is not to outlive us.
    fn program(&self, name: &str, command: Vec<OsString>) -> Program {
        let command = tied_to_us(&self.executable).into_iter().chain(command).collect();
        Program { command, log: self.logs.join(format!("{name}.log")) }
    }

    /// The application of a pod, if we are to run it; notes where it listens in any case.
    fn application(&mut self, workload: &Workload, reading: &Reading) -> Option<(String, Program)> {
        let address = *workload.addresses.first()?;
        let pod = PodSource::find(workload, &reading.objects);
        let ports = pod.as_ref().map(PodSource::ports).unwrap_or_default();
        let meshed = workload.protocol == TunnelProtocol::Hbone;
        let own = match (&self.network, meshed) {
            (None, true) => cairn_ztunnel::twin(address),
            (Some(_), _) | (None, false) => address,
        };
        let listen: Vec<SocketAddr> = ports.iter().map(|port| SocketAddr::new(own, *port)).collect();
        let name = format!("application.{}", namespace_file(&workload.namespace, &workload.name));
        let command = pod.as_ref().and_then(|pod| self.command(pod, workload, &listen));
        let label = format!("{}/{}", workload.namespace, workload.name);
        self.applications.push((label, listen, command.is_some()));
        let mut command = command?;
        if let Some(network) = &self.network {
            let enter = network.enter_pod(&workload.namespace, &workload.name);
            command = enter.into_iter().map(OsString::from).chain(command).collect();
        }
        let program = self.program(&name, command);
        Some((name, program))
    }

    fn command(
        &self,
        pod: &PodSource<'_>,
        workload: &Workload,
        listen: &[SocketAddr],
    ) -> Option<Vec<OsString>> {
        if pod.annotation(RUN) == Some("echo") && !listen.is_empty() {
            let mut command: Vec<OsString> = vec![self.executable.clone().into(), "echo".into()];
            command.extend(["--name".into(), OsString::from(&*workload.name)]);
            command.extend(["--version".into(), OsString::from(&*workload.canonical_revision)]);
            command.push("--listen".into());
            command.extend(listen.iter().map(|address| OsString::from(address.to_string())));
            return Some(command);
        }
        let text = pod.annotation(COMMAND).filter(|_| self.options.run)?;
        let address = listen.first().map_or_else(String::new, ToString::to_string);
        let words = [
            "env".to_owned(),
            format!("LISTEN_ADDRESS={address}"),
            "sh".into(),
            "-c".into(),
            text.to_owned(),
        ];
        let words = words.into_iter().map(OsString::from);
        Some(with_all_it_starts(&self.executable).into_iter().chain(words).collect())
    }
}

/// What a waypoint's process and files are called.
fn waypoint_name(gateway: &GatewayEntry) -> String {
    format!("waypoint.{}", namespace_file(&gateway.name.namespace, &gateway.name.name))
}

fn waypoint_address(reading: &Reading, gateway: &GatewayEntry) -> Option<IpAddr> {
    let uid = gateway.workloads.first()?;
    let workload = reading.world.workloads.iter().find(|workload| *workload.uid == **uid)?;
    workload.addresses.first().copied()
}

/// Serves xDS and certificates on the node's address.
fn serve(
    control: &Control,
    node: Ipv4Addr,
    network: Option<&Network>,
) -> Result<JoinHandle<Result<(), ServeError>>> {
    let address = SocketAddr::new(IpAddr::V4(node), XDS_PORT);
    let listen = || cairn_net::listen(address, &ListenOptions::default());
    let listener = match network {
        Some(network) => network.node()?.within(listen)??,
        None => listen()?,
    };
    let tls = control.authority.server_tls(&[node.to_string(), "localhost".to_owned()])?;
    let server = Arc::clone(&control.server);
    Ok(tokio::spawn(server.serve(listener, tls, std::future::pending())))
}

/// Where a pod is described: itself, or the template of what controls it.
struct PodSource<'a> {
    annotations: BTreeMap<&'a str, &'a str>,
    spec: &'a serde_json::Value,
}

impl<'a> PodSource<'a> {
    fn find(workload: &Workload, objects: &'a [Object]) -> Option<Self> {
        let named = |object: &&Object, name: &str| {
            *object.name.namespace == *workload.namespace && *object.name.name == *name
        };
        let pod = objects.iter().find(|object| object.kind == "Pod" && named(object, &workload.name));
        if let Some(pod) = pod {
            let annotations =
                pod.annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            return Some(Self { annotations, spec: pod.spec.get("spec")? });
        }
        let controller = objects.iter().find(|object| {
            matches!(object.kind.as_str(), "Deployment" | "StatefulSet")
                && named(object, &workload.workload_name)
        })?;
        let template = controller.spec.get("spec")?.get("template")?;
        let annotations = template.get("metadata").and_then(|metadata| metadata.get("annotations"));
        let annotations = annotations.and_then(serde_json::Value::as_object).into_iter().flatten();
        let annotations =
            annotations.filter_map(|(key, value)| Some((key.as_str(), value.as_str()?))).collect();
        Some(Self { annotations, spec: template.get("spec")? })
    }

    fn annotation(&self, name: &str) -> Option<&'a str> {
        self.annotations.get(name).copied()
    }

    fn ports(&self) -> Vec<u16> {
        let containers =
            self.spec.get("containers").and_then(serde_json::Value::as_array).into_iter().flatten();
        let ports = containers.filter_map(|container| container.get("ports")?.as_array()).flatten();
        ports.filter_map(|port| u16::try_from(port.get("containerPort")?.as_u64()?).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_place_where_someone_answers_is_not_free() {
        let way = Way::Direct(None);
        let address: IpAddr = "127.0.15.21".parse().unwrap();
        let at = SocketAddr::new(address, client::READINESS_PORT);
        let listener = cairn_net::listen(at, &ListenOptions::default()).unwrap();
        let error = wait_until_free(&way, address, Duration::ZERO).await.unwrap_err().to_string();
        assert!(error.starts_with("127.0.15.21:15021 is in use"), "{error}");
        let waiting = wait_until_free(&way, address, Duration::from_secs(10));
        let (ended, ()) = tokio::join!(waiting, async {
            drop(listener.accept().await.unwrap());
            drop(listener);
        });
        ended.unwrap();
    }
}
