//! The charts in SVG, with a light and a dark style: a bar for each proxy.

use crate::*;

// Sizes in pixels.
const WIDTH: f64 = 760.0;
const NAME_WIDTH: f64 = 150.0;
const VALUE_WIDTH: f64 = 110.0;
const BAR_HEIGHT: f64 = 13.0;
const ROW_HEIGHT: f64 = 18.0;
const TITLE_HEIGHT: f64 = 34.0;

const STYLE: &str = "<style>\
text{font:12px sans-serif;fill:#24292f}.title{font-weight:600}.peer{fill:#8c96a3}.s5{fill:#1f6feb}\
.direct{fill:#d0d7de}.range{stroke:#24292f;stroke-width:1}\
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.peer{fill:#6e7681}.s5{fill:#4493f8}.direct{fill:#3d444d}\
.range{stroke:#e6edf3}}</style>\n";

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
