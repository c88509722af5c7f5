//! Checks of the source code that neither the compiler nor clippy does: imports follow the table in src/lib.rs and have
//! no cycle, pure modules use only pure parts of std and of other crates, files are short, src/README.md lists all
//! dependencies. The checks search the text, so code can evade them. Clippy finds panics (src/lib.rs), and clocks and
//! sockets in pure modules (.clippy.toml).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Modules that only parse and decide.
const PURE: [&str; 4] = ["proto", "reassembly", "name_addrs", "policy"];
/// Everything outside of the crate that pure modules may use.
const PURE_IMPORTS: &str = "std/borrow std/collections std/error std/fmt std/hash std/iter std/net std/ops std/str \
                            std/sync/Arc std/time argon2 bcrypt ipnet percent_encoding thiserror";

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Returns the text of each module below `dir` by its path, such as "server/connect", without the tests at its end.
fn modules(dir: &str) -> BTreeMap<String, String> {
    let mut modules = BTreeMap::new();
    for entry in fs::read_dir(dir).expect("directory read") {
        let path = entry.expect("directory entry").path().display().to_string();
        if Path::new(&path).is_dir() {
            modules.append(&mut self::modules(&path));
        } else if let Some(module) = path.strip_prefix("src/").and_then(|path| path.strip_suffix(".rs")) {
            let text = read(&path);
            modules.insert(module.into(), text.split("\n#[cfg(test)]\nmod tests {").take(1).collect());
        }
    }
    modules
}

fn top(path: &str) -> &str {
    path.split('/').next().unwrap_or_default()
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn is_in(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Returns the paths that a module names: those of this crate from its root, and those of other crates.
fn imports(module: &str, text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter_map(|line| line.split("//").next());
    let code: String = lines.flat_map(str::split_whitespace).map(|word| format!("{word} ")).collect();
    let manifest = read("Cargo.toml").replace('-', "_");
    // Also finds keys that are no crates, but nothing in src has a path that begins with one.
    let crates = manifest.lines().filter_map(|line| Some(line.split_once(" = ")?.0));
    let mut found = BTreeSet::new();
    for root in crates.chain(["std", "core", "alloc", "crate", "super", "s5"]) {
        for (at, _) in code.match_indices(&format!("{root}::")) {
            // Parts of a longer word or path, and visibilities, are no imports.
            let is_part = code[..at].ends_with(|c: char| c.is_alphanumeric() || "_:".contains(c));
            if !is_part && !code[..at].ends_with("pub(in ") {
                expand_import(if root == "super" { module } else { "" }, &code[at..], &mut found);
            }
        }
    }
    found
}

/// Adds the paths of one import below `base`, also those of a group. Returns the text after the import.
fn expand_import<'a>(base: &str, text: &'a str, found: &mut BTreeSet<String>) -> &'a str {
    if let Some(mut rest) = text.strip_prefix('{') {
        while !rest.is_empty() && !rest.starts_with('}') {
            rest = expand_import(base, rest.trim_start_matches([',', ' ']), found);
            rest = rest.trim_start_matches(|c| !",}".contains(c));
        }
        return rest.get(1..).unwrap_or_default();
    }
    let (name, rest) = text.split_at(text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len()));
    let path = match name {
        // The end of a group.
        "" if !rest.starts_with('*') => return rest,
        "" | "self" | "crate" | "s5" => base.into(),
        "super" => parent(base).into(),
        name => format!("{base}/{name}").trim_start_matches('/').to_owned(),
    };
    if let Some(rest) = rest.strip_prefix("::") {
        return expand_import(&path, rest, found);
    }
    found.insert(path);
    rest
}

/// Returns the table of src/lib.rs: each module with the modules that it may import.
fn import_table() -> BTreeMap<String, Vec<String>> {
    let mut table = BTreeMap::from([("main".into(), vec!["cmd".into()])]);
    let mut above = Vec::new();
    for line in read("src/lib.rs").lines().filter(|line| line.starts_with("//! | [")) {
        let cells: Vec<&str> = line.split('|').map(|cell| cell.trim().trim_matches(['[', ']', '`'])).collect();
        let [_, module, _, imports, _] = cells[..] else { panic!("expected a row of three cells: {line}") };
        let list = imports.split("`, `").map(str::to_owned).collect();
        table.insert(module.into(), if imports == "all of the above" { above.clone() } else { list });
        above.push(module.into());
    }
    table
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let (table, mut modules) = (import_table(), modules("src"));
    modules.remove("lib");
    assert_eq!(table.keys().collect::<Vec<_>>(), modules.keys().filter(|path| !path.contains('/')).collect::<Vec<_>>());
    for (module, text) in &modules {
        let allowed = table[top(module)].iter().map(String::as_str).chain(PURE_IMPORTS.split_whitespace());
        let allowed: Vec<&str> = allowed.chain([top(module)]).collect();
        let is_bad = |path: &String| {
            let is_checked = PURE.contains(&top(module)) || table.contains_key(top(path));
            is_checked && !allowed.iter().any(|allowed| is_in(path, allowed))
        };
        let bad: Vec<String> = imports(module, text).into_iter().filter(is_bad).collect();
        assert!(bad.is_empty(), "{module} imports {bad:?}, against the table of src/lib.rs or PURE_IMPORTS");
    }
}

#[test]
fn no_two_files_import_each_other_and_no_file_imports_one_above() {
    for part in ["server", "cmd", "net", "conn", "gssapi", "proto"] {
        let modules: Vec<_> = modules("src").into_iter().filter(|(module, _)| top(module) == part).collect();
        let files_of = |(module, text): &(String, String)| {
            // A file imports all files below it. The modules are sorted, so the last match is the innermost.
            let below = modules.iter().filter(|(other, _)| is_in(other, module));
            let named = imports(module, text).into_iter();
            let named = named.filter_map(|path| modules.iter().rfind(|(file, _)| is_in(&path, file)));
            let files = below.chain(named).map(|(file, _)| file.clone()).filter(|file| file != module);
            (module.clone(), files.collect())
        };
        let mut graph: BTreeMap<String, Vec<String>> = modules.iter().map(files_of).collect();
        // Removes the files that import nothing, again and again.
        while let Some(done) = graph.iter().find(|(_, files)| files.is_empty()).map(|(module, _)| module.clone()) {
            graph.remove(&done);
            graph.values_mut().for_each(|files| files.retain(|file| *file != done));
        }
        assert!(graph.is_empty(), "these files import each other: {graph:#?}");
    }
}

#[test]
fn files_have_module_docs_tests_at_their_end_and_at_most_450_lines() {
    for (module, text) in modules("src") {
        let lines = text.lines().count();
        assert!(lines <= 450, "{module}: {lines} lines without tests (at most 450; split the file)");
        assert!(text.starts_with("//! "), "{module}: no module documentation");
        assert!(!text.contains("cfg(test)"), "{module}: cfg(test) outside of the tests module at the end");
        assert_eq!(text.contains("unsafe_code"), module == "gssapi/ffi", "{module}: only gssapi/ffi.rs may be unsafe");
        assert!(!PURE.contains(&top(&module)) || !text.contains("async "), "{module}: async in a pure module");
    }
}

#[test]
fn lock_file_has_no_second_runtime_and_no_openssl() {
    let lock = read("Cargo.lock");
    for name in ["tokio", "async-std", "mio", "openssl"] {
        assert!(!lock.contains(&format!("name = \"{name}")), "Cargo.lock has a package {name}…");
    }
}

/// Returns a licence in one form: alternatives are separated by OR, and sorted.
fn normalize_licence(text: &str) -> String {
    let mut alternatives: Vec<&str> = text.split('/').flat_map(|text| text.split(" OR ")).map(str::trim).collect();
    alternatives.sort_unstable();
    alternatives.join(" OR ")
}

#[test]
fn readme_lists_all_crates_of_the_binary_with_their_licences() {
    let mut tree = Command::new(env!("CARGO"));
    tree.args(["tree", "--frozen", "--target", "x86_64-unknown-linux-gnu", "--edges", "normal,build"]);
    let output = tree.args(["--prefix", "none", "--format", "{p}|{l}"]).output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).expect("UTF-8");
    // A line is `name v1.2.3 (proc-macro)|licence (*)`. The first one is s5.
    let used = tree.lines().skip(1).map(|line| {
        let (name, licence) = line.split_once('|').expect("two fields");
        format!(
            "{}: {}",
            name.split(' ').next().unwrap_or_default(),
            normalize_licence(licence.trim_end_matches(" (*)"))
        )
    });
    let readme = read("src/README.md");
    let section = readme.split("\n## ").find(|section| section.starts_with("Dependencies\n")).expect("a section");
    let rows = section.lines().filter(|line| line.starts_with("| ")).skip(2);
    let listed = rows.flat_map(|row| {
        let cells: Vec<&str> = row.trim_matches(['|', ' ']).split(" | ").collect();
        let [crates, licence, _] = cells[..] else { panic!("expected a row of three cells: {row}") };
        crates.split(", ").map(|name| format!("{name}: {}", normalize_licence(licence))).collect::<Vec<_>>()
    });
    let (used, listed): (BTreeSet<String>, BTreeSet<String>) = (used.collect(), listed.collect());
    let missing: Vec<_> = used.difference(&listed).collect();
    let extra: Vec<_> = listed.difference(&used).collect();
    assert!(missing.is_empty() && extra.is_empty(), "src/README.md: add {missing:#?}, remove {extra:#?}");
}

#[test]
fn all_forms_of_imports_are_found() {
    let code = "use crate::a::{self, b::{C, D}, e as f,};\nuse super::{g, h::*}; use super::super::i; // use crate::x;\n\
                pub(in crate::cmd) fn f() -> mycrate::Y { crate::j::k(); std::fs::read(smol::l::M) }";
    let found = imports("m/n/o", code).into_iter().collect::<Vec<_>>();
    assert_eq!(found, ["a", "a/b/C", "a/b/D", "a/e", "j/k", "m/i", "m/n/g", "m/n/h", "smol/l/M", "std/fs/read"]);
}
