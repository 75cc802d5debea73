//! A wall clock that jumps: a small library, built by the machine's C compiler, that is preloaded into a server.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
    process::Command,
};

use tempfile::TempDir;

/// Shifts the wall clock of the servers that are started with its environment.
pub struct ClockShift {
    library: PathBuf,
    shift: PathBuf,
    _home: TempDir,
}

impl ClockShift {
    pub fn new() -> Self {
        let home = TempDir::with_prefix("millpond-clock-").unwrap();
        let (library, shift) = (home.path().join("clock_shift.so"), home.path().join("shift"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/clock_shift.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source);
        let built = compiler.status().expect("a C compiler is there; Millpond itself needs it to be built");
        assert!(built.success(), "clock_shift.c compiles");
        fs::write(&shift, 0_i64.to_ne_bytes()).unwrap();
        Self { library, shift, _home: home }
    }

    /// What a server needs in its environment.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![("LD_PRELOAD", self.library.display().to_string()), ("CLOCK_SHIFT", self.shift.display().to_string())]
    }

    /// From now on the wall clock is so many seconds away from the machine's.
    pub fn set(&self, seconds: i64) {
        // In place: the servers have the file mapped.
        let file = File::options().write(true).open(&self.shift).unwrap();
        file.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }
}
