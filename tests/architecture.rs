//! The shape of the source, read as text: who may name whom, and what stays in one place.
//!
//! Rules:
//! - A1: a layer names only the layers in its row of [`LAYERS`], however the path is written.
//! - A2: the crate root re-exports nothing and is not aliased, so that A1 cannot be walked around.
//! - A3: `sled`, `fuser`, `libc` and `unsafe` are named only where [`FENCES`] says.
//! - A4: every file opens with `//!`.
//! - A5: source is ASCII, so that what is shown is what is compiled.
//!
//! The checker knows strings, comments and nested `use` lists, but no macros that build paths from
//! pieces. Its own tests feed it snippets that must fail.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// Each layer with everything it may name besides itself.
const LAYERS: [(&str, &[&str]); 11] = [
    ("error", &[]),
    ("units", &["error"]),
    ("sys", &["error", "units"]),
    ("log", &["error", "units", "sys"]),
    ("map", &["error", "units", "sys"]),
    ("volume", &["error", "units", "sys", "log", "map"]),
    ("image", &["error", "units", "sys", "log", "map", "volume"]),
    (
        "tree",
        &["error", "units", "sys", "log", "map", "volume", "image"],
    ),
    (
        "fuse",
        &[
            "error", "units", "sys", "log", "map", "volume", "image", "tree",
        ],
    ),
    (
        "daemon",
        &[
            "error", "units", "sys", "log", "map", "volume", "image", "tree", "fuse",
        ],
    ),
    (
        "cli",
        &[
            "error", "units", "sys", "log", "map", "volume", "image", "tree", "fuse", "daemon",
        ],
    ),
];

/// A word, and the files or folders (relative to `src/`) that alone may hold it.
const FENCES: [(&str, &str); 5] = [
    ("sled", "map/sled_index.rs"),
    ("fuser", "fuse/"),
    ("libc", "sys/"),
    ("unsafe", "sys/"),
    ("unsafe_code", "sys/"),
];

#[test]
fn the_source_keeps_its_shape() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut faults = Vec::new();
    let mut seen = 0;
    for path in files(&root.join("src")) {
        let name = path
            .strip_prefix(root.join("src"))
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let text = fs::read(&path).unwrap();
        faults.extend(check(&name, &text));
        seen += 1;
    }
    for folder in ["tests", "examples"] {
        for path in files(&root.join(folder)) {
            let text = fs::read(&path).unwrap();
            faults.extend(check_opening(path.to_str().unwrap(), &text));
        }
    }
    assert!(
        seen > 20,
        "only {seen} files were found: the checker looks in the wrong place"
    );
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// Every layer of the table exists, and every folder of `src` is a layer.
#[test]
fn the_table_is_the_source() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found: Vec<String> = fs::read_dir(src)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| name.trim_end_matches(".rs").to_owned())
        .filter(|name| !["lib", "main"].contains(&name.as_str()))
        .collect();
    found.sort();
    let mut table: Vec<&str> = LAYERS.iter().map(|(layer, _)| *layer).collect();
    table.sort_unstable();
    assert_eq!(found, table);
}

/// The table has no circle: every layer names only layers that stand before it.
#[test]
fn the_table_flows_one_way() {
    for (i, (layer, below)) in LAYERS.iter().enumerate() {
        for name in *below {
            let at = LAYERS.iter().position(|(other, _)| other == name);
            assert!(at.is_some_and(|at| at < i), "{layer} may not name {name}");
        }
    }
}

#[test]
fn what_is_wrong_is_found() {
    let wrong: &[(&str, &str)] = &[
        // A1, in every way a path can be written
        ("sys/a.rs", "use crate::volume::Engine;"),
        ("map/mod.rs", "use crate::log::Log;"),
        ("log/mod.rs", "use crate::map::Map;"),
        ("tree/mod.rs", "use crate::{error::Error, fuse::Options};"),
        (
            "tree/mod.rs",
            "use crate::{error::{Error, Kind}, units::Name, cli};",
        ),
        ("tree/mod.rs", "use {crate::fuse};"),
        (
            "volume/a.rs",
            "fn f() -> crate::daemon::serve::Config { g() }",
        ),
        ("volume/a.rs", "fn f() { let x = crate :: tree :: Tree; }"),
        (
            "volume/a.rs",
            "fn f() { let x = ::stillframe::tree::Tree; }",
        ),
        ("volume/a.rs", "pub(in crate::tree) fn f() {}"),
        ("volume/mod.rs", "use super::tree::Tree;"),
        ("volume/a.rs", "use super::super::tree::Tree;"),
        (
            "volume/a.rs",
            "mod t { use super::super::super::tree::Tree; }",
        ),
        ("volume/a/b.rs", "use super::super::super::tree::Tree;"),
        ("volume/a.rs", "/* \" */ use crate::tree::Tree; // \""),
        (
            "volume/a.rs",
            "const C: char = '\"'; use crate::tree::Tree; const D: char = '\"';",
        ),
        (
            "volume/a.rs",
            "const R: &str = r#\"\"\"#; use crate::tree::Tree;",
        ),
        (
            "volume/a.rs",
            "const R: &str = \"\\\"\"; use crate::tree::Tree; // \"",
        ),
        ("error.rs", "use crate::units::Name;"),
        ("main.rs", "fn main() { stillframe::daemon::serve() }"),
        ("cli/mod.rs", "use crate::r#unknown::X;"),
        // A2
        ("lib.rs", "pub use volume::Engine;"),
        ("lib.rs", "pub use crate::volume::Engine;"),
        ("lib.rs", "extern crate self as root;"),
        ("map/mod.rs", "use crate as root;"),
        ("map/mod.rs", "use crate::*;"),
        ("map/mod.rs", "use crate::{self as root};"),
        ("map/mod.rs", "use super as root;"),
        ("map/a.rs", "use super::super::{self as root};"),
        ("map/a.rs", "use super::{super::log::Log};"),
        // A3
        ("map/mod.rs", "use sled::Db;"),
        ("map/mod.rs", "extern crate sled;"),
        ("tree/mod.rs", "fn f(x: fuser::INodeNo) {}"),
        ("fuse/mod.rs", "const E: i32 = libc::EIO;"),
        ("log/mod.rs", "fn f() { unsafe { g() } }"),
        ("log/mod.rs", "#![allow(unsafe_code)]"),
    ];
    for (file, text) in wrong {
        let text = format!("//! Opens.\n{text}\n");
        assert!(
            !check(file, text.as_bytes()).is_empty(),
            "not found in {file}: {text}"
        );
    }
    assert!(!check("sys/a.rs", b"// no contract\n").is_empty());
    assert!(!check("sys/a.rs", b"").is_empty());
    assert!(!check("sys/a.rs", b"\xef\xbb\xbf//! A mark before the contract\n").is_empty());
    assert!(!check("sys/a.rs", "//! caf\u{e9}\n".as_bytes()).is_empty());
}

#[test]
fn what_is_right_passes() {
    let right: &[(&str, &str)] = &[
        (
            "sys/mod.rs",
            "use crate::error::Error; fn f() { unsafe { libc::getpid() } }",
        ),
        (
            "map/sled_index.rs",
            "use sled::Db; use crate::map::index::Index;",
        ),
        (
            "map/mod.rs",
            "pub mod sled_index; const S: &str = \"sled\"; // sled",
        ),
        ("fuse/mod.rs", "use fuser::Session; use crate::tree::Tree;"),
        (
            "cli/mod.rs",
            "use crate::{daemon::store, error::{Error, Kind}, units};",
        ),
        (
            "volume/a.rs",
            "use super::b::C; pub(crate) fn f() { crate::error::g() }",
        ),
        (
            "volume/a.rs",
            "#[cfg(test)] mod tests { use super::*; use super::super::b::C; }",
        ),
        (
            "volume/a.rs",
            "// use crate::tree::Tree;\nconst S: &str = \"crate::tree::Tree\";",
        ),
        (
            "volume/a.rs",
            "/* outer /* crate::tree */ still crate::tree */ fn f() {}",
        ),
        (
            "volume/a.rs",
            "fn f<'a>(x: &'a str) -> &'a str { x } const R: &str = r#\"crate::tree\"#;",
        ),
        (
            "lib.rs",
            "pub mod error; pub mod units; #[doc(hidden)] mod cli;",
        ),
        (
            "main.rs",
            "fn main() -> ExitCode { stillframe::cli::main() }",
        ),
    ];
    for (file, text) in right {
        let text = format!("//! Opens.\n{text}\n");
        assert_eq!(
            check(file, text.as_bytes()),
            Vec::<String>::new(),
            "{file}: {text}"
        );
    }
}

/// Every Rust file below a folder, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// All faults of a file; `name` is relative to `src/`.
fn check(name: &str, text: &[u8]) -> Vec<String> {
    let mut faults = check_opening(name, text);
    let words = words(&String::from_utf8_lossy(text));
    for (word, place) in FENCES {
        if !name.starts_with(place) && words.iter().any(|w| w == word) {
            faults.push(format!("A3: {name} names {word}, which belongs to {place}"));
        }
    }
    match name {
        "lib.rs" => {
            for word in ["use", "extern", "crate"] {
                if words.iter().any(|w| w == word) {
                    faults.push(format!(
                        "A2: lib.rs says '{word}'; it may only declare modules"
                    ));
                }
            }
        }
        "main.rs" => {
            for path in paths(&words, &["stillframe"], 1).into_iter().flatten() {
                if path != "cli" {
                    faults.push(format!("A1: main.rs names {path}"));
                }
            }
        }
        _ => faults.extend(check_layer(name, &words)),
    }
    faults
}

fn check_opening(name: &str, text: &[u8]) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with(b"//!") {
        faults.push(format!("A4: {name} does not open with //!"));
    }
    if let Some(at) = text.iter().position(|b| !b.is_ascii()) {
        let line = 1 + text[..at].iter().filter(|&&b| b == b'\n').count();
        faults.push(format!("A5: {name}:{line} is not ASCII"));
    }
    faults
}

fn check_layer(name: &str, words: &[String]) -> Vec<String> {
    let layer = name.split(['/', '.']).next().unwrap();
    let Some((_, below)) = LAYERS.iter().find(|(known, _)| *known == layer) else {
        return vec![format!("A1: {name} is in no layer")];
    };
    let inner = name.trim_end_matches(".rs").trim_end_matches("/mod");
    let depth = inner.split('/').count();
    let mut faults = Vec::new();
    for found in paths(words, &["crate", "stillframe"], depth) {
        match found {
            Some(path) if path == layer || below.contains(&path.as_str()) => {}
            Some(path) => faults.push(format!("A1: {name} names {path}, which is not below it")),
            None => faults.push(format!("A2: {name} names the crate's root itself")),
        }
    }
    faults
}

/// The first names below the crate's root that are reached from a root word or by `super`s from a
/// module at `depth`; `None` where the root itself is named.
fn paths(words: &[String], roots: &[&str], depth: usize) -> Vec<Option<String>> {
    let mut found = Vec::new();
    let mut modules: Vec<usize> = Vec::new();
    let mut braces = 0;
    let mut i = 0;
    while i < words.len() {
        let word = words[i].as_str();
        match word {
            "{" => {
                braces += 1;
                if i >= 2 && words[i - 2] == "mod" {
                    modules.push(braces);
                }
            }
            "}" => {
                if modules.last() == Some(&braces) {
                    modules.pop();
                }
                braces = braces.saturating_sub(1);
            }
            "super" => {
                let mut climbed = 1;
                while is_path(words, i) && words.get(i + 2).is_some_and(|w| w == "super") {
                    climbed += 1;
                    i += 2;
                }
                // `super::{super::x}` climbs further than this reader follows.
                let hidden = is_path(words, i)
                    && words.get(i + 2).is_some_and(|w| w == "{")
                    && group(words, i + 2).contains(&"super".to_owned());
                if hidden {
                    found.push(None);
                } else if climbed >= depth + modules.len() {
                    found.extend(heads(words, i));
                }
            }
            // `pub(crate)` is no path; a field or method may not be called like a root.
            _ if roots.contains(&word)
                && (is_path(words, i) || words.get(i + 1).is_some_and(|w| w == "as")) =>
            {
                found.extend(heads(words, i));
            }
            _ => {}
        }
        i += 1;
    }
    found
}

fn is_path(words: &[String], at: usize) -> bool {
    words.get(at + 1).is_some_and(|w| w == "::")
}

/// The words of a group in braces that opens at `at`.
fn group(words: &[String], at: usize) -> &[String] {
    let mut open = 0;
    for (i, word) in words[at..].iter().enumerate() {
        match word.as_str() {
            "{" => open += 1,
            "}" => open -= 1,
            _ => {}
        }
        if open == 0 {
            return &words[at + 1..at + i];
        }
    }
    &words[at..]
}

/// What follows a root at `at`: one name, or the first name of each entry of a list.
fn heads(words: &[String], at: usize) -> Vec<Option<String>> {
    if !is_path(words, at) {
        return vec![None];
    }
    let named = |word: &String| match word.as_str() {
        "*" | "self" | "super" | "crate" => None,
        name => Some(name.to_owned()),
    };
    match words.get(at + 2) {
        Some(open) if open == "{" => {
            let mut heads = Vec::new();
            let (mut nested, mut first) = (0, true);
            for word in group(words, at + 2) {
                match word.as_str() {
                    "{" => nested += 1,
                    "}" => nested -= 1,
                    "," if nested == 0 => first = true,
                    _ if first && nested == 0 => {
                        heads.push(named(word));
                        first = false;
                    }
                    _ => {}
                }
            }
            heads
        }
        Some(word) => vec![named(word)],
        None => vec![None],
    }
}

/// Identifiers, `::` and single punctuation marks; comments and literals are dropped.
fn words(text: &str) -> Vec<String> {
    let c: Vec<char> = text.chars().collect();
    let at = |i: usize| c.get(i).copied().unwrap_or('\0');
    let mut words = Vec::new();
    let mut i = 0;
    while i < c.len() {
        let ident = |x: char| x == '_' || x.is_alphanumeric();
        if at(i) == '/' && at(i + 1) == '/' {
            while i < c.len() && at(i) != '\n' {
                i += 1;
            }
        } else if at(i) == '/' && at(i + 1) == '*' {
            i = after_comment(&c, i);
        } else if let Some(end) = after_raw_string(&c, i) {
            i = end;
        } else if at(i) == '"' {
            i = after_quoted(&c, i, '"');
        } else if at(i) == '\'' {
            // A lifetime is a quote and a word that no quote closes.
            let literal = at(i + 1) == '\\' || at(i + 2) == '\'';
            i = if literal {
                after_quoted(&c, i, '\'')
            } else {
                i + 1
            };
        } else if ident(at(i)) {
            let start = i;
            while ident(at(i)) {
                i += 1;
            }
            words.push(c[start..i].iter().collect());
        } else if at(i) == ':' && at(i + 1) == ':' {
            words.push("::".to_owned());
            i += 2;
        } else {
            if !at(i).is_whitespace() {
                words.push(at(i).to_string());
            }
            i += 1;
        }
    }
    words
}

fn after_comment(c: &[char], mut i: usize) -> usize {
    let mut open = 0;
    while i < c.len() {
        match (c[i], c.get(i + 1)) {
            ('/', Some('*')) => {
                open += 1;
                i += 2;
            }
            ('*', Some('/')) => {
                open -= 1;
                i += 2;
            }
            _ => i += 1,
        }
        if open == 0 {
            break;
        }
    }
    i
}

fn after_quoted(c: &[char], mut i: usize, quote: char) -> usize {
    i += 1;
    while i < c.len() && c[i] != quote {
        i += if c[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// Past `r"..."`, `r#"..."#`, `br"..."` and so on, if one starts here.
fn after_raw_string(c: &[char], start: usize) -> Option<usize> {
    let before = start.checked_sub(1).map(|i| c[i]);
    if before.is_some_and(|x| x == '_' || x.is_alphanumeric()) {
        return None;
    }
    let mut i = start;
    if matches!(c.get(i), Some('b' | 'c')) {
        i += 1;
    }
    if c.get(i) != Some(&'r') {
        return None;
    }
    i += 1;
    let hashes = c[i..].iter().take_while(|&&x| x == '#').count();
    i += hashes;
    if c.get(i) != Some(&'"') {
        return None;
    }
    i += 1;
    while i < c.len() {
        if c[i] == '"'
            && c[i + 1..]
                .iter()
                .take(hashes)
                .filter(|&&x| x == '#')
                .count()
                == hashes
        {
            return Some(i + 1 + hashes);
        }
        i += 1;
    }
    Some(i)
}
