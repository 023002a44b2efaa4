//! Debian's registry of images, started for one test. The end-to-end tests have this file, too.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use tempfile::TempDir;

/// How long it may take to listen, on a machine that is busy with other tests.
const START_MAX: Duration = Duration::from_secs(30);

/// Ends when dropped.
pub(super) struct Registry {
    pub(super) address: SocketAddr,
    process: Child,
    _home: TempDir,
}

impl Registry {
    /// Starts one with `further` in its configuration, where `HOME` is its folder, in which `files` are; `None`, having
    /// said why, where it is not installed.
    pub(super) fn start(http: &str, further: &str, files: &[(&str, &str)]) -> Option<Self> {
        let program = program()?;
        let home = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(home.path().join(name), content).unwrap();
        }
        let configuration = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: HOME}}}}\n\
             http: {{addr: '127.0.0.1:0', secret: x{http}}}\n{further}\n"
        );
        let file = home.path().join("config.yml");
        std::fs::write(&file, configuration.replace("HOME", &home.path().display().to_string())).unwrap();
        let mut command = Command::new(program);
        command.arg("serve").arg(file).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let log = BufReader::new(process.stderr.take().unwrap());
        let (found, address) = mpsc::channel();
        std::thread::spawn(move || {
            // Read to the end, so that it never waits for a reader.
            for line in log.lines().map_while(Result::ok) {
                if let Some(address) = line.split("listening on ").nth(1) {
                    let address = address.split([',', '"', ' ']).next().unwrap_or_default();
                    // Nobody waits any more when it is late.
                    let _late = found.send(address.parse::<SocketAddr>().unwrap());
                }
            }
        });
        let Ok(address) = address.recv_timeout(START_MAX) else {
            let _killed = process.kill();
            panic!("the registry did not start");
        };
        Some(Self { address, process, _home: home })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.process.kill().and_then(|()| self.process.wait());
    }
}

fn program() -> Option<PathBuf> {
    let within = |folder: &Path| folder.join("target/peers/registry/usr/bin/docker-registry");
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(within).find(|file| file.exists());
    if installed.is_none() {
        let may_skip = std::env::var_os("CAIRN_NO_SKIPS").is_none_or(|value| value.is_empty());
        assert!(may_skip, "CAIRN_NO_SKIPS is set, and there is no registry of images in target/peers");
        println!("skipped: no registry of images in target/peers; `tests/peers` installs it");
    }
    installed
}
