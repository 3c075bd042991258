#![expect(clippy::cast_precision_loss, reason = "places on a drawing")]
//! The results as charts: bars over the number of requests in flight, one colour for each way. Scalable vector graphics
//! (SVG 1.1) that need nothing else, alone (`--svg`) or in a page (`--html`).

use std::fmt::Write as _;

use super::cell::{Way, Work};
use super::subject::Subject;
use super::{Measured, Middle, Results, Summary};
use crate::config::format_size;

const WIDTH: f64 = 720.0;
/// Where the bars are: left, top, right, bottom.
const PLOT: (f64, f64, f64, f64) = (70.0, 54.0, 700.0, 244.0);
/// Lines of the legend are so far apart.
const LINE: f64 = 16.0;
/// Told apart by everyone, and in print (Okabe and Ito).
const COLOURS: [&str; 8] = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442", "#000000"];
/// Lines across the chart.
const STEPS: u32 = 4;

/// Bars of several series over some groups.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Chart {
    /// A name for a file.
    pub(super) name: String,
    title: String,
    /// What the figures are.
    meaning: &'static str,
    groups: Vec<String>,
    series: Vec<(String, Vec<Option<Bar>>)>,
}

/// A figure, and the interval in which it truly is if that is known.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bar {
    value: f64,
    range: Option<(f64, f64)>,
}

impl From<f64> for Bar {
    fn from(value: f64) -> Self {
        Self { value, range: None }
    }
}

impl From<Middle> for Bar {
    fn from(middle: Middle) -> Self {
        let range = (!middle.is_single()).then_some((middle.low, middle.high));
        Self { value: middle.median, range }
    }
}

/// What a chart shows of a cell.
type Figure = fn(&Measured) -> Option<Bar>;

/// What there are charts of: a name for the file, the meaning, the figure.
const FIGURES: [(&str, &str, Figure); 8] = [
    ("iops", "requests per second", |cell| Some(ours(cell)?.iops.into())),
    ("p99", "99 % of requests take at most, in microseconds", |cell| Some(ours(cell)?.p99_us.into())),
    ("io-cpu", "CPU time of a request outside the vCPU, in microseconds", |cell| Some(ours(cell)?.io_us.into())),
    ("submissions", "io_submit or io_uring_enter calls for a request", |cell| Some(ours(cell)?.submissions?.into())),
    ("of-host", "requests per second, as a part of the host's without a machine", |cell| part(cell, Subject::Host)),
    ("of-qemu", "requests per second, as a part of QEMU's", |cell| part(cell, Subject::Qemu)),
    ("of-cloud-hypervisor", "requests per second, as a part of Cloud Hypervisor's", |cell| {
        part(cell, Subject::CloudHypervisor)
    }),
    ("of-firecracker", "requests per second, as a part of Firecracker's", |cell| part(cell, Subject::Firecracker)),
];

fn ours(cell: &Measured) -> Option<&Summary> {
    cell.summary.get(&Subject::Skiff)
}

/// What skiff reaches, as a part of what `subject` does.
fn part(cell: &Measured, subject: Subject) -> Option<Bar> {
    Some(cell.summary.get(&subject)?.ratio?.into())
}

/// Every chart that `results` have figures for.
pub(super) fn charts(results: &Results) -> Vec<Chart> {
    let alike = |one: &Work, other: &Work| Work { depth: 0, ..*one } == Work { depth: 0, ..*other };
    let mut charts = Vec::new();
    for cells in results.cells.chunk_by(|one, other| alike(&one.cell.work, &other.cell.work)) {
        let work = cells[0].cell.work;
        let (mut depths, mut ways) = (Vec::<u16>::new(), Vec::<Way>::new());
        for cell in cells {
            if !depths.contains(&cell.cell.work.depth) {
                depths.push(cell.cell.work.depth);
            }
            if !ways.contains(&cell.cell.way) {
                ways.push(cell.cell.way);
            }
        }
        for (name, meaning, figure) in FIGURES {
            let value = |way: &Way, depth: u16| {
                let cell = cells.iter().find(|cell| cell.cell.way == *way && cell.cell.work.depth == depth)?;
                figure(cell)
            };
            let of_way = |way: &Way| (label(*way), depths.iter().map(|depth| value(way, *depth)).collect::<Vec<_>>());
            let series: Vec<_> = ways.iter().map(of_way).collect();
            if series.iter().all(|(_, values)| values.iter().all(Option::is_none)) {
                continue;
            }
            let bs = format_size(work.bs.into()).to_lowercase();
            let (content, rw, queues) = (work.content.name(), work.rw.name(), work.queues);
            let busy = if work.busy > 0 { format!("-busy{}", work.busy) } else { String::new() };
            charts.push(Chart {
                name: format!("{content}-{rw}-{bs}-q{queues}{busy}-{name}"),
                title: title(&work),
                meaning,
                groups: depths.iter().map(|depth| format!("depth {depth}")).collect(),
                series,
            });
        }
    }
    charts
}

fn title(work: &Work) -> String {
    let bs = format_size(work.bs.into()).to_lowercase();
    let plural = if work.queues > 1 { "s" } else { "" };
    let busy = if work.busy > 0 { format!(", {} busy threads beside it", work.busy) } else { String::new() };
    format!("{}, {} {bs}, {} queue{plural}{busy}", work.content.name(), work.rw.name(), work.queues)
}

fn label(way: Way) -> String {
    let words = [way.aio_name().to_owned(), format!("cache={}", way.cache.name())];
    words.into_iter().chain(way.unusual()).collect::<Vec<_>>().join(", ")
}

impl Chart {
    /// The chart as an SVG document.
    pub(super) fn svg(&self) -> String {
        let (left, top, right, bottom) = PLOT;
        let ends = |bar: &Bar| bar.range.map_or(bar.value, |(_, high)| high.max(bar.value));
        let values = || self.series.iter().flat_map(|(_, values)| values.iter().flatten().map(ends));
        let top_value = round_up(values().fold(0.0, f64::max));
        let columns = self.columns();
        let height = bottom + 38.0 + LINE * self.series.len().div_ceil(columns) as f64;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<text x=\"{left}\" y=\"18\" font-size=\"14\" font-weight=\"bold\">{}</text>\n\
             <text x=\"{left}\" y=\"36\">{}</text>\n",
            escape(&self.title),
            escape(self.meaning)
        );
        for step in 0..=STEPS {
            let part = f64::from(step) / f64::from(STEPS);
            let (y, value) = (bottom - part * (bottom - top), number(part * top_value));
            let _ = writeln!(svg, "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ccc\"/>");
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>", left - 6.0, y + 4.0);
        }
        let group = (right - left) / self.groups.len().max(1) as f64;
        let bar = group * 0.8 / self.series.len().max(1) as f64;
        for (at, name) in self.groups.iter().enumerate() {
            let start = left + group * at as f64;
            let (middle, below) = (start + group / 2.0, bottom + 18.0);
            let _ =
                writeln!(svg, "<text x=\"{middle:.1}\" y=\"{below}\" text-anchor=\"middle\">{}</text>", escape(name));
            for (index, (label, values)) in self.series.iter().enumerate() {
                let Some(Bar { value, range }) = values.get(at).copied().flatten() else { continue };
                let height = value / top_value * (bottom - top);
                let x = start + group * 0.1 + bar * index as f64;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{}\"><title>{}, {}: {}</title></rect>",
                    bottom - height,
                    bar * 0.9,
                    COLOURS[index % COLOURS.len()],
                    escape(label),
                    escape(name),
                    number(value)
                );
                let Some((low, high)) = range else { continue };
                let (middle, y) = (x + bar * 0.45, |value: f64| bottom - value / top_value * (bottom - top));
                let _ = writeln!(
                    svg,
                    "<path d=\"M{middle:.1} {:.1}V{:.1}\" stroke=\"#333\"><title>{}-{}</title></path>",
                    y(low),
                    y(high),
                    number(low),
                    number(high)
                );
            }
        }
        for (index, (label, _)) in self.series.iter().enumerate() {
            let (column, row) = ((index % columns) as f64, (index / columns) as f64);
            let (x, y) = (left + (right - left) / columns as f64 * column, bottom + 38.0 + LINE * row);
            let colour = COLOURS[index % COLOURS.len()];
            let _ = writeln!(svg, "<path d=\"M{x} {:.1}h10\" stroke=\"{colour}\" stroke-width=\"10\"/>", y - 4.0);
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{y}\">{}</text>", x + 16.0, escape(label));
        }
        svg + "</svg>\n"
    }
}

impl Chart {
    /// How many labels stand side by side: as many as the longest leaves room for.
    fn columns(&self) -> usize {
        let longest = self.series.iter().map(|(label, _)| label.len()).max().unwrap_or_default();
        match longest {
            0..=28 => 3,
            29..=44 => 2,
            _ => 1,
        }
    }
}

/// 1, 2 or 5 times a power of ten that is not below `value`.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|round| *round >= value).unwrap_or(value)
}

fn number(value: f64) -> String {
    match value {
        1e6.. => format!("{:.2}M", value / 1e6),
        1e4..1e6 => format!("{:.1}k", value / 1e3),
        100.0..1e4 => format!("{value:.0}"),
        // The steps of a scale.
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ => format!("{value:.2}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Results {
    /// A page with every chart and the tables, complete in itself; it prints three charts or more to a sheet.
    pub fn to_html(&self) -> String {
        let tables = self.to_string();
        // A sheet's width in points without its margins; a letter of this font is 0.602 of its size wide.
        let widest = tables.lines().map(|line| line.chars().count()).max().unwrap_or(1);
        let size = (525.0 / (0.602 * widest as f64)).min(8.0);
        let mut page = String::from(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>skiff bench</title>\n<style>\
             body{font-family:sans-serif;max-width:60em;margin:1em auto;padding:0 1em}svg{width:100%;break-inside:avoid}\
             pre{overflow-x:auto;font-size:80%}pre.words{white-space:pre-wrap}@page{size:A4;margin:12mm}\
             @media print{body{max-width:none;margin:0;padding:0}svg{width:86%}pre{overflow:visible}",
        );
        let _ = writeln!(page, "pre{{font-size:{size:.1}pt}}}}</style></head>\n<body><h1>skiff bench</h1>");
        if !self.complete {
            page.push_str("<p><strong>Interrupted: not all was measured.</strong></p>\n");
        }
        let _ = writeln!(
            page,
            "<pre class=\"words\">{}\n{}</pre>",
            escape(&self.manifest.to_string()),
            escape(&self.manifest.command.join(" "))
        );
        page.push_str(
            "<p>Thin lines: where the true median is, with the confidence that stands below the tables.</p>\n",
        );
        for chart in charts(self) {
            page.push_str(&chart.svg());
        }
        let _ = writeln!(page, "<pre>{}</pre>\n</body></html>", escape(&tables));
        page
    }

    /// Every chart as an SVG document, with a name for its file.
    pub fn to_svg(&self) -> impl Iterator<Item = (String, String)> {
        charts(self).into_iter().map(|chart| (format!("{}.svg", chart.name), chart.svg()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn chart() -> Chart {
        let series = vec![
            ("threads <1>".to_owned(), vec![Some(1000.0.into()), Some(4000.0.into())]),
            ("native & co".to_owned(), vec![None, Some(Bar { value: 2000.0, range: Some((1900.0, 4500.0)) })]),
        ];
        let groups = vec!["depth 1".to_owned(), "depth 32".to_owned()];
        Chart { name: "n".to_owned(), title: "written".to_owned(), meaning: "requests", groups, series }
    }

    /// The heights of the bars, in the order of the drawing.
    fn heights(svg: &str) -> Vec<f64> {
        let bars = svg.lines().filter(|line| line.starts_with("<rect"));
        bars.map(|bar| bar.split(" height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()).collect()
    }

    #[test]
    fn bars_are_as_high_as_their_values() {
        // The scale ends at 5000, the plot is 190 high.
        assert_eq!(heights(&chart().svg()), [1000.0, 4000.0, 2000.0].map(|value| value / 5000.0 * 190.0));
    }

    /// From the bottom at 244, where 5000 is 190 higher.
    #[test]
    fn intervals_stand_at_their_values() {
        assert!(chart().svg().contains(" 171.8V73.0\" stroke=\"#333\"><title>1900-4500</title>"), "{}", chart().svg());
    }

    /// A line of the legend for each that has no room beside another.
    #[test]
    fn legends_fit() {
        let mut long = chart();
        assert!(long.svg().contains("viewBox=\"0 0 720 298\""), "{}", long.svg());
        long.series[0].0 = "threads, cache=writeback, ioeventfd=off, poll-us=0, merge=off".to_owned();
        assert!(long.svg().contains("viewBox=\"0 0 720 314\""), "{}", long.svg());
    }

    /// An XML parser that is not ours has a look.
    #[test]
    fn it_is_well_formed() {
        let check = "import sys, xml.dom.minidom as m; print(len(m.parse(sys.stdin).getElementsByTagName('rect')))";
        let python = Command::new("python3").args(["-c", check]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut python) = python else {
            skip::because("no python3");
            return;
        };
        python.stdin.take().unwrap().write_all(chart().svg().as_bytes()).unwrap();
        let output = python.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "3");
    }

    #[test]
    fn scales_end_at_round_numbers() {
        for (value, end) in [(0.0, 1), (0.9, 1), (1.2, 2), (3.0, 5), (5.5, 10), (81_000.0, 100_000), (100.0, 100)] {
            assert_eq!(format!("{:.0}", round_up(value)), end.to_string(), "{value}");
        }
    }
}
