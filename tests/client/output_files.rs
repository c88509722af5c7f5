//! The files that s5 writes: `--address-file`, `--json=FILE` and the users file.

use std::fs::{self, Permissions};
use std::os::unix::fs::{chown, lchown};

use crate::*;

/// Writes a file with each option. Returns the outcomes.
fn write_each(path: &Path) -> [Outcome; 3] {
    let listener = "05 00 00 01 7f 00 00 01 10 e1";
    let proxy = ScriptedServer::start(&format!("{} < {listener}", reply(listener))).addr;
    let lines = [
        format!("bind -z -x {proxy} --address-file {}", path.display()),
        format!("connect -z --json={} -x {} {TARGET}", path.display(), ScriptedServer::start(&reply(listener)).addr),
        format!("serve --users {} --add-user alice", path.display()),
    ];
    lines.map(|line| {
        let before = fs::read(path).ok();
        let outcome = outcome_of(&mut command(&line), b"topsecret\n");
        assert_eq!(outcome.0 == Some(0), before != fs::read(path).ok(), "{outcome:?}");
        fs::write(path, "").expect("file written");
        outcome
    })
}

#[test]
fn links_of_other_users_in_shared_directories_are_not_followed() {
    if !rustix::process::getuid().is_root() {
        // Only root can give a link away.
        return;
    }
    let (shared, own) = (temp_dir(), temp_dir());
    let (file, link) = (own.path().join("file"), shared.path().join("link"));
    let below = shared.path().join("directory");
    for (mode, owner, link_owner, is_followed) in [
        (0o1777, 0, 1, false),
        (0o1777, 0, 0, true),
        (0o1777, 1, 1, true),
        (0o1777, 2, 1, false),
        (0o777, 0, 1, true),
        (0o1755, 0, 1, true),
    ] {
        for (target, link, path) in [(&file, &link, link.clone()), (&own.path().into(), &below, below.join("file"))] {
            fs::write(&file, "").expect("file written");
            symlink(target, link).expect("symlink created");
            lchown(link, Some(link_owner), None).expect("owner set");
            chown(shared.path(), Some(owner), None).expect("owner set");
            fs::set_permissions(shared.path(), Permissions::from_mode(mode)).expect("permissions set");
            for (status, _, stderr) in write_each(&path) {
                let refused = format!("{} is a symbolic link of another user", link.display());
                assert_eq!((status == Some(0), stderr.contains(&refused)), (is_followed, !is_followed), "{stderr}");
            }
            assert!(link.is_symlink(), "the link was replaced");
            fs::remove_file(link).expect("link removed");
        }
    }
}

#[test]
fn stdout_is_not_a_file_for_the_address_or_the_summary() {
    assert_line("connect --json=- a:1", 2, &["--json=-: stdout is for data"]);
    assert_line("bind --address-file -", 2, &["--address-file -: stdout is for data"]);
    let dir = temp_dir();
    let _ = run(command("connect --json=- a:1").current_dir(dir.path()), b"", TIMEOUT);
    assert_eq!(fs::read_dir(dir.path()).expect("directory read").count(), 0);
    // The links of open files are not paths.
    let script = "exec \"$0\" connect --json=/dev/stderr a:0 2>&1 >/dev/null | cat";
    let (_, stdout, _) =
        outcome_of(std::process::Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_s5")]), b"");
    assert!(stdout.contains("\"status\":2"), "{stdout}");
}
