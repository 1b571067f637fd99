//! The rows as one SVG: a bar for each contender's median, a line from its least to its greatest sample.
//!
//! Every row has a scale of its own, because rows have different units. It ends with the greatest of those who serve
//! through a mount; the raw file may be far beyond, and its bar is cut off there, with a mark. Bars of ours are darker.

use std::fmt::Write;

use super::contender::{LOOP, OURS, RAW};
use super::report::{Row, Samples, shown, verdict};

const WIDTH: f64 = 980.0;
const LEFT: f64 = 250.0;
const BARS: f64 = 560.0;
const LINE: f64 = 18.0;

/// Draws all rows that have samples.
pub fn draw(rows: &[Row], title: &str, small: bool) -> String {
    let mut body = String::new();
    let mut y = 30.0;
    text(
        &mut body,
        10.0,
        y,
        "font-size='15' font-weight='bold'",
        title,
    );
    for row in rows.iter().filter(|row| !row.samples.is_empty()) {
        y += 2.0 * LINE;
        let heading = format!("{}: {} ({})", row.id, row.title, row.unit);
        text(&mut body, 10.0, y, "font-weight='bold'", &heading);
        let served = |samples: &&Samples| ![RAW, LOOP].contains(&samples.contender.as_str());
        let most = row.samples.iter().filter(served).map(Samples::greatest);
        let most = most.fold(f64::MIN_POSITIVE, f64::max);
        for samples in &row.samples {
            y += LINE;
            let at = |value: f64| LEFT + (value / most).min(1.0) * BARS;
            let colour = match samples.contender.starts_with(OURS) {
                true => "#1f4e79",
                false => "#a9bfd4",
            };
            text(&mut body, 20.0, y, "", &samples.contender);
            let (median, middle) = (at(samples.median()), y - 4.0);
            put(
                &mut body,
                format_args!(
                    "<rect x='{LEFT}' y='{:.1}' width='{:.1}' height='12' fill='{colour}'/>",
                    y - 10.0,
                    median - LEFT
                ),
            );
            put(
                &mut body,
                format_args!(
                    "<line x1='{:.1}' x2='{:.1}' y1='{middle}' y2='{middle}' stroke='#c0504d' stroke-width='2'/>",
                    at(samples.least()),
                    at(samples.greatest())
                ),
            );
            let beyond = if samples.median() > most { "> " } else { "" };
            let number = format!("{beyond}{}", shown(samples.median()));
            text(&mut body, LEFT + BARS + 10.0, y, "", &number);
        }
        for claim in &row.claims {
            y += LINE;
            let ratio = row.ratio(claim);
            let said = format!(
                "{}: {}, must {}, goal {}: {}",
                claim.against.unwrap_or("itself"),
                ratio.map_or("-".into(), shown),
                shown(claim.must),
                shown(claim.goal),
                verdict(claim, ratio, small)
            );
            text(&mut body, LEFT, y, "font-style='italic'", &said);
        }
    }
    let height = y + 2.0 * LINE;
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' font-family='sans-serif' font-size='12'>\n<rect width='100%' height='100%' fill='white'/>\n{body}</svg>\n"
    )
}

fn put(body: &mut String, what: std::fmt::Arguments<'_>) {
    writeln!(body, "{what}").expect("a string takes all");
}

fn text(body: &mut String, x: f64, y: f64, how: &str, said: &str) {
    let said = said.replace('&', "&amp;").replace('<', "&lt;");
    put(
        body,
        format_args!("<text x='{x}' y='{y}' {how}>{said}</text>"),
    );
}
