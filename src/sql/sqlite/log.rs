//! Whether SQLite's write-ahead log has lost commits that were durable.
//!
//! SQLite takes the log up to the first frame that does not match its checksum, since that is what a crash leaves of the last
//! commit, and ignores what follows. A damaged frame further back looks the same to it: durable writes would be missing without a
//! word, and their revisions given out again.
//!
//! What follows tells the two apart. A commit is synced before anything is written behind it, so a crash damages the last one
//! only. Each frame's checksum goes on from that of the frame before it, so that a frame which fits the one before it was written
//! behind it, and is no remnant of something else. Where a frame fits the end of a commit, that commit was durable; if it lies
//! behind the first damaged frame, the damage came later. Damage in the last commit looks like a crash.
//!
//! This is only true if what SQLite once found in a log is durable before it writes behind it: see [`settle`].

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// The first word of a log; the lowest bit tells that checksums are over big-endian words.
const MAGIC: u32 = 0x377f_0682;

/// Sizes that a page can have, and the one that it has.
const USUAL_PAGE: usize = 4096;
const PAGE_SIZES: std::ops::RangeInclusive<usize> = 512..=65536;

/// SQLite's running checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Checksum(u32, u32);

impl Checksum {
    fn over(self, bytes: &[u8], word: fn([u8; 4]) -> u32) -> Self {
        let words = bytes.as_chunks::<4>().0.as_chunks::<2>().0;
        words.iter().fold(self, |Self(one, two), [first, second]| {
            let one = one.wrapping_add(word(*first)).wrapping_add(two);
            Self(one, two.wrapping_add(word(*second)).wrapping_add(one))
        })
    }
}

/// The big-endian word at `at`; 0 beyond the end.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u32::from_be_bytes(*word))
}

/// A walk over a log's frames.
struct Walk {
    page: usize,
    salts: Option<(u32, u32)>,
    word: fn([u8; 4]) -> u32,
    /// What the next frame's checksum goes on from.
    checksum: Checksum,
    /// Where the first damage is, in bytes from the log's beginning.
    damage: Option<u64>,
    /// Whether the last frame ended a commit behind the damage.
    is_behind_a_commit: bool,
}

impl Walk {
    /// Begins behind the header. It lies in one sector, so no crash leaves half of it; if it is damaged, SQLite takes nothing from the
    /// log, and what else it says is seen in the first frame.
    fn begin(header: &[u8; HEADER]) -> Self {
        let order = if word(header, 0) & 1 == 0 { u32::from_le_bytes } else { u32::from_be_bytes };
        let page = usize::try_from(word(header, 8)).unwrap_or(0);
        let is_page = page.is_power_of_two() && PAGE_SIZES.contains(&page);
        let checksum = Checksum(word(header, 24), word(header, 28));
        let is_sound = word(header, 0) & !1 == MAGIC
            && is_page
            && header.first_chunk::<24>().is_some_and(|content| Checksum(0, 0).over(content, order) == checksum);
        Self {
            page: if is_page { page } else { USUAL_PAGE },
            salts: is_sound.then(|| (word(header, 16), word(header, 20))),
            // SQLite writes in the machine's order.
            word: if is_sound { order } else { u32::from_ne_bytes },
            checksum,
            damage: (!is_sound).then_some(0),
            is_behind_a_commit: false,
        }
    }

    /// Takes the frame at `offset`. Whether it shows that durable commits are lost.
    fn take(&mut self, frame: &[u8], offset: u64) -> bool {
        let (about, content) = frame.split_at_checked(FRAME_HEADER).unwrap_or_default();
        let salts = (word(about, 8), word(about, 12));
        let written = Checksum(word(about, 16), word(about, 20));
        let checksum = self.checksum.over(about.get(..8).unwrap_or_default(), self.word).over(content, self.word);
        let fits = salts == *self.salts.get_or_insert(salts) && checksum == written;
        if fits && self.is_behind_a_commit {
            return true;
        }
        if !fits {
            self.damage.get_or_insert(offset);
        }
        // The next frame goes on from what is written here, whatever has become of the content.
        self.checksum = written;
        self.is_behind_a_commit = self.damage.is_some() && word(about, 4) != 0;
        false
    }
}

/// Where the log in `file` is damaged, in bytes, if commits behind that place were durable. `None` also without a log.
///
/// # Errors
/// When the file cannot be read.
pub fn damage(file: &Path) -> io::Result<Option<u64>> {
    let mut log = match File::open(file) {
        Ok(log) => BufReader::with_capacity(1 << 20, log),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut header = [0; HEADER];
    if !fill(&mut log, &mut header)? {
        return Ok(None);
    }
    let mut walk = Walk::begin(&header);
    let mut frame = vec![0; FRAME_HEADER + walk.page];
    let mut offset = HEADER as u64;
    while fill(&mut log, &mut frame)? {
        if walk.take(&frame, offset) {
            return Ok(walk.damage);
        }
        offset += frame.len() as u64;
    }
    Ok(None)
}

/// Makes durable what a process that was killed has left in the log. SQLite is about to take it, and would sync it only after it has
/// written behind it.
///
/// # Errors
/// When the file cannot be synced.
pub fn settle(file: &Path) -> io::Result<()> {
    match File::open(file) {
        Ok(log) => log.sync_all(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether there were as many bytes.
fn fill(log: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match log.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
