//! Files are shared, bounded, and opened anew when they were moved.

use super::*;
use cairn_telemetry::TelemetrySettings;
use std::fs;
use std::time::{Duration, Instant};

/// How long a line may take to arrive.
const SOON: Duration = Duration::from_secs(20);

fn wait_for(file: &std::path::Path, text: &str) {
    let deadline = Instant::now() + SOON;
    while fs::read_to_string(file).unwrap_or_default() != text {
        assert!(Instant::now() < deadline, "{}: {:?}", file.display(), fs::read_to_string(file));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_moved_file_is_let_go_and_its_name_opened_anew() {
    let directory = std::env::temp_dir().join(format!("cairn-observe-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let (file, moved) = (directory.join("log"), directory.join("log.1"));
    let telemetry = Telemetry::new("proxy", "1", &TelemetrySettings::default(), std::io::sink());
    let outputs = Outputs::new(telemetry, Arc::default(), drop);
    let path: Arc<str> = file.display().to_string().into();
    let log = outputs.file(&path).unwrap();
    assert!(Arc::ptr_eq(&log, &outputs.file(&path).unwrap()), "one writer per file");
    let write = |text: &str| log.write(|out| out.extend_from_slice(text.as_bytes()));
    write("a");
    wait_for(&file, "a\n");
    fs::rename(&file, &moved).unwrap();
    write("b");
    wait_for(&moved, "a\nb\n");
    outputs.reopen();
    // Also without a line the old file is let go.
    let deadline = Instant::now() + SOON;
    while !file.exists() {
        assert!(Instant::now() < deadline, "the file is not opened anew");
        std::thread::sleep(Duration::from_millis(5));
    }
    write("c");
    wait_for(&file, "c\n");
    wait_for(&moved, "a\nb\n");
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_file_that_cannot_be_opened_is_left_out() {
    let telemetry = Telemetry::new("proxy", "1", &TelemetrySettings::default(), std::io::sink());
    let outputs = Outputs::new(telemetry, Arc::default(), drop);
    assert!(outputs.file(&"/there/is/no/such/directory".into()).is_none());
}
