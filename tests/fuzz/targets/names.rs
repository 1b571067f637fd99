//! Names, what is written with them on the command line, and sizes.
//!
//! Input: text. Held: a name that is taken keeps the rules, written down here a second time; a spec that is
//! read says the same when it is written again; refusals and escaped text are one line of plain ASCII.

use clap::Parser;
use stillframe::cli::{Cli, args};
use stillframe::daemon::protocol::NewSize;
use stillframe::log::segment;
use stillframe::units::{Grain, Name, escape};

use super::{Target, nothing};

pub const TARGET: Target = Target {
    name: "names",
    seeds,
    run,
    reaches: &["refused", "name", "spec", "size", "command"],
    tokens: &[
        b"@",
        b"/",
        b"..",
        b"live",
        b"=",
        b"+",
        b"K",
        b"MiB",
        b"T",
        b"18446744073709551615",
        b"-",
        b"_",
        b"\0",
        b"--json",
        b"snapshot",
        b"clone",
        b"create",
        b"\xe2\x80\xae",
        b"000001.seg",
        b".seg",
    ],
    max_len: 600,
    group: 1,
    reset: nothing,
};

fn seeds() -> Vec<Vec<u8>> {
    let long = "n".repeat(200);
    [
        "vm",
        "daily-2026-11-21T10:00:00+01",
        "_x",
        "vm@a",
        "vm/c",
        "vm@a..b",
        "vm@a..live",
        "vm=/srv/x=y.img",
        "4096",
        "64K",
        "64KiB",
        "1M",
        "2G",
        "1T",
        "16777216T",
        "+5G",
        "000001.seg",
        "4294967295.seg",
        "live",
        "",
        &long,
        "mount\0/store\0/mnt\0--volume\0vm=/srv/x",
        "snapshot\0create\0vm@a\0web@a",
        "diff\0vm@a..live\0--json",
        "clone\0create\0vm@a\0c",
        "volume\0resize\0vm\0+1G",
    ]
    .iter()
    .map(|text| text.as_bytes().to_vec())
    .collect()
}

fn plain(text: &str) {
    assert!(text.bytes().all(|b| (0x20..0x7f).contains(&b)), "{text:?}");
}

/// The rules for names, once more.
fn keeps_the_rules(text: &str) -> bool {
    let mut chars = text.chars();
    let first = chars.next();
    let body =
        |c: char| matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '_' | '+' | ':' | '-');
    text.len() <= 200
        && first.is_some_and(|c| matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '_'))
        && chars.all(body)
        && !text.as_bytes().windows(2).any(|w| w == b"..")
        && text != "live"
}

fn check_name(text: &str) -> bool {
    let good = keeps_the_rules(text);
    match Name::new(text) {
        Ok(name) => {
            assert!(good, "{text:?} is taken");
            assert_eq!((name.as_str(), name.to_string().as_str()), (text, text));
        }
        Err(e) => {
            assert!(!good, "{text:?} is refused");
            plain(&e.to_string());
        }
    }
    assert_eq!(args::checked(text).is_ok(), good);
    good
}

/// What was read, written again.
fn check_specs(text: &str) -> bool {
    let specs = [
        args::snapshot(text).map(|s| format!("{}@{}", s.volume, s.name)),
        args::clone(text).map(|c| format!("{}/{}", c.volume, c.name)),
        args::diff(text).map(|d| format!("{}@{}..{}", d.volume, d.from, d.to)),
        args::volume(text).map(|v| format!("{}={}", v.name, v.source)),
        args::origin(text).map(|o| match o {
            args::OriginArg::Snapshot(s) => format!("{}@{}", s.volume, s.name),
            args::OriginArg::Clone(c) => format!("{}/{}", c.volume, c.name),
        }),
    ];
    let mut any = false;
    for spec in specs {
        match spec {
            Ok(again) => {
                assert_eq!(again, text);
                any = true;
            }
            Err(e) => plain(&e),
        }
    }
    any
}

fn check_size(text: &str) -> bool {
    let size = args::size(text);
    if let Ok(bytes) = size {
        assert_eq!(args::size(&bytes.to_string()), Ok(bytes));
        assert_eq!(args::new_size(text), Ok(NewSize::To(bytes)));
        assert_eq!(args::new_size(&format!("+{text}")), Ok(NewSize::By(bytes)));
        if let Ok(grain) = Grain::new(bytes) {
            assert!(bytes.is_power_of_two() && (4096..=1 << 20).contains(&bytes));
            assert_eq!(grain.blocks() * 4096, bytes);
        }
    }
    if let Ok(bytes) = args::segment(text) {
        assert_eq!(size, Ok(bytes));
        assert!((segment::SEGMENT_MIN..=segment::SEGMENT_MAX).contains(&bytes));
    }
    size.is_ok()
}

fn run(input: &[u8]) -> &'static str {
    let text = String::from_utf8_lossy(input);
    plain(&escape(&text));
    if let Some(number) = segment::number(&text) {
        assert_eq!(segment::file_name(number), text);
    }
    if text.contains('\0') {
        let words = std::iter::once("stillframe").chain(text.split('\0'));
        return match Cli::try_parse_from(words) {
            Ok(_) => "command",
            Err(e) => {
                // What a terminal gets; colours are the parser's own.
                let shown = e.render().to_string();
                assert!(!shown.is_empty());
                "refused"
            }
        };
    }
    let (name, spec, size) = (check_name(&text), check_specs(&text), check_size(&text));
    match (size, spec, name) {
        (true, ..) => "size",
        (_, true, _) => "spec",
        (_, _, true) => "name",
        _ => "refused",
    }
}
