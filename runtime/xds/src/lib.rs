//! Delta ADS client and server; the workload API and the model.
//!
//! The client ([`follow`]) keeps a [`Mesh`] in step with a control plane: istiod, or our own [`Server`]. The server
//! serves what it is given ([`Served`]) and signs certificates with the embedded CA. Protocol state is pure and
//! tested without I/O: `session` and `gate` on the client's side, `published` and `subscriber` on the server's.

pub mod authorization;
pub mod workload;

mod accept;
mod counts;
mod demand;
mod error;
mod follow;
mod gate;
mod kept;
mod mesh;
mod object;
mod published;
mod server;
mod session;
mod subscriber;
mod tokens;
mod unknown;

pub use demand::{ANSWER_WAIT, DemandError};
pub use error::ResourceError;
pub use follow::{FollowError, FollowSettings, follow};
pub use kept::{KeepError, KeepSettings};
pub use mesh::{Mesh, POLICY_WAIT};
pub use object::{Object, ObjectEvent};
pub use published::Served;
pub use server::{Rejection, ServeError, Server};
pub use session::{ObjectDecoder, Problem};
pub use tokens::{Role, Tokens};

/// The type of workloads and services.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// The type of L4 policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
