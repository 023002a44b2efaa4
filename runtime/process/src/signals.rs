//! Signals that end the process, and those that have it open its logs anew.

use tokio::signal::unix::{SignalKind, signal};

/// Signals of one kind, as they come; those that come while one waits are one.
pub use tokio::signal::unix::Signal as Signals;

/// SIGUSR1, with which Envoy's users have logs opened anew when they have rotated them. It no longer ends the process.
///
/// # Errors
/// When the handler cannot be installed.
pub fn reopen_signals() -> std::io::Result<Signals> {
    signal(SignalKind::user_defined1())
}

/// Resolves at the first SIGTERM or SIGINT and returns its name. A second one ends the process at once, for people
/// who press Ctrl-C twice.
///
/// # Errors
/// When handlers cannot be installed.
pub async fn stop_signal() -> std::io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(130);
    });
    Ok(name)
}
