//! What a module exports: what every plugin needs, and the callbacks that [`macro@crate::plugin`] found.

/// Exports a plugin's callbacks by name; written by [`macro@crate::plugin`]. Does nothing when not compiled to Wasm.
#[doc(hidden)]
#[macro_export]
macro_rules! export {
    ($plugin:ty; $($callback:ident)*) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code)]
        const _: () = {
            use $crate::runtime::Runtime;

            // A module has one thread.
            ::std::thread_local! {
                static RUNTIME: Runtime<$plugin> = const { Runtime::new() };
            }

            #[cfg(target_os = "wasi")]
            unsafe extern "C" {
                safe fn __wasm_call_ctors();
            }

            #[unsafe(no_mangle)]
            extern "C" fn _initialize() {
                #[cfg(target_os = "wasi")]
                __wasm_call_ctors();
                $crate::runtime::initialize();
            }

            #[unsafe(no_mangle)]
            extern "C" fn proxy_abi_version_0_2_1() {}

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
                $crate::sys::allocate(size)
            }

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_context_create(context: u32, root: u32) {
                RUNTIME.with(|runtime| runtime.create(context, root));
            }

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_configure(root: u32, size: usize) -> u32 {
                RUNTIME.with(|runtime| u32::from(runtime.configure(root, size)))
            }

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_delete(context: u32) {
                RUNTIME.with(|runtime| runtime.delete(context));
            }

            // The following are called only for what a plugin has asked for.

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_tick(root: u32) {
                RUNTIME.with(|runtime| runtime.tick(root));
            }

            /// An addition of Cairn's to the ABI, which other proxies do not call.
            #[unsafe(no_mangle)]
            extern "C" fn cairn_on_clone() {
                RUNTIME.with(|runtime| runtime.cloned());
            }

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_http_call_response(_: u32, id: u32, headers: u32, body: usize, trailers: u32) {
                RUNTIME.with(|runtime| runtime.http_answer(id, headers, body, trailers));
            }

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_grpc_receive(_: u32, id: u32, size: usize) {
                RUNTIME.with(|runtime| runtime.grpc_message(id, size));
            }

            #[unsafe(no_mangle)]
            extern "C" fn proxy_on_grpc_close(_: u32, id: u32, status: u32) {
                RUNTIME.with(|runtime| runtime.grpc_close(id, status));
            }

            $($crate::export!(@one $callback);)*
        };
    };
    (@one proxy_on_request_headers) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_request_headers(context: u32, _: u32, end: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.request_headers(context, end != 0))
        }
    };
    (@one proxy_on_request_body) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_request_body(context: u32, size: usize, end: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.request_body(context, size, end != 0))
        }
    };
    (@one proxy_on_request_trailers) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_request_trailers(context: u32, _: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.request_trailers(context))
        }
    };
    (@one proxy_on_response_headers) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_response_headers(context: u32, _: u32, end: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.response_headers(context, end != 0))
        }
    };
    (@one proxy_on_response_body) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_response_body(context: u32, size: usize, end: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.response_body(context, size, end != 0))
        }
    };
    (@one proxy_on_response_trailers) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_response_trailers(context: u32, _: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.response_trailers(context))
        }
    };
    (@one proxy_on_new_connection) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_new_connection(context: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.new_connection(context))
        }
    };
    (@one proxy_on_downstream_data) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_downstream_data(context: u32, size: usize, end: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.downstream_data(context, size, end != 0))
        }
    };
    (@one proxy_on_upstream_data) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_upstream_data(context: u32, size: usize, end: u32) -> u32 {
            RUNTIME.with(|runtime| runtime.upstream_data(context, size, end != 0))
        }
    };
    (@one proxy_on_downstream_connection_close) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_downstream_connection_close(context: u32, peer: u32) {
            RUNTIME.with(|runtime| runtime.downstream_close(context, peer));
        }
    };
    (@one proxy_on_log) => {
        #[unsafe(no_mangle)]
        extern "C" fn proxy_on_log(context: u32) {
            RUNTIME.with(|runtime| runtime.log(context));
        }
    };
}
