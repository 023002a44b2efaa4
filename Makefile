# `make demo` and `make test` are the two commands of the README. Each installs what it needs and says so first.

.PHONY: demo test bench check

demo: ## build everything and run the demo
	@tests/setup
	@plugins/build
	cargo build --package cairn
	target/debug/cairn demo --plugins target/plugins --state target/demo

test: ## run all tests
	@tests/setup
	@tests/peers
	@plugins/build
	@tests/modules/build
	cargo build --workspace --bins
	cargo test --workspace

bench: ## measure Cairn and Envoy side by side; see BENCHMARKS.md
	@tests/setup
	tests/bench/bench

check: ## what CI checks beside the tests
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
