//! What was measured: rows with samples of each contender, and what is claimed of them.
//!
//! A row's number for a contender is the median of its samples, its spread the least and the greatest. A claim's
//! ratio is the quotient of two medians of one row. "reached" and "not reached" compare it with the must and the goal
//! of the issue that asked for this benchmark; where one of the two is missing, or the run is a small one, nothing is judged.

use std::fmt::Write;

use serde::Serialize;

use super::contender::{OURS, RAW};

/// A number that has to be reached, and one that is hoped for.
#[derive(Clone, Serialize)]
pub struct Claim {
    pub of: &'static str,
    /// Whom `of` is compared with; none where the number itself counts.
    pub against: Option<&'static str>,
    pub must: f64,
    pub goal: f64,
    /// Whether more is better.
    pub at_least: bool,
}

/// Ours is at least so many times as much as a peer.
pub fn at_least(against: &'static str, must: f64, goal: f64) -> Claim {
    Claim {
        of: OURS,
        against: Some(against),
        must,
        goal,
        at_least: true,
    }
}

/// Ours is at most so many times as much as a peer.
pub fn at_most(against: &'static str, must: f64, goal: f64) -> Claim {
    Claim {
        at_least: false,
        ..at_least(against, must, goal)
    }
}

/// Ours is under this.
pub fn under(must: f64, goal: f64) -> Claim {
    Claim {
        against: None,
        ..at_most(RAW, must, goal)
    }
}

#[derive(Serialize)]
pub struct Samples {
    pub contender: String,
    pub values: Vec<f64>,
}

impl Samples {
    pub fn median(&self) -> f64 {
        median(&self.values)
    }

    pub fn least(&self) -> f64 {
        self.values.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub fn greatest(&self) -> f64 {
        self.values.iter().copied().fold(0.0, f64::max)
    }
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

/// The value under which `share` of all lie.
pub fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * share).ceil() as usize;
    values[at.clamp(1, values.len()) - 1]
}

#[derive(Serialize)]
pub struct Row {
    pub id: &'static str,
    pub title: &'static str,
    pub unit: &'static str,
    pub samples: Vec<Samples>,
    pub claims: Vec<Claim>,
}

impl Row {
    pub fn new(id: &'static str, title: &'static str, unit: &'static str, claims: &[Claim]) -> Row {
        Row {
            id,
            title,
            unit,
            samples: Vec::new(),
            claims: claims.to_vec(),
        }
    }

    pub fn add(&mut self, contender: &str, value: f64) {
        match self.samples.iter_mut().find(|s| s.contender == contender) {
            Some(samples) => samples.values.push(value),
            None => self.samples.push(Samples {
                contender: contender.to_owned(),
                values: vec![value],
            }),
        }
    }

    fn median_of(&self, contender: &str) -> Option<f64> {
        let samples = self.samples.iter().find(|s| s.contender == contender);
        samples.map(Samples::median)
    }

    /// The measured number of a claim.
    pub fn ratio(&self, claim: &Claim) -> Option<f64> {
        let of = self.median_of(claim.of)?;
        match claim.against {
            Some(other) => Some(of / self.median_of(other)?),
            None => Some(of),
        }
    }
}

/// How a claim stands.
pub fn verdict(claim: &Claim, ratio: Option<f64>, small: bool) -> &'static str {
    let Some(ratio) = ratio else {
        return "not measured";
    };
    let holds = |bound: f64| match claim.at_least {
        true => ratio >= bound,
        false => ratio <= bound,
    };
    match (small, holds(claim.goal), holds(claim.must)) {
        (true, ..) => "not judged",
        (_, true, _) => "reached, goal too",
        (_, _, true) => "reached",
        _ => "not reached",
    }
}

/// Four digits that matter.
pub fn shown(value: f64) -> String {
    match value {
        v if !v.is_finite() => "-".into(),
        v if v >= 1000.0 => format!("{v:.0}"),
        v if v >= 100.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

/// A row as text, as soon as it is measured.
pub fn row_text(row: &Row, small: bool) -> String {
    let mut text = format!("\n### {}: {} ({})\n\n", row.id, row.title, row.unit);
    text.push_str("| contender | median | min | max | n | stillframe is |\n| --- | --- | --- | --- | --- | --- |\n");
    let ours = row.median_of(OURS);
    for samples in &row.samples {
        let ratio = ours.map_or(String::new(), |ours| {
            format!("{}x", shown(ours / samples.median()))
        });
        let (median, n) = (shown(samples.median()), samples.values.len());
        let (least, greatest) = (shown(samples.least()), shown(samples.greatest()));
        let name = &samples.contender;
        writeln!(
            text,
            "| {name} | {median} | {least} | {greatest} | {n} | {ratio} |"
        )
        .expect("a string takes all");
    }
    text.push('\n');
    for claim in &row.claims {
        writeln!(text, "{}", claim_text(row, claim, small)).expect("a string takes all");
    }
    text
}

fn claim_parts(row: &Row, claim: &Claim, small: bool) -> [String; 5] {
    let ratio = row.ratio(claim);
    let x = if claim.against.is_some() { "x" } else { "" };
    let number = |value: f64| format!("{}{x}", shown(value));
    let bound = if claim.at_least { ">=" } else { "<=" };
    [
        claim
            .against
            .map_or(row.unit.to_owned(), |other| format!("against {other}")),
        ratio.map_or("-".into(), number),
        format!("{bound} {}", number(claim.must)),
        format!("{bound} {}", number(claim.goal)),
        verdict(claim, ratio, small).to_owned(),
    ]
}

fn claim_text(row: &Row, claim: &Claim, small: bool) -> String {
    let [what, measured, must, goal, verdict] = claim_parts(row, claim, small);
    format!("{what}: {measured}; must {must}, goal {goal}: **{verdict}**")
}

/// All claims in one table.
pub fn summary(rows: &[Row], small: bool) -> String {
    let mut text = String::from(
        "\n## What must be shown\n\n| row | work | | measured | must | goal | |\n| --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        for claim in &row.claims {
            let parts = claim_parts(row, claim, small).join(" | ");
            writeln!(text, "| {} | {} | {parts} |", row.id, row.title).expect("a string takes all");
        }
    }
    text
}
