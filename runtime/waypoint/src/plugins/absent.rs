//! What stands in a chain for a plugin of type NETWORK that is not running and may not be missing.

use bytes::Bytes;
use cairn_filter::{Closer, ConnectionFilter, Exchange, Factory, Filter, Passage, Phases, Side, Wakers};
use std::sync::Arc;

/// A filter that closes every new connection; exchanges do not meet it, as they do not meet the plugin. `why` is for logs.
pub fn absent(name: &str, why: &str) -> Arc<dyn Factory> {
    Arc::new(Absent { name: name.into(), reason: format!("plugin {name}: {why}") })
}

struct Absent {
    name: Box<str>,
    reason: String,
}

impl Factory for Absent {
    fn name(&self) -> &str {
        &self.name
    }

    fn phases(&self) -> Phases {
        Phases::empty()
    }

    fn start(&self, _: &Exchange) -> Option<Box<dyn Filter>> {
        None
    }

    fn connect(&self, _: &Exchange, _: &Wakers) -> Option<Box<dyn ConnectionFilter>> {
        Some(Box::new(Refusal { reason: self.reason.clone() }))
    }
}

struct Refusal {
    reason: String,
}

impl Refusal {
    fn close(&self) -> Passage {
        Passage::Close(self.reason.clone())
    }
}

impl ConnectionFilter for Refusal {
    fn opened(&mut self, _: &mut Exchange) -> Passage {
        self.close()
    }

    fn data(&mut self, _: &mut Exchange, _: Side, _: Bytes, _: bool) -> Passage {
        self.close()
    }

    fn woken(&mut self, _: &mut Exchange, _: Side) -> Passage {
        self.close()
    }

    fn overdue(&mut self, _: &mut Exchange, _: Side) -> Passage {
        self.close()
    }

    fn closed(&mut self, _: &mut Exchange, _: Closer) {}
}
