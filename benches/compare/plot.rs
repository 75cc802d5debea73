//! Plots as SVG: one line per system, both axes logarithmic, since what matters is how a cost grows.

use std::fmt::Write;

use super::{report::amount, servers::System};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
/// Space for the labels.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;

/// The data of one plot.
pub struct Series {
    /// What is plotted.
    pub title: String,
    /// What the horizontal axis counts.
    pub x: &'static str,
    /// What the vertical axis counts.
    pub y: &'static str,
    /// Points by system.
    pub lines: Vec<(System, Vec<(f64, f64)>)>,
}

/// Where a row's plot goes.
pub fn file_name(row: &str, index: usize) -> String {
    if index == 0 { format!("{row}.svg") } else { format!("{row}-{index}.svg") }
}

/// A logarithmic axis.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Whole powers of ten around the values, laid over the pixels `from` to `to`.
    fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let logs: Vec<f64> = values.filter(|value| *value > 0.0).map(f64::log10).collect();
        let low = logs.iter().copied().fold(f64::INFINITY, f64::min).floor();
        let high = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max).ceil();
        let (low, high) = if low.is_finite() { (low, high.max(low + 1.0)) } else { (0.0, 1.0) };
        Self { low, high, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.max(f64::MIN_POSITIVE).log10() - self.low) / (self.high - self.low);
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        (self.low as i32..=self.high as i32).map(|power| 10f64.powi(power))
    }
}

fn colour(system: System) -> &'static str {
    match system {
        System::Etcd => "#4f6d8f",
        System::GrpcProxy => "#b07d2b",
        System::Bare => "#8a8a8a",
        System::Millpond => "#0b7a5b",
    }
}

/// Draws it.
pub fn svg(series: &Series) -> String {
    let points = || series.lines.iter().flat_map(|(_, line)| line.iter().copied());
    let x = Axis::around(points().map(|(x, _)| x), LEFT, WIDTH - RIGHT);
    let y = Axis::around(points().map(|(_, y)| y), HEIGHT - BOTTOM, TOP);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    text(&mut out, WIDTH / 2.0, 22.0, "middle", "#222", &series.title);
    text(&mut out, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 12.0, "middle", "#444", series.x);
    text(&mut out, 8.0, TOP - 10.0, "start", "#444", series.y);
    grid(&mut out, &x, &y);
    for (system, line) in &series.lines {
        draw(&mut out, *system, line, &x, &y);
    }
    out + "</svg>\n"
}

fn grid(out: &mut String, x: &Axis, y: &Axis) {
    for tick in x.ticks() {
        let at = x.at(tick);
        rule(out, (at, y.from), (at, y.to));
        text(out, at, y.from + 18.0, "middle", "#444", &label(tick));
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        rule(out, (x.from, at), (x.to, at));
        text(out, x.from - 6.0, at + 4.0, "end", "#444", &label(tick));
    }
}

fn label(tick: f64) -> String {
    if tick >= 1.0 { format!("{tick:.0}") } else { format!("{tick}") }
}

fn draw(out: &mut String, system: System, line: &[(f64, f64)], x: &Axis, y: &Axis) {
    let colour = colour(system);
    let points: Vec<String> = line.iter().map(|&(px, py)| format!("{:.1},{:.1}", x.at(px), y.at(py))).collect();
    let points = points.join(" ");
    let _ = writeln!(out, "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
    for &(px, py) in line {
        let (cx, cy) = (x.at(px), y.at(py));
        let tip = amount(py);
        let _ = writeln!(
            out,
            "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\" fill=\"{colour}\"><title>{tip}</title></circle>"
        );
    }
    if let Some(&(px, py)) = line.last() {
        text(out, x.at(px) + 8.0, y.at(py) + 4.0, "start", colour, system.name());
    }
}

fn rule(out: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let _ = writeln!(out, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#ddd\"/>");
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, colour: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>");
}
