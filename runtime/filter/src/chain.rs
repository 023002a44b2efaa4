//! The chain: the filters of one destination, compiled once.

use crate::running::Active;
use crate::{Admission, Connection, ConnectionFilter, Exchange, Factory, Phases, Running, Wakers};
use std::sync::Arc;

/// The filters of one destination in request order, compiled once per configuration.
#[derive(Clone, Default)]
pub struct Chain {
    links: Arc<[Link]>,
}

#[derive(Clone)]
struct Link {
    factory: Arc<dyn Factory>,
    phases: Phases,
}

impl Chain {
    /// A chain that runs `factories` in this order on requests and in reverse on responses.
    pub fn new(factories: Vec<Arc<dyn Factory>>) -> Self {
        let link = |factory: Arc<dyn Factory>| Link { phases: factory.phases(), factory };
        Self { links: factories.into_iter().map(link).collect() }
    }

    /// The names of the filters, in request order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.links.iter().map(|link| link.factory.name())
    }

    /// The filters, in request order.
    pub(crate) fn factories(&self) -> impl Iterator<Item = &Arc<dyn Factory>> {
        self.links.iter().map(|link| &link.factory)
    }

    /// Whether nothing is asked of the destination's traffic.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Judges a connection that carries no HTTP: any filter's refusal is the chain's.
    pub fn admit(&self, connection: &Connection) -> Admission {
        let mut allowed_by = None;
        for link in self.links.iter() {
            match link.factory.admit(connection) {
                Admission::Pass(by) => allowed_by = allowed_by.or(by),
                refused => return refused,
            }
        }
        Admission::Pass(allowed_by)
    }

    /// Judges a connection that carries no HTTP and that [`Chain::admit`] lets pass, by filters that ask somebody.
    pub async fn ask(&self, connection: &Connection) -> Admission {
        let asked: Vec<_> = self.links.iter().filter_map(|link| link.factory.ask(connection)).collect();
        for judgement in asked {
            if let Admission::Refuse(denial) = judgement.await {
                return Admission::Refuse(denial);
            }
        }
        Admission::Pass(None)
    }

    /// Starts the instances for one connection that carries no HTTP, in request order; mostly there are none.
    pub fn connect(&self, exchange: &Exchange, wakers: &Wakers) -> Vec<Box<dyn ConnectionFilter>> {
        self.links.iter().filter_map(|link| link.factory.connect(exchange, wakers)).collect()
    }

    /// Starts the instances for one exchange.
    pub fn start(&self, exchange: &Exchange) -> Running {
        let start = |link: &Link| {
            let filter = link.factory.start(exchange)?;
            Some(Active { phases: link.phases, filter })
        };
        Running::new(self.links.iter().filter_map(start).collect())
    }
}

#[cfg(test)]
#[path = "chain/tests.rs"]
mod tests;
