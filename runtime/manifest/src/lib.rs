//! Kubernetes, Istio and Gateway API manifests turned into the model; watches a directory.

mod codes;
mod decode;
mod diagnostic;
mod directory;
mod document;
mod field;
mod files;
mod kinds;
mod lint;
mod object;
mod reader;
#[cfg(test)]
mod testing;
mod watch;
mod world;

pub use codes::{CODES, Code};
pub use decode::{Decoded, decode, resource_key, written_mesh_config};
pub use diagnostic::{Diagnostic, DiagnosticView, Finding, Severity};
pub use directory::{Directory, Loaded};
pub use document::Position;
pub use field::{FieldPath, Step};
pub use lint::lint;
pub use object::{Object, ObjectId, Origin, Owner};
pub use watch::Watch;
pub use world::{Addressing, GatewayEntry, WaypointFor, World};
