//! Limits of the process that the system sets.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the number of files and sockets that may be open to the most that the system allows. What it cannot have is
/// logged: the process goes on with what it has.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => tracing::debug!(from = limit.current, to = limit.maximum, "more files may be open"),
        Err(error) => tracing::warn!(limit = limit.current, %error, "no more files may be open"),
    }
}

/// How many files and sockets are open and may be, in Prometheus' text format, by their usual names.
pub fn encode_file_metrics() -> String {
    // The directory that is being read is one of them.
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count().saturating_sub(1));
    let maximum = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    format!(
        "# HELP process_open_fds Open files and sockets\n# TYPE process_open_fds gauge\nprocess_open_fds {open}\n\
         # HELP process_max_fds Files and sockets that may be open\n# TYPE process_max_fds gauge\n\
         process_max_fds {maximum}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_counted() {
        let count = |text: String| -> u64 {
            let line =
                text.lines().find_map(|line| line.strip_prefix("process_open_fds ")).unwrap().to_owned();
            line.parse().unwrap()
        };
        let held: Vec<_> = (0..32).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        assert!(count(encode_file_metrics()) > 32);
        drop(held);
    }

    #[test]
    fn as_many_files_may_be_open_as_the_system_allows() {
        raise_file_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
