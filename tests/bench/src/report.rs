//! The report in Markdown: the table of figures, the goals, and the rows that were not run or failed.

use crate::*;

/// All runs of one figure of one proxy.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    pub values: Vec<f64>,
    pub errors: Vec<BenchError>,
}

impl Cell {
    pub fn add(&mut self, result: Result<f64, BenchError>) {
        match result {
            Ok(value) if value.is_finite() => self.values.push(value),
            Ok(_) => {}
            Err(error) => self.errors.push(error),
        }
    }

    fn is_corrupt(&self) -> bool {
        self.errors.iter().any(|error| matches!(error, BenchError::Corrupt(_)))
    }

    /// Returns the median, or `None` if data of any run was corrupt.
    pub fn median(&self) -> Option<f64> {
        (!self.is_corrupt() && !self.values.is_empty()).then(|| median(&self.values))
    }

    /// Returns the lowest and the highest value.
    pub fn range(&self) -> (f64, f64) {
        self.values.iter().fold((f64::INFINITY, 0.0), |(low, high), value| (low.min(*value), high.max(*value)))
    }

    fn text(&self, digits: usize) -> String {
        let Some(median) = self.median() else {
            return match self.errors.first() {
                _ if self.is_corrupt() => "corrupt".into(),
                Some(BenchError::Unsupported) => "n/a".into(),
                Some(_) => "failed".into(),
                None => "-".into(),
            };
        };
        let (low, high) = self.range();
        match self.values.len() {
            1 => format!("{median:.digits$}"),
            _ => format!("**{median:.digits$}** {low:.digits$}..{high:.digits$}"),
        }
    }
}

/// All results, by proxy and by figure.
pub struct Results {
    pub proxies: Vec<Proxy>,
    pub figures: Vec<(&'static Row, Figure)>,
    cells: Vec<Vec<Cell>>,
    /// Programs and rows that can't be run, with reasons.
    pub missing: Vec<String>,
}

impl Results {
    pub fn new(proxies: Vec<Proxy>, missing: Vec<String>) -> Self {
        let figures: Vec<_> =
            ROWS.iter().flat_map(|row| row.figures.iter().map(move |figure| (row, *figure))).collect();
        let cells = vec![vec![Cell::default(); figures.len()]; proxies.len()];
        Self { proxies, figures, cells, missing }
    }

    pub fn cell(&self, proxy: usize, id: &str) -> &Cell {
        &self.cells[proxy][self.at(id)]
    }

    pub fn cell_mut(&mut self, proxy: usize, id: &str) -> &mut Cell {
        let at = self.at(id);
        &mut self.cells[proxy][at]
    }

    fn at(&self, id: &str) -> usize {
        self.figures.iter().position(|(_, figure)| figure.id == id).expect("known figure")
    }

    /// Returns the figures with a value or an error of at least one proxy.
    fn measured(&self) -> impl Iterator<Item = (&'static Row, Figure)> {
        let is_measured =
            |at: usize| self.cells.iter().any(|cells| !cells[at].values.is_empty() || !cells[at].errors.is_empty());
        self.figures.iter().enumerate().filter(move |(at, _)| is_measured(*at)).map(|(_, figure)| *figure)
    }

    pub fn table(&self) -> String {
        let names: Vec<_> = self.proxies.iter().map(|proxy| proxy.name.as_str()).collect();
        let mut text = format!("| | unit | {} |\n| --- | --- |{}\n", names.join(" | "), " --: |".repeat(names.len()));
        for (_, figure) in self.measured() {
            let cells: Vec<_> = (0..names.len()).map(|at| self.cell(at, figure.id).text(figure.digits)).collect();
            let _ = writeln!(text, "| {} | {} | {} |", figure.label, figure.unit, cells.join(" | "));
        }
        text
    }

    /// Returns the peer with the best figure.
    fn best_peer(&self, figure: Figure) -> Option<(&str, f64)> {
        let peers = self.proxies.iter().enumerate().filter(|(_, proxy)| proxy.is_peer());
        let figures = peers.filter_map(|(at, proxy)| Some((proxy.name.as_str(), self.cell(at, figure.id).median()?)));
        match figure.is_higher_better {
            true => figures.max_by(|a, b| a.1.total_cmp(&b.1)),
            false => figures.min_by(|a, b| a.1.total_cmp(&b.1)),
        }
    }

    pub fn goals(&self) -> String {
        let Some(s5) = self.proxies.iter().position(|proxy| proxy.kind == ProxyKind::S5) else {
            return "s5 was not measured.\n".into();
        };
        let mut text = "| row | goal | s5 | best peer | ratio | |\n| --- | --- | --: | --: | --: | --- |\n".to_owned();
        let mut unmeasured = Vec::new();
        let all = self.figures.iter().flat_map(|(_, figure)| figure.goals.iter().map(move |goal| (figure, goal)));
        for (figure, goal) in all {
            let (digits, Some(got)) = (figure.digits, self.cell(s5, figure.id).median()) else {
                unmeasured.push(figure.label);
                continue;
            };
            let direct = self.proxies.iter().position(|proxy| proxy.kind == ProxyKind::Direct);
            let peer = match goal {
                Goal::OfDirect(_) => direct.and_then(|at| Some(("alone", self.cell(at, figure.id).median()?))),
                _ => self.best_peer(*figure),
            };
            let best = peer.map_or("-".into(), |(name, best)| format!("{best:.digits$} ({name})"));
            let ratio =
                peer.filter(|(_, best)| *best > 0.0).map_or("-".into(), |(_, best)| format!("{:.2}", got / best));
            let result = match goal.is_met(got, peer.map(|(_, best)| best)) {
                Some(true) => "met",
                Some(false) => "**missed**",
                None => "no peer",
            };
            let goal = goal.text(figure.unit);
            let _ = writeln!(text, "| {} | {goal} | {got:.digits$} | {best} | {ratio} | {result} |", figure.label);
        }
        if !unmeasured.is_empty() {
            let _ = writeln!(text, "\ns5 has no figure for: {}.", unmeasured.join("; "));
        }
        text
    }

    /// Lists the programs and rows that were not run, and each error once.
    pub fn remarks(&self) -> String {
        let mut lines: Vec<String> = self.missing.iter().map(|line| format!("- {line}\n")).collect();
        for (at, proxy) in self.proxies.iter().enumerate() {
            for (row, figure) in self.measured() {
                for error in &self.cell(at, figure.id).errors {
                    let line = format!("- {}: {}: {error}\n", proxy.name, row.name);
                    let is_new = !matches!(error, BenchError::Unsupported) && !lines.contains(&line);
                    lines.extend(is_new.then_some(line));
                }
            }
        }
        let without_udp: Vec<_> =
            self.proxies.iter().filter(|proxy| !proxy.has_udp()).map(|proxy| proxy.name.as_str()).collect();
        if !without_udp.is_empty() {
            lines.push(format!("- no UDP in: {}\n", without_udp.join(", ")));
        }
        lines.concat()
    }
}

/// Describes the machine, the date and the commit, one line each.
pub fn environment() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown CPU");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let git = |args: &[&str]| output(Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(args));
    let changes = if git(&["status", "--porcelain"]).is_empty() { "" } else { "+changes" };
    let packages = ["microsocks", "dante-server", "openssh-client", "openssh-server"];
    let packages = output(Command::new("dpkg-query").args(["-W", "-f", "${Package} ${Version}; "]).args(packages));
    format!(
        "- {}, {cores} cores, Linux {}; {}\n- {}\n- commit {}{changes}{}\n",
        model.trim_start_matches([' ', '\t', ':']),
        read("/proc/sys/kernel/osrelease").trim(),
        packages.trim_end_matches([';', ' ']),
        output(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
        git(&["rev-parse", "--short", "HEAD"]),
        std::env::var("S5_BENCH_ARGS").map_or(String::new(), |args| format!("; `s5 serve {args}`")),
    )
}

fn output(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).trim().to_owned()
}
