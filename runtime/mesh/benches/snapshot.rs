//! Benchmarks of the snapshot.
fn main() {}
