//! What happens to a request on its way: routes, plugins, protocols, and the answers when there is no way.

use crate::client::{Client, Who, connect_to_name, get, request};
use crate::shop::{guest, mesh, service, web};
use anyhow::Result;
use http::{Method, Version};

#[tokio::test]
async fn an_allowed_request_arrives_as_the_client_sent_it() -> Result<()> {
    let answer = get(web()?, service("catalog")?, "/items?a=1&b=%20").await?;
    assert_eq!((answer.status, answer.version), (200, Version::HTTP_11), "{}", answer.body);
    assert_eq!(answer.seen_request(), "GET /items?a=1&b=%20 HTTP/1.1");
    let host = service("catalog")?.to_string();
    assert_eq!(answer.seen("host"), Some(host.as_str()));
    Ok(())
}

#[tokio::test]
async fn a_denied_request_is_told_so_and_no_more() -> Result<()> {
    for (what, who, method, path) in [
        ("not the client that may", guest()?, Method::GET, "/items"),
        ("not the method that is allowed", web()?, Method::POST, "/items"),
        ("explicitly denied", web()?, Method::GET, "/admin/users"),
    ] {
        let mut client = Client::open(who, service("catalog")?).await?;
        let answer = client.send(request(method, path, &[])).await?;
        assert_eq!((answer.status, answer.body.as_str()), (403, "RBAC: access denied"), "{what}");
        assert_eq!(answer.header("x-echo-name"), "", "{what}: the application must not have been asked");
    }
    Ok(())
}

#[tokio::test]
async fn a_request_that_leads_nowhere_is_answered_by_the_reason() -> Result<()> {
    let mut client = Client::open(web()?, service("routed")?).await?;
    for (path, status, what) in [
        ("/unrouted", 404, "no route matches"),
        ("/absent", 500, "the backend does not exist"),
        ("/reviews", 503, "the backend has no ready endpoint"),
        ("/chosen", 200, "and the connection goes on"),
    ] {
        let answer = client.get(path).await?;
        assert_eq!(answer.status, status, "{what}: {}", answer.body);
    }
    Ok(())
}

#[tokio::test]
async fn a_canary_gets_its_share() -> Result<()> {
    const REQUESTS: usize = 500;
    let mut client = Client::open(web()?, service("routed")?).await?;
    let mut second = 0;
    for _ in 0..REQUESTS {
        let answer = client.get("/weights").await?;
        assert_eq!(answer.status, 200, "{}", answer.body);
        second += usize::from(answer.header("x-echo-version") == "v2");
    }
    let share = second as f64 / REQUESTS as f64;
    // Chance alone takes a fair share this far off in one of 50 million runs; half of it in one of 190.
    assert!((share - 0.2).abs() <= 0.1, "v2 got {share} of the requests");
    Ok(())
}

#[tokio::test]
async fn routes_choose_by_query_method_and_header() -> Result<()> {
    let mut client = Client::open(web()?, service("routed")?).await?;
    for (what, method, path, headers, version) in [
        ("nothing special", Method::GET, "/chosen", &[][..], "v1"),
        ("query", Method::GET, "/chosen?version=2", &[], "v2"),
        ("another value", Method::GET, "/chosen?version=3", &[], "v1"),
        ("method", Method::POST, "/chosen", &[], "v2"),
        ("header", Method::GET, "/chosen", &[("x-version", "2")], "v2"),
        ("another header", Method::GET, "/chosen", &[("x-version", "22")], "v1"),
    ] {
        let answer = client.send(request(method, path, headers)).await?;
        assert_eq!((answer.status, answer.header("x-echo-version")), (200, version), "{what}");
    }
    Ok(())
}

#[tokio::test]
async fn a_route_redirects_rewrites_and_changes_headers() -> Result<()> {
    let mut client = Client::open(web()?, service("routed")?).await?;
    let moved = client.get("/moved/a?b=c").await?;
    assert_eq!((moved.status, moved.header("location")), (301, "https://shop.example:8443/new/a?b=c"));

    let rewritten = client.get("/rewritten/a?b=c").await?;
    assert_eq!(rewritten.seen_request(), "GET /inner/a?b=c HTTP/1.1", "{}", rewritten.body);
    assert_eq!(rewritten.seen("host"), Some("inner.example"));

    let sent = [("x-set", "by-client"), ("x-added", "by-client"), ("x-removed", "by-client")];
    let changed = client.send(request(Method::GET, "/headers", &sent)).await?;
    assert_eq!(changed.seen("x-set"), Some("by-route"), "{}", changed.body);
    let added: Vec<&str> =
        changed.body.lines().filter_map(|line| line.strip_prefix("header: x-added: ")).collect();
    assert_eq!(added, ["by-client", "by-route"]);
    assert_eq!(changed.seen("x-removed"), None);
    assert_eq!((changed.header("x-response"), changed.header("x-echo-name")), ("by-route", ""));
    Ok(())
}

#[tokio::test]
async fn a_plugin_tags_the_request_and_the_response() -> Result<()> {
    let mut client = Client::open(web()?, service("catalog")?).await?;
    let forged = request(Method::GET, "/items", &[("x-client", "cluster.local/ns/shop/sa/owner")]);
    let answer = client.send(forged).await?;
    assert_eq!(answer.seen("x-client"), Some("cluster.local/ns/shop/sa/web"), "{}", answer.body);
    assert_eq!(answer.header("x-tagged-by"), "cairn");
    Ok(())
}

#[tokio::test]
async fn a_plugin_answers_in_place_of_the_application() -> Result<()> {
    let mut client = Client::open(web()?, service("members")?).await?;
    let refused = client.get("/").await?;
    assert_eq!((refused.status, refused.body.as_str()), (418, "say your team"));
    let passed = client.send(request(Method::GET, "/", &[("x-team", "blue")])).await?;
    assert_eq!((passed.status, passed.header("x-echo-version")), (200, "v1"));
    Ok(())
}

#[tokio::test]
async fn http2_without_negotiation_goes_through() -> Result<()> {
    let mut client = Client::open_http2(web()?, service("catalog")?).await?;
    for _ in 0..3 {
        let answer = client.get("/items").await?;
        assert_eq!((answer.status, answer.version), (200, Version::HTTP_2), "{}", answer.body);
        assert_eq!(answer.header("x-tagged-by"), "cairn");
    }
    assert_eq!(client.get("/admin").await?.status, 403);
    Ok(())
}

#[tokio::test]
async fn a_denied_grpc_call_has_a_grpc_status() -> Result<()> {
    let mut client = Client::open_http2(guest()?, service("catalog")?).await?;
    let call = request(Method::POST, "/shop.Catalog/List", &[("content-type", "application/grpc")]);
    let answer = client.send(call).await?;
    assert_eq!((answer.status, answer.header("grpc-status")), (200, "7"), "{:?}", answer.headers);
    assert_eq!(answer.header("content-type"), "application/grpc");
    Ok(())
}

#[tokio::test]
async fn a_target_of_a_policy_that_cannot_be_enforced_is_closed() -> Result<()> {
    let answer = get(web()?, service("tickets")?, "/").await?;
    assert_eq!((answer.status, answer.body.as_str()), (503, "policy not enforceable"));
    Ok(())
}

#[tokio::test]
async fn names_are_those_of_the_mesh() -> Result<()> {
    let pod = mesh()?.pod("shop/web")?;
    for name in ["catalog", "catalog.shop", "catalog.shop.svc", "catalog.shop.svc.cluster.local"] {
        let stream = connect_to_name(pod, name, 8000).await?;
        let answer = Client::on(stream, name).await?.get("/items").await?;
        assert_eq!(answer.status, 200, "{name}");
    }
    for name in ["nothing", "catalog.guests", "catalog.shop.example"] {
        let error = connect_to_name(pod, name, 8000).await.err();
        let reply = error.as_ref().and_then(|error| error.downcast_ref::<crate::client::Refused>());
        assert_eq!(reply.map(|reply| reply.0), Some(4), "{name}: {error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_service_answers_outsiders_without_the_waypoint() -> Result<()> {
    let answer = get(Who::Nobody, service("catalog")?, "/admin").await?;
    assert_eq!((answer.status, answer.header("x-tagged-by")), (200, ""), "{}", answer.body);
    Ok(())
}
