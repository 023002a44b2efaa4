//! Child processes: started, watched, started again when they end by themselves, and ended with us.
//!
//! Each leads a process group of its own: Ctrl-C in a terminal reaches us alone, and what a child has started ends
//! with it. Should we be killed, they learn of it (see `child.rs`).

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
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

/// A child that does not end on SIGTERM within this time is killed. Proxies drain for 5 seconds.
pub const STOP_MAX: Duration = Duration::from_secs(8);

/// How often we look whether a process group is empty.
const POLL: Duration = Duration::from_millis(10);

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
    /// What has been told to end: nothing of its name starts before it has ended.
    ending: BTreeMap<String, JoinHandle<()>>,
}

struct Kept {
    program: Program,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Supervisor {
    /// Makes what runs be exactly `wanted`: starts what is new, ends what is gone, replaces what changed. Does not
    /// wait for what ends, but a replacement does.
    pub fn keep(&mut self, wanted: BTreeMap<String, Program>) {
        self.end_if(|name, program| wanted.get(name) != Some(program));
        self.ending.retain(|_, task| !task.is_finished());
        for (name, program) in wanted {
            if !self.running.contains_key(&name) {
                let (stop, told) = oneshot::channel();
                let before = self.ending.remove(&name);
                let task = tokio::spawn(watch(name.clone(), program.clone(), before, told));
                self.running.insert(name, Kept { program, stop, task });
            }
        }
    }

    /// Ends everything and waits for it.
    pub async fn stop(&mut self) {
        self.end_if(|_, _| true);
        for task in std::mem::take(&mut self.ending).into_values() {
            finished(task).await;
        }
    }

    /// Tells to end what `is_gone` says.
    fn end_if(&mut self, is_gone: impl Fn(&str, &Program) -> bool) {
        let gone: Vec<String> = self
            .running
            .iter()
            .filter(|(name, kept)| is_gone(name, &kept.program))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            if let Some(kept) = self.running.remove(&name) {
                // A receiver that is gone means the task has ended already.
                let _ended = kept.stop.send(());
                self.ending.insert(name, kept.task);
            }
        }
    }
}

async fn finished(task: JoinHandle<()>) {
    if let Err(error) = task.await {
        tracing::error!(%error, "a supervisor's task failed");
    }
}

/// Keeps a program running from when the one before it has ended until told to stop.
async fn watch(
    name: String,
    program: Program,
    before: Option<JoinHandle<()>>,
    mut stop: oneshot::Receiver<()>,
) {
    if let Some(before) = before {
        finished(before).await;
    }
    if stop.try_recv() != Err(oneshot::error::TryRecvError::Empty) {
        return;
    }
    let mut pause = RESTART_PAUSE;
    loop {
        let started = tokio::time::Instant::now();
        match start(&program) {
            Ok((mut child, group)) => {
                tracing::debug!(name, pid = group.as_raw_pid(), "started");
                tokio::select! {
                    biased;
                    _ = &mut stop => return end(&name, &mut child, group).await,
                    ended = child.wait() => match ended {
                        Ok(status) => tracing::warn!(name, %status, log = %program.log.display(), "ended by itself, will be started again"),
                        Err(error) => tracing::warn!(name, %error, "cannot be watched"),
                    },
                }
                // What it has started would be in the way of its next run.
                end(&name, &mut child, group).await;
            }
            Err(error) => tracing::error!(name, error = format!("{error:#}"), "cannot be started"),
        }
        if started.elapsed() > STEADY {
            pause = RESTART_PAUSE;
        }
        tokio::select! {
            biased;
            _ = &mut stop => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(RESTART_PAUSE_MAX);
    }
}

/// Starts a program as the leader of a process group.
fn start(program: &Program) -> Result<(Child, Pid)> {
    let (file, arguments) = program.command.split_first().context("an empty command")?;
    let log = open_log(&program.log)?;
    let child = Command::new(file)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {}", Path::new(file).display()))?;
    let group =
        child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).context("it has no process id")?;
    Ok((child, group))
}

fn open_log(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Ends a child and all processes of its group: they are asked, and killed if that takes too long.
async fn end(name: &str, child: &mut Child, group: Pid) {
    // Where nobody is left, nobody needs a signal.
    let _gone = rustix::process::kill_process_group(group, Signal::TERM);
    let ended = async {
        reaped(name, child).await;
        while rustix::process::test_kill_process_group(group).is_ok() {
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(STOP_MAX, ended).await.is_err() {
        tracing::warn!(name, "did not end in time and is killed");
        let _gone = rustix::process::kill_process_group(group, Signal::KILL);
        reaped(name, child).await;
    }
}

async fn reaped(name: &str, child: &mut Child) {
    if let Err(error) = child.wait().await {
        tracing::error!(name, %error, "cannot be waited for");
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
            "cd {}; trap 'echo bye; exit 0' TERM; echo run; test -f once || {{ touch once; exit 1; }}; \
             while :; do sleep 0.05; done",
            dir.path().display()
        );
        let twice = program(dir.path(), &script);
        supervisor.keep(BTreeMap::from([("a".to_owned(), twice)]));
        assert!(until(dir.path(), "run\nrun\n").await.contains("run\nrun\n"));
        supervisor.keep(BTreeMap::new());
        assert!(until(dir.path(), "bye").await.contains("bye"));
    }

    /// Says that it begins, and some time after it is asked to end that it does.
    fn slow(name: &str) -> String {
        // The shell would tell of its `sleep`, which is asked to end as well.
        format!(
            "exec 2>/dev/null; trap 'sleep 0.2; echo {name} ends; exit' TERM; echo {name} begins; \
             while :; do sleep 0.02; done"
        )
    }

    #[tokio::test]
    async fn what_a_child_has_started_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut supervisor = Supervisor::default();
        let script = format!("trap 'echo child ends; exit' TERM; ({}) & wait", slow("grandchild"));
        supervisor.keep(BTreeMap::from([("a".to_owned(), program(dir.path(), &script))]));
        assert_eq!(until(dir.path(), "begins").await, "grandchild begins\n");
        supervisor.stop().await;
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert!(log.contains("\nchild ends\n") && log.contains("grandchild ends\n"), "{log}");
    }

    #[tokio::test]
    async fn a_replacement_starts_when_its_predecessor_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut supervisor = Supervisor::default();
        let keep = |supervisor: &mut Supervisor, name: &str| {
            supervisor.keep(BTreeMap::from([("a".to_owned(), program(dir.path(), &slow(name)))]));
        };
        keep(&mut supervisor, "first");
        assert_eq!(until(dir.path(), "begins").await, "first begins\n");
        // The second is replaced before its turn comes, and never runs.
        keep(&mut supervisor, "second");
        keep(&mut supervisor, "third");
        until(dir.path(), "third begins").await;
        supervisor.stop().await;
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log, "first begins\nfirst ends\nthird begins\nthird ends\n");
    }
}
