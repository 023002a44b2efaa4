//! The mesh that tests share which change nothing: a shop behind a waypoint, a bank without one, and guests.

use crate::client::Who;
use crate::harness::Mesh;
use anyhow::{Result, anyhow};
use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;

const MANIFESTS: [(&str, &str); 5] = [
    ("applications.yaml", include_str!("manifests/applications.yaml")),
    ("services.yaml", include_str!("manifests/services.yaml")),
    ("routes.yaml", include_str!("manifests/routes.yaml")),
    ("plugins.yaml", include_str!("manifests/plugins.yaml")),
    ("policies.yaml", include_str!("manifests/policies.yaml")),
];

static SHOP: LazyLock<Result<Mesh>> = LazyLock::new(|| Mesh::start(&MANIFESTS, &[]));

/// The shared mesh, started by the first that asks.
pub fn mesh() -> Result<&'static Mesh> {
    SHOP.as_ref().map_err(|error| anyhow!("the shared mesh is not there: {error:#}"))
}

/// The web pod of the shop.
pub fn web() -> Result<Who> {
    Ok(Who::Pod(mesh()?.pod("shop/web")?))
}

/// A pod of another namespace.
pub fn guest() -> Result<Who> {
    Ok(Who::Pod(mesh()?.pod("guests/guest")?))
}

/// A service of the shop, at the port of HTTP.
pub fn service(name: &str) -> Result<SocketAddr> {
    mesh()?.service(&format!("shop/{name}"), 8000)
}

/// The shop's waypoint.
pub fn waypoint() -> Result<IpAddr> {
    mesh()?.waypoint("shop/shop-waypoint")
}
