//! `cairn child` and `cairn guard`: how what `up` starts learns that `up` has ended, should it be killed.
//!
//! A mesh without its control plane would go on with what it last knew, and in the way of the next one.

use crate::supervise::STOP_MAX;
use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, getppid};
use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};
use tokio::signal::unix::{SignalKind, signal};

/// `cairn child`.
#[derive(Debug, clap::Args)]
pub struct ChildOptions {
    /// The process that starts it and without which it must not run.
    #[arg(long)]
    parent: i32,
    #[command(flatten)]
    program: Program,
}

/// The program to run.
#[derive(Debug, clap::Args)]
pub struct Program {
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

impl Program {
    fn command(&self) -> Result<Command> {
        let (program, arguments) = self.command.split_first().context("an empty command")?;
        let mut command = Command::new(program);
        command.args(arguments);
        Ok(command)
    }
}

/// The words before a command that make it end when this process does, however that comes about.
pub fn tied_to_us(cairn: &Path) -> Vec<OsString> {
    let parent = std::process::id().to_string();
    vec![cairn.into(), "child".into(), "--parent".into(), parent.into(), "--".into()]
}

/// The words between those of [`tied_to_us`] and a command that make this hold for all that the command starts.
pub fn with_all_it_starts(cairn: &Path) -> Vec<OsString> {
    vec![cairn.into(), "guard".into(), "--".into()]
}

/// Becomes a program that is sent SIGTERM when its parent, or rather the parent's thread that started it, ends.
///
/// # Errors
/// When the parent has ended already, or the program cannot be run.
pub fn become_program(options: &ChildOptions) -> Result<Infallible> {
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .context("cannot ask for a signal at the parent's end")?;
    // A parent that ended before that sends nothing any more.
    let parent = getppid().map(Pid::as_raw_pid);
    ensure!(parent == Some(options.parent), "process {}, which started this one, has ended", options.parent);
    let mut command = options.program.command()?;
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// Runs a program and ends as it does. On a SIGTERM that comes because our parent has ended, ends the whole process
/// group; any other was sent to the group by the supervisor, and the program has it already.
///
/// # Errors
/// When the program cannot be run or waited for.
pub async fn guard(program: Program) -> Result<ExitCode> {
    let parent = getppid();
    let mut told = signal(SignalKind::terminate()).context("cannot watch for signals")?;
    let mut command = tokio::process::Command::from(program.command()?);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", command.as_std().get_program().display()))?;
    let orphaned = async {
        loop {
            // Its sender lives as long as this process.
            let _ever = told.recv().await;
            if getppid() != parent {
                return;
            }
        }
    };
    tokio::select! {
        status = child.wait() => return Ok(code(status.context("cannot be waited for")?)),
        () = orphaned => {}
    }
    rustix::process::kill_current_process_group(Signal::TERM).context("cannot end what was started")?;
    if let Ok(status) = tokio::time::timeout(STOP_MAX, child.wait()).await {
        return Ok(code(status.context("cannot be waited for")?));
    }
    rustix::process::kill_current_process_group(Signal::KILL).context("cannot end what was started")?;
    Ok(ExitCode::FAILURE)
}

/// The exit status as shells tell it: 128 and the signal's number for a program that a signal ended.
fn code(status: ExitStatus) -> ExitCode {
    let number = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    number.and_then(|number| u8::try_from(number).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
