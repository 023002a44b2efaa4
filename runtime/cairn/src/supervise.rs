//! Child processes: started, watched, started again when they end by themselves, and ended with us.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The pause before a child that ended by itself is started again; it doubles up to [`RESTART_PAUSE_MAX`].
const RESTART_PAUSE: Duration = Duration::from_millis(200);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(10);

/// A child that ran this long is given the short pause again.
const STEADY: Duration = Duration::from_secs(30);

/// A child that does not end on SIGTERM within this time is killed.
const STOP_MAX: Duration = Duration::from_secs(8);

/// One program to be kept running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Where its output goes, access log lines included.
    pub log: PathBuf,
}

/// The programs kept running, by name.
#[derive(Default)]
pub struct Supervisor {
    running: BTreeMap<String, Kept>,
}

struct Kept {
    program: Program,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Supervisor {
    /// Makes what runs be exactly `wanted`: starts what is new, ends what is gone, replaces what changed.
    pub async fn keep(&mut self, wanted: BTreeMap<String, Program>) {
        let gone: Vec<String> = self
            .running
            .iter()
            .filter(|(name, kept)| wanted.get(*name) != Some(&kept.program))
            .map(|(name, _)| name.clone())
            .collect();
        self.end(gone).await;
        for (name, program) in wanted {
            self.running.entry(name.clone()).or_insert_with(|| {
                let (stop, stopped) = oneshot::channel();
                let task = tokio::spawn(watch(name, program.clone(), stopped));
                Kept { program, stop: Some(stop), task }
            });
        }
    }

    /// Ends everything and waits for it.
    pub async fn stop(&mut self) {
        let all = self.running.keys().cloned().collect();
        self.end(all).await;
    }

    async fn end(&mut self, names: Vec<String>) {
        let mut ended = Vec::new();
        for name in names {
            if let Some(mut kept) = self.running.remove(&name) {
                // A receiver that is gone means the task has ended already.
                let _ended = kept.stop.take().map(|stop| stop.send(()));
                ended.push(kept.task);
            }
        }
        for task in ended {
            if let Err(error) = task.await {
                tracing::error!(%error, "a supervisor's task failed");
            }
        }
    }
}

async fn watch(name: String, program: Program, mut stop: oneshot::Receiver<()>) {
    let mut pause = RESTART_PAUSE;
    loop {
        let started = tokio::time::Instant::now();
        match start(&program) {
            Ok(mut child) => {
                let pid = child.id();
                tracing::debug!(name, pid, "started");
                tokio::select! {
                    ended = child.wait() => match ended {
                        Ok(status) => tracing::warn!(name, %status, log = %program.log.display(), "ended by itself, will be started again"),
                        Err(error) => tracing::warn!(name, %error, "cannot be watched"),
                    },
                    _ = &mut stop => return end(&name, child).await,
                }
            }
            Err(error) => tracing::error!(name, error = format!("{error:#}"), "cannot be started"),
        }
        if started.elapsed() > STEADY {
            pause = RESTART_PAUSE;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = &mut stop => return,
        }
        pause = (pause * 2).min(RESTART_PAUSE_MAX);
    }
}

fn start(program: &Program) -> Result<Child> {
    let (file, arguments) = program.command.split_first().context("an empty command")?;
    let log = open_log(&program.log)?;
    let child = Command::new(file)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {}", Path::new(file).display()))?;
    Ok(child)
}

fn open_log(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

async fn end(name: &str, mut child: Child) {
    if let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
        // A child that is gone already needs no signal.
        let _gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    if tokio::time::timeout(STOP_MAX, child.wait()).await.is_err() {
        tracing::warn!(name, "did not end in time and is killed");
        if let Err(error) = child.kill().await {
            tracing::error!(name, %error, "cannot be killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &Path, script: &str) -> Program {
        let command = ["sh", "-c", script].map(OsString::from).to_vec();
        Program { command, log: dir.join("log") }
    }

    async fn until(dir: &Path, text: &str) -> String {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
            if log.contains(text) || tokio::time::Instant::now() > deadline {
                return log;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_child_that_ends_is_started_again_and_ends_with_us() {
        let dir = tempfile::tempdir().unwrap();
        let mut supervisor = Supervisor::default();
        let script = format!(
            "cd {}; echo run; test -f once || {{ touch once; exit 1; }}; \
             trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done",
            dir.path().display()
        );
        let twice = program(dir.path(), &script);
        supervisor.keep(BTreeMap::from([("a".to_owned(), twice)])).await;
        assert!(until(dir.path(), "run\nrun\n").await.contains("run\nrun\n"));
        supervisor.keep(BTreeMap::new()).await;
        assert!(until(dir.path(), "bye").await.contains("bye"));
    }
}
