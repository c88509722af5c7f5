//! The rules of the code that no compiler knows, held against the text of src: who imports whom as the table in
//! src/lib.rs says, what is pure, what can't panic, how long a file is. By text, so not proof against trickery.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules that decide and parse, and do nothing else.
const PURE: [&str; 3] = ["proto", "reassembly", "policy"];
/// What a pure module does not name: the runtime, sockets, the clock, files, processes, threads.
const IMPURE: [&str; 30] = [
    "smol",
    "async",
    "await",
    "async_net",
    "async_signal",
    "futures_lite",
    "dns_lookup",
    "rustix",
    "socket2",
    "tempfile",
    "rpassword",
    "getrandom",
    "log",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "UnixListener",
    "ToSocketAddrs",
    "SystemTime",
    "elapsed",
    "Timer",
    "fs",
    "File",
    "env",
    "process",
    "thread",
    "os",
    "stdin",
    "Future",
];
/// The same, of more than a word.
const IMPURE_PATHS: [&str; 3] = ["Instant::now", "std::io", "io::"];
/// What ends in a panic when it is wrong.
const PANICS: [&str; 8] =
    [".unwrap()", ".expect(", ".unwrap_err()", ".expect_err(", "panic!", "unreachable!", "todo!", "unimplemented!"];
/// The only file that may be unsafe: it calls a library of C.
const UNSAFE: &str = "gssapi/ffi.rs";
/// How long a file may be, without its tests.
const MAX_LINES: usize = 500;

/// A file of src, without comments and without its tests.
struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    fn new(path: &Path, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    /// The names from the crate down: `["server", "connect"]` for server/connect.rs.
    fn module(&self) -> Vec<String> {
        let names = self.path.with_extension("");
        names.iter().map(|name| name.to_string_lossy().into_owned()).collect()
    }

    fn top(&self) -> String {
        self.module().swap_remove(0)
    }

    /// What stands before the tests.
    fn without_tests(&self) -> &str {
        self.text.split_once("\n#[cfg(test)]\nmod tests {").map_or(&self.text, |(code, _)| code)
    }

    fn code(&self) -> String {
        let lines = self.without_tests().lines().map(|line| without_comment(line).to_owned() + "\n");
        lines.collect()
    }
}

/// A comment begins the line or follows a blank; what does not, as in a URL, is none.
fn without_comment(line: &str) -> &str {
    let is_begin = |at: &usize| line[..*at].trim_end().is_empty() || line[..*at].ends_with(' ');
    match line.match_indices("//").map(|(at, _)| at).find(is_begin) {
        Some(at) => &line[..at],
        None => line,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c| !is_word(c)).filter(|word| !word.is_empty())
}

/// All of src, in order.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of src") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_none_or(|name| name != "README.md" && name != "s5.1") {
                assert_eq!(path.extension().and_then(|name| name.to_str()), Some("rs"), "{}", path.display());
                let text = fs::read_to_string(&path).expect("a file of text");
                sources.push(Source::new(path.strip_prefix(&root).expect("it is below src"), &text));
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

fn lib() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("src/lib.rs")
}

/// Each module and what it may import, from the table of src/lib.rs.
fn table(lib: &str) -> Vec<(String, Vec<String>)> {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    for line in lib.lines().filter(|line| line.starts_with("//! | [")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, module, _, imports, _] = cells[..] else { panic!("a row of three cells: {line}") };
        let imports = match imports {
            "all of the above" => rows.iter().map(|(module, _)| module.clone()).collect(),
            "nothing" => Vec::new(),
            list => list.split(", ").map(|name| name.trim_matches('`').to_owned()).collect(),
        };
        rows.push((module.trim_matches(['[', ']', '`']).to_owned(), imports));
    }
    rows
}

/// The modules at the top of the crate that a piece of code names, by `crate::`, or by `super::` as often as it takes.
fn imports(code: &str, depth: usize) -> Vec<String> {
    let mut found = Vec::new();
    let code: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    for root in ["crate::", &"super::".repeat(depth)] {
        for (at, _) in code.match_indices(root) {
            let before = &code[..at];
            if before.ends_with(is_word) || before.ends_with("::") {
                continue;
            }
            let rest = &code[at + root.len()..];
            match rest.strip_prefix('{') {
                Some(group) => found.extend(heads(group)),
                None => found.extend(words(rest).next().map(str::to_owned)),
            }
        }
    }
    found.retain(|name| name != "super" && name != "self");
    found.sort();
    found.dedup();
    found
}

/// The first name of each item of a group of imports.
fn heads(group: &str) -> Vec<String> {
    let (mut depth, mut item, mut heads) = (0, String::new(), Vec::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                heads.extend(words(&item).next().map(str::to_owned));
                item.clear();
                if c == '}' {
                    break;
                }
            }
            _ if depth == 0 => item.push(c),
            _ => {}
        }
    }
    heads
}

fn import_faults(source: &Source, table: &[(String, Vec<String>)]) -> Vec<String> {
    let top = source.top();
    let Some((_, allowed)) = table.iter().find(|(module, _)| *module == top) else {
        return vec![format!("{} has no row in the table", source.path.display())];
    };
    let named = imports(&source.code(), source.module().len()).into_iter();
    let bad = named.filter(|name| *name != top && !allowed.contains(name));
    bad.map(|name| format!("{} imports {name}", source.path.display())).collect()
}

fn purity_faults(source: &Source) -> Vec<String> {
    let code = source.code();
    let mut faults: Vec<&str> = words(&code).filter(|word| IMPURE.contains(word)).collect();
    faults.extend(IMPURE_PATHS.into_iter().filter(|path| code.contains(path)));
    faults.iter().map(|fault| format!("{} names {fault}", source.path.display())).collect()
}

fn safety_faults(source: &Source) -> Vec<String> {
    let code: String = source.code().split_whitespace().collect();
    let mut faults: Vec<&str> = PANICS.into_iter().filter(|panic| code.contains(panic)).collect();
    let is_unsafe = source.path != Path::new(UNSAFE) && words(&source.code()).any(|word| word == "unsafe");
    faults.extend(is_unsafe.then_some("unsafe"));
    faults.iter().map(|fault| format!("{} has {fault}", source.path.display())).collect()
}

fn shape_faults(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = source.without_tests().lines().count();
    if lines > MAX_LINES {
        faults.push(format!("{} has {lines} lines", source.path.display()));
    }
    if !source.text.starts_with("//! ") {
        faults.push(format!("{} does not say what it is", source.path.display()));
    }
    if source.without_tests().contains("cfg(test)") {
        faults.push(format!("{} has tests that are not its last module", source.path.display()));
    }
    faults
}

fn check(faults: impl Iterator<Item = Vec<String>>) {
    let faults: Vec<String> = faults.flatten().collect();
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn modules_import_what_the_table_says_and_nothing_else() {
    let table = table(&lib());
    let sources = sources();
    check(sources.iter().filter(|source| !["lib", "main"].contains(&&*source.top())).map(|s| import_faults(s, &table)));
}

#[test]
fn the_table_has_every_module_once_and_no_other() {
    let lib = lib();
    let mut rows: Vec<String> = table(&lib).into_iter().map(|(module, _)| module).collect();
    let mods = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    rows.sort();
    assert_eq!(rows, mods.collect::<Vec<_>>(), "the rows and the modules");
    for source in sources() {
        assert!(["lib", "main"].contains(&&*source.top()) || rows.contains(&source.top()), "{:?}", source.path);
    }
}

#[test]
fn the_table_has_no_circle() {
    let table = table(&lib());
    let mut done: Vec<&String> = Vec::new();
    while done.len() < table.len() {
        let is_free = |(module, imports): &&(String, Vec<String>)| {
            !done.contains(&module) && imports.iter().all(|name| done.contains(&name))
        };
        let (module, _) = table.iter().find(is_free).expect("a module that imports only what is below it");
        done.push(module);
    }
}

#[test]
fn the_program_is_only_a_way_into_the_commands() {
    let sources = sources();
    let main = sources.iter().find(|source| source.top() == "main").expect("src/main.rs");
    let code = main.code();
    let named: Vec<&str> = code.match_indices("s5::").filter_map(|(at, _)| words(&code[at + 4..]).next()).collect();
    assert!(!named.is_empty() && named.iter().all(|name| *name == "cmd"), "{named:?}");
}

#[test]
fn what_is_pure_names_no_runtime_socket_clock_or_file() {
    let sources = sources();
    check(sources.iter().filter(|source| PURE.contains(&&*source.top())).map(purity_faults));
    for pure in PURE {
        assert!(sources.iter().any(|source| source.top() == pure), "there is no {pure}");
    }
}

#[test]
fn nothing_outside_of_tests_can_panic_or_is_unsafe() {
    check(sources().iter().map(safety_faults));
}

#[test]
fn every_file_says_what_it_is_and_ends_before_500_lines() {
    check(sources().iter().map(shape_faults));
}

#[test]
fn there_is_one_runtime() {
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    let lock = fs::read_to_string(lock).expect("Cargo.lock");
    assert_eq!(strangers(&lock), [""; 0]);
}

/// Packages that are not wanted, directly or not.
fn strangers(lock: &str) -> Vec<&str> {
    let unwanted = ["tokio", "async-std", "mio", "openssl", "openssl-sys"];
    let names = lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    names.filter(|name| unwanted.contains(name) || name.starts_with("tokio-")).collect()
}

const BAD: &str = "//! Something.
use crate::server::Server;
use crate::{client::{self, udp}, proto, dial as d};
pub(crate) fn bad(now: std::time::Instant) {
    // Here crate::cmd and .unwrap() are only talked about: smol, Instant::now().
    let url = \"http://crate\"; let _ = mycrate::relay; crate::conn::timeout_at(Instant::now());
    std::fs::read(url)
        .unwrap ();
    unsafe { todo!() }
}

#[cfg(test)]
mod tests {
    use crate::cmd;
    fn fine() { panic!() }
}
";

#[test]
fn a_forbidden_import_is_found_however_it_is_written() {
    let bad = Source::new(Path::new("proto/deep.rs"), BAD);
    assert_eq!(imports(&bad.code(), 2), ["client", "conn", "dial", "proto", "server"]);
    assert_eq!(imports("super::super::relay::relay(super::other::x)", 2), ["relay"]);
    assert_eq!(imports("use super::{conn::Conn, relay};", 1), ["conn", "relay"]);
    assert_eq!(imports("use crate::relay::{\n    Abort,\n    crates::dial,\n};", 1), ["relay"]);

    let table = vec![("proto".to_owned(), vec!["dial".to_owned()])];
    let faults = import_faults(&bad, &table);
    let expected = ["client", "conn", "server"].map(|name| format!("proto/deep.rs imports {name}"));
    assert_eq!(faults, expected);
    let stray = Source::new(Path::new("stray.rs"), "//! Stray.\n");
    assert_eq!(import_faults(&stray, &table), ["stray.rs has no row in the table"]);
}

#[test]
fn the_table_is_read_as_it_is_meant() {
    let text = "//! | module | what | may import |\n//! | --- | --- | --- |\n//! | [`a`] | it | nothing |\n\
                //! | [`b`] | it | `a` |\n//! | [`c`] | it | `a`, `b` |\n//! | [`d`] | it | all of the above |\n";
    let rows: Vec<_> = table(text).into_iter().map(|(module, imports)| module + ":" + &imports.join(" ")).collect();
    assert_eq!(rows, ["a:", "b:a", "c:a b", "d:a b c"]);
}

#[test]
fn what_is_not_pure_and_not_safe_is_found_outside_of_comments_and_tests() {
    let bad = Source::new(Path::new("proto/deep.rs"), BAD);
    assert_eq!(purity_faults(&bad), ["proto/deep.rs names fs", "proto/deep.rs names Instant::now"]);
    let expected = [".unwrap()", "todo!", "unsafe"].map(|fault| format!("proto/deep.rs has {fault}"));
    assert_eq!(safety_faults(&bad), expected);
    assert_eq!(
        safety_faults(&Source::new(Path::new(UNSAFE), BAD)),
        expected[..2].iter().map(|fault| fault.replace("proto/deep.rs", UNSAFE)).collect::<Vec<_>>()
    );
    let fine = Source::new(Path::new("fine.rs"), "//! Fine.\nfn f(now: Instant, x: IpAddr) { x.unwrap_or(now) }\n");
    assert!(purity_faults(&fine).is_empty() && safety_faults(&fine).is_empty());
}

#[test]
fn a_file_that_is_too_long_or_says_nothing_is_found() {
    let shape = |text: &str| shape_faults(&Source::new(Path::new("a.rs"), text)).len();
    let tests = "\n#[cfg(test)]\nmod tests {\n".to_owned() + &"x\n".repeat(900) + "}\n";
    assert_eq!(shape(&("//! A.\n".to_owned() + &"x\n".repeat(499) + &tests)), 0);
    assert_eq!(shape(&("//! A.\n".to_owned() + &"x\n".repeat(500) + &tests)), 1);
    assert_eq!(shape("// A.\n"), 1);
    assert_eq!(shape("//! A.\n#[cfg(test)]\nuse x;\n"), 1);
}

#[test]
fn another_runtime_is_found() {
    let lock = "[[package]]\nname = \"smol\"\n\n[[package]]\nname = \"tokio\"\n\n[[package]]\nname = \"tokio-util\"\n";
    assert_eq!(strangers(lock), ["tokio", "tokio-util"]);
}
