//! The end-to-end tests, the harness they share and the tidy test.
