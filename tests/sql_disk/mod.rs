//! A disk that can lose power and be full: SQLite's own file layer with a memory of what was written since the last sync, and
//! a limit on how large all files together, or the index of a log, may grow.
//!
//! Files are opened by SQLite's default layer, whose table of methods is then replaced, file by file, by a copy with write,
//! truncate, sync, close and the mapping of the log's index going through here.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(unsafe_code, reason = "SQLite's file layer is an interface of C")]

use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_void},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use rand::{RngExt, rngs::StdRng};
use rusqlite::ffi::{
    SQLITE_OK, sqlite3_file, sqlite3_filename, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs, sqlite3_vfs_find,
    sqlite3_vfs_register,
};

/// What a disk writes at once.
const SECTOR: usize = 512;

/// A change that may not have reached the disk.
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

/// A file as the disk has it for certain, and the changes since.
#[derive(Default)]
struct Image {
    synced: Vec<u8>,
    pending: Vec<Change>,
    size: usize,
}

#[derive(Default)]
struct Disk {
    images: HashMap<PathBuf, Image>,
    /// Open files by the address of their handle, with their true methods.
    open: HashMap<usize, (PathBuf, usize)>,
    /// Bytes that all files together may have.
    room: Option<usize>,
    /// Regions that the index of a log may have.
    regions: Option<c_int>,
}

impl Disk {
    /// How many bytes of a write there is room for. The file is as long afterwards.
    fn admit(&mut self, file: *mut sqlite3_file, offset: usize, count: usize) -> usize {
        let Some((path, _)) = self.open.get(&(file as usize)) else { return count };
        let size = self.images.get(path).map_or(0, |image| image.size);
        let others = self.images.values().map(|image| image.size).sum::<usize>() - size;
        let longest = self.room.map_or(usize::MAX, |room| room.saturating_sub(others).max(size));
        let admitted = longest.saturating_sub(offset).min(count);
        if let Some(image) = self.images.get_mut(path).filter(|_| admitted > 0) {
            image.size = image.size.max(offset + admitted);
        }
        admitted
    }
}

static DISK: OnceLock<Mutex<Disk>> = OnceLock::new();
static BASE: OnceLock<usize> = OnceLock::new();

fn disk() -> MutexGuard<'static, Disk> {
    DISK.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

fn apply(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(offset, bytes) => {
            let end = offset + bytes.len();
            content.resize(content.len().max(end), 0);
            content[*offset..end].copy_from_slice(bytes);
        }
        Change::Truncate(size) => content.resize(*size, 0),
    }
}

/// Puts this disk under every database that the process opens from now on.
pub fn install() {
    // SAFETY: the default layer lives as long as the process, and so does the leaked copy of it.
    unsafe {
        let base = sqlite3_vfs_find(std::ptr::null());
        BASE.get_or_init(|| base as usize);
        let mut layer = std::ptr::read(base);
        layer.xOpen = Some(open);
        layer.xDelete = Some(delete);
        layer.zName = c"power".as_ptr();
        layer.pNext = std::ptr::null_mut();
        assert_eq!(sqlite3_vfs_register(Box::leak(Box::new(layer)), 1), SQLITE_OK);
    }
}

/// Bytes that all files together have now.
pub fn used() -> usize {
    disk().images.values().map(|image| image.size).sum()
}

/// Lets all files together have this many bytes, from now on; `None` is no limit.
pub fn limit(room: Option<usize>) {
    disk().room = room;
}

/// Lets the index of a log have this many regions, from now on; `None` is no limit.
pub fn limit_index(regions: Option<c_int>) {
    disk().regions = regions;
}

/// The files of `dir` as a power cut at this moment leaves them.
pub fn cut(dir: &Path, rng: &mut StdRng) -> Vec<(String, Vec<u8>)> {
    let disk = disk();
    let of_dir = disk.images.iter().filter(|(path, _)| path.parent() == Some(dir));
    of_dir
        .filter_map(|(path, image)| {
            let mut content = image.synced.clone();
            for change in &image.pending {
                survive(&mut content, change, rng);
            }
            Some((path.file_name()?.to_str()?.to_owned(), content))
        })
        .collect()
}

/// Applies what the disk got of a change: all, nothing, or some of its sectors.
fn survive(content: &mut Vec<u8>, change: &Change, rng: &mut StdRng) {
    match (change, rng.random_range(0..3)) {
        (_, 0) => {}
        (Change::Write(offset, bytes), 1) => {
            for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                if rng.random_ratio(1, 2) {
                    apply(content, &Change::Write(offset + number * SECTOR, sector.to_vec()));
                }
            }
        }
        _ => apply(content, change),
    }
}

unsafe extern "C" fn open(
    _: *mut sqlite3_vfs,
    name: sqlite3_filename,
    file: *mut sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: SQLite passes what its own layer expects; a successful open has set the methods.
    unsafe {
        let base = BASE.get().copied().unwrap_or_default() as *mut sqlite3_vfs;
        let Some(real) = (*base).xOpen else { return rusqlite::ffi::SQLITE_CANTOPEN };
        let result = real(base, name, file, flags, out);
        if result == SQLITE_OK && !name.is_null() {
            let path = PathBuf::from(CStr::from_ptr(name).to_string_lossy().into_owned());
            let methods = (*file).pMethods;
            let mut ours = std::ptr::read(methods);
            ours.xWrite = Some(write);
            ours.xTruncate = Some(truncate);
            ours.xSync = Some(sync);
            ours.xClose = Some(close);
            ours.xShmMap = Some(map);
            let mut disk = disk();
            disk.images.entry(path.clone()).or_default().size =
                std::fs::metadata(&path).map_or(0, |file| file.len() as usize);
            disk.open.insert(file as usize, (path, methods as usize));
            (*file).pMethods = Box::leak(Box::new(ours));
        }
        result
    }
}

/// A deletion reaches the disk at once: SQLite syncs the directory after those that matter.
unsafe extern "C" fn delete(_: *mut sqlite3_vfs, name: *const c_char, sync_directory: c_int) -> c_int {
    let mut disk = disk();
    // SAFETY: SQLite passes what its own layer expects.
    unsafe {
        let base = BASE.get().copied().unwrap_or_default() as *mut sqlite3_vfs;
        let Some(real) = (*base).xDelete else { return rusqlite::ffi::SQLITE_IOERR };
        disk.images.remove(&PathBuf::from(CStr::from_ptr(name).to_string_lossy().into_owned()));
        real(base, name, sync_directory)
    }
}

/// The true methods of an open file.
unsafe fn methods<'a>(disk: &Disk, file: *mut sqlite3_file) -> Option<&'a sqlite3_io_methods> {
    // SAFETY: tables of methods are static in SQLite.
    disk.open.get(&(file as usize)).map(|(_, methods)| unsafe { &*(*methods as *const sqlite3_io_methods) })
}

fn remember(disk: &mut Disk, file: *mut sqlite3_file, change: Change) {
    if let Some((path, _)) = disk.open.get(&(file as usize))
        && let Some(image) = disk.images.get_mut(path)
    {
        image.pending.push(change);
    }
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    bytes: *const c_void,
    count: c_int,
    offset: sqlite3_int64,
) -> c_int {
    let mut disk = disk();
    let admitted = disk.admit(file, offset as usize, count as usize);
    // SAFETY: SQLite passes `count` readable bytes, of which no more than those are written.
    unsafe {
        let Some(real) = methods(&disk, file).and_then(|methods| methods.xWrite) else {
            return rusqlite::ffi::SQLITE_IOERR;
        };
        let content = std::slice::from_raw_parts(bytes.cast::<u8>(), admitted).to_vec();
        remember(&mut disk, file, Change::Write(offset as usize, content));
        match real(file, bytes, admitted as c_int, offset) {
            SQLITE_OK if admitted < count as usize => rusqlite::ffi::SQLITE_FULL,
            result => result,
        }
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    let mut disk = disk();
    // SAFETY: the file is open.
    unsafe {
        let Some(real) = methods(&disk, file).and_then(|methods| methods.xTruncate) else {
            return rusqlite::ffi::SQLITE_IOERR;
        };
        remember(&mut disk, file, Change::Truncate(size as usize));
        let Disk { images, open, .. } = &mut *disk;
        if let Some(image) = open.get(&(file as usize)).and_then(|(path, _)| images.get_mut(path)) {
            image.size = size as usize;
        }
        real(file, size)
    }
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    let mut disk = disk();
    let Disk { images, open, .. } = &mut *disk;
    if let Some(image) = open.get(&(file as usize)).and_then(|(path, _)| images.get_mut(path)) {
        for change in std::mem::take(&mut image.pending) {
            apply(&mut image.synced, &change);
        }
    }
    // SAFETY: the file is open.
    unsafe {
        let Some(real) = methods(&disk, file).and_then(|methods| methods.xSync) else {
            return rusqlite::ffi::SQLITE_IOERR;
        };
        real(file, flags)
    }
}

/// A region of a log's index, which is a file without the other methods.
unsafe extern "C" fn map(
    file: *mut sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    let disk = disk();
    if extend != 0 && disk.regions.is_some_and(|regions| region >= regions) {
        return rusqlite::ffi::SQLITE_IOERR_SHMSIZE;
    }
    // SAFETY: the file is open.
    unsafe {
        let Some(real) = methods(&disk, file).and_then(|methods| methods.xShmMap) else {
            return rusqlite::ffi::SQLITE_IOERR;
        };
        real(file, region, size, extend, out)
    }
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    let mut disk = disk();
    // SAFETY: the file is open until this returns.
    unsafe {
        let Some(real) = methods(&disk, file).and_then(|methods| methods.xClose) else {
            return rusqlite::ffi::SQLITE_IOERR;
        };
        disk.open.remove(&(file as usize));
        real(file)
    }
}
