//! A log that is damaged while nobody has it open: SQLite takes what lies before, and says nothing.

use std::path::{Path, PathBuf};

use millpond::sql::{Engine, Options, SqlError, check, sqlite::FILE};
use tempfile::TempDir;

use crate::store::{Result, Store};

const HEADER: usize = 32;
const FRAME: usize = 24 + 4096;

/// The files of a store as a process that is killed leaves them.
struct Killed {
    dir: TempDir,
}

impl Killed {
    fn copy(store: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        for name in [FILE.to_owned(), format!("{FILE}-wal")] {
            std::fs::copy(store.join(&name), dir.path().join(&name))?;
        }
        Ok(Self { dir })
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join(format!("{FILE}-wal"))
    }

    /// Flips a bit of the log.
    fn flip(&self, at: usize) -> Result {
        let mut log = std::fs::read(self.log())?;
        *log.get_mut(at).ok_or("the log is shorter")? ^= 4;
        Ok(std::fs::write(self.log(), log)?)
    }

    /// Where the frame lies that ends the last commit but so many.
    fn commit(&self, from_the_end: usize) -> Result<usize> {
        let log = std::fs::read(self.log())?;
        let salts = log.get(16..24).ok_or("no header")?;
        let frames = log.get(HEADER..).unwrap_or_default().chunks_exact(FRAME).enumerate();
        let commits = frames.filter(|(_, frame)| &frame[8..16] == salts && frame[4..8] != [0; 4]);
        let number = commits.map(|(number, _)| number).rev().nth(from_the_end).ok_or("fewer commits")?;
        Ok(HEADER + number * FRAME)
    }

    fn open(&self) -> std::result::Result<Engine, SqlError> {
        Engine::open(self.dir.path(), Options::default())
    }
}

async fn with_puts(count: usize) -> Result<Store> {
    let store = Store::open().await?;
    for number in 0..count {
        store.put(&format!("k{number}"), "value").await?;
    }
    Ok(store)
}

/// The store started at an older revision and gave the lost ones out again.
#[tokio::test]
async fn a_log_damaged_before_durable_commits_is_refused() -> Result {
    let store = with_puts(30).await?;
    let at = Killed::copy(store.dir())?.commit(5)?;
    // In the content, the page's number, the end of the commit, the salt and the checksum of a frame; in the log's header.
    for place in [at + 1000, at + 3, at + 7, at + 9, at + 17, 3, 9, 17, 30] {
        let killed = Killed::copy(store.dir())?;
        killed.flip(place)?;
        let found = check(killed.dir.path());
        assert!(matches!(found, Err(SqlError::DamagedLog { .. })), "{place}: {found:?}");
        let refused = killed.open().err();
        assert!(matches!(refused, Some(SqlError::DamagedLog { .. })), "{place}: {refused:?}");
    }
    assert_eq!(check(store.dir())?.problems, Vec::<String>::new());
    Ok(())
}

/// A crash leaves any part of the last commit.
#[tokio::test]
async fn a_log_whose_last_commit_is_torn_is_taken_without_it() -> Result {
    let store = with_puts(30).await?;
    store.put("large", &"v".repeat(100_000)).await?;
    let whole = Killed::copy(store.dir())?;
    let (begin, end) = (whole.commit(1)? + FRAME, whole.commit(0)?);
    for at in (begin..end + FRAME).step_by(1777) {
        let killed = Killed::copy(store.dir())?;
        killed.flip(at)?;
        let engine = killed.open()?;
        assert_eq!(engine.state().position().current, 31);
        engine.close().await;
        let killed = Killed::copy(store.dir())?;
        std::fs::OpenOptions::new().write(true).open(killed.log())?.set_len(at as u64)?;
        killed.open()?.close().await;
    }
    Ok(())
}

#[tokio::test]
async fn what_remains_of_a_torn_commit_behind_later_ones_is_no_damage() -> Result {
    let store = with_puts(3).await?;
    store.put("large", &"v".repeat(100_000)).await?;
    let killed = Killed::copy(store.dir())?;
    killed.flip(killed.commit(1)? + FRAME)?;
    // Its end lies behind the commit of this start, with the salts of the log.
    let engine = killed.open()?;
    let again = Killed::copy(killed.dir.path())?;
    assert!(std::fs::metadata(again.log())?.len() > again.commit(1)? as u64 + 2 * FRAME as u64);
    assert_eq!(check(again.dir.path())?.problems, Vec::<String>::new());
    let reopened = again.open()?;
    assert_eq!(reopened.state().position().current, 4);
    reopened.close().await;
    engine.close().await;
    Ok(())
}

#[tokio::test]
async fn what_remains_of_the_log_before_it_began_anew_is_no_damage() -> Result {
    let store = with_puts(30).await?;
    store.engine.alone(|store| store.checkpoint()).await?;
    store.put("a", "1").await?;
    store.put("b", "1").await?;
    let killed = Killed::copy(store.dir())?;
    assert!(std::fs::metadata(killed.log())?.len() > killed.commit(0)? as u64 + 10 * FRAME as u64);
    assert_eq!(check(killed.dir.path())?.problems, Vec::<String>::new());
    let reopened = killed.open()?;
    assert_eq!(reopened.state().position().current, 33);
    reopened.close().await;
    Ok(())
}
