//! The control plane of one directory: its manifests, read again when they change, served over xDS with a CA.

use crate::addresses::Addresses;
use anyhow::{Context, Result};
use cairn_identity::Authority;
use cairn_manifest::{
    Diagnostic, Directory, FieldPath, Finding, Loaded, Object, Severity, World, written_mesh_config,
};
use cairn_mesh::{Change, MeshSettings, PathNormalization, ResourceName, Store, TunnelProtocol};
use cairn_xds::{Mesh, Role, Served, Server, Tokens};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The type under which the mesh's settings travel.
const SETTINGS_TYPE: (&str, &str, &str) = ("mesh.istio.io", "v1alpha1", "MeshConfig");

/// A node's name is part of the names of files, which end at 255 bytes.
const NODE_BYTES_MAX: usize = 200;

/// Gives no addresses: what a manifest does not say has none.
pub struct AsWritten;

impl cairn_manifest::Addressing for AsWritten {
    fn pod(&mut self, _namespace: &str, _name: &str) -> Option<IpAddr> {
        None
    }

    fn service(&mut self, _namespace: &str, _name: &str) -> Option<IpAddr> {
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
    /// The trust domain that the CA is for.
    trust_domain: Arc<str>,
    tokens: Tokens,
    minted: BTreeMap<String, Minted>,
    root: Arc<Path>,
    state: PathBuf,
    said: Vec<String>,
}

/// A token that is valid.
struct Minted {
    token: String,
    role: Role,
    file: PathBuf,
}

/// What a directory holds now.
pub struct Reading {
    /// The mesh it describes.
    pub world: World,
    /// Its objects.
    pub objects: Vec<Object>,
    /// Its settings.
    pub settings: MeshSettings,
    /// The nodes that need a ztunnel, and its address for operators.
    pub ztunnels: BTreeMap<String, IpAddr>,
    /// What is wrong with it, in order of file and line.
    pub diagnostics: Vec<Diagnostic>,
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
            trust_domain,
            tokens,
            minted: BTreeMap::new(),
            root: root.into(),
            state: state.to_owned(),
            said: Vec::new(),
        })
    }

    /// The file of the root certificate, for proxies.
    pub fn root_file(&self) -> PathBuf {
        self.state.join("root.pem")
    }

    /// Mints a token for a role and returns its file. While the role is the same, so is the token.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn token(&mut self, name: &str, role: Role) -> Result<PathBuf> {
        if let Some(minted) = self.minted.get(name)
            && minted.role == role
        {
            return Ok(minted.file.clone());
        }
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
        self.tokens.insert(token.clone(), role.clone());
        let before = self.minted.insert(name.to_owned(), Minted { token, role, file: file.clone() });
        if let Some(before) = before {
            self.tokens.remove(&before.token);
        }
        Ok(file)
    }

    /// Makes every token invalid whose name is no longer in use.
    pub fn retain_tokens(&mut self, is_used: impl Fn(&str) -> bool) {
        self.minted.retain(|name, minted| {
            let keep = is_used(name);
            if !keep {
                self.tokens.remove(&minted.token);
                // The token in it is worth nothing any more.
                let _gone = std::fs::remove_file(&minted.file);
            }
            keep
        });
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
        let mut loaded = self.directory.read();
        self.hold_trust_domain(&mut loaded);
        let Loaded { objects, settings, mut diagnostics } = loaded;
        let (world, ztunnels) = match &mut self.addressing {
            Addressing::Block(addresses) => {
                addresses.keep_clear_of(written(&World::build(&objects, &mut AsWritten, &settings)));
                let world = World::build(&objects, addresses, &settings);
                let ztunnels = ztunnels(&world, &objects, &self.root, addresses, &mut diagnostics);
                addresses.save()?;
                (world, ztunnels)
            }
            Addressing::AsWritten(nothing) => (World::build(&objects, nothing, &settings), BTreeMap::new()),
        };
        diagnostics.extend(world.diagnostics.iter().cloned());
        sort(&mut diagnostics);
        let reading = Reading { world, objects, settings, ztunnels, diagnostics };
        self.publish_here(&reading);
        Ok(reading)
    }

    /// The CA is made for one trust domain, so that stays in force while this process lives.
    fn hold_trust_domain(&self, loaded: &mut Loaded) {
        let new = std::mem::replace(&mut loaded.settings.trust_domain, Arc::clone(&self.trust_domain));
        if new != self.trust_domain {
            let reason = format!(
                "trust domain `{new}` takes effect when the mesh is started again; `{}` stays in force",
                self.trust_domain
            );
            let object = loaded.objects.iter().find(|object| is_settings(object));
            let at = FieldPath::of(&["data", "mesh"]);
            loaded.diagnostics.push(finding(object, &self.root, "needs-restart", at, reason));
        }
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
    sort(&mut diagnostics);
    let (objects, settings) = (loaded.objects, loaded.settings);
    Reading { world, objects, settings, ztunnels: BTreeMap::new(), diagnostics }
}

fn sort(diagnostics: &mut [Diagnostic]) {
    diagnostics.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
}

/// Whether an object holds the mesh's settings.
fn is_settings(object: &Object) -> bool {
    let name = &object.name;
    object.is("", "ConfigMap") && &*name.name == "istio" && &*name.namespace == "istio-system"
}

/// An error about an object, or about the whole directory when no object is to blame.
fn finding(
    object: Option<&Object>,
    root: &Arc<Path>,
    code: &'static str,
    field: FieldPath,
    reason: String,
) -> Diagnostic {
    let severity = Severity::Error;
    match object {
        Some(object) => Diagnostic::at(object, &Finding { severity, code, field, reason }),
        None => {
            let (file, field) = (Arc::clone(root), String::new());
            Diagnostic { severity, file, line: 0, column: 0, object: None, field, reason, code, fix: None }
        }
    }
}

/// The addresses that manifests give to pods and services, known from a world in which nothing else has any. An
/// EndpointSlice does not give an address, it refers to one.
fn written(world: &World) -> Vec<IpAddr> {
    let pods = world.workloads.iter().filter(|workload| workload.uid.contains("//Pod/"));
    let pods = pods.flat_map(|workload| workload.addresses.iter().copied());
    pods.chain(world.services.iter().flat_map(|service| service.vips.iter().map(|vip| vip.address))).collect()
}

/// The nodes with pods that need a ztunnel, and its address. A node that cannot have one is reported.
fn ztunnels(
    world: &World,
    objects: &[Object],
    root: &Arc<Path>,
    addresses: &mut Addresses,
    diagnostics: &mut Vec<Diagnostic>,
) -> BTreeMap<String, IpAddr> {
    let captured = world
        .workloads
        .iter()
        .filter(|workload| workload.protocol == TunnelProtocol::Hbone && !workload.native_tunnel);
    let nodes: BTreeSet<&str> = captured.map(|workload| &*workload.node).collect();
    let (good, bad): (BTreeSet<&str>, BTreeSet<&str>) =
        nodes.into_iter().partition(|node| is_node_name(node));
    let given = addresses.nodes(&good);
    let mut report = |node: &str, code, reason: &str| {
        let (object, at) = placed_on(objects, node).unzip();
        let reason = format!("node `{node}` {reason}: it has no ztunnel");
        diagnostics.push(finding(object, root, code, at.unwrap_or_else(FieldPath::root), reason));
    };
    for node in bad {
        report(node, "invalid-value", "is not a DNS name of at most 200 bytes");
    }
    for node in good.into_iter().filter(|node| !given.contains_key(*node)) {
        report(node, "no-address", "is one more than there are addresses");
    }
    given
}

/// The object that puts a pod on a node, and where it says so.
fn placed_on<'a>(objects: &'a [Object], node: &str) -> Option<(&'a Object, FieldPath)> {
    const PLACES: [&[&str]; 2] = [&["spec", "nodeName"], &["spec", "template", "spec", "nodeName"]];
    objects.iter().find_map(|object| {
        let place = PLACES.into_iter().find(|place| {
            let found = place.iter().try_fold(&object.spec, |value, key| value.get(key));
            found.and_then(serde_json::Value::as_str) == Some(node)
        })?;
        Some((object, FieldPath::of(place)))
    })
}

/// Whether a node's name is a DNS name (RFC 1123), as Kubernetes wants it.
fn is_node_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !label.is_empty() && label.bytes().all(inside) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= NODE_BYTES_MAX && name.split('.').all(is_label)
}

fn served(reading: &Reading) -> Served {
    let world = &reading.world;
    let all: Vec<ResourceName> = world.gateways.iter().map(|gateway| gateway.name.clone()).collect();
    let scoped = world.scoped.iter();
    let scoped = scoped.filter_map(|(index, gateways)| Some((reading.objects.get(*index)?, gateways)));
    let mut objects: Vec<cairn_xds::Object> = scoped
        .filter(|(object, _)| !is_settings(object) && object.kind != SETTINGS_TYPE.2)
        .map(|(object, gateways)| to_wire(object, gateways.clone()))
        .collect();
    let written = reading.objects.iter().filter(|object| is_settings(object)).find_map(written_mesh_config);
    objects.push(settings_to_wire(&reading.settings, written, all));
    Served {
        workloads: world.workloads.clone(),
        services: world.services.clone(),
        authorizations: world.authorizations.clone(),
        objects,
    }
}

/// The settings go to everyone, in one form whether or not a manifest gives them: as `written`, with those fields that
/// this control plane lives by as they are in force here. So what a manifest no longer says returns to its default.
fn settings_to_wire(
    settings: &MeshSettings,
    written: Option<Value>,
    gateways: Vec<ResourceName>,
) -> cairn_xds::Object {
    let (group, version, kind) = SETTINGS_TYPE;
    let normalization = match settings.path_normalization {
        PathNormalization::None => "NONE",
        PathNormalization::Base => "BASE",
        PathNormalization::MergeSlashes => "MERGE_SLASHES",
        PathNormalization::DecodeAndMergeSlashes => "DECODE_AND_MERGE_SLASHES",
    };
    let mut spec = written.unwrap_or_else(|| json!({}));
    spec["trustDomain"] = json!(&*settings.trust_domain);
    spec["rootNamespace"] = json!(&*settings.root_namespace);
    spec["pathNormalization"] = json!({ "normalization": normalization });
    cairn_xds::Object {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: kind.to_owned(),
        name: ResourceName::new("istio-system", "istio"),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created: String::new(),
        spec,
        gateways,
    }
}

fn to_wire(object: &Object, gateways: Vec<ResourceName>) -> cairn_xds::Object {
    let mut annotations: BTreeMap<String, String> = object.annotations.clone();
    if let Some(reason) = &object.broken {
        annotations.insert(cairn_waypoint::BROKEN.to_owned(), reason.to_string());
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
        "security.istio.io" | "telemetry.istio.io" | "networking.istio.io" | "gateway.networking.k8s.io" => {
            "v1"
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::Block;

    const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Pod
metadata: { name: a, namespace: shop }
spec: { nodeName: node-1 }
---
apiVersion: v1
kind: Pod
metadata: { name: b, namespace: shop }
spec:
  nodeName: ../node
";

    fn settings(mesh: &str) -> String {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: istio, namespace: istio-system }}\n\
             data: {{ mesh: '{mesh}' }}\n"
        )
    }

    /// A control plane of these manifests, by file name.
    fn control(files: &[(&str, &str)]) -> (tempfile::TempDir, Control) {
        let home = tempfile::tempdir().unwrap();
        let manifests = home.path().join("manifests");
        std::fs::create_dir(&manifests).unwrap();
        for (name, text) in files {
            std::fs::write(manifests.join(name), text).unwrap();
        }
        let state = home.path().join("state");
        private_directory(&state).unwrap();
        let addresses = Addresses::open(&state, Block::loopback(10).unwrap()).unwrap();
        let control = Control::open(&manifests, &state, Addressing::Block(addresses), None).unwrap();
        (home, control)
    }

    fn served_settings(reading: &Reading) -> serde_json::Value {
        let objects = served(reading).objects;
        let mut found = objects.into_iter().filter(|object| object.kind == "MeshConfig");
        let settings = found.next().unwrap();
        assert!(found.next().is_none(), "settings are served once");
        settings.spec
    }

    #[test]
    fn a_node_that_cannot_be_is_reported_and_others_go_on() {
        let (_home, mut control) = control(&[("pods.yaml", PODS)]);
        let reading = control.read().unwrap();
        let ztunnels: Vec<String> =
            reading.ztunnels.iter().map(|(node, address)| format!("{node} {address}")).collect();
        assert_eq!(ztunnels, ["node-1 127.10.0.2"]);
        let told: Vec<String> = reading.diagnostics.iter().map(ToString::to_string).collect();
        let [told] = told.as_slice() else { panic!("{told:?}") };
        assert!(told.contains("pods.yaml:15:"), "{told}");
        assert!(told.contains("Pod shop/b: spec.nodeName: node `../node` is not a DNS name"), "{told}");
    }

    #[test]
    fn node_names_are_dns_names() {
        let long = "a".repeat(NODE_BYTES_MAX + 1);
        for (name, expected) in [
            ("node", true),
            ("ip-10-0-0-1.eu.internal", true),
            ("", false),
            ("..", false),
            ("a/b", false),
            ("Node", false),
            ("-a", false),
            (&long, false),
        ] {
            assert_eq!(is_node_name(name), expected, "{name:?}");
        }
    }

    #[test]
    fn settings_that_only_proxies_read_are_served_as_written() {
        let written = settings(
            "trustDomainAliases: [old]\n\n        extensionProviders: [{ name: a, prometheus: {} }]",
        );
        let (_home, mut control) = control(&[("pods.yaml", PODS), ("settings.yaml", &written)]);
        let served = served_settings(&control.read().unwrap());
        assert_eq!(served["trustDomainAliases"], json!(["old"]));
        assert_eq!(served["extensionProviders"][0]["name"], "a");
        assert_eq!(served["trustDomain"], "cluster.local");
    }

    #[test]
    fn the_trust_domain_holds_and_other_settings_follow() {
        let before = settings("trustDomain: a.local\n\n        rootNamespace: r");
        let (home, mut control) = control(&[("pods.yaml", PODS), ("settings.yaml", &before)]);
        let served = |domain: &str, root: &str, mode: &str| {
            serde_json::json!({ "trustDomain": domain, "rootNamespace": root,
                "pathNormalization": { "normalization": mode } })
        };
        let reading = control.read().unwrap();
        assert_eq!(served_settings(&reading), served("a.local", "r", "BASE"));
        let file = home.path().join("manifests/settings.yaml");
        std::fs::write(
            &file,
            settings("trustDomain: b.local\n\n        pathNormalization: { normalization: NONE }"),
        )
        .unwrap();
        let reading = control.read().unwrap();
        assert_eq!(served_settings(&reading), served("a.local", "istio-system", "NONE"));
        let workload = reading.world.workloads.first().unwrap();
        assert_eq!(workload.identity.to_string(), "spiffe://a.local/ns/shop/sa/default");
        let restart = |reading: &Reading| {
            let told = reading.diagnostics.iter().find(|one| one.code == "needs-restart").unwrap();
            told.to_string()
        };
        let told = restart(&reading);
        assert!(told.contains("settings.yaml:") && told.contains("`b.local`"), "{told}");
        // Without the manifest all but the trust domain returns to its default.
        std::fs::remove_file(&file).unwrap();
        let reading = control.read().unwrap();
        assert_eq!(served_settings(&reading), served("a.local", "istio-system", "BASE"));
        assert!(restart(&reading).contains("`cluster.local`"), "{}", restart(&reading));
    }

    #[test]
    fn a_token_goes_with_its_role() {
        let (_home, mut control) = control(&[("pods.yaml", PODS)]);
        let mut minted = |node: &str| {
            let file = control.token("proxy", Role::Ztunnel { node: node.to_owned() }).unwrap();
            (std::fs::read_to_string(&file).unwrap(), file)
        };
        let (first, again, other) = (minted("a"), minted("a"), minted("b"));
        assert_eq!(first, again, "the same role");
        assert_ne!(first.0, other.0, "another role");
        control.retain_tokens(|name| name != "proxy");
        assert!(!other.1.exists(), "nobody uses it");
        assert!(control.minted.is_empty());
    }
}
