//! How much of a virtual machine's time its host gave to others: what was measured meanwhile says little.

use std::fs;

/// Below this share, what a run shows is not disturbed.
const UNDISTURBED: f64 = 0.05;

/// All processors' time since the boot, in the kernel's ticks.
#[derive(Clone, Copy)]
pub struct HostTime {
    all: u64,
    stolen: u64,
}

impl HostTime {
    /// As it is now. None where the kernel does not tell.
    pub fn now() -> Option<Self> {
        Self::read(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// The first line of proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal. What follows is part of user and nice.
    fn read(text: &str) -> Option<Self> {
        let fields = text.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace().take(8);
        let ticks = fields.map(str::parse).collect::<Result<Vec<u64>, _>>().ok()?;
        Some(Self { all: ticks.iter().sum(), stolen: *ticks.get(7)? })
    }

    /// A remark on the time since `before`, if the host took much of it.
    pub fn remark(self, before: Self) -> Option<String> {
        let stolen =
            self.stolen.saturating_sub(before.stolen) as f64 / self.all.saturating_sub(before.all).max(1) as f64;
        (stolen > UNDISTURBED)
            .then(|| format!("the host took {:.0} % of this machine's time meanwhile", stolen * 100.0))
    }
}
