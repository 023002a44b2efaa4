//! The control plane of one directory: its manifests, read again when they change, served over xDS with a CA.

use crate::addresses::Addresses;
use anyhow::{Context, Result};
use cairn_identity::Authority;
use cairn_manifest::{Diagnostic, Directory, Object, Severity, World};
use cairn_mesh::{Change, MeshSettings, ResourceName, Store};
use cairn_xds::{Mesh, Role, Served, Server, Tokens};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The type under which the mesh's settings travel.
const SETTINGS_TYPE: (&str, &str, &str) = ("mesh.istio.io", "v1alpha1", "MeshConfig");

/// The annotation by which a waypoint is told that a document could not be read.
const BROKEN: &str = "cairn.dev/broken";

/// Gives no addresses: what a manifest does not say has none.
pub struct AsWritten;

impl cairn_manifest::Addressing for AsWritten {
    fn pod(&mut self, _namespace: &str, _name: &str) -> Option<std::net::IpAddr> {
        None
    }

    fn service(&mut self, _namespace: &str, _name: &str) -> Option<std::net::IpAddr> {
        None
    }
}

/// Where addresses come from that manifests do not give.
pub enum Addressing {
    /// From a block, kept in a book.
    Block(Addresses),
    /// From nowhere.
    AsWritten(AsWritten),
}

/// The control plane of one directory.
pub struct Control {
    directory: Directory,
    addressing: Addressing,
    /// The server of xDS and certificates.
    pub server: Arc<Server>,
    /// What the server serves, as a proxy would know it.
    pub mesh: Arc<Mesh>,
    /// The CA.
    pub authority: Arc<Authority>,
    tokens: Tokens,
    state: PathBuf,
    said: Vec<String>,
}

/// What a directory holds now.
pub struct Reading {
    /// The mesh it describes.
    pub world: World,
    /// Its objects.
    pub objects: Vec<Object>,
    /// Its settings.
    pub settings: MeshSettings,
    /// What is wrong with it, in order of file and line.
    pub diagnostics: Vec<Diagnostic>,
}

impl Reading {
    /// Whether something is wrong that an author must mend.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
    }
}

impl Control {
    /// Opens the control plane of the manifests at `root`. The CA is made in, or taken from, `state`, unless a
    /// certificate and key are given.
    ///
    /// # Errors
    /// When the CA or the state directory cannot be used.
    pub fn open(
        root: &Path,
        state: &Path,
        addressing: Addressing,
        ca: Option<(&Path, &Path)>,
    ) -> Result<Self> {
        private_directory(state)?;
        let mut directory = Directory::new(root, MeshSettings::default());
        let trust_domain = directory.read().settings.trust_domain;
        let authority = match ca {
            Some((certificate, key)) => Authority::from_files(certificate, key)?,
            None => Authority::open(&state.join("ca"), &trust_domain)?,
        };
        let authority = Arc::new(authority);
        std::fs::write(state.join("root.pem"), authority.roots_pem())
            .with_context(|| format!("cannot write to {}", state.display()))?;
        let tokens = Tokens::new();
        Ok(Self {
            directory,
            addressing,
            server: Server::new(Arc::clone(&authority), tokens.clone()),
            mesh: Mesh::new(),
            authority,
            tokens,
            state: state.to_owned(),
            said: Vec::new(),
        })
    }

    /// The file of the root certificate, for proxies.
    pub fn root_file(&self) -> PathBuf {
        self.state.join("root.pem")
    }

    /// Mints a token for a role and returns its file. A role's token stays the same while this process lives.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn token(&self, name: &str, role: Role) -> Result<PathBuf> {
        let directory = self.state.join("tokens");
        private_directory(&directory)?;
        let file = directory.join(format!("{name}.token"));
        let mut secret = [0; 32];
        File::open("/dev/urandom")
            .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut secret))
            .context("no randomness")?;
        let token: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let new = file.with_extension("new");
        // A file left by an earlier run that was interrupted is in the way.
        let _gone = std::fs::remove_file(&new);
        let written = File::options().create_new(true).write(true).mode(0o600).open(&new);
        written
            .and_then(|mut written| written.write_all(token.as_bytes()))
            .and_then(|()| std::fs::rename(&new, &file))
            .with_context(|| format!("cannot write {}", file.display()))?;
        self.tokens.insert(token, role);
        Ok(file)
    }

    /// Reads the directory again and publishes what it says. What is broken keeps its last good state.
    ///
    /// # Errors
    /// When addresses cannot be kept.
    pub fn refresh(&mut self) -> Result<Reading> {
        let reading = self.read()?;
        self.publish(&reading);
        Ok(reading)
    }

    /// Serves what was read, and says what is wrong with it.
    pub fn publish(&mut self, reading: &Reading) {
        self.server.publish(served(reading));
        self.say(reading);
    }

    /// Reads the directory again. The mesh as we know it is what it says; proxies hear of it by [`Control::publish`],
    /// when what they will need has been prepared.
    ///
    /// # Errors
    /// When addresses cannot be kept.
    pub fn read(&mut self) -> Result<Reading> {
        let loaded = self.directory.read();
        let world = match &mut self.addressing {
            Addressing::Block(addresses) => {
                let world = World::build(&loaded.objects, addresses, &loaded.settings);
                addresses.save()?;
                world
            }
            Addressing::AsWritten(nothing) => World::build(&loaded.objects, nothing, &loaded.settings),
        };
        let mut diagnostics = loaded.diagnostics;
        diagnostics.extend(world.diagnostics.iter().cloned());
        diagnostics.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
        let reading = Reading { world, objects: loaded.objects, settings: loaded.settings, diagnostics };
        self.publish_here(&reading);
        Ok(reading)
    }

    fn publish_here(&self, reading: &Reading) {
        let mut store = Store::new();
        let world = &reading.world;
        let workloads = world.workloads.iter().cloned().map(Change::Workload);
        let services = world.services.iter().cloned().map(Change::Service);
        let policies = world.authorizations.iter().cloned().map(Change::Authorization);
        store.apply(
            policies.chain(workloads).chain(services).chain([Change::Settings(reading.settings.clone())]),
        );
        self.mesh.publish(store.snapshot());
    }

    /// Logs what is wrong, when that has changed.
    fn say(&mut self, reading: &Reading) {
        let lines: Vec<String> = reading.diagnostics.iter().map(ToString::to_string).collect();
        if lines != self.said {
            for (line, diagnostic) in lines.iter().zip(&reading.diagnostics) {
                if self.said.contains(line) {
                    continue;
                }
                match diagnostic.severity {
                    Severity::Error => tracing::error!("{line}"),
                    Severity::Warning => tracing::warn!("{line}"),
                    Severity::Info => tracing::info!("{line}"),
                }
            }
            let mended = self.said.iter().filter(|line| !lines.contains(line)).count();
            if mended > 0 {
                tracing::info!(mended, left = lines.len(), "manifests mended");
            }
            self.said = lines;
        }
    }
}

/// Reads a directory once, without serving it.
///
/// # Errors
/// Never: what is wrong is in the reading.
pub fn read_once(root: &Path, addressing: &mut dyn cairn_manifest::Addressing) -> Reading {
    let loaded = Directory::new(root, MeshSettings::default()).read();
    let world = World::build(&loaded.objects, addressing, &loaded.settings);
    let mut diagnostics = loaded.diagnostics;
    diagnostics.extend(world.diagnostics.iter().cloned());
    diagnostics.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    Reading { world, objects: loaded.objects, settings: loaded.settings, diagnostics }
}

fn served(reading: &Reading) -> Served {
    let world = &reading.world;
    let all: Vec<ResourceName> = world.gateways.iter().map(|gateway| gateway.name.clone()).collect();
    let mut objects: Vec<cairn_xds::Object> = world
        .scoped
        .iter()
        .filter_map(|(index, gateways)| Some(to_wire(reading.objects.get(*index)?, gateways.clone())))
        .collect();
    // The settings go to everyone, in one form whether or not a manifest gives them.
    let settings = reading.objects.iter().find(|object| {
        object.kind == "ConfigMap"
            && &*object.name.name == "istio"
            && &*object.name.namespace == "istio-system"
    });
    objects.retain(|object| object.kind != "ConfigMap");
    if let Some(settings) = settings {
        let (group, version, kind) = SETTINGS_TYPE;
        let wire = to_wire(settings, all);
        let (group, version, kind) = (group.to_owned(), version.to_owned(), kind.to_owned());
        objects.push(cairn_xds::Object { group, version, kind, ..wire });
    }
    Served {
        workloads: world.workloads.clone(),
        services: world.services.clone(),
        authorizations: world.authorizations.clone(),
        objects,
    }
}

fn to_wire(object: &Object, gateways: Vec<ResourceName>) -> cairn_xds::Object {
    let mut annotations: BTreeMap<String, String> = object.annotations.clone();
    if let Some(reason) = &object.broken {
        annotations.insert(BROKEN.to_owned(), reason.to_string());
    }
    cairn_xds::Object {
        group: object.group.clone(),
        version: served_version(object).to_owned(),
        kind: object.kind.clone(),
        name: object.name.clone(),
        labels: object.labels.clone(),
        annotations,
        created: object.created.clone(),
        spec: object.spec.clone(),
        gateways,
    }
}

/// The version under which a kind is served: the older ones have the same schema.
fn served_version(object: &Object) -> &str {
    match &*object.group {
        "security.istio.io" | "telemetry.istio.io" | "gateway.networking.k8s.io" => "v1",
        "extensions.istio.io" => "v1alpha1",
        _ => &object.version,
    }
}

/// Makes a directory that only we can read, or tightens one that is there.
fn private_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .with_context(|| format!("cannot protect {}", path.display()))
}
