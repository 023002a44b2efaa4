//! TLS sessions that a server may resume: few, and for a short time.
//!
//! A resumed session skips the proof of who the client is; it is taken from the session. So a session must not outlive
//! the trust that was put in it: it is kept with the server's own certificate, is used once, and ends after minutes.

use parking_lot::Mutex;
use rustls::server::StoresServerSessions;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// How long a session can be resumed.
const LIFETIME: Duration = Duration::from_secs(10 * 60);

/// How many sessions are kept; beyond, the oldest go. Each is one or two KiB.
const SESSIONS_MAX: usize = 256;

/// The sessions of one certificate.
#[derive(Debug)]
pub(crate) struct Sessions {
    lifetime: Duration,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    by_key: HashMap<Vec<u8>, (Instant, Vec<u8>)>,
    /// The oldest first; some may have been used.
    order: VecDeque<Vec<u8>>,
}

impl Default for Sessions {
    fn default() -> Self {
        Self { lifetime: LIFETIME, kept: Mutex::default() }
    }
}

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let mut kept = self.kept.lock();
        while kept.order.len() >= SESSIONS_MAX {
            let Some(oldest) = kept.order.pop_front() else { break };
            kept.by_key.remove(&oldest);
        }
        kept.order.push_back(key.clone());
        kept.by_key.insert(key, (Instant::now(), value));
        true
    }

    /// Sessions of TLS 1.3 are only taken.
    fn get(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        let (since, value) = self.kept.lock().by_key.remove(key)?;
        (since.elapsed() < self.lifetime).then_some(value)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_used_once_and_the_oldest_go() {
        let sessions = Sessions::default();
        for number in 0..=SESSIONS_MAX {
            sessions.put(number.to_be_bytes().to_vec(), vec![number as u8]);
        }
        assert_eq!(sessions.take(&0_usize.to_be_bytes()), None, "the oldest");
        assert_eq!(sessions.take(&1_usize.to_be_bytes()), Some(vec![1]));
        assert_eq!(sessions.take(&1_usize.to_be_bytes()), None, "once");
        assert!(sessions.kept.lock().order.len() <= SESSIONS_MAX);
    }

    #[test]
    fn a_session_ends() {
        let sessions = Sessions { lifetime: Duration::ZERO, ..Sessions::default() };
        sessions.put(vec![1], vec![2]);
        assert_eq!(sessions.take(&[1]), None);
    }
}
