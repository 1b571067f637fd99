//! Instants as text: ISO 8601 in UTC, the one form that listings, JSON and logs show.
//!
//! It does not parse, and it knows no time zones: a machine's local time is not unique (an hour
//! repeats every autumn), and the instant of a snapshot must be.

const NS: i64 = 1_000_000_000;
const DAY: i64 = 86_400;

/// `2026-11-21T10:00:00.123456789Z`: nanoseconds since 1970 as text that sorts like the instants
/// (for the years 0 to 9999).
pub fn precise(ns: i64) -> String {
    format!("{}.{:09}Z", to_seconds(ns), ns.rem_euclid(NS))
}

/// `2026-11-21T10:00:00Z`: the same, cut to whole seconds, for people.
pub fn brief(precise: &str) -> String {
    match precise.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => precise.to_owned(),
    }
}

fn to_seconds(ns: i64) -> String {
    let seconds = ns.div_euclid(NS);
    let (year, month, day) = civil(seconds.div_euclid(DAY));
    let of_day = seconds.rem_euclid(DAY);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// Days since 1970 to a date of the proleptic Gregorian calendar. Years start in March here, so
/// that the leap day is the last one of its year; 400 years (146,097 days) are one period.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_instants() {
        assert_eq!(precise(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(precise(-1), "1969-12-31T23:59:59.999999999Z");
        // date -u -d @951782400 and @1709164799 (leap days), @4102444800
        assert_eq!(precise(951_782_400 * NS), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(
            precise(1_709_251_199 * NS + 5),
            "2024-02-29T23:59:59.000000005Z"
        );
        assert_eq!(
            precise(4_102_444_800 * NS),
            "2100-01-01T00:00:00.000000000Z"
        );
        assert_eq!(
            brief(&precise(1_709_251_199 * NS + 5)),
            "2024-02-29T23:59:59Z"
        );
    }

    /// Walks a whole period day by day: every date follows the one before it.
    #[test]
    fn every_day_follows_the_day_before() {
        let leap = |y: i64| y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
        let mut expected = (1970, 1, 1);
        for day in 0..146_097 {
            assert_eq!(civil(day), expected, "day {day}");
            let (y, m, d) = expected;
            let last = match m {
                2 => 28 + i64::from(leap(y)),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            expected = match (d == last, m == 12) {
                (true, true) => (y + 1, 1, 1),
                (true, false) => (y, m + 1, 1),
                _ => (y, m, d + 1),
            };
        }
    }
}
