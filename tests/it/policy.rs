//! AuthorizationPolicy at the waypoint: the tables of Istio's own integration tests, through a whole mesh.

use crate::client::{Client, Who, request};
use crate::shop::{guest, mesh, service, web};
use anyhow::Result;
use http::Method;
use std::net::SocketAddr;

/// Asks on one connection for each path and compares what may and what may not.
async fn check(who: Who, to: SocketAddr, rows: &[(&str, u16)]) -> Result<()> {
    let mut client = Client::open(who, to).await?;
    for (path, status) in rows {
        let answer = client.get(path).await?;
        assert_eq!(answer.status, *status, "{who:?} {path}: {}", answer.body);
    }
    Ok(())
}

#[tokio::test]
async fn clients_are_told_apart_by_identity() -> Result<()> {
    let to = service("principals")?;
    let everyone = [
        ("/deny", 403),
        ("/trust-domain", 200),
        ("/foreign", 403),
        ("/not-trust-domain", 403),
        ("/not-foreign", 200),
    ];
    check(web()?, to, &everyone).await?;
    check(guest()?, to, &everyone).await?;
    let listed =
        [("/principal", 200), ("/principal?param=value", 200), ("/account", 200), ("/namespace", 200)];
    check(web()?, to, &listed).await?;
    check(guest()?, to, &listed.map(|(path, _)| (path, 403))).await
}

#[tokio::test]
async fn a_denial_is_for_whom_and_what_it_names() -> Result<()> {
    let to = service("denials")?;
    check(web()?, to, &[("/deny", 403), ("/deny?x=y", 403), ("/deny/allow", 200), ("/allow", 200)]).await?;
    check(guest()?, to, &[("/deny", 200), ("/deny?x=y", 200), ("/deny/allow", 200), ("/allow", 200)]).await
}

#[tokio::test]
async fn a_denial_wins_over_permission() -> Result<()> {
    let rows = [
        ("/allow", 200),
        ("/allow?p=v", 200),
        ("/allow/admin", 403),
        ("/allow/admin?p=v", 403),
        // Written otherwise, it is the same path; an empty segment makes it another one (Istio's `BASE`).
        ("/allow/./admin", 403),
        ("/allow/x/../admin", 403),
        ("/allow/%61dmin", 403),
        ("/allow//admin", 200),
        ("/other", 403),
    ];
    check(web()?, service("precedence")?, &rows).await
}

#[tokio::test]
async fn what_a_rule_excludes_is_not_matched() -> Result<()> {
    let to = service("negations")?;
    check(web()?, to, &[("/namespaces", 200), ("/anyone", 200), ("/from-shop", 200)]).await?;
    check(guest()?, to, &[("/namespaces", 403), ("/anyone", 200), ("/from-shop", 403)]).await?;
    check(web()?, mesh()?.service("shop/negations", 8001)?, &[("/ports", 403), ("/anyone", 200)]).await?;
    check(web()?, to, &[("/ports", 200)]).await
}

#[tokio::test]
async fn requests_are_told_apart_by_host_method_and_header() -> Result<()> {
    let mut client = Client::open(web()?, service("negations")?).await?;
    for (method, path, headers, status) in [
        (Method::GET, "/hosts", &[("host", "allow.host")][..], 200),
        (Method::GET, "/hosts", &[("host", "deny.host")], 403),
        (Method::GET, "/hosts", &[("host", "DENY.host")], 403),
        (Method::GET, "/host", &[("host", "a.Allow.host")], 200),
        (Method::GET, "/host", &[("host", "allow.host")], 403),
        (Method::GET, "/host", &[("host", "a.allow.host.example")], 403),
        (Method::GET, "/methods", &[], 200),
        (Method::PUT, "/methods", &[], 403),
        (Method::GET, "/header", &[("x-foo", "foo")], 200),
        (Method::GET, "/header", &[("x-foo", "bar")], 403),
        (Method::GET, "/header", &[], 403),
        (Method::GET, "/no-header", &[("x-foo", "foo")], 200),
        (Method::GET, "/no-header", &[("x-foo", "bar")], 403),
        (Method::GET, "/no-header", &[], 200),
    ] {
        let answer = client.send(request(method.clone(), path, headers)).await?;
        assert_eq!(answer.status, status, "{method} {path} {headers:?}: {}", answer.body);
    }
    Ok(())
}
