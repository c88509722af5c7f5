//! promtool on the metrics of a server, and on the configuration and alerts of src/dist.

use super::{get, start};
use crate::*;

#[test]
fn metrics_pass_promtool() {
    if !is_installed("promtool") {
        return;
    }
    let (server, metrics) = start(&["--deny", "port=9"]);
    assert_eq!(open(&server, CONNECT, addr("127.0.0.1:9")).1, 2);
    let output =
        run(Command::new("promtool").args(["check", "metrics"]), get(metrics, "/metrics").1.as_bytes(), TIMEOUT);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}

/// Metrics of a node that has all problems, for `promtool test rules`.
const SERIES: &str = r#"evaluation_interval: 1m
tests:
- interval: 1m
  input_series:
  - {series: 'up{job="s5",instance="a"}', values: '0x30'}
  - {series: 's5_sessions_open{instance="a"}', values: '81x30'}
  - {series: 's5_sessions_limit{instance="a"}', values: '100x30'}
  - {series: 's5_last_reload_successful{instance="a"}', values: '0x30'}
  - {series: 's5_login_failures_total{instance="a"}', values: '0+120x30'}
  alert_rule_test:
"#;

/// Runs promtool on the files of src/dist.
fn promtool(args: &[&str]) -> String {
    let dist = concat!(env!("CARGO_MANIFEST_DIR"), "/src/dist");
    let output = run(Command::new("promtool").args(args).current_dir(dist), b"", TIMEOUT);
    assert!(output.status.success(), "{args:?}: {output:?}");
    text(&output.stdout)
}

#[test]
fn configuration_for_prometheus_is_valid_and_its_metrics_exist() {
    if !is_installed("promtool") {
        return;
    }
    assert!(promtool(&["check", "config", "prometheus.yml"]).contains(" 4 rules found"));
    let page = include_str!("../../../src/dist/README.md");
    let graphs = page.split("```promql\n").nth(1).and_then(|rest| rest.split("```").next()).expect("queries");
    let rules: String = graphs.lines().map(|graph| format!("  - {{record: graph, expr: '{graph}'}}\n")).collect();
    let dir = temp_dir();
    let file = write_file(dir.path(), "graphs", &format!("groups:\n- name: graphs\n  rules:\n{rules}"));
    promtool(&["check", "rules", &file]);
    let (_server, metrics) = start(&[]);
    let (_, exposition) = get(metrics, "/metrics");
    let used = [graphs, include_str!("../../../src/dist/alerts.yml")].concat();
    let names = used.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| word.starts_with("s5_"));
    for name in names.map(|name| name.trim_end_matches("_bucket")) {
        assert!(exposition.contains(&format!("# TYPE {name} ")), "{name}");
    }
}

#[test]
fn alerts_for_prometheus_fire() {
    if !is_installed("promtool") {
        return;
    }
    let near_limit = "a has 81 sessions, more than 80 % of its limit (--max-connections)";
    let expected = [
        ("S5Down", "job: s5, severity: critical", "a does not answer"),
        ("S5NearSessionLimit", "severity: warning", near_limit),
        ("S5ReloadFailed", "severity: warning", "a keeps its old users and rules; its log has the reason"),
        ("S5LoginFailures", "severity: warning", "a has 2 failed logins per second"),
    ];
    let test = |(name, labels, summary)| {
        let alert = format!("{{exp_labels: {{instance: a, {labels}}}, exp_annotations: {{summary: \"{summary}\"}}}}");
        format!("  - {{eval_time: 20m, alertname: {name}, exp_alerts: [{alert}]}}\n")
    };
    let tests: String = expected.into_iter().map(test).collect();
    let test = format!("rule_files: [{}/src/dist/alerts.yml]\n{SERIES}{tests}", env!("CARGO_MANIFEST_DIR"));
    let dir = temp_dir();
    promtool(&["test", "rules", &write_file(dir.path(), "tests", &test)]);
}
