//! The rules: words and how they stand together, on the plain form of a text. Each finds its attack by a few words, so that
//! clean requests cost a search or two per rule and no regular expression.

/// Where a text comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    Path,
    Query,
    Header,
    Agent,
    Body,
}

/// One rule.
pub(crate) struct Rule {
    pub(crate) group: &'static str,
    pub(crate) name: &'static str,
    pub(crate) score: u32,
    places: &'static [Where],
    hits: fn(&str) -> bool,
}

const INPUT: &[Where] = &[Where::Path, Where::Query, Where::Header, Where::Body];
const ANYWHERE: &[Where] = &[Where::Path, Where::Query, Where::Header, Where::Agent, Where::Body];

/// All of them.
pub(crate) const RULES: &[Rule] = &[
    Rule { group: "sqli", name: "sqli-union", score: 5, places: ANYWHERE, hits: union_select },
    Rule { group: "sqli", name: "sqli-tautology", score: 5, places: INPUT, hits: tautology },
    Rule { group: "sqli", name: "sqli-comment", score: 3, places: INPUT, hits: quote_and_comment },
    Rule { group: "sqli", name: "sqli-stacked", score: 5, places: INPUT, hits: stacked_query },
    Rule { group: "sqli", name: "sqli-function", score: 5, places: ANYWHERE, hits: database_function },
    Rule { group: "xss", name: "xss-tag", score: 5, places: ANYWHERE, hits: dangerous_tag },
    Rule { group: "xss", name: "xss-handler", score: 5, places: INPUT, hits: event_handler },
    Rule { group: "xss", name: "xss-scheme", score: 5, places: INPUT, hits: script_scheme },
    Rule { group: "traversal", name: "traversal-dots", score: 5, places: INPUT, hits: climbing },
    Rule { group: "traversal", name: "traversal-file", score: 5, places: INPUT, hits: system_file },
    Rule { group: "injection", name: "injection-jndi", score: 5, places: ANYWHERE, hits: lookup },
    Rule { group: "injection", name: "injection-shell", score: 5, places: INPUT, hits: shell_command },
    Rule { group: "scanner", name: "scanner-agent", score: 5, places: &[Where::Agent], hits: scanner },
    Rule { group: "scanner", name: "scanner-path", score: 3, places: &[Where::Path], hits: probed_path },
];

impl Rule {
    pub(crate) fn is_for(&self, place: Where) -> bool {
        self.places.contains(&place)
    }

    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.name == name || self.group == name
    }

    pub(crate) fn hits(&self, plain: &str) -> bool {
        (self.hits)(plain)
    }
}

fn has_any(text: &str, words: &[&str]) -> bool {
    words.iter().any(|word| text.contains(word))
}

/// The rests of a text behind each place where a word begins, the word not being part of another.
fn behind<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = &'a str> {
    text.match_indices(word).filter_map(move |(at, _)| {
        let before = text[..at].chars().next_back();
        let is_begin = before.is_none_or(|c| !c.is_alphanumeric() && c != '_');
        is_begin.then(|| &text[at + word.len()..])
    })
}

fn union_select(text: &str) -> bool {
    behind(text, "union").any(|rest| {
        let rest = rest.trim_start_matches([' ', '(']);
        let rest = rest.strip_prefix("all ").or_else(|| rest.strip_prefix("distinct ")).unwrap_or(rest);
        rest.trim_start_matches([' ', '(']).starts_with("select")
    })
}

/// A quote, `or` or `and`, and a comparison of two equal things: `' or 1=1`, `" or "a"="a`.
fn tautology(text: &str) -> bool {
    let joins = ["or", "and", "||", "&&"];
    let joined = joins.iter().flat_map(|join| behind(text, join).map(move |rest| (join, rest)));
    joined.into_iter().any(|(_, rest)| {
        let rest = rest.trim_start_matches([' ', '(']);
        let Some((left, right)) = rest.split_once('=').or_else(|| rest.split_once(" like ")) else {
            return false;
        };
        let plain = |side: &str| side.trim_matches([' ', '\'', '"', '`', '(', ')']).to_owned();
        let left = plain(left);
        let right = right.trim_start_matches([' ', '\'', '"', '`', '(']);
        let is_short = !left.is_empty() && left.len() <= 16 && left.chars().all(char::is_alphanumeric);
        let behind_equal = right.strip_prefix(left.as_str()).map(|end| end.chars().next());
        is_short
            && behind_equal.is_some_and(|next| next.is_none_or(|c| !c.is_alphanumeric() && c != '_'))
            && has_any(text, &["'", "\"", " or ", ")"])
    })
}

fn quote_and_comment(text: &str) -> bool {
    let ends = ["'", "\"", "')", "\")", "'))"];
    ends.iter().any(|end| {
        has_any(text, &[&format!("{end}--"), &format!("{end} --"), &format!("{end}#"), &format!("{end} #")])
    })
}

fn stacked_query(text: &str) -> bool {
    text.split(';').skip(1).any(|next| {
        let words = [
            "drop table",
            "drop database",
            "insert into",
            "delete from",
            "update ",
            "alter table",
            "exec ",
            "shutdown",
        ];
        words.iter().any(|word| next.trim_start().starts_with(word))
            && (!next.trim_start().starts_with("update ") || next.contains(" set "))
    })
}

fn database_function(text: &str) -> bool {
    let called = [
        "sleep(",
        "benchmark(",
        "pg_sleep(",
        "extractvalue(",
        "updatexml(",
        "load_file(",
        "group_concat(",
        "xp_cmdshell",
    ];
    let calls = called.iter().any(|name| behind(text, name).next().is_some());
    let is_harmless = !has_any(text, &["'", "\"", "select", " and ", " or ", ";", "("]);
    (calls && !is_harmless && has_any(text, &["'", "select", " and ", " or ", ";", "xp_cmdshell"]))
        || has_any(text, &["information_schema.", "waitfor delay", "into outfile", "into dumpfile"])
}

fn dangerous_tag(text: &str) -> bool {
    let tags = ["script", "iframe", "object", "embed", "svg", "base", "form", "math", "link", "meta"];
    text.split('<').skip(1).any(|rest| {
        let rest = rest.trim_start_matches([' ', '/']);
        let named = tags.iter().find_map(|tag| rest.strip_prefix(tag));
        named.is_some_and(|rest| rest.chars().next().is_none_or(|c| " />\"'".contains(c)))
    })
}

fn event_handler(text: &str) -> bool {
    let is_tag = text.contains('<') || has_any(text, &["\" on", "' on", "/on"]);
    let events = [
        "error",
        "load",
        "click",
        "mouse",
        "focus",
        "blur",
        "toggle",
        "key",
        "input",
        "start",
        "animation",
        "pointer",
    ];
    is_tag
        && behind(text, "on").any(|rest| {
            let event = rest.split('=').next().unwrap_or_default().trim();
            rest.contains('=')
                && event.len() < 24
                && event.chars().all(char::is_alphanumeric)
                && events.iter().any(|known| event.starts_with(known))
        })
}

fn script_scheme(text: &str) -> bool {
    let plain: String = text.chars().filter(|c| *c != ' ').collect();
    has_any(&plain, &["javascript:", "vbscript:", "data:text/html", "livescript:"])
}

fn climbing(text: &str) -> bool {
    text.contains("../../")
        || text.ends_with("/..")
        || has_any(text, &["/../", "..;/", "=../", ".../.../"])
        || text.starts_with("../")
}

fn system_file(text: &str) -> bool {
    has_any(
        text,
        &[
            "/etc/passwd",
            "/etc/shadow",
            "/etc/hosts",
            "/proc/self/",
            "/windows/system32",
            "/win.ini",
            "/boot.ini",
            "/.ssh/",
            "/var/run/secrets/",
            "php://",
            "file:///",
            "phar://",
        ],
    )
}

/// Lookups of loggers and templates.
fn lookup(text: &str) -> bool {
    let plain: String = text.chars().filter(|c| *c != ' ').collect();
    has_any(&plain, &["${jndi:", "${lower:", "${upper:", "${env:", "${::-", "#{t(java", "${t(java"])
}

fn shell_command(text: &str) -> bool {
    let commands = [
        "cat /",
        "wget http",
        "curl http",
        "nc -",
        "bash -",
        "sh -c",
        "id;",
        "whoami",
        "rm -rf",
        "/bin/sh",
        "/bin/bash",
        "powershell",
    ];
    let parts = [";", "|", "&&", "`", "$("];
    parts.iter().any(|part| {
        text.split(part).skip(1).any(|rest| {
            let rest = rest.trim_start();
            commands.iter().any(|command| rest.starts_with(command))
        })
    })
}

fn scanner(text: &str) -> bool {
    has_any(
        text,
        &[
            "sqlmap",
            "nikto",
            "nessus",
            "acunetix",
            "nmap",
            "masscan",
            "dirbuster",
            "gobuster",
            "wpscan",
            "nuclei",
            "zgrab",
            "havij",
            "w3af",
            "openvas",
            "feroxbuster",
        ],
    )
}

fn probed_path(text: &str) -> bool {
    has_any(
        text,
        &[
            "/.git/",
            "/.env",
            "/.svn/",
            "/.aws/",
            "/wp-login.php",
            "/phpmyadmin",
            "/.htpasswd",
            "/actuator/heapdump",
        ],
    )
}
