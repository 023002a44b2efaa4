//! What `cairn plugin new` writes compiles and passes the test that it brings along.

#[path = "../../runtime/cairn/src/plugin/template/lib.rs.in"]
mod template;
