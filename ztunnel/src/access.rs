//! Which connections the access log tells of: all of them, unless a filter or a share says otherwise.

use anyhow::{Result, bail, ensure};
use cairn_mesh::TextMatch;
use cairn_telemetry::{TcpRecord, TcpValue};
use std::fmt::Write;
use std::str::FromStr;

/// The most conditions of a filter.
const CONDITIONS_MAX: usize = 32;

/// What is logged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AccessFilter {
    /// All of them must be met.
    conditions: Vec<Condition>,
    /// The share of connections that ended well; all if unset. Those that did not are logged in any case.
    share: Option<Share>,
}

/// A condition on one field of the line.
#[derive(Clone, Debug, PartialEq)]
struct Condition {
    field: &'static str,
    pattern: TextMatch,
    /// Whether the pattern must match, or must not.
    must_match: bool,
}

/// A share, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(f64);

impl FromStr for Share {
    type Err = anyhow::Error;

    /// Reads `0.25` or `25%`.
    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let share = match text.strip_suffix('%') {
            Some(percent) => percent.trim().parse::<f64>().map(|percent| percent / 100.0),
            None => text.parse(),
        };
        match share {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(Self(share)),
            _ => bail!("`{text}` is no share: a number from 0 to 1, or a percentage"),
        }
    }
}

impl FromStr for AccessFilter {
    type Err = anyhow::Error;

    /// Reads conditions with commas between them: a field of the log's line, `=` or `!=`, and a pattern, which may begin
    /// or end with `*`; `*` alone means that there is something. A field that a connection has not is empty.
    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let conditions: Vec<Condition> = parts.map(condition).collect::<Result<_>>()?;
        ensure!(conditions.len() <= CONDITIONS_MAX, "more than {CONDITIONS_MAX} conditions");
        Ok(Self { conditions, share: None })
    }
}

fn condition(text: &str) -> Result<Condition> {
    let Some((name, pattern)) = text.split_once('=') else {
        bail!("`{text}` is no condition: field=pattern or field!=pattern");
    };
    let (name, must_match) = match name.strip_suffix('!') {
        Some(name) => (name.trim(), false),
        None => (name.trim(), true),
    };
    let Some(field) = TcpRecord::FIELDS.into_iter().find(|field| *field == name) else {
        bail!("`{name}` is no field of the access log: {}", TcpRecord::FIELDS.join(", "));
    };
    Ok(Condition { field, pattern: TextMatch::parse(pattern.trim()), must_match })
}

impl AccessFilter {
    /// The same, of which only this share is logged where connections ended well.
    pub fn with_share(self, share: Option<Share>) -> Self {
        Self { share, ..self }
    }

    /// Whether a connection is logged. `chance` is at least 0 and less than 1.
    pub fn wants(&self, record: &TcpRecord<'_>, chance: impl FnOnce() -> f64) -> bool {
        let is_met = |condition: &Condition| {
            condition.pattern.matches(&text(record, condition.field)) == condition.must_match
        };
        if !self.conditions.iter().all(is_met) {
            return false;
        }
        match self.share {
            Some(Share(share)) if record.error.is_empty() => chance() < share,
            _ => true,
        }
    }
}

/// A field of the line as it is written there, without quotes.
fn text(record: &TcpRecord<'_>, wanted: &str) -> String {
    let mut text = String::new();
    record.for_each_field(|name, value| {
        if name == wanted {
            // Writing to a text cannot fail.
            let _written = match value {
                TcpValue::Text(value) | TcpValue::Word(value) => write!(text, "{value}"),
                TcpValue::Address(value) => write!(text, "{value}"),
                TcpValue::Number(value) => write!(text, "{value}"),
                TcpValue::Milliseconds(value) => write!(text, "{value}ms"),
            };
        }
    });
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use cairn_mesh::{Identity, Workload};
    use cairn_telemetry::Direction;
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    /// A connection from `shop/web` that ended so.
    pub(crate) fn record<'a>(source: &'a Arc<Workload>, error: &'a str) -> TcpRecord<'a> {
        TcpRecord {
            started: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
            duration: Duration::from_millis(2500),
            direction: Direction::Inbound,
            source: "10.0.0.1:1000".parse().unwrap(),
            source_workload: Some(source),
            source_identity: Some(&source.identity),
            destination: "10.0.0.2:15008".parse().unwrap(),
            hbone_authority: "10.0.0.2:8080",
            service: None,
            destination_workload: None,
            destination_identity: None,
            bytes_sent: 7,
            bytes_received: 5,
            error,
            plan: "inbound",
            decision: "allow",
            policy: "",
        }
    }

    pub(crate) fn web() -> Arc<Workload> {
        Arc::new(Workload::new("web", "web", Identity::new("cluster.local", "shop", "web").unwrap()))
    }

    #[test]
    fn all_conditions_must_be_met() {
        let web = web();
        for (filter, error, wanted) in [
            ("", "", true),
            ("direction=inbound", "", true),
            ("direction=outbound", "", false),
            ("direction=inbound, src.namespace=shop", "", true),
            ("direction=inbound,src.namespace=bank", "", false),
            ("src.namespace!=bank", "", true),
            ("src.identity=spiffe://cluster.local/ns/shop/*", "", true),
            ("dst.addr=*:15008", "", true),
            ("error=*", "", false),
            ("error=*", "broken pipe", true),
            ("error!=*", "broken pipe", false),
            ("dst.service=*", "", false),
            ("dst.service!=*", "", true),
            ("bytes_sent!=0,duration=2500ms,bytes_recv=5", "", true),
        ] {
            let filter_read: AccessFilter = filter.parse().unwrap();
            assert_eq!(filter_read.wants(&record(&web, error), || 0.0), wanted, "{filter} {error}");
        }
    }

    #[test]
    fn a_share_of_what_ended_well_and_all_that_did_not() {
        let web = web();
        for (share, chance, error, wanted) in [
            ("25%", 0.24, "", true),
            ("25%", 0.25, "", false),
            ("0.25", 0.24, "", true),
            ("0", 0.0, "", false),
            ("100%", 0.999, "", true),
            ("0", 0.5, "broken pipe", true),
        ] {
            let filter = AccessFilter { share: Some(share.parse().unwrap()), ..AccessFilter::default() };
            assert_eq!(filter.wants(&record(&web, error), || chance), wanted, "{share} {chance} {error}");
        }
        let filter = AccessFilter { share: Some(Share(0.0)), .."direction=outbound".parse().unwrap() };
        assert!(!filter.wants(&record(&web, "broken pipe"), || 0.0), "the filter counts for failures too");
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (filter, says) in [
            ("namespace=shop", "`namespace` is no field"),
            ("direction", "is no condition"),
            (&"error=*,".repeat(CONDITIONS_MAX + 1), "more than 32"),
        ] {
            let error = filter.parse::<AccessFilter>().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        for share in ["", "x", "1.5", "-1", "101%", "NaN"] {
            assert!(share.parse::<Share>().is_err(), "{share}");
        }
    }
}
