//! Reading a directory again and again while it is edited.

use super::*;
use crate::World;
use crate::testing::short_placed;
use std::fs;
use tempfile::TempDir;

const POLICY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: web}]
  rules: [{to: [{operation: {methods: [GET]}}]}]
";
const BROKEN_FIELD: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: web}]
  rules: [{to: [{operation: {method: [GET]}}]}]
";
const BROKEN_TEXT: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: p
  namespace: shop
spec:
  rules: [
";
const SERVICE: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{port: 80}]}\n";

struct Edited {
    place: TempDir,
    directory: Directory,
}

impl Edited {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::new(place.path(), MeshSettings::default());
        Self { place, directory }
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.place.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.place.path().join(name)).unwrap();
    }

    /// Objects, and diagnostics as short lines.
    fn read(&mut self) -> (Vec<String>, Vec<String>) {
        let loaded = self.directory.read();
        let objects = loaded.objects.iter().map(ToString::to_string).collect();
        (objects, loaded.diagnostics.iter().map(short_placed).collect())
    }

    fn change(&mut self) -> Change {
        let loaded = self.directory.read();
        let policy = loaded.objects.iter().find(|object| object.kind == "AuthorizationPolicy").unwrap();
        decode(policy, &loaded.settings).changes.remove(0)
    }
}

const NONE: [&str; 0] = [];

#[test]
fn manifests_are_found_in_any_depth() {
    let mut edited = Edited::new();
    edited.write("a.yaml", SERVICE);
    edited.write("deep/er/b.yml", &SERVICE.replace("web", "two"));
    edited.write("c.json", r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "three"}}"#);
    edited.write("notes.txt", "not: [a manifest");
    edited.write(".hidden/d.yaml", "not: [a manifest");
    edited.write("empty.yaml", "# nothing\n---\n");
    let (objects, said) = edited.read();
    assert_eq!(objects, ["Service shop/web", "Service default/three", "Service shop/two"]);
    assert_eq!(said, NONE);
}

#[test]
fn one_file_can_stand_for_a_directory() {
    let edited = Edited::new();
    edited.write("a.yaml", SERVICE);
    let loaded = Directory::new(edited.place.path().join("a.yaml"), MeshSettings::default()).read();
    assert_eq!(loaded.objects.len(), 1);
}

#[test]
fn a_diagnostic_names_file_line_column_and_field() {
    let mut edited = Edited::new();
    edited.write("a.yaml", &format!("{SERVICE}---\n{BROKEN_FIELD}"));
    let loaded = edited.directory.read();
    let diagnostic = &loaded.diagnostics[0];
    assert_eq!(
        diagnostic.to_string(),
        format!(
            "{}:11:30: error: AuthorizationPolicy shop/p: spec.rules[0].to[0].operation.method: unknown field; known are \
             hosts, notHosts, ports, notPorts, methods, notMethods, paths, notPaths [unknown-field]",
            edited.place.path().join("a.yaml").display()
        )
    );
    let view = serde_json::to_value(diagnostic.view()).unwrap();
    assert_eq!(
        (&view["line"], &view["column"], &view["severity"]),
        (&11.into(), &30.into(), &"error".into())
    );
    assert_eq!(view["field"], "spec.rules[0].to[0].operation.method");
}

#[test]
fn a_new_policy_that_is_broken_refuses_its_target() {
    let label = &POLICY.replace("namespace: shop}", "namespace: shop, labels: {a: true}}");
    for (name, text, targets) in
        [("field", BROKEN_FIELD, 1), ("text", BROKEN_TEXT, 0), ("metadata", label, 0)]
    {
        let mut edited = Edited::new();
        edited.write("a.yaml", text);
        let Change::Unenforceable(_, refusal) = edited.change() else { panic!("{name}") };
        assert_eq!((refusal.targets.len(), &*refusal.namespace), (targets, "shop"), "{name}");
        let said = edited.directory.read().diagnostics;
        assert!(
            said.iter().all(|diagnostic| diagnostic.line > 0 && diagnostic.file.ends_with("a.yaml")),
            "{said:?}"
        );
    }
}

#[test]
fn a_policy_that_becomes_broken_stays_as_it_was() {
    for (name, text) in [("field", BROKEN_FIELD), ("text", BROKEN_TEXT)] {
        let mut edited = Edited::new();
        edited.write("a.yaml", POLICY);
        assert!(matches!(edited.change(), Change::Policy(_)), "{name}");
        for _ in 0..2 {
            edited.write("a.yaml", text);
            assert!(matches!(edited.change(), Change::Policy(_)), "{name}");
        }
        let said = edited.read().1;
        assert!(said.iter().any(|line| line.contains("not-applied")), "{name}: {said:?}");
        edited.write("a.yaml", &POLICY.replace("GET", "PUT"));
        assert_eq!(edited.read().1, NONE, "{name}: mended");
        assert!(matches!(edited.change(), Change::Policy(policy)
            if policy.rules[0].to[0].methods.any == [cairn_mesh::TextMatch::parse("PUT")]));
    }
}

#[test]
fn a_policy_that_was_never_good_does_not_count_as_last_good() {
    let mut edited = Edited::new();
    edited.write("a.yaml", BROKEN_FIELD);
    edited.read();
    edited.write("a.yaml", BROKEN_TEXT);
    assert!(matches!(edited.change(), Change::Unenforceable(..)));
}

#[test]
fn what_is_gone_stays_until_everything_can_be_read() {
    let mut edited = Edited::new();
    edited.write("a.yaml", SERVICE);
    edited.write("b.yaml", &SERVICE.replace("web", "two"));
    edited.read();
    edited.remove("a.yaml");
    edited.write("b.yaml", "apiVersion: v1\nkind: [\n");
    let (objects, said) = edited.read();
    assert_eq!(objects, ["Service shop/two", "Service shop/web"]);
    assert_eq!(said.len(), 2, "the broken text, and what is kept: {said:?}");
    assert!(said[1].contains("warning kept"));
    edited.write("b.yaml", &SERVICE.replace("web", "two"));
    assert_eq!(edited.read(), (vec!["Service shop/two".to_owned()], vec![]));
    edited.remove("b.yaml");
    assert_eq!(edited.read().0, NONE);
}

#[test]
fn a_broken_document_leaves_the_others_of_its_file_in_effect() {
    let mut edited = Edited::new();
    edited.write("a.yaml", &format!("{SERVICE}---\n{BROKEN_TEXT}---\n{}", SERVICE.replace("web", "two")));
    let (objects, said) = edited.read();
    assert_eq!(objects, ["Service shop/web", "AuthorizationPolicy shop/p", "Service shop/two"]);
    assert!(said[0].contains("error bad-yaml"), "{said:?}");
}

#[test]
fn an_object_that_moves_to_another_file_is_the_same() {
    let mut edited = Edited::new();
    edited.write("a.yaml", POLICY);
    edited.read();
    edited.remove("a.yaml");
    edited.write("z.yaml", POLICY);
    assert_eq!(edited.read(), (vec!["AuthorizationPolicy shop/p".to_owned()], vec![]));
}

#[test]
fn the_first_of_two_objects_with_one_name_stays() {
    let mut edited = Edited::new();
    edited.write("a.yaml", SERVICE);
    edited.write("b.yaml", &format!("# second\n{SERVICE}"));
    let loaded = edited.directory.read();
    assert_eq!(loaded.objects.len(), 1);
    assert_eq!(short_placed(&loaded.diagnostics[0]), "2:1 error duplicate-object ");
    assert!(loaded.diagnostics[0].reason.contains("a.yaml:1"), "{}", loaded.diagnostics[0]);
}

#[test]
fn kinds_that_are_not_read_are_told() {
    let mut edited = Edited::new();
    let kind = |group: &str, kind: &str| {
        format!("---\napiVersion: {group}v1\nkind: {kind}\nmetadata: {{name: x}}\n")
    };
    edited.write(
        "a.yaml",
        &[
            kind("batch/", "Job"),
            kind("networking.istio.io/", "DestinationRule"),
            kind("telemetry.istio.io/", "Telemetry"),
            kind("", "ConfigMap"),
            kind("", "ServiceAccount"),
        ]
        .concat(),
    );
    let (objects, said) = edited.read();
    assert_eq!(objects.len(), 5);
    assert_eq!(said, ["2:1 info unknown-kind ", "6:1 warning not-supported "]);
}

#[test]
fn settings_of_the_mesh_hold_for_what_is_read_with_them() {
    let mut edited = Edited::new();
    let target = "{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}";
    edited.write("a.yaml", &POLICY.replace("{kind: Service, name: web}", target));
    assert!(edited.read().1[0].contains("invalid-value spec.targetRefs[0]"), "not in the root namespace");
    edited.write("b.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: \"rootNamespace: shop\"}\n");
    assert_eq!(edited.read().1, NONE);
    assert_eq!(&*edited.directory.read().settings.root_namespace, "shop");
}

#[test]
fn modules_beside_their_manifest_are_found() {
    let mut edited = Edited::new();
    let plugin = "apiVersion: extensions.istio.io/v1alpha1\nkind: WasmPlugin\nmetadata: {name: p, namespace: shop}\nspec: \
                  {url: \"file://./p.wasm\", targetRefs: [{kind: Service, name: web}]}\n";
    edited.write("sub/a.yaml", plugin);
    let loaded = edited.directory.read();
    let Change::Plugin(plugin) = decode(&loaded.objects[0], &loaded.settings).changes.remove(0) else {
        panic!()
    };
    let expected = format!("file://{}", edited.place.path().join("sub/./p.wasm").display());
    assert_eq!(&*plugin.url, expected);
}

#[test]
fn a_missing_directory_is_told_and_empties_nothing() {
    let mut edited = Edited::new();
    edited.write("sub/a.yaml", SERVICE);
    let root = edited.place.path().join("sub");
    edited.directory = Directory::new(&root, MeshSettings::default());
    assert_eq!(edited.read().0, ["Service shop/web"]);
    fs::rename(&root, edited.place.path().join("away")).unwrap();
    let (objects, said) = edited.read();
    assert_eq!(objects, ["Service shop/web"]);
    assert!(said[0].contains("error unreadable"), "{said:?}");
}

/// Gives every pod and service the address of a counter.
struct Counter(u32);

impl crate::Addressing for Counter {
    fn pod(&mut self, _: &str, _: &str) -> Option<std::net::IpAddr> {
        self.0 += 1;
        Some(std::net::Ipv4Addr::from(0x0a00_0000 + self.0).into())
    }

    fn service(&mut self, namespace: &str, name: &str) -> Option<std::net::IpAddr> {
        self.pod(namespace, name)
    }
}

#[test]
fn a_whole_shop_is_read_without_a_word() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bookshop");
    let loaded = Directory::new(root, MeshSettings::default()).read();
    assert_eq!(loaded.diagnostics, []);
    let world = World::build(&loaded.objects, &mut Counter(0), &loaded.settings);
    let said: Vec<String> = world.diagnostics.iter().map(ToString::to_string).collect();
    assert_eq!(said, NONE);
    assert_eq!(&*loaded.settings.trust_domain, "books.example");
    let names = |list: Vec<String>| list.join(" ");
    assert_eq!(
        names(world.workloads.iter().map(|workload| workload.name.to_string()).collect()),
        "catalog-0 catalog-1 front-0 ratings-0 reviews-v1-0 reviews-v2-0 shop-waypoint-0 visitor"
    );
    assert_eq!(
        names(
            world
                .services
                .iter()
                .filter(|service| service.waypoint.is_some())
                .map(|s| s.name.to_string())
                .collect()
        ),
        "catalog ratings reviews reviews-v1 reviews-v2"
    );
    assert_eq!(
        names(world.authorizations.iter().map(|policy| policy.name.to_string()).collect()),
        "bookshop/only-through-the-waypoint istio-system/istio_converted_static_strict"
    );
    let scoped: Vec<String> =
        world.scoped.iter().map(|(index, _)| loaded.objects[*index].to_string()).collect();
    assert_eq!(
        names(scoped),
        "ConfigMap istio-system/istio Gateway bookshop/shop-waypoint WasmPlugin bookshop/tag \
         AuthorizationPolicy bookshop/catalog-readers AuthorizationPolicy bookshop/no-secrets HTTPRoute bookshop/reviews"
    );
}
