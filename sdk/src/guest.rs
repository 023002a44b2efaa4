//! The plugin inside a proxy: contexts of the official crate that call [`Plugin`], and the proxy as a [`Host`].

use crate::{Flow, Host, Plugin, Reply, Request, Response, Side, config};
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MapType};
use std::rc::Rc;

/// Registers the plugin with the official crate; called by [`crate::plugin!`] when the module is initialised.
pub fn register<P: Plugin>() {
    // What the host wants is asked at the start: hosts allow few calls while a module is initialised.
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::<P> { plugin: None }));
}

struct Root<P> {
    plugin: Option<Rc<P>>,
}

impl<P: Plugin> Context for Root<P> {}

impl<P: Plugin> RootContext for Root<P> {
    fn on_vm_start(&mut self, _: usize) -> bool {
        if let Ok(level) = hostcalls::get_log_level() {
            proxy_wasm::set_log_level(level);
        }
        true
    }

    fn on_configure(&mut self, _: usize) -> bool {
        let bytes = self.get_plugin_configuration().unwrap_or_default();
        match config::configure(&bytes) {
            Ok(plugin) => {
                self.plugin = Some(Rc::new(plugin));
                true
            }
            Err(error) => {
                log::error!("{error}");
                false
            }
        }
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        let plugin = Rc::clone(self.plugin.as_ref()?);
        Some(Box::new(Stream { plugin, exchange: P::Exchange::default() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Stream<P: Plugin> {
    plugin: Rc<P>,
    exchange: P::Exchange,
}

impl<P: Plugin> Context for Stream<P> {}

impl<P: Plugin> HttpContext for Stream<P> {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let mut proxy = Proxy;
        let flow = self.plugin.on_request(&mut Request::new(&mut proxy), &mut self.exchange);
        act(flow)
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        let mut proxy = Proxy;
        let flow = self.plugin.on_response(&mut Response::new(&mut proxy), &mut self.exchange);
        act(flow)
    }
}

fn act(flow: Flow) -> Action {
    let Flow::Reply(reply) = flow else { return Action::Continue };
    send(&reply);
    Action::Pause
}

fn send(reply: &Reply) {
    let headers = reply.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    if hostcalls::send_http_response(u32::from(reply.status), headers, Some(&reply.body)).is_err() {
        log::warn!("the proxy did not take the reply");
    }
}

/// The proxy behind the host functions.
struct Proxy;

fn map(side: Side) -> MapType {
    match side {
        Side::Request => MapType::HttpRequestHeaders,
        Side::Response => MapType::HttpResponseHeaders,
    }
}

/// The official crate panics on statuses that it does not expect, and returns no error otherwise.
fn done<E>(result: Result<(), E>) {
    if result.is_err() {
        log::warn!("the proxy did not take a change");
    }
}

impl Host for Proxy {
    fn headers(&self, side: Side) -> Vec<(String, Vec<u8>)> {
        hostcalls::get_map_bytes(map(side)).unwrap_or_default()
    }

    fn header(&self, side: Side, name: &str) -> Option<Vec<u8>> {
        hostcalls::get_map_value_bytes(map(side), name).ok().flatten()
    }

    fn set_header(&mut self, side: Side, name: &str, value: &[u8]) {
        done(hostcalls::set_map_value_bytes(map(side), name, Some(value)));
    }

    fn add_header(&mut self, side: Side, name: &str, value: &[u8]) {
        done(hostcalls::add_map_value_bytes(map(side), name, value));
    }

    fn remove_header(&mut self, side: Side, name: &str) {
        done(hostcalls::remove_map_value(map(side), name));
    }

    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        hostcalls::get_property(path.to_vec()).ok().flatten()
    }

    fn set_property(&mut self, path: &[&str], value: &[u8]) {
        done(hostcalls::set_property(path.to_vec(), Some(value)));
    }
}
