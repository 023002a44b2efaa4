//! Tests of path normalisation.

use super::normalize_path;
use crate::PathNormalization::{self, Base, DecodeAndMergeSlashes, MergeSlashes, None};
use proptest::prelude::*;
use std::borrow::Cow;

const MODES: [PathNormalization; 4] = [None, Base, MergeSlashes, DecodeAndMergeSlashes];

fn check(sent: &str, expected: [&str; 4]) {
    for (mode, expected) in MODES.into_iter().zip(expected) {
        assert_eq!(normalize_path(sent, mode), expected, "{sent} {mode:?}");
    }
}

fn same(sent: &str) {
    check(sent, [sent; 4]);
}

#[test]
fn paths_become_what_istio_makes_of_them() {
    check("/app#", ["/app"; 4]);
    check("/app#foo", ["/app"; 4]);
    check("/app/../admin", ["/app/../admin", "/admin", "/admin", "/admin"]);
    check("/app/./a", ["/app/./a", "/app/a", "/app/a", "/app/a"]);
    check("/app//", ["/app//", "/app//", "/app/", "/app/"]);
    check("/app/%2f", ["/app/%2f", "/app/%2f", "/app/%2f", "/app/"]);
    check("/app%2f/", ["/app%2f/", "/app%2f/", "/app%2f/", "/app/"]);
    check("/xyz%30..//abc", ["/xyz%30..//abc", "/xyz0..//abc", "/xyz0../abc", "/xyz0../abc"]);
    check(r"/app/\/\/\admin", [r"/app/\/\/\admin", "/app//////admin", "/app/admin", "/app/admin"]);
    let encoded = "/%2Fapp%5cadmin%5Cabc";
    check(encoded, [encoded, encoded, encoded, "/app/admin/abc"]);
    check(
        r"/%5Capp%2f%5c%2F%2e%2e%2fadmin%5c\abc",
        [
            r"/%5Capp%2f%5c%2F%2e%2e%2fadmin%5c\abc",
            "/%5Capp%2f%5c%2F..%2fadmin%5c/abc",
            "/%5Capp%2f%5c%2F..%2fadmin%5c/abc",
            "/app/admin/abc",
        ],
    );
    check("/app//../admin", ["/app//../admin", "/app/admin", "/app/admin", "/app/admin"]);
    check("/app//../../admin", ["/app//../../admin", "/admin", "/admin", "/admin"]);
    check(
        "/%c0%2e%c0%2e/admin",
        ["/%c0%2e%c0%2e/admin", "/%c0.%c0./admin", "/%c0.%c0./admin", "/%c0.%c0./admin"],
    );
    check("/%7eadmin", ["/%7eadmin", "/~admin", "/~admin", "/~admin"]);
}

#[test]
fn every_spelling_of_a_parent_segment_is_resolved() {
    for path in [
        "/public/../private",
        "/public/%2e%2e/private",
        "/public/%2E./private",
        "/public/.%2e/private",
        "/public/%2e%2E/private",
        r"/public/..\private",
    ] {
        for mode in [Base, MergeSlashes, DecodeAndMergeSlashes] {
            assert_eq!(normalize_path(path, mode), "/private", "{path} {mode:?}");
        }
    }
}

#[test]
fn dot_segments_may_have_parameters() {
    for (path, expected) in [
        ("/.;", "/"),
        ("/a/.;", "/a/"),
        ("/a/.;x;y/b", "/a/b"),
        ("/a/b/..;/c", "/a/c"),
        ("/a/..;x/b", "/b"),
        ("/a/..;?q=..;", "/?q=..;"),
        ("/a/%2e%2e;/b", "/b"),
        ("/a;x/b", "/a;x/b"),
        ("/a/..%3b/b", "/a/..%3b/b"),
        ("/a/;/b", "/a/;/b"),
        ("/...;/.a;", "/...;/.a;"),
    ] {
        check(path, [path, expected, expected, expected]);
    }
}

#[test]
fn nothing_rises_above_the_root() {
    check("/../../x", ["/../../x", "/x", "/x", "/x"]);
    check("/..", ["/..", "/", "/", "/"]);
    check("/a/..", ["/a/..", "/", "/", "/"]);
    check("/a/b/..", ["/a/b/..", "/a/", "/a/", "/a/"]);
    check("/a/.", ["/a/.", "/a/", "/a/", "/a/"]);
}

#[test]
fn what_is_deliberately_left_stays() {
    for path in ["/%252f", "/%252e%252e/admin", "/.../admin", "/ADMIN", "/a;x=y", "/%c0%af", "*", "/é"] {
        same(path);
    }
}

#[test]
fn query_stays_and_fragment_goes() {
    check("/a/../b?x=/../%2e#top", ["/a/../b?x=/../%2e", "/b?x=/../%2e", "/b?x=/../%2e", "/b?x=/../%2e"]);
    check("/a#b?c=d", ["/a"; 4]);
    check("/a?b#c?d", ["/a?b"; 4]);
    same("/a?b=//c\\d");
}

#[test]
fn broken_encodings_never_join_into_new_ones() {
    for path in ["/%", "/%2", "/%zz", "/a%u0041"] {
        same(path);
    }
    for (sent, normal) in [
        ("/a/%%32e%%32e/b", "/a/%252e%252e/b"),
        ("/a/%2%65%2%65/b", "/a/%252e%252e/b"),
        ("/a/%%32f", "/a/%252f"),
        ("/%2%45", "/%252E"),
        ("/%%7a", "/%z"),
    ] {
        check(sent, [sent, normal, normal, normal]);
    }
}

#[test]
fn what_no_uri_has_is_encoded() {
    let sent = "/\"<>^`{|}[]*\"?\"|";
    let normal = "/%22%3C%3E%5E%60%7B%7C%7D[]*%22?\"|";
    check(sent, [sent, normal, normal, normal]);
}

#[test]
fn normal_paths_are_not_copied() {
    for mode in MODES {
        assert!(matches!(normalize_path("/api/v1/items.json?a=..", mode), Cow::Borrowed(_)), "{mode:?}");
    }
}

proptest! {
    #[test]
    fn normalising_again_changes_nothing(path in r"/[a-c./\\%2eEfF5cC?#]{0,24}") {
        for mode in MODES {
            let once = normalize_path(&path, mode).into_owned();
            prop_assert_eq!(&normalize_path(&once, mode), &once, "{:?}", mode);
        }
    }

    #[test]
    fn any_text_has_a_normal_form_without_dot_segments(path in "/\\PC{0,40}") {
        for mode in [Base, MergeSlashes, DecodeAndMergeSlashes] {
            let normal = normalize_path(&path, mode);
            let normal = normal.split('?').next().unwrap_or_default();
            prop_assert!(normal.starts_with('/'));
            prop_assert!(normal.split('/').all(|segment| segment != "." && segment != ".."), "{}", normal);
            prop_assert!(mode == Base || !normal.contains("//"), "{}", normal);
        }
    }
}
