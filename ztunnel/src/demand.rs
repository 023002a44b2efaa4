//! Asking the control plane for what a decision needs, where the mesh is known only as far as it was asked for (facts: the
//! ztunnel's on-demand mode). A connection whose answer does not come is refused: what is not known may be guarded.

use cairn_mesh::{Snapshot, Wanted};
use cairn_xds::{DemandError, Mesh};
use std::collections::HashSet;
use std::time::Duration;

/// How many names are asked for on behalf of one connection: a destination, its waypoints, and the gateways of other
/// networks behind it.
const NAMES_MAX: usize = 32;

/// How long one connection waits for all of them.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Why it is not known where a connection goes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnknownError {
    /// The control plane has not said it.
    #[error("`{wanted}` is not known")]
    Unanswered {
        /// What was asked for.
        wanted: Wanted,
        /// Why it is not known.
        #[source]
        source: DemandError,
    },
    /// It takes too many questions.
    #[error("more than {NAMES_MAX} names had to be asked for")]
    TooMany,
    /// It takes too long.
    #[error("names were asked for, for {WAIT_MAX:?}")]
    TooLong,
}

/// Asks until `wanted` needs nothing more of the mesh that can be had. Each name is asked for once: what is not there then
/// is not there.
///
/// # Errors
/// When the control plane does not say it in time, or there is too much to ask.
pub async fn know(mesh: &Mesh, wanted: impl Fn(&Snapshot) -> Vec<Wanted>) -> Result<(), UnknownError> {
    match tokio::time::timeout(WAIT_MAX, ask_for_all(mesh, wanted)).await {
        Ok(known) => known,
        Err(_) => Err(UnknownError::TooLong),
    }
}

async fn ask_for_all(mesh: &Mesh, wanted: impl Fn(&Snapshot) -> Vec<Wanted>) -> Result<(), UnknownError> {
    let mut asked: HashSet<Wanted> = HashSet::new();
    loop {
        let mut next = wanted(&mesh.snapshot());
        next.retain(|wanted| !asked.contains(wanted));
        if next.is_empty() {
            return Ok(());
        }
        for wanted in next {
            if asked.len() >= NAMES_MAX {
                return Err(UnknownError::TooMany);
            }
            if let Err(source) = mesh.ask(&wanted).await {
                return Err(UnknownError::Unanswered { wanted, source });
            }
            asked.insert(wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_mesh::MeshSettings;

    fn name(number: usize) -> Wanted {
        Wanted::Workload(number.to_string().into())
    }

    /// A mesh that is followed whole answers at once that it knows no more.
    #[tokio::test]
    async fn each_name_is_asked_for_once_and_not_too_many_are() {
        let mesh = Mesh::new();
        know(&mesh, |_| vec![name(1), name(2)]).await.unwrap();
        let most = |count: usize| move |_: &Snapshot| (0..count).map(name).collect();
        know(&mesh, most(NAMES_MAX)).await.unwrap();
        let error = know(&mesh, most(NAMES_MAX + 1)).await.unwrap_err();
        assert!(matches!(error, UnknownError::TooMany), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_control_plane_that_does_not_answer_is_named() {
        let mesh = Mesh::on_demand(MeshSettings::default());
        let error = know(&mesh, |_| vec![name(7)]).await.unwrap_err();
        assert_eq!(error.to_string(), "`7` is not known");
    }
}
