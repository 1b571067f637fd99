//! What goes to stdout: lines, aligned tables, JSON.
//!
//! Promises: text from outside (names, paths) is escaped in tables; a write that fails is an error,
//! so that `stillframe ... > /full/disk` does not look like success. `exit::is_broken_pipe` tells
//! the one failure that is none.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::error::{Error, IoContext, Kind, Result};
use crate::units::escape;

/// The context of every error of this file.
pub const CONTEXT: &str = "cannot write the output";

/// Prints one line as it is.
///
/// # Errors
/// `Io`, `NoSpace`.
pub fn line(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .context(|| CONTEXT)
}

/// Prints a value as indented JSON.
///
/// # Errors
/// `Io`, `NoSpace`.
pub fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::with_source(Kind::Failed, "cannot render JSON", e))?;
    line(&text)
}

/// Prints a remark to stderr: stdout stays what a program may read.
pub fn remark(text: &str) {
    // There is nobody to tell that stderr is closed.
    let _ = writeln!(io::stderr(), "stillframe: {}", super::exit::safe(text));
}

/// Shows how a job goes on, to people only: a log of a timer job needs no news of success.
pub fn progress(text: &str) {
    if io::stderr().is_terminal() {
        remark(text);
    }
}

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Renders rows under a header, columns two spaces apart, no spaces at the ends of lines. Cells are
/// escaped.
pub fn table(header: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| escape(cell)).collect())
        .collect();
    let titles: Vec<String> = header
        .iter()
        .map(|(title, _)| (*title).to_owned())
        .collect();
    let width = |i: usize| {
        let widest = cells
            .iter()
            .filter_map(|row| row.get(i))
            .map(String::len)
            .max();
        widest.unwrap_or(0).max(titles[i].len())
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let render = |row: &Vec<String>| {
        let mut text = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(header) {
            let cell = match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            };
            text.push_str(&cell);
            text.push_str("  ");
        }
        text.trim_end().to_owned()
    };
    let lines: Vec<String> = std::iter::once(&titles).chain(&cells).map(render).collect();
    lines.join("\n")
}

/// Bytes for people: `512`, `4.0K`, `1.5G`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["K", "M", "G", "T", "P", "E"];
    if bytes < 1024 {
        return bytes.to_string();
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be shown as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1}{}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_names_are_escaped() {
        let header = [("NAME", Align::Left), ("SIZE", Align::Right)];
        let rows = vec![
            vec!["a".to_owned(), "12345".to_owned()],
            vec!["long\u{1b}name".to_owned(), "1".to_owned()],
        ];
        let expected = "NAME             SIZE\na               12345\nlong\\u{1b}name      1";
        assert_eq!(table(&header, &rows), expected);
        assert_eq!(table(&header, &[]), "NAME  SIZE");
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1.0K"),
            (1536, "1.5K"),
            (1 << 20, "1.0M"),
            ((1 << 20) - 1, "1.0M"),
            (u64::MAX, "16.0E"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }
}
