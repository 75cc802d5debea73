//! Metrics of the process as a whole: build, CPU, memory, open files, allocator.
//!
//! The `process_…` names and meanings are those that Prometheus client libraries agree on, so that common dashboards fit.

use std::io;

use parking_lot::Mutex;
use prometheus::{
    Counter, IntGauge, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use tikv_jemalloc_ctl::{epoch, stats};

use super::process::{ProcessStat, boot_time, open_files};

/// Registers them all.
pub fn register(registry: &Registry) -> Result<(), prometheus::Error> {
    let build =
        IntGaugeVec::new(Opts::new("millpond_build_info", "Always 1; the labels tell the build"), &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    registry.register(Box::new(build))?;
    registry.register(Box::new(ProcessCollector::new()?))?;
    registry.register(Box::new(AllocatorCollector::new()?))
}

/// Reads the kernel's figures when it is asked.
struct ProcessCollector {
    /// A counter can only be added to, so reading it and adding the rest must not interleave.
    cpu: Mutex<Counter>,
    resident: IntGauge,
    virtual_memory: IntGauge,
    threads: IntGauge,
    started: IntGauge,
    open_files: IntGauge,
    max_files: IntGauge,
}

impl ProcessCollector {
    fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            cpu: Mutex::new(Counter::new("process_cpu_seconds_total", "User and system CPU time spent, in seconds")?),
            resident: IntGauge::new("process_resident_memory_bytes", "Resident memory")?,
            virtual_memory: IntGauge::new("process_virtual_memory_bytes", "Virtual memory")?,
            threads: IntGauge::new("process_threads", "Threads")?,
            started: IntGauge::new("process_start_time_seconds", "Start of the process, in seconds since the epoch")?,
            open_files: IntGauge::new("process_open_fds", "Open file descriptors")?,
            max_files: IntGauge::new("process_max_fds", "Most file descriptors that may be open")?,
        })
    }

    fn refresh(&self) -> io::Result<()> {
        let stat = ProcessStat::read_own()?;
        let cpu = self.cpu.lock();
        cpu.inc_by((stat.cpu.as_secs_f64() - cpu.get()).max(0.0));
        self.resident.set(whole(stat.resident_bytes));
        self.virtual_memory.set(whole(stat.virtual_bytes));
        self.threads.set(whole(stat.threads));
        self.started.set(whole(boot_time()?.saturating_add(stat.started_after_boot.as_secs())));
        self.open_files.set(whole(open_files()? as u64));
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        self.max_files.set(whole(most.unwrap_or(u64::MAX)));
        Ok(())
    }

    fn gauges(&self) -> [&IntGauge; 6] {
        [&self.resident, &self.virtual_memory, &self.threads, &self.started, &self.open_files, &self.max_files]
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        if let Err(error) = self.refresh() {
            tracing::warn!(%error, "process metrics cannot be read");
            return Vec::new();
        }
        let mut families = self.cpu.lock().collect();
        families.extend(self.gauges().into_iter().flat_map(Collector::collect));
        families
    }
}

/// Reads jemalloc's figures when it is asked. They stay at zero in a program that allocates through something else.
struct AllocatorCollector {
    allocated: IntGauge,
    active: IntGauge,
    resident: IntGauge,
    retained: IntGauge,
}

impl AllocatorCollector {
    fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            allocated: IntGauge::new("millpond_memory_allocated_bytes", "Heap memory in use by the program")?,
            active: IntGauge::new("millpond_memory_active_bytes", "Heap pages that hold memory in use")?,
            resident: IntGauge::new(
                "millpond_memory_resident_bytes",
                "Heap pages in physical memory, the allocator's own included",
            )?,
            retained: IntGauge::new(
                "millpond_memory_retained_bytes",
                "Address space kept for later, not in physical memory",
            )?,
        })
    }

    fn refresh(&self) -> Result<(), tikv_jemalloc_ctl::Error> {
        epoch::advance()?;
        self.allocated.set(whole(stats::allocated::read()? as u64));
        self.active.set(whole(stats::active::read()? as u64));
        self.resident.set(whole(stats::resident::read()? as u64));
        self.retained.set(whole(stats::retained::read()? as u64));
        Ok(())
    }

    fn gauges(&self) -> [&IntGauge; 4] {
        [&self.allocated, &self.active, &self.resident, &self.retained]
    }
}

impl Collector for AllocatorCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        if let Err(error) = self.refresh() {
            tracing::warn!(%error, "allocator metrics cannot be read");
            return Vec::new();
        }
        self.gauges().into_iter().flat_map(Collector::collect).collect()
    }
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_shows_build_process_and_allocator() {
        let registry = Registry::new();
        register(&registry).unwrap();
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for name in [
            "millpond_build_info{version=",
            "process_cpu_seconds_total",
            "process_open_fds",
            "millpond_memory_resident_bytes",
        ] {
            assert!(text.contains(name), "{name} is missing in:\n{text}");
        }
    }

    #[test]
    fn cpu_time_never_falls() {
        let collector = ProcessCollector::new().unwrap();
        let mut last = 0.0;
        for _ in 0..3 {
            collector.refresh().unwrap();
            let now = collector.cpu.lock().get();
            assert!(now >= last);
            last = now;
        }
    }
}
