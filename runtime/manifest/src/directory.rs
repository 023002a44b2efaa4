//! A directory of manifests: reads it again and again, and keeps what is good when an edit is not.

use crate::decode::decode;
use crate::diagnostic::{Diagnostic, Finding, Severity};
use crate::document::{BrokenDocument, Position, documents};
use crate::field::FieldPath;
use crate::files::{self, FILE_LEN_MAX};
use crate::object::{self, BrokenObject, Object, ObjectId, Origin};
use crate::{kinds, world};
use cairn_mesh::{Change, MeshSettings};
use serde_json::Value;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a directory holds now.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The objects in effect, in order of file and place, each name once.
    pub objects: Vec<Object>,
    /// The settings that the ConfigMap `istio` gives, over those the directory was made with.
    pub settings: MeshSettings,
    /// What is wrong within files and objects. What is wrong between objects is [`crate::World`]'s to say.
    pub diagnostics: Vec<Diagnostic>,
}

impl Loaded {
    /// What a text of manifests holds by itself, read once.
    pub fn from_text(text: &str, settings: MeshSettings) -> Self {
        let file = parse(Path::new("text.yaml"), text, 0);
        let mut diagnostics = file.diagnostics;
        let objects = unique(file.objects.iter(), &mut diagnostics);
        let settings = mesh_settings(&objects, &settings);
        Self { objects, settings, diagnostics }
    }
}

/// A directory of manifests.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    settings: MeshSettings,
    files: BTreeMap<PathBuf, File>,
    /// What was in effect after the last read.
    held: BTreeMap<ObjectId, Object>,
}

/// What a file held when it was last read.
#[derive(Clone, Debug, Default)]
struct File {
    hash: u64,
    objects: Vec<Object>,
    diagnostics: Vec<Diagnostic>,
    /// Every document in it could be read and named.
    clean: bool,
}

impl Directory {
    /// The directory (or single file) at `root`, with the settings that hold where its manifests say nothing.
    pub fn new(root: impl Into<PathBuf>, settings: MeshSettings) -> Self {
        Self { root: root.into(), settings, files: BTreeMap::new(), held: BTreeMap::new() }
    }

    /// Reads the directory. Only files whose content changed are parsed again.
    ///
    /// Objects apply one by one. An object that is no longer good stays as it last was, and one that was never good
    /// comes out as it is, so that what it guards can be refused. An object that is gone stays until every file can
    /// be read, for it may be in one that cannot.
    pub fn read(&mut self) -> Loaded {
        let (mut diagnostics, clean) = self.read_files();
        let objects = unique(self.files.values().flat_map(|file| &file.objects), &mut diagnostics);
        let settings = mesh_settings(&objects, &self.settings);
        let mut loaded = Loaded { objects: Vec::with_capacity(objects.len()), settings, diagnostics };
        let mut held = std::mem::take(&mut self.held);
        for object in objects {
            let previous = held.remove(&object.id());
            let object = checked(object, previous, &loaded.settings, &mut loaded.diagnostics);
            loaded.objects.push(object);
        }
        if !clean && !held.is_empty() {
            let reason =
                format!("{} objects are gone and stay in effect until every file can be read", held.len());
            let root = Arc::from(self.root.as_path());
            loaded.diagnostics.push(Diagnostic::file(Severity::Warning, "kept", root, reason));
            loaded.objects.extend(held.into_values());
        }
        self.held = loaded.objects.iter().map(|object| (object.id(), object.clone())).collect();
        loaded
    }

    /// Brings `files` up to date. Returns what is wrong with them, and whether nothing is.
    fn read_files(&mut self) -> (Vec<Diagnostic>, bool) {
        let listing = files::list(&self.root);
        let mut clean = listing.failed.is_empty();
        let mut diagnostics: Vec<Diagnostic> =
            listing.failed.iter().map(|(path, error)| unreadable(path, &error.to_string())).collect();
        let mut previous = std::mem::take(&mut self.files);
        for path in listing.files {
            let before = previous.remove(&path);
            match read_text(&path) {
                Ok(text) => {
                    let hash = hash(&text);
                    let file =
                        before.filter(|file| file.hash == hash).unwrap_or_else(|| parse(&path, &text, hash));
                    clean &= file.clean;
                    diagnostics.extend(file.diagnostics.iter().cloned());
                    self.files.insert(path, file);
                }
                Err(reason) => {
                    clean = false;
                    diagnostics.push(unreadable(&path, &reason));
                    self.files.insert(path, before.unwrap_or_default());
                }
            }
        }
        (diagnostics, clean)
    }
}

fn unreadable(path: &Path, reason: &str) -> Diagnostic {
    Diagnostic::file(Severity::Error, "unreadable", path.into(), format!("cannot be read: {reason}"))
}

fn read_text(path: &Path) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    file.take(FILE_LEN_MAX + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_LEN_MAX {
        return Err(format!("it is longer than {FILE_LEN_MAX} bytes"));
    }
    Ok(text)
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn parse(path: &Path, text: &str, hash: u64) -> File {
    let name: Arc<Path> = path.into();
    let mut file = File { hash, clean: true, ..File::default() };
    for document in documents(text) {
        match document {
            Ok(document) => {
                for found in object::objects(document, &name) {
                    match found {
                        Ok(object) => file.objects.push(with_paths(object, path)),
                        Err(broken) => file.add_broken_object(&name, broken),
                    }
                }
            }
            Err(broken) => file.add_broken_text(&name, broken),
        }
    }
    file
}

impl File {
    fn add_broken_object(&mut self, name: &Arc<Path>, broken: BrokenObject) {
        self.clean = false;
        if let (Some(id), Some((finding, position))) = (broken.id, broken.findings.first()) {
            self.add_nameplate(id, finding.to_string(), name, position.clone());
        }
        for (finding, position) in broken.findings {
            self.diagnostics.push(unnamed(name, &finding, position.find(&finding.field)));
        }
    }

    fn add_broken_text(&mut self, name: &Arc<Path>, broken: BrokenDocument<'_>) {
        self.clean = false;
        let mut diagnostic =
            Diagnostic::file(Severity::Error, "bad-yaml", Arc::clone(name), broken.reason.clone());
        (diagnostic.line, diagnostic.column) = (broken.line, broken.column);
        if let Some(id) = object::sniff(broken.text) {
            diagnostic.object = Some(format!("{} {}", id.kind, id.name));
            self.add_nameplate(id, broken.reason, name, Position::point(broken.line, broken.column));
        }
        self.diagnostics.push(diagnostic);
    }

    /// Adds what is known of an object that cannot be read, if it guards anything.
    fn add_nameplate(&mut self, id: ObjectId, reason: String, file: &Arc<Path>, position: Position) {
        if kinds::is_guard(&id) {
            let line = position.line() as usize;
            let origin = Origin { file: Arc::clone(file), line, position: Arc::new(position) };
            self.objects.push(nameplate(id, reason, origin));
        }
    }
}

fn unnamed(file: &Arc<Path>, finding: &Finding, (line, column): (u32, u32)) -> Diagnostic {
    let mut diagnostic =
        Diagnostic::file(finding.severity, finding.code, Arc::clone(file), finding.reason.clone());
    diagnostic.field = finding.field.to_string();
    (diagnostic.line, diagnostic.column) = (line, column);
    diagnostic
}

/// An object of which only the name is known.
fn nameplate(id: ObjectId, reason: String, origin: Origin) -> Object {
    Object {
        group: id.group,
        version: String::new(),
        kind: id.kind,
        name: id.name,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created: String::new(),
        owner: None,
        spec: Value::Null,
        broken: Some(reason.into()),
        origin: Some(origin),
    }
}

/// Makes `file://./…` and `file://../…` of a WasmPlugin relative to its manifest, so that an example works wherever
/// it is checked out.
fn with_paths(mut object: Object, file: &Path) -> Object {
    if !object.is("extensions.istio.io", "WasmPlugin") {
        return object;
    }
    let Some(Value::String(url)) = object.spec.get_mut("url") else { return object };
    let relative =
        url.strip_prefix("file://").filter(|path| path.starts_with("./") || path.starts_with("../"));
    let base = file.parent().and_then(|parent| std::path::absolute(parent).ok());
    if let Some((relative, base)) = relative.zip(base) {
        *url = format!("file://{}", base.join(relative).display());
    }
    object
}

/// Each name once: the first stays.
fn unique<'a>(objects: impl Iterator<Item = &'a Object>, diagnostics: &mut Vec<Diagnostic>) -> Vec<Object> {
    let mut first: BTreeMap<ObjectId, &Object> = BTreeMap::new();
    let mut kept = Vec::new();
    for object in objects {
        match first.get(&object.id()) {
            None => {
                first.insert(object.id(), object);
                kept.push(object.clone());
            }
            Some(earlier) => {
                let at = earlier.origin.as_ref().map_or_else(String::new, |origin| {
                    format!(" at {}:{}", origin.file.display(), origin.line)
                });
                let finding = Finding {
                    severity: Severity::Error,
                    code: "duplicate-object",
                    field: FieldPath::root(),
                    reason: format!("is there already{at}: this one has no effect"),
                };
                diagnostics.push(Diagnostic::at(object, &finding));
            }
        }
    }
    kept
}

/// The settings that `objects` give, over `base`.
fn mesh_settings(objects: &[Object], base: &MeshSettings) -> MeshSettings {
    let changes = objects
        .iter()
        .filter(|object| object.is("", "ConfigMap"))
        .flat_map(|object| decode(object, base).changes);
    let settings = changes.filter_map(|change| match change {
        Change::Settings(settings) => Some(settings),
        _ => None,
    });
    settings.last().unwrap_or_else(|| base.clone())
}

/// The object to be in effect: `object`, or `previous` when `object` is broken and `previous` is not.
fn checked(
    object: Object,
    previous: Option<Object>,
    settings: &MeshSettings,
    diagnostics: &mut Vec<Diagnostic>,
) -> Object {
    let (findings, broken) = check(&object, settings);
    diagnostics.extend(findings.iter().map(|finding| Diagnostic::at(&object, finding)));
    if !broken {
        return object;
    }
    let is_good = |object: &Object| !check(object, settings).1;
    let (kept, consequence) = match previous.filter(is_good) {
        Some(previous) => (previous, "the last good version stays in effect"),
        None if kinds::is_guard(&object.id()) => (object, "what it guards is refused"),
        None => (object, "it has no effect"),
    };
    let finding = Finding {
        severity: Severity::Error,
        code: "not-applied",
        field: FieldPath::root(),
        reason: format!("cannot be applied as written: {consequence}"),
    };
    diagnostics.push(Diagnostic::at(&kept, &finding));
    kept
}

/// What is wrong within an object, and whether it makes it unusable.
fn check(object: &Object, settings: &MeshSettings) -> (Vec<Finding>, bool) {
    let decoded = decode(object, settings);
    let (mut findings, mut broken) = (decoded.findings, decoded.broken);
    if object.broken.is_none() {
        let more = world::check(object, settings);
        broken |= more.broken;
        findings.extend(more.list);
        findings.extend(kinds::unread(object));
    }
    let mut seen = BTreeSet::new();
    findings.retain(|finding| seen.insert((finding.field.clone(), finding.code)));
    (findings, broken)
}

#[cfg(test)]
#[path = "directory/tests.rs"]
mod tests;
