//! What the kernel knows of a process: CPU time, memory, threads, open files. Read from `/proc`, so Linux only.

use std::{fs, io, time::Duration};

/// One look at a process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessStat {
    /// User and system CPU time of all threads since the start, in steps of one clock tick (10 ms as a rule).
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Virtual memory in bytes.
    pub virtual_bytes: u64,
    /// Threads now.
    pub threads: u64,
    /// Start time since the machine's boot.
    pub started_after_boot: Duration,
}

impl ProcessStat {
    /// Looks at the process with that id. Fails when there is none.
    pub fn read(pid: u32) -> io::Result<Self> {
        parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
    }

    /// Looks at this process.
    pub fn read_own() -> io::Result<Self> {
        parse_stat(&fs::read_to_string("/proc/self/stat")?)
    }
}

/// Field numbers as in proc_pid_stat(5), from 1; those before the third may hold spaces and are cut off first.
fn parse_stat(text: &str) -> io::Result<ProcessStat> {
    let unreadable = || io::Error::new(io::ErrorKind::InvalidData, "unreadable process status");
    let fields: Vec<&str> = text.rsplit_once(')').ok_or_else(unreadable)?.1.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<u64>().ok()).ok_or_else(unreadable);
    Ok(ProcessStat {
        cpu: ticks(field(14)?.saturating_add(field(15)?)),
        threads: field(20)?,
        started_after_boot: ticks(field(22)?),
        virtual_bytes: field(23)?,
        resident_bytes: field(24)?.saturating_mul(rustix::param::page_size() as u64),
    })
}

fn ticks(count: u64) -> Duration {
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_micros(count.saturating_mul(1_000_000) / per_second)
}

/// Files, sockets included, that this process has open.
pub fn open_files() -> io::Result<usize> {
    // The listing itself holds one open.
    Ok(fs::read_dir("/proc/self/fd")?.count().saturating_sub(1))
}

/// Seconds since the epoch at which the machine started.
pub fn boot_time() -> io::Result<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|seconds| seconds.trim().parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no boot time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_is_no_trap() {
        let line = "7 (a) b (c)) S 1 1 1 0 -1 4194304 1 0 0 0 150 50 0 0 20 0 3 0 200 4096 2 18446744073709551615";
        let stat = parse_stat(line).unwrap();
        let tick = ticks(1);
        assert_eq!((stat.cpu, stat.threads, stat.started_after_boot), (tick * 200, 3, tick * 200));
        assert_eq!((stat.virtual_bytes, stat.resident_bytes), (4096, 2 * rustix::param::page_size() as u64));
    }

    #[test]
    fn what_is_no_status_is_an_error() {
        assert!(parse_stat("").is_err() && parse_stat("1 (x) S 1").is_err());
        assert!(ProcessStat::read(u32::MAX).is_err());
    }

    #[test]
    fn this_process_is_seen() {
        let stat = ProcessStat::read_own().unwrap();
        assert!(stat.resident_bytes > 0 && stat.threads > 0);
        assert!(open_files().unwrap() > 0 && boot_time().unwrap() > 0);
    }
}
