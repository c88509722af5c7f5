//! Checks of the source code that the compiler does not do. Imports follow the table in src/lib.rs, pure modules do no
//! I/O, code outside of tests does not panic, files are short. The checks search the text, so code can evade them.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules that only parse and decide.
const PURE_MODULES: [&str; 3] = ["proto", "reassembly", "policy"];
/// Words that a pure module must not use: the runtime, sockets, the clock, files, processes, threads.
const IMPURE_WORDS: [&str; 30] = [
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
/// Paths that a pure module must not use.
const IMPURE_PATHS: [&str; 3] = ["Instant::now", "std::io", "io::"];
/// Calls and macros that can panic.
const PANICKING: [&str; 8] =
    [".unwrap()", ".expect(", ".unwrap_err()", ".expect_err(", "panic!", "unreachable!", "todo!", "unimplemented!"];
/// The only file that may use unsafe code, because it calls a C library.
const UNSAFE_FILE: &str = "gssapi/ffi.rs";
/// Maximum number of lines of a file without its tests.
const MAX_LINES: usize = 500;

/// A file of src.
struct SourceFile {
    path: PathBuf,
    text: String,
}

impl SourceFile {
    fn new(path: &Path, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    /// Returns the module names below the crate: `["server", "connect"]` for server/connect.rs.
    fn module_path(&self) -> Vec<String> {
        let names = self.path.with_extension("");
        names.iter().map(|name| name.to_string_lossy().into_owned()).collect()
    }

    fn top_module(&self) -> String {
        self.module_path().swap_remove(0)
    }

    /// Returns the text before the tests module.
    fn without_tests(&self) -> &str {
        self.text.split_once("\n#[cfg(test)]\nmod tests {").map_or(&self.text, |(code, _)| code)
    }

    /// Returns the code without comments and without the tests module.
    fn code(&self) -> String {
        let lines = self.without_tests().lines().map(|line| without_comment(line).to_owned() + "\n");
        lines.collect()
    }
}

/// Removes a comment. `//` starts a comment only at the beginning of a line or after a space, so not in a URL.
fn without_comment(line: &str) -> &str {
    let is_comment_start = |at: &usize| line[..*at].trim_end().is_empty() || line[..*at].ends_with(' ');
    match line.match_indices("//").map(|(at, _)| at).find(is_comment_start) {
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

/// Reads all files of src, sorted by path.
fn source_files() -> Vec<SourceFile> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut dirs = vec![root.clone()];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("directory read") {
            let path = entry.expect("directory entry").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().is_none_or(|name| name != "README.md" && name != "s5.1") {
                assert_eq!(path.extension().and_then(|name| name.to_str()), Some("rs"), "{}", path.display());
                let text = fs::read_to_string(&path).expect("file read");
                files.push(SourceFile::new(path.strip_prefix(&root).expect("path below src"), &text));
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

fn lib_rs() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("src/lib.rs")
}

/// Parses the table of src/lib.rs: each module with the modules that it may import.
fn import_table(lib: &str) -> Vec<(String, Vec<String>)> {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    for line in lib.lines().filter(|line| line.starts_with("//! | [")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, module, _, imports, _] = cells[..] else { panic!("expected a row of three cells: {line}") };
        let imports = match imports {
            "all of the above" => rows.iter().map(|(module, _)| module.clone()).collect(),
            "nothing" => Vec::new(),
            list => list.split(", ").map(|name| name.trim_matches('`').to_owned()).collect(),
        };
        rows.push((module.trim_matches(['[', ']', '`']).to_owned(), imports));
    }
    rows
}

/// Returns the paths that the code of a module names by `crate::` or `super::`, from the root of the crate.
fn imported_paths(code: &str, module_path: &[String]) -> Vec<Vec<String>> {
    let code: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut found = Vec::new();
    for (at, root) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        // Parts of a longer path, and visibilities, are no imports.
        if code[..at].ends_with(is_word) || code[..at].ends_with("::") || code[..at].ends_with("pub(in ") {
            continue;
        }
        let mut base = if root == "super::" { module_path.split_last().expect("a module").1 } else { &[] };
        let mut rest = &code[at + root.len()..];
        while let Some(after) = rest.strip_prefix("super::") {
            base = base.split_last().map_or(&[], |(_, parent)| parent);
            rest = after;
        }
        expand_import(base, rest, &mut found);
    }
    found.sort();
    found.dedup();
    found
}

/// Adds the paths of one import below `base`, also those of a group. Returns the text after the import.
fn expand_import<'a>(base: &[String], text: &'a str, found: &mut Vec<Vec<String>>) -> &'a str {
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = expand_import(base, rest.trim_start(), found).trim_start_matches(|c| !",}".contains(c));
            match rest.strip_prefix(',') {
                Some(next) => rest = next,
                None => return rest.get(1..).unwrap_or_default(),
            }
        }
    }
    let (name, rest) = text.split_at(text.find(|c| !is_word(c)).unwrap_or(text.len()));
    let mut path = base.to_vec();
    match name {
        "" if !rest.starts_with('*') => return rest,
        "" | "self" => {}
        name => path.push(name.into()),
    }
    match rest.strip_prefix("::") {
        Some(rest) => expand_import(&path, rest, found),
        None => {
            found.push(path);
            rest
        }
    }
}

/// Returns each file of a module with the files that it imports. A file imports all files below it.
fn import_graph(files: &[SourceFile], top: &str) -> Vec<(String, Vec<String>)> {
    let files: Vec<_> = files.iter().filter(|file| file.top_module() == top).collect();
    let name = |path: &[String]| path.join("/");
    let names: Vec<String> = files.iter().map(|file| name(&file.module_path())).collect();
    let file_of =
        |path: Vec<String>| (1..=path.len()).rev().map(|n| name(&path[..n])).find(|name| names.contains(name));
    let imports = |file: &SourceFile| {
        let own = name(&file.module_path());
        let mut imports: Vec<String> =
            imported_paths(&file.code(), &file.module_path()).into_iter().filter_map(file_of).collect();
        imports.extend(names.iter().filter(|name| name.starts_with(&(own.clone() + "/"))).cloned());
        imports.retain(|name| *name != own);
        imports
    };
    names.iter().cloned().zip(files.iter().map(|file| imports(file))).collect()
}

/// Removes the rows without imports, again and again. The rows that remain import each other.
fn cycles(mut graph: Vec<(String, Vec<String>)>) -> Vec<(String, Vec<String>)> {
    while let Some(at) = graph.iter().position(|(_, imports)| imports.is_empty()) {
        let (done, _) = graph.remove(at);
        graph.iter_mut().for_each(|(_, imports)| imports.retain(|name| *name != done));
    }
    graph
}

fn import_violations(file: &SourceFile, table: &[(String, Vec<String>)]) -> Vec<String> {
    let top = file.top_module();
    let Some((_, allowed)) = table.iter().find(|(module, _)| *module == top) else {
        return vec![format!("{}: no row in the table of src/lib.rs", file.path.display())];
    };
    let imported = imported_paths(&file.code(), &file.module_path());
    let mut named: Vec<String> = imported.into_iter().filter_map(|path| path.into_iter().next()).collect();
    named.dedup();
    let bad = named.into_iter().filter(|name| *name != top && !allowed.contains(name));
    bad.map(|name| format!("{}: imports {name}, against the table of src/lib.rs", file.path.display())).collect()
}

fn purity_violations(file: &SourceFile) -> Vec<String> {
    let code = file.code();
    let mut violations: Vec<&str> = words(&code).filter(|word| IMPURE_WORDS.contains(word)).collect();
    violations.extend(IMPURE_PATHS.into_iter().filter(|path| code.contains(path)));
    violations.iter().map(|violation| format!("{}: uses {violation} in a pure module", file.path.display())).collect()
}

fn safety_violations(file: &SourceFile) -> Vec<String> {
    let code: String = file.code().split_whitespace().collect();
    let mut violations: Vec<&str> = PANICKING.into_iter().filter(|panic| code.contains(panic)).collect();
    let is_unsafe = file.path != Path::new(UNSAFE_FILE) && words(&file.code()).any(|word| word == "unsafe");
    violations.extend(is_unsafe.then_some("unsafe"));
    violations
        .iter()
        .map(|violation| format!("{}: contains {violation} outside of tests", file.path.display()))
        .collect()
}

fn format_violations(file: &SourceFile) -> Vec<String> {
    let mut violations = Vec::new();
    let lines = file.without_tests().lines().count();
    if lines > MAX_LINES {
        violations.push(format!(
            "{}: {lines} lines without tests (at most {MAX_LINES}; split the file)",
            file.path.display()
        ));
    }
    if !file.text.starts_with("//! ") {
        violations.push(format!("{}: no module documentation (start the file with //!)", file.path.display()));
    }
    if file.without_tests().contains("cfg(test)") {
        violations.push(format!("{}: cfg(test) outside of the tests module at the end", file.path.display()));
    }
    violations
}

fn assert_no_violations(violations: impl Iterator<Item = Vec<String>>) {
    let violations: Vec<String> = violations.flatten().collect();
    assert!(violations.is_empty(), "{violations:#?}");
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let table = import_table(&lib_rs());
    let files = source_files();
    let below_lib = files.iter().filter(|file| !["lib", "main"].contains(&&*file.top_module()));
    assert_no_violations(below_lib.map(|file| import_violations(file, &table)));
}

#[test]
fn import_table_lists_each_module_once() {
    let lib = lib_rs();
    let mut rows: Vec<String> = import_table(&lib).into_iter().map(|(module, _)| module).collect();
    let mods = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    rows.sort();
    assert_eq!(rows, mods.collect::<Vec<_>>(), "the table and the modules differ");
    for file in source_files() {
        assert!(["lib", "main"].contains(&&*file.top_module()) || rows.contains(&file.top_module()), "{:?}", file.path);
    }
}

#[test]
fn import_table_has_no_cycle() {
    assert_eq!(cycles(import_table(&lib_rs())), []);
}

#[test]
fn no_two_files_of_server_and_cmd_import_each_other() {
    for top in ["server", "cmd"] {
        assert_eq!(cycles(import_graph(&source_files(), top)), []);
    }
}

#[test]
fn main_uses_only_the_cmd_module() {
    let files = source_files();
    let main = files.iter().find(|file| file.top_module() == "main").expect("src/main.rs");
    let code = main.code();
    let named: Vec<&str> = code.match_indices("s5::").filter_map(|(at, _)| words(&code[at + 4..]).next()).collect();
    assert!(!named.is_empty() && named.iter().all(|name| *name == "cmd"), "{named:?}");
}

#[test]
fn pure_modules_use_no_runtime_socket_clock_or_file() {
    let files = source_files();
    assert_no_violations(
        files.iter().filter(|file| PURE_MODULES.contains(&&*file.top_module())).map(purity_violations),
    );
    for pure in PURE_MODULES {
        assert!(files.iter().any(|file| file.top_module() == pure), "no module {pure}");
    }
}

#[test]
fn code_outside_tests_has_no_panic_and_no_unsafe() {
    assert_no_violations(source_files().iter().map(safety_violations));
}

#[test]
fn source_files_have_module_docs_and_at_most_500_lines() {
    assert_no_violations(source_files().iter().map(format_violations));
}

#[test]
fn lock_file_has_no_second_runtime_and_no_openssl() {
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    let lock = fs::read_to_string(lock).expect("Cargo.lock");
    assert_eq!(unwanted_packages(&lock), [""; 0]);
}

/// Returns the names of unwanted packages in a Cargo.lock, which lists indirect dependencies too.
fn unwanted_packages(lock: &str) -> Vec<&str> {
    let unwanted = ["tokio", "async-std", "mio", "openssl", "openssl-sys"];
    let names = lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    names.filter(|name| unwanted.contains(name) || name.starts_with("tokio-")).collect()
}

const BAD_CODE: &str = "//! Something.
use crate::server::Server;
use crate::{client::{self, udp}, proto, dial as d};
pub(crate) fn bad(now: std::time::Instant) {
    // A comment that mentions crate::cmd, .unwrap(), smol and Instant::now().
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
fn import_check_finds_all_forms_of_imports() {
    let bad_file = SourceFile::new(Path::new("proto/deep.rs"), BAD_CODE);
    let imported = |code: &str, module: &str| {
        let module: Vec<String> = module.split('/').map(str::to_owned).collect();
        imported_paths(code, &module).iter().map(|path| path.join("/")).collect::<Vec<_>>().join(" ")
    };
    let of_bad = "client client/udp conn/timeout_at dial proto server/Server";
    assert_eq!(imported(&bad_file.code(), "proto/deep"), of_bad);
    assert_eq!(imported("super::super::relay::relay(super::other::x)", "proto/deep"), "proto/other/x relay/relay");
    assert_eq!(imported("use super::{conn::Conn, relay};", "top"), "conn/Conn relay");
    assert_eq!(
        imported("use crate::relay::{\n    Abort,\n    crates::dial as d,\n};", "a"),
        "relay/Abort relay/crates/dial"
    );
    assert_eq!(imported("use super::*; pub(in crate::a) fn f() {}", "a/b"), "a");

    let table = vec![("proto".to_owned(), vec!["dial".to_owned()])];
    let violations = import_violations(&bad_file, &table);
    let expected = ["client", "conn", "server"]
        .map(|name| format!("proto/deep.rs: imports {name}, against the table of src/lib.rs"));
    assert_eq!(violations, expected);
    let unlisted = SourceFile::new(Path::new("unlisted.rs"), "//! Unlisted.\n");
    assert_eq!(import_violations(&unlisted, &table), ["unlisted.rs: no row in the table of src/lib.rs"]);
}

#[test]
fn import_graph_shows_cycles_and_imports_of_a_file_above() {
    let graph = |files: &[(&str, &str)]| {
        let files: Vec<_> = files.iter().map(|(path, text)| SourceFile::new(Path::new(path), text)).collect();
        cycles(import_graph(&files, "a")).into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" ")
    };
    let (top, c) = (("a.rs", "mod b; mod c; use b::x;"), ("a/c.rs", "use super::b::{self, D};"));
    assert_eq!(graph(&[top, ("a/b.rs", "use crate::b::y;"), c]), "");
    assert_eq!(graph(&[top, ("a/b.rs", "fn f() { crate::a::c::g() }"), c]), "a a/b a/c");
    assert_eq!(graph(&[top, ("a/b.rs", "use super::E;"), c]), "a a/b a/c");
    assert_eq!(graph(&[top, ("a/b.rs", ""), c, ("a/c/d.rs", "use super::super::b::x; use super::F;")]), "a a/c a/c/d");
}

#[test]
fn import_table_parser_reads_lists_nothing_and_all_of_the_above() {
    let text = "//! | module | what | may import |\n//! | --- | --- | --- |\n//! | [`a`] | it | nothing |\n\
                //! | [`b`] | it | `a` |\n//! | [`c`] | it | `a`, `b` |\n//! | [`d`] | it | all of the above |\n";
    let rows: Vec<_> =
        import_table(text).into_iter().map(|(module, imports)| module + ":" + &imports.join(" ")).collect();
    assert_eq!(rows, ["a:", "b:a", "c:a b", "d:a b c"]);
}

#[test]
fn purity_and_safety_checks_skip_comments_and_tests() {
    let bad_file = SourceFile::new(Path::new("proto/deep.rs"), BAD_CODE);
    assert_eq!(
        purity_violations(&bad_file),
        ["proto/deep.rs: uses fs in a pure module", "proto/deep.rs: uses Instant::now in a pure module"]
    );
    let expected = [".unwrap()", "todo!", "unsafe"]
        .map(|violation| format!("proto/deep.rs: contains {violation} outside of tests"));
    assert_eq!(safety_violations(&bad_file), expected);
    assert_eq!(
        safety_violations(&SourceFile::new(Path::new(UNSAFE_FILE), BAD_CODE)),
        expected[..2].iter().map(|violation| violation.replace("proto/deep.rs", UNSAFE_FILE)).collect::<Vec<_>>()
    );
    let fine = SourceFile::new(Path::new("fine.rs"), "//! Fine.\nfn f(now: Instant, x: IpAddr) { x.unwrap_or(now) }\n");
    assert!(purity_violations(&fine).is_empty() && safety_violations(&fine).is_empty());
}

#[test]
fn format_check_finds_long_files_and_missing_module_docs() {
    let count_violations = |text: &str| format_violations(&SourceFile::new(Path::new("a.rs"), text)).len();
    let tests = "\n#[cfg(test)]\nmod tests {\n".to_owned() + &"x\n".repeat(900) + "}\n";
    assert_eq!(count_violations(&("//! A.\n".to_owned() + &"x\n".repeat(499) + &tests)), 0);
    assert_eq!(count_violations(&("//! A.\n".to_owned() + &"x\n".repeat(500) + &tests)), 1);
    assert_eq!(count_violations("// A.\n"), 1);
    assert_eq!(count_violations("//! A.\n#[cfg(test)]\nuse x;\n"), 1);
}

#[test]
fn unwanted_packages_are_found_in_lock_file() {
    let lock = "[[package]]\nname = \"smol\"\n\n[[package]]\nname = \"tokio\"\n\n[[package]]\nname = \"tokio-util\"\n";
    assert_eq!(unwanted_packages(lock), ["tokio", "tokio-util"]);
}
