//! One line of the table per row, with the ratios that Millpond is to reach.

use std::{fmt::Write, fs};

use millpond::cli::bench::report::Report;

use super::{Outcome, plot::Series, servers::System, toolchain::Release};

/// What Millpond is to reach.
#[derive(Clone, Copy, Debug)]
pub enum Aim {
    /// That system's figure is at least this many times ours.
    Better(System, f64),
    /// Our figure is at most this many times that system's.
    Within(System, f64),
    /// Our figure is at most that system's and this much.
    Beyond(System, f64),
    /// Our figure is at most this.
    AtMost(f64),
}

/// What was measured for one row.
pub struct Row {
    /// Its name.
    pub id: &'static str,
    /// What was done.
    pub work: &'static str,
    /// What a figure counts.
    pub unit: &'static str,
    /// Figures, by system.
    pub cells: Vec<(System, f64)>,
    /// What is to be reached.
    pub aims: Vec<Aim>,
    /// What else was seen.
    pub remarks: Vec<String>,
    /// The most cores that the generator used while it measured any of them.
    pub generator_cores: f64,
    /// Plots of this row.
    pub plots: Vec<Series>,
}

impl Row {
    /// A row without figures yet.
    pub fn new(id: &'static str, work: &'static str, unit: &'static str, aims: &[Aim]) -> Self {
        let (cells, remarks, plots) = (Vec::new(), Vec::new(), Vec::new());
        Self { id, work, unit, cells, aims: aims.to_vec(), remarks, generator_cores: 0.0, plots }
    }

    /// Adds a system's CPU time per operation.
    pub fn add(&mut self, system: System, report: &Report) {
        self.generator_cores = self.generator_cores.max(report.own_cores);
        self.cells.push((system, report.server_cpu_micros.unwrap_or(f64::NAN)));
        if let Some(deliveries) = report.deliveries.filter(|deliveries| deliveries.seen < deliveries.expected) {
            let late = format!("{}: {} of {} events in time", system.name(), deliveries.seen, deliveries.expected);
            self.remarks.push(late);
        }
    }

    /// Adds a measurement that may have failed, which becomes a remark: one server's failure must not end the run.
    pub fn attempt(&mut self, system: System, measured: Outcome<Report>) -> Option<Report> {
        match measured {
            Ok(report) => {
                self.add(system, &report);
                Some(report)
            }
            Err(error) => {
                self.remarks.push(format!("{} failed: {error}", system.name()));
                None
            }
        }
    }

    /// The figure of a system.
    pub fn of(&self, system: System) -> Option<f64> {
        self.cells.iter().find(|(of, _)| *of == system).map(|(_, figure)| *figure)
    }

    /// All figures on one line.
    pub fn summary(&self) -> String {
        let figures = self.cells.iter().map(|(system, figure)| format!("{} {}", system.name(), amount(*figure)));
        let mut line = figures.collect::<Vec<_>>().join(", ");
        let _ = write!(line, " ({})", self.unit);
        self.remarks.iter().for_each(|remark| line += &format!("; {remark}"));
        line
    }

    fn judged(&self) -> String {
        let judged: Vec<String> = self.aims.iter().filter_map(|aim| self.judge(*aim)).collect();
        if judged.is_empty() { "–".to_owned() } else { judged.join("<br>") }
    }

    /// The ratio, what it is to be, and whether it is. None: one of the figures is missing.
    fn judge(&self, aim: Aim) -> Option<String> {
        let ours = self.of(System::Millpond)?;
        let mark = |met: bool| if met { "✓" } else { "**short**" };
        Some(match aim {
            Aim::Better(system, wanted) => {
                let ratio = self.of(system)? / ours;
                format!("{}x {} (aim >= {wanted}) {}", amount(ratio), system.name(), mark(ratio >= wanted))
            }
            Aim::Within(system, wanted) => {
                let ratio = ours / self.of(system)?;
                format!("{}x of {} (aim <= {wanted}) {}", amount(ratio), system.name(), mark(ratio <= wanted))
            }
            Aim::Beyond(system, wanted) => {
                let more = ours - self.of(system)?;
                format!("{} over {} (aim <= {wanted}) {}", amount(more), system.name(), mark(more <= wanted))
            }
            Aim::AtMost(wanted) => format!("{} (aim <= {}) {}", amount(ours), amount(wanted), mark(ours <= wanted)),
        })
    }
}

/// Three significant digits.
pub fn amount(figure: f64) -> String {
    match figure.abs() {
        size if size >= 100.0 => format!("{figure:.0}"),
        size if size >= 10.0 => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}

/// The table, with what it was measured on.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::from("# Millpond beside etcd and grpc-proxy\n\n");
    let _ = writeln!(text, "{}\n", machine());
    text += "Figures are CPU time of the server's process per operation unless the unit says otherwise. \"Generator\" is the most \
             cores, out of the one it may use, that the load generator took while a row was measured.\n\n";
    text += "| | work | unit | etcd | grpc-proxy | bare hyper | Millpond | ratios | generator |\n";
    text += "|---|---|---|---|---|---|---|---|---|\n";
    for row in rows {
        let cell = |system| row.of(system).map_or_else(|| "–".to_owned(), amount);
        let cells = System::ALL.map(cell).join(" | ");
        let cores = row.generator_cores;
        let _ =
            writeln!(text, "| {} | {} | {} | {cells} | {} | {cores:.2} |", row.id, row.work, row.unit, row.judged());
    }
    let remarks = rows.iter().flat_map(|row| row.remarks.iter().map(move |remark| (row.id, remark)));
    let remarks: String = remarks.map(|(id, remark)| format!("- {id}: {remark}\n")).collect();
    if !remarks.is_empty() {
        let _ = write!(text, "\n{remarks}");
    }
    text
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": an unnamed processor");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let memory =
        read("/proc/meminfo").lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    format!(
        "Measured on {cores} cores of {}, {} GiB of memory, Linux {}, over loopback; etcd {}, Millpond {}.",
        model.trim_start_matches([':', ' ', '\t']).trim(),
        memory.unwrap_or(0) >> 20,
        kernel.trim(),
        Release::newest().version,
        env!("CARGO_PKG_VERSION"),
    )
}
