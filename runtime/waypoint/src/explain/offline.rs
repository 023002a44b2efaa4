//! A waypoint that is not running, made from manifests.

use super::Place;
use crate::keys::Keyring;
use crate::plugins::{PluginSource, Standing};
use crate::scope::Own;
use crate::sites::Sites;
use cairn_builtin::TokenCache;
use cairn_filter::{Exchange, Factory, Filter, NoCallout, Phases};
use cairn_manifest::{Object, decode};
use cairn_mesh::{Change, Identity, L7, MeshSettings, ResourceName, Store};
use std::net::IpAddr;
use std::sync::Arc;

/// The waypoint of a Gateway in a mesh that `changes` make, which is to read `objects`. Keys of token issuers must stand in
/// the objects: none is fetched.
pub fn offline<'a>(
    (gateway, identity, address): (ResourceName, Identity, IpAddr),
    changes: impl IntoIterator<Item = Change>,
    objects: impl IntoIterator<Item = &'a Object>,
    settings: &MeshSettings,
) -> Place {
    let mut store = Store::new();
    store.apply(changes);
    store.apply(objects.into_iter().flat_map(|object| decode(object, settings).changes));
    let snapshot = store.snapshot();
    let own = Own { gateway: gateway.clone(), address };
    // No key is fetched: whoever asks has put keys into the objects.
    let keyring = Arc::new(Keyring::new(Arc::new(NoCallout), None, TokenCache::default()));
    let table = Sites::unobserved(own, keyring).update(&snapshot, &mut StandIns);
    Place { gateway, identity, address, snapshot: Arc::new(snapshot), table: Arc::new(table) }
}

/// Plugins that keep the place of those that are not loaded.
struct StandIns;

impl PluginSource for StandIns {
    fn want(&mut self, _l7: &L7) {}

    fn standing(&self, name: &ResourceName) -> Standing {
        Standing::Ready(Arc::new(StandIn { name: name.to_string() }), None)
    }
}

struct StandIn {
    name: String,
}

impl Factory for StandIn {
    fn name(&self) -> &str {
        &self.name
    }

    fn phases(&self) -> Phases {
        Phases::REQUEST_HEADERS
    }

    fn start(&self, _exchange: &Exchange) -> Option<Box<dyn Filter>> {
        Some(Box::new(Idle))
    }
}

/// What a stand-in does: nothing. It is withheld from rehearsals, as every plugin is.
struct Idle;

impl Filter for Idle {}
