//! One token bucket, as it lies in shared data: tokens and a time, eight bytes each.

use std::time::Duration;

/// Tokens as of a moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bucket {
    tokens: f64,
    at: u64,
}

impl Bucket {
    pub(crate) fn full(burst: u32, now: Duration) -> Self {
        Self { tokens: f64::from(burst), at: nanos(now) }
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let (tokens, at) = bytes.split_first_chunk()?;
        let tokens = f64::from_le_bytes(*tokens);
        let at = u64::from_le_bytes(at.try_into().ok()?);
        tokens.is_finite().then_some(Self { tokens, at })
    }

    pub(crate) fn write(&self) -> Vec<u8> {
        [self.tokens.to_le_bytes(), self.at.to_le_bytes()].concat()
    }

    /// Takes a token, or says how long it takes until there is one. Clocks of workers may differ a little: time never runs
    /// backwards here.
    pub(crate) fn take(&mut self, per_second: f64, burst: u32, now: Duration) -> Result<(), Duration> {
        let now = nanos(now).max(self.at);
        let grown = (now - self.at) as f64 / 1e9 * per_second;
        self.tokens = (self.tokens + grown).clamp(0.0, f64::from(burst));
        self.at = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::try_from_secs_f64((1.0 - self.tokens) / per_second).unwrap_or(Duration::MAX))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_survive_the_way_there_and_back() {
        let mut bucket = Bucket::full(2, Duration::from_secs(5));
        assert_eq!(bucket.take(0.5, 2, Duration::from_secs(4)), Ok(()), "a clock that is behind");
        assert_eq!(Bucket::read(&bucket.write()), Some(bucket));
        assert_eq!(bucket.take(0.5, 2, Duration::from_secs(5)), Ok(()));
        assert_eq!(bucket.take(0.5, 2, Duration::from_secs(5)), Err(Duration::from_secs(2)));
        assert_eq!(Bucket::read(b"short"), None);
        assert_eq!(Bucket::read(&[0xff; 16]), None);
    }
}
