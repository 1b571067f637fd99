//! Every sentence of `docs/semantics.md` names the tests that show it.
//!
//! Promises: each bullet, each row of a table and each paragraph below the first section's heading ends
//! with a marker, `[suite::test, suite::other]` or `[untested: why]`; every test that is named is there,
//! is a test, and is not ignored; and no more than [`UNTESTED_MAX`] say that they are untested.
//!
//! A paragraph that ends in a colon introduces what follows it and needs none. Whether a test would fail
//! if its sentence were false is for people to judge; this test holds only that somebody has named one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const DOCUMENT: &str = "docs/semantics.md";
/// Sentences that no test on one machine can show.
const UNTESTED_MAX: usize = 6;

/// Something that the document says: a bullet, a row or a paragraph.
#[derive(Debug, PartialEq)]
struct Item {
    line: usize,
    section: String,
    text: String,
}

/// What stands at the end of an item.
#[derive(Debug, PartialEq)]
enum Marker {
    Tests(Vec<(String, String)>),
    Untested,
}

/// Collects the items of a document line by line.
#[derive(Default)]
struct Reader {
    items: Vec<Item>,
    section: String,
    open: Option<Item>,
}

impl Reader {
    fn begin(&mut self, line: usize, text: &str) {
        self.end();
        self.open = Some(Item {
            line,
            section: self.section.clone(),
            text: text.trim().to_owned(),
        });
    }

    fn end(&mut self) {
        // What stands above the first section is about the document.
        let item = self.open.take().filter(|item| !item.section.is_empty());
        self.items.extend(item.filter(|i| !i.text.ends_with(':')));
    }

    fn line(&mut self, number: usize, line: &str) {
        let text = line.trim();
        if text.is_empty() {
            self.end();
        } else if let Some(section) = text.strip_prefix("##") {
            self.end();
            self.section = section.trim_start_matches('#').trim().to_owned();
        } else if text.starts_with('#') {
            self.end();
        } else if text.starts_with('|') {
            if text.chars().all(|c| "|-: ".contains(c)) {
                // The row above the rule is the table's head.
                self.open = None;
            } else {
                self.begin(number, text.trim_end_matches('|'));
            }
        } else if text.starts_with("- ") {
            self.begin(number, text);
        } else if let Some(item) = &mut self.open {
            item.text.push(' ');
            item.text.push_str(text);
        } else if !line.starts_with("    ") {
            self.begin(number, text);
        }
    }
}

fn items(document: &str) -> Vec<Item> {
    let mut reader = Reader::default();
    for (index, line) in document.lines().enumerate() {
        reader.line(index + 1, line);
    }
    reader.end();
    reader.items
}

/// The marker at the end of a text; `None` if there is none that can be read.
fn marker(text: &str) -> Option<Marker> {
    let inside = text.trim_end().strip_suffix(']')?;
    let inside = &inside[inside.rfind('[')? + 1..];
    if let Some(why) = inside.strip_prefix("untested:") {
        return (!why.trim().is_empty()).then_some(Marker::Untested);
    }
    let word = |w: &str| !w.is_empty() && w.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let tests = inside.split(',').map(|test| {
        let (suite, name) = test.trim().split_once("::")?;
        (word(suite) && word(name)).then(|| (suite.to_owned(), name.to_owned()))
    });
    tests.collect::<Option<_>>().map(Marker::Tests)
}

/// The names of the tests in a source that are run.
fn tests_of(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    let (mut is_test, mut ignored) = (false, false);
    for line in source.lines().map(str::trim) {
        if line == "#[test]" {
            (is_test, ignored) = (true, false);
        } else if line.starts_with("#[ignore") {
            ignored = true;
        } else if let Some(name) = line.strip_prefix("fn ") {
            let name = name.split('(').next().unwrap_or_default();
            if is_test && !ignored {
                names.push(name.to_owned());
            }
            is_test = false;
        }
    }
    names
}

fn sources(root: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(root) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

/// The tests of a suite; `None` if there is no suite of that name.
///
/// An integration test by the name of its file or directory, else the tests in a layer's own sources.
fn suite(root: &Path, name: &str) -> Option<BTreeSet<String>> {
    for place in ["tests", "src"] {
        let mut files = Vec::new();
        sources(&root.join(place).join(name), &mut files);
        let file = root.join(place).join(format!("{name}.rs"));
        files.extend(file.is_file().then_some(file));
        if !files.is_empty() {
            let text = files.iter().map(|file| fs::read_to_string(file).unwrap());
            return Some(text.flat_map(|text| tests_of(&text)).collect());
        }
    }
    None
}

/// Everything that is wrong with a document, a line each, where `suites` finds the tests.
fn complaints(
    document: &str,
    untested_max: usize,
    suites: &mut dyn FnMut(&str) -> Option<BTreeSet<String>>,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut untested = 0;
    for item in items(document) {
        let begin: String = item.text.chars().take(70).collect();
        let at = format!("line {} ({}): {begin}", item.line, item.section);
        match marker(&item.text) {
            None => wrong.push(format!("{at}: no test is named")),
            Some(Marker::Untested) => {
                untested += 1;
                if untested > untested_max {
                    wrong.push(format!("{at}: more than {untested_max} untested"));
                }
            }
            Some(Marker::Tests(tests)) => {
                for (suite, name) in tests {
                    match suites(&suite) {
                        None => wrong.push(format!("{at}: no suite {suite}")),
                        Some(known) if !known.contains(&name) => {
                            wrong.push(format!("{at}: no test {suite}::{name}"));
                        }
                        Some(_) => {}
                    }
                }
            }
        }
    }
    wrong
}

#[test]
fn every_sentence_names_its_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(root.join(DOCUMENT)).unwrap();
    let mut known = BTreeMap::new();
    let mut suites = |name: &str| {
        let found = known.entry(name.to_owned());
        found.or_insert_with(|| suite(root, name)).clone()
    };
    let count = items(&document).len();
    assert!(count > 200, "only {count} sentences were found");
    let wrong = complaints(&document, UNTESTED_MAX, &mut suites);
    assert!(
        wrong.is_empty(),
        "{DOCUMENT}: {} of {count} sentences\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn what_is_wrong_is_found() {
    let mut suites = |name: &str| {
        let tests = ["works", "holds"].map(str::to_owned);
        (name == "tree").then(|| BTreeSet::from(tests))
    };
    let mut check = |text: &str| complaints(&format!("# T\n\n## S\n\n{text}"), 1, &mut suites);
    for good in [
        "- It works. [tree::works]",
        "- It works,\n  over lines. [tree::works,\n  tree::holds]",
        "- Names match `[a-z]*`. [tree::works]",
        "- A power cut. [untested: no machine at hand]",
        "It works. [tree::works]\n\n    a picture",
        "What follows:\n\n- It works. [tree::works]",
        "| on | name |\n| --- | --- |\n| a | b [tree::works] |\n| c | d | [tree::works] |",
    ] {
        assert_eq!(check(good), Vec::<String>::new(), "{good}");
    }
    for (bad, told) in [
        ("- It works.", "line 5 (S): - It works.: no test is named"),
        ("- One. [tree::works]\n- Two.", "line 6 (S)"),
        ("- It works. [tree::works] And more.", "no test is named"),
        ("- It works. [works]", "no test is named"),
        ("- It works. []", "no test is named"),
        ("- It works. [tree::works, ]", "no test is named"),
        ("- It works. [untested: ]", "no test is named"),
        ("- It works. [tree::work]", "no test tree::work"),
        (
            "- It works. [tree::works, tree::gone]",
            "no test tree::gone",
        ),
        ("- It works. [trees::works]", "no suite trees"),
        (
            "- A. [untested: x]\n- B. [untested: y]",
            "line 6 (S): - B. [untested: y]: more than 1",
        ),
        ("It works.", "no test is named"),
        ("| on | name |\n| --- | --- |\n| a | b |", "line 7 (S)"),
    ] {
        let wrong = check(bad);
        assert!(wrong.len() == 1 && wrong[0].contains(told), "{wrong:?}");
    }
}

#[test]
fn only_tests_that_run_are_tests() {
    let source = "#[test]\nfn one() {}\nfn no() {}\n#[test]\n#[ignore]\nfn two() {}\n\
                  mod m {\n    /// Why.\n    #[test]\n    fn three(a in op()) {}\n}\n";
    assert_eq!(tests_of(source), ["one", "three"]);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let here = suite(root, "semantics_doc").unwrap();
    assert!(here.contains("only_tests_that_run_are_tests"));
    // A directory of an integration test, a layer with its tests, and a name that is both.
    for (name, test) in [
        ("mounted", "a_volume_is_reverted_under_a_mount"),
        ("tree", "attributes_are_those_of_the_contract"),
        ("cli", "the_whole_life"),
    ] {
        assert!(suite(root, name).unwrap().contains(test), "{name}");
    }
    assert_eq!(suite(root, "nothing"), None);
}
