//! The charts in SVG, with a light and a dark style: bars for the rows, lines for the soak.

use std::fmt::Write as _;

use crate::proxies::ProxyKind;
use crate::report::Results;

// Sizes in pixels.
const WIDTH: f64 = 760.0;
const NAME_WIDTH: f64 = 150.0;
const VALUE_WIDTH: f64 = 110.0;
const BAR_HEIGHT: f64 = 13.0;
const ROW_HEIGHT: f64 = 18.0;
const TITLE_HEIGHT: f64 = 34.0;

const STYLE: &str = "<style>\
text{font:12px sans-serif;fill:#24292f}.title{font-weight:600}.peer{fill:#8c96a3}.s5{fill:#1f6feb}\
.direct{fill:#d0d7de}.range{stroke:#24292f;stroke-width:1}.line{fill:none;stroke:#1f6feb;stroke-width:1.5}\
.axis{fill:none;stroke:#8c96a3;stroke-width:.5}\
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.peer{fill:#6e7681}.s5{fill:#4493f8}.direct{fill:#3d444d}\
.range{stroke:#e6edf3}.line{stroke:#4493f8}}</style>\n";

fn svg(height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\">\n{STYLE}{body}</svg>\n"
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Draws the figures of one group, with a bar for each proxy. Returns `None` if there are no values.
pub fn bars(results: &Results, group: &str) -> Option<String> {
    let (mut body, mut y) = (String::new(), 0.0);
    for (_, figure) in results.figures.iter().filter(|(row, _)| row.group == group) {
        let cells = results.proxies.iter().enumerate().filter_map(|(at, proxy)| {
            let cell = results.cell(at, figure.id);
            Some((proxy, cell.median()?, cell.range()))
        });
        let cells: Vec<_> = cells.collect();
        let max = cells.iter().map(|(_, _, (_, high))| *high).fold(0.0, f64::max);
        if max == 0.0 {
            continue;
        }
        let better = if figure.is_higher_better { "higher is better" } else { "lower is better" };
        let title = escape(&format!("{}, {} ({better})", figure.label, figure.unit));
        let _ = writeln!(body, "<text class=\"title\" x=\"8\" y=\"{:.0}\">{title}</text>", y + 22.0);
        y += TITLE_HEIGHT;
        let scale = (WIDTH - NAME_WIDTH - VALUE_WIDTH) / max;
        for (proxy, median, (low, high)) in cells {
            let class = match proxy.kind {
                ProxyKind::Direct => "direct",
                ProxyKind::S5 => "s5",
                _ => "peer",
            };
            let (right, text, line) = (NAME_WIDTH - 8.0, y + 11.0, y + BAR_HEIGHT / 2.0);
            let _ = writeln!(
                body,
                "<text x=\"{right}\" y=\"{text:.1}\" text-anchor=\"end\">{}</text>\
                 <rect class=\"{class}\" x=\"{NAME_WIDTH}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\"/>\
                 <path class=\"range\" d=\"M{:.1} {line:.1}H{:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{text:.1}\">{median:.*}</text>",
                escape(&proxy.name),
                median * scale,
                NAME_WIDTH + low * scale,
                NAME_WIDTH + high * scale,
                NAME_WIDTH + median.max(high) * scale + 6.0,
                figure.digits,
            );
            y += ROW_HEIGHT;
        }
    }
    (y > 0.0).then(|| svg(y + 10.0, &body))
}

/// A chart of one value over time.
pub struct Panel {
    pub title: String,
    /// Minute and value.
    pub points: Vec<(f64, f64)>,
}

pub fn lines(panels: &[Panel]) -> String {
    const HEIGHT: f64 = 90.0;
    let (mut body, mut y) = (String::new(), 0.0);
    for panel in panels {
        let max = panel.points.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let last = panel.points.last().map_or(1.0, |(minute, _)| minute.max(f64::MIN_POSITIVE));
        let (width, foot) = (WIDTH - 90.0, y + TITLE_HEIGHT + HEIGHT);
        let at = |(minute, value): &(f64, f64)| {
            format!("{:.1},{:.1}", 60.0 + minute / last * width, foot - value / max * HEIGHT)
        };
        let points: Vec<_> = panel.points.iter().map(at).collect();
        let _ = writeln!(
            body,
            "<text class=\"title\" x=\"8\" y=\"{:.1}\">{}</text><path class=\"axis\" d=\"M60 {:.1}V{foot:.1}H{:.1}\"/>\
             <text x=\"54\" y=\"{:.1}\" text-anchor=\"end\">{max:.1}</text><text x=\"54\" y=\"{foot:.1}\" \
             text-anchor=\"end\">0</text><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{last:.1} min</text>\
             <polyline class=\"line\" points=\"{}\"/>",
            y + 22.0,
            escape(&panel.title),
            y + TITLE_HEIGHT,
            60.0 + width,
            y + TITLE_HEIGHT + 10.0,
            60.0 + width,
            foot + 14.0,
            points.join(" "),
        );
        y = foot + 22.0;
    }
    svg(y + 10.0, &body)
}
