//! The command line: up, demo, xds, check, echo.
fn main() {}
