//! What each fuzz target does with its bytes, and what must hold. The seeds go through the same functions in an
//! ordinary test, `tests/differential/seeds.rs`, so that they never rot.

mod calls;
mod cel;
mod exchange;
mod format;
pub mod guest;
mod jwt;
mod path;
mod policy;
pub mod proxy;

pub use calls::calls;
pub use cel::cel;
pub use format::format;
pub use jwt::jwt;
pub use path::path;
pub use policy::policy;
