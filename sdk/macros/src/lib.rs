//! The attribute that exports a plugin's callbacks from its module. It reads which methods an `impl Plugin` block has and
//! leaves the block as it is, so it needs no parser of Rust.

use proc_macro::{Delimiter, TokenStream, TokenTree};

/// The exports that a method of `Plugin` needs; those that every plugin needs are in `cairn_sdk::export!`.
const EXPORTS: [(&str, &[&str]); 15] = [
    ("on_request", &["proxy_on_request_headers"]),
    ("on_request_chunk", &["proxy_on_request_body"]),
    // A body may end with trailers instead of with data.
    ("on_request_body", &["proxy_on_request_body", "proxy_on_request_trailers"]),
    ("on_request_trailers", &["proxy_on_request_trailers"]),
    ("on_response", &["proxy_on_response_headers"]),
    ("on_response_chunk", &["proxy_on_response_body"]),
    ("on_response_body", &["proxy_on_response_body", "proxy_on_response_trailers"]),
    ("on_response_trailers", &["proxy_on_response_trailers"]),
    ("on_connection", &["proxy_on_new_connection"]),
    ("on_downstream_data", &["proxy_on_downstream_data"]),
    ("on_upstream_data", &["proxy_on_upstream_data"]),
    ("on_close", &["proxy_on_downstream_connection_close"]),
    ("on_tick", &[]),
    ("on_clone", &[]),
    ("on_log", &["proxy_on_log"]),
];

/// Exports a plugin: put it on the `impl Plugin for …` block. Proxies are shown only the callbacks that the block
/// implements and call no others. Does nothing when not compiled to Wasm.
#[proc_macro_attribute]
pub fn plugin(_: TokenStream, block: TokenStream) -> TokenStream {
    let Some((plugin, methods)) = read(block.clone()) else {
        return "::core::compile_error!(\"`#[plugin]` goes on an `impl Plugin for …` block\");"
            .parse()
            .unwrap_or_default();
    };
    let mut exports: Vec<&str> = Vec::new();
    for (method, needed) in EXPORTS {
        if methods.iter().any(|present| present == method) {
            exports.extend(needed.iter().filter(|name| !exports.contains(name)).collect::<Vec<_>>());
        }
    }
    let export = format!("::cairn_sdk::export!({plugin}; {});", exports.join(" "));
    let mut output = block;
    output.extend(export.parse::<TokenStream>().unwrap_or_default());
    output
}

/// The type that the block is for, and the names of its methods.
fn read(block: TokenStream) -> Option<(String, Vec<String>)> {
    let tokens: Vec<TokenTree> = block.into_iter().collect();
    let Some(TokenTree::Group(body)) = tokens.last() else { return None };
    if body.delimiter() != Delimiter::Brace {
        return None;
    }
    let is_word =
        |token: &TokenTree, word: &str| matches!(token, TokenTree::Ident(ident) if ident.to_string() == word);
    let after = tokens.iter().position(|token| is_word(token, "for"))? + 1;
    let named: TokenStream = tokens[after..tokens.len() - 1].iter().cloned().collect();
    let body: Vec<TokenTree> = body.stream().into_iter().collect();
    let methods = body.windows(2).filter(|pair| is_word(&pair[0], "fn")).map(|pair| pair[1].to_string());
    // `type F = fn(..)` has no name behind `fn`, which does no harm here.
    let methods = methods.filter(|name| !name.starts_with('(')).collect();
    Some((named.to_string(), methods)).filter(|(name, _)| !name.is_empty())
}
