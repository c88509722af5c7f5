//! The units in src/dist, without a booted systemd.

use crate::*;

fn dist(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist").join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Runs systemd-analyze on the units, which start the binary of this test. Returns its output.
fn analyze(args: &[&str]) -> Option<String> {
    if !is_installed("systemd-analyze") {
        return None;
    }
    let dir = temp_dir();
    let program = s5().get_program().display().to_string();
    let service = write_file(dir.path(), "s5.service", &dist("s5.service").replace("/usr/bin/s5", &program));
    let socket = write_file(dir.path(), "s5.socket", &dist("s5.socket"));
    let files = if args == ["verify"] { vec![service, socket] } else { vec![service] };
    let output = run(Command::new("systemd-analyze").args(args).args(files), b"", LONG_TIMEOUT);
    assert!(output.status.success(), "{output:?}");
    Some(text(&output.stderr) + &text(&output.stdout))
}

#[test]
fn systemd_analyze_verify_reports_nothing() {
    if let Some(output) = analyze(&["verify"]) {
        assert_eq!(output, "");
    }
}

#[test]
fn systemd_analyze_security_gives_two_or_better() {
    let Some(output) = analyze(&["security", "--offline=yes"]) else { return };
    let line = output.lines().last().unwrap_or_default();
    let level = line.split_once("s5.service: ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<f32>().ok());
    assert!(level.is_some_and(|level| level <= 2.0), "{line}");
}

#[test]
fn default_file_is_an_environment_file_whose_options_are_valid() {
    let dir = temp_dir();
    let file = write_file(dir.path(), "s5", &dist("s5.default"));
    let script = format!(". {file}; exec \"$0\" serve --check $S5_OPTIONS");
    let output = run(Command::new("sh").args(["-c", &script]).arg(s5().get_program()), b"", TIMEOUT);
    assert!(output.status.success(), "{output:?}");
}
