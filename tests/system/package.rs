//! The Debian package (`make deb`) in a booted systemd: installation, reload, restart and upgrade under load, removal.
//! The static binary (`make static`) in an empty root directory.

use rustix::process::{Pid, Signal, kill_process};

use crate::*;

/// Time to boot, and for a command in the container.
const LIMIT: Duration = Duration::from_secs(60);

/// Modes and paths in the package.
const FILES: &str = "\
644 etc/default/s5\n\
644 etc/fail2ban/filter.d/s5.conf\n\
644 etc/logrotate.d/s5\n\
640 etc/s5/rules\n\
640 etc/s5/users\n\
755 usr/bin/s5\n\
644 usr/lib/systemd/system/s5.service\n\
644 usr/lib/systemd/system/s5.socket\n\
644 usr/share/bash-completion/completions/s5\n\
644 usr/share/doc/s5/README.md\n\
644 usr/share/doc/s5/copyright\n\
644 usr/share/doc/s5/examples/alerts.yml\n\
644 usr/share/doc/s5/examples/haproxy.cfg\n\
644 usr/share/doc/s5/examples/prometheus.yml\n\
644 usr/share/fish/vendor_completions.d/s5.fish\n\
644 usr/share/man/man1/s5.1.gz\n\
644 usr/share/zsh/vendor-completions/_s5\n\
";

/// A container with systemd. Its changes are in memory. Killed when dropped.
///
/// Its systemd is process 1 of its namespace, so all others end with it. It outlives systemd-nspawn(1).
struct Container {
    _nspawn: ProcessGroup,
    /// The process id of its systemd.
    init: u32,
}

impl Container {
    /// `shared` is /mnt in the container.
    fn boot(shared: &Path) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/system-root");
        let mut command = Command::new("systemd-nspawn");
        command.args(["-q", "--register=no", "--keep-unit", "--private-network", "--volatile=overlay", "--boot"]);
        command.arg("-D").arg(root).arg(format!("--bind-ro={}:/mnt", shared.display()));
        // Without its filter of system calls, which refuses Landlock.
        command.env("SYSTEMD_SECCOMP", "0").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let nspawn = ProcessGroup::start(&mut command);
        let pid = nspawn.pid().as_raw_nonzero();
        let children = || fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let mut container = Self { _nspawn: nspawn, init: 0 };
        wait_until("systemd has booted", LIMIT, || {
            container.init = children().split_whitespace().next().and_then(|pid| pid.parse().ok()).unwrap_or_default();
            let state = container.output("systemctl is-system-running --wait");
            container.init > 0 && ["running\n", "degraded\n"].iter().any(|up| state.stdout == up.as_bytes())
        });
        container
    }

    fn output(&self, script: &str) -> Output {
        run(&mut self.command(script), b"", LIMIT)
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init.to_string(), "-a", "sh", "-c", script]);
        command
    }

    /// Returns stdout of a script that succeeds.
    fn sh(&self, script: &str) -> String {
        let output = self.output(script);
        assert!(output.status.success(), "{script}: {output:?}\n{}", text(&self.output("journalctl -n 60").stdout));
        text(&output.stdout)
    }

    /// Runs `work` in the network of the container.
    fn on<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_network(&format!("/proc/{}/ns/net", self.init), work)
    }

    fn main_pid(&self) -> String {
        self.sh("systemctl show -P MainPID s5")
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(init) = i32::try_from(self.init).ok().and_then(Pid::from_raw) {
            let _ = kill_process(init, Signal::KILL);
        }
    }
}

/// Packages of these versions in a new folder.
fn packages(versions: &[&str]) -> TempDir {
    let dir = temp_dir();
    for version in versions {
        let options = format!("--deb-version {version} --output {}/s5_{version}.deb", dir.path().display());
        let mut make = Command::new("make");
        // `make test-system` has built it.
        make.args(["-o", "build", "deb", &format!("DEB_OPTIONS={options}")]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = run(&mut make, b"", Duration::from_secs(600));
        assert!(output.status.success(), "{output:?}");
    }
    dir
}

#[test]
#[ignore = "needs a root file system and cargo-deb: make test-system"]
fn package_runs_upgrades_without_a_gap_and_is_removed() {
    let packages = packages(&["1.0", "2.0"]);
    let container = Container::boot(packages.path());
    container.sh("dpkg -i /mnt/s5_1.0.deb");
    let modes = container.sh("stat -c '%a %U:%G' /etc/s5/users /etc/s5/rules /etc/default/s5 /var/log/s5");
    assert_eq!(modes, "640 root:s5\n640 root:s5\n644 root:root\n750 s5:s5\n");
    assert_eq!(
        container.sh("systemctl is-active s5.service s5.socket; systemctl is-enabled s5.service s5.socket"),
        "active\nactive\nenabled\nenabled\n"
    );
    // There is no target in the container. The server refuses connections to itself with REP 2.
    assert_eq!(container.output("s5 connect -z 127.0.0.1:1080").status.code(), Some(102));
    wait_until("the session is in the journal", LIMIT, || {
        let journal = container.sh("journalctl -u s5 -o json --output-fields=PRIORITY,MESSAGE");
        journal.lines().any(|line| line.contains("msg=session") && line.contains("\"PRIORITY\":\"6\""))
    });
    // The socket starts the service, and its options come from /etc/default/s5.
    container.sh("echo 'S5_OPTIONS=\"--rules /etc/s5/rules --access-log /var/log/s5/access.log\"' > /etc/default/s5");
    container.sh("systemctl stop s5.service");
    assert_eq!(container.output("s5 connect -z 127.0.0.1:1080").status.code(), Some(102));
    container.sh("systemctl is-active s5.service");
    wait_until("the session is in the access log", LIMIT, || {
        container.sh("cat /var/log/s5/access.log").contains("msg=session")
    });
    container
        .sh("mv /var/log/s5/access.log /var/log/s5/old && echo 'deny port=9' >> /etc/s5/rules && systemctl reload s5");
    wait_until("the rules are read again", LIMIT, || {
        container.sh("journalctl -u s5").contains("reload: users: 0, rules: 1")
            && container.output("test -e /var/log/s5/access.log").status.success()
    });
    container.sh("echo 'deny prot=9' > /etc/s5/rules");
    assert!(!container.output("systemctl reload s5").status.success());
    container.sh("echo > /etc/s5/rules");
    let stops = || container.sh("journalctl -u s5").matches("Stopped s5.service").count();
    let stopped = stops();
    container.sh("dpkg -i /mnt/s5_2.0.deb");
    assert_eq!(stops(), stopped, "{}", container.sh("journalctl -u s5 -n 60"));
    container.sh("systemctl is-active s5.service && test -s /etc/default/s5 && grep -q access /etc/default/s5");
    container.sh("dpkg -r s5");
    assert!(container.output("systemctl is-active s5.service s5.socket").stdout.starts_with(b"inactive\ninactive\n"));
    container.sh("test -e /etc/s5/users && dpkg -P s5 && ! test -e /etc/s5 && ! test -e /var/log/s5 && ! test -e /etc/default/s5");
    container.sh("! systemctl cat s5.service && ! ls /etc/systemd/system/*/s5.*");
}

/// Connections per second.
const RATE: u32 = 500;

/// The commands of src/dist/README.md, and the upgrade of the package: a client waits for the new process, but gets an
/// answer. An open tunnel continues, except at a restart.
#[test]
#[ignore = "needs a root file system and cargo-deb: make test-system"]
fn reload_restart_and_upgrade_under_load_lose_no_connection() {
    let packages = packages(&["1.0", "2.0"]);
    let container = Container::boot(packages.path());
    container.sh("dpkg -i /mnt/s5_1.0.deb");
    let page = include_str!("../../src/dist/README.md").split_once("## Reload and restart\n").expect("the section").1;
    let commands = page.split("```").nth(1).and_then(|block| block.strip_prefix("sh\n")).expect("its commands");
    let commands: Vec<&str> = commands.lines().map(|line| line.split('#').next().unwrap_or(line).trim()).collect();
    let [reload, replace, restart] = commands[..] else { panic!("{commands:?}") };
    // Sessions of the process that is replaced last end with the restart.
    for (command, is_new, keeps_tunnel) in [
        (reload, false, Some(true)),
        (replace, true, Some(true)),
        ("dpkg -i /mnt/s5_2.0.deb", true, None),
        (restart, true, Some(false)),
    ] {
        // A busy machine may be slow, and may not reach the rate. The limit is less than --drain-timeout.
        let is_good = |rate| {
            let report = under_load(&container, rate, command, is_new, keeps_tunnel);
            report.has_rate(rate) && report.slowest < Duration::from_secs(5)
        };
        let is_good = [RATE, RATE, RATE / 10].into_iter().any(is_good);
        assert!(is_good, "{command}: fewer connections per second than the rate, or they wait");
    }
}

/// Runs a command while clients connect. `is_new`: it starts a new process. `keeps_tunnel` is `None` for the package,
/// which takes an unknown time after that.
fn under_load(container: &Container, rate: u32, command: &str, is_new: bool, keeps_tunnel: Option<bool>) -> LoadReport {
    let before = container.main_pid();
    let addrs = ["127.0.0.1:1080", "[::1]:1080"].map(addr);
    container.on(|| {
        let target = echo_server();
        let mut tunnel = greet_at(addrs[0]);
        tunnel.write_all(&request(CONNECT, target)).expect("request sent");
        assert_eq!(read_reply(&mut tunnel).0, 0);
        let session = |n: usize| use_once(connect_for_load(addrs[n % 2])?, target);
        Load::run(rate, session, |load| {
            load.wait(200);
            container.sh(command);
            let has_changed = || (container.main_pid() != before) == is_new;
            wait_until("the main process has changed", LIMIT, has_changed);
            assert!(keeps_tunnel.is_none_or(|keeps| keeps == is_open(&mut tunnel)), "{command}: the tunnel");
            load.wait(500);
        })
    })
}

#[test]
#[ignore = "needs cargo-deb: make test-system"]
fn package_has_manual_completions_and_configuration() {
    let (packages, dir) = (packages(&["1.0"]), temp_dir());
    let package = packages.path().join("s5_1.0.deb");
    stdout(Command::new("dpkg-deb").arg("-x").arg(&package).arg(dir.path()), b"");
    let find =
        stdout(Command::new("find").args([".", "-type", "f", "-printf", "%m %P\n"]).current_dir(dir.path()), b"");
    let mut files: Vec<String> = text(&find).split_inclusive('\n').map(str::to_owned).collect();
    files.sort_by(|a, b| a[4..].cmp(&b[4..]));
    assert_eq!(files.join(""), FILES);
    let man = dir.path().join("usr/share/man");
    let path = text(&stdout(Command::new("man").arg("-M").arg(&man).args(["-w", "s5"]), b""));
    assert_eq!(Path::new(path.trim()), man.join("man1/s5.1.gz"));
    let page = text(&stdout(Command::new("man").arg("-M").arg(&man).arg("s5").env("MANWIDTH", "80"), b""));
    assert!(page.contains("systemctl restart s5"), "{page}");
}

#[test]
#[ignore = "needs a root file system and cargo-deb: make test-system"]
fn readme_commands_install_and_run_a_service() {
    let packages = packages(&["1.0"]);
    let dir = packages.path().join("target/debian");
    fs::create_dir_all(&dir).expect("directory created");
    fs::rename(packages.path().join("s5_1.0.deb"), dir.join("s5_1.0.deb")).expect("renamed");
    let container = Container::boot(packages.path());
    // Nobody answers apt's questions, and there is no network for packages that s5 recommends.
    let apt = "APT::Get::Assume-Yes \"true\"; APT::Install-Recommends \"false\";";
    container.sh(&format!("echo '{apt}' > /etc/apt/apt.conf.d/99test"));
    let readme = include_str!("../../README.md").split_once("## Running s5 for others\n").expect("the section").1;
    let readme = readme.split("\n## ").next().expect("its text");
    let commands: Vec<&str> =
        readme.split("```sh\n").skip(1).flat_map(|block| block.split("```").take(1)).flat_map(str::lines).collect();
    assert!(commands.len() > 8, "{commands:?}");
    let (mut log, mut metrics) = (String::new(), String::new());
    for command in commands {
        // The container is root and has no sudo(8).
        let script = format!("cd /mnt; sudo() {{ \"$@\"; }}; {command}");
        match command.split(' ').next() {
            // `packages` has done it.
            Some("make") => {}
            // From outside, because the container has no curl(1).
            Some("curl") => {
                let mut nsenter = Command::new("nsenter");
                nsenter.args(["-t", &container.init.to_string(), "-n", "sh", "-c", command]);
                metrics = text(&run(&mut nsenter, b"", LIMIT).stdout);
            }
            Some("journalctl") => log = container.sh(&script),
            _ if command.contains("--add-user") => {
                container.sh(&format!("echo open-sesame | {{ {script}; }}"));
            }
            _ => drop(container.sh(&script)),
        }
        if command.contains("restart") {
            let connect = |login: &str| format!("s5 connect -z -x {login}@127.0.0.1 127.0.0.1:1080");
            assert_eq!(container.output(&connect("alice:open-sesame")).status.code(), Some(102));
            assert_eq!(container.output(&connect("alice:wrong")).status.code(), Some(67));
        }
    }
    assert!(log.contains("user=\"alice\""), "{log}");
    wait_until("the users are read again", LIMIT, || {
        container.sh("journalctl -u s5").contains("reload: users: 1, rules: 0")
    });
    assert!(metrics.contains("s5_login_failures_total") && metrics.contains("s5_sessions_total{"), "{metrics}");
    assert_eq!(container.sh("stat -c '%a %U:%G' /etc/s5/users"), "640 root:s5\n");
}

#[test]
#[ignore = "needs the static binary: make test-system"]
fn static_binary_serves_in_an_empty_root_directory() {
    let mut make = Command::new("make");
    let output =
        run(make.args(["-s", "static"]).current_dir(env!("CARGO_MANIFEST_DIR")), b"", Duration::from_secs(600));
    let dir = temp_dir();
    fs::copy(text(&output.stdout).trim(), dir.path().join("s5")).expect("make has built it");
    let s5 = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--root"]).arg(dir.path()).arg("/s5");
        command
    };
    let version = text(&run(s5().args(["--version", "-v"]), b"", LIMIT).stdout);
    assert!(version.contains("static\nGSSAPI: no") && version.contains("nsswitch: no"), "{version}");
    let server = Server::start_with(s5().args(["serve", "--listen", "127.0.0.1:0"]), 1);
    ping(&mut connect_to(&server, echo_server()), b"hello");
    let gssapi = run(
        s5().args(["connect", "-zv", "--auth", "gssapi", "-x"]).arg(server.addr().to_string()).arg("a.test:1"),
        b"",
        LIMIT,
    );
    assert!(text(&gssapi.stderr).contains("a static binary cannot load the library"), "{gssapi:?}");
}
