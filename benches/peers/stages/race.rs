//! Whether a snapshot is read right while every block of it is overwritten: not timed, and a wrong byte ends the run.
//!
//! In turn n the live volume is generation n from end to end; snapshot n is taken; two writers give every page
//! generation n + 1, in mixed order and in runs of 1 to 16 pages, while readers compare every byte of the snapshot
//! with generation n: in order through the page cache, which is emptied all the time, in order with O_DIRECT, and
//! at random. That the readers met the writers is counted: reads of a range that held overwritten and other
//! pages at that moment. That the comparison can fail is shown on `live.img`, which must not be generation n after.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::contender::Contender;
use crate::content::{Buffer, PAGE, fill, first_wrong, mixed};
use crate::driver::{check_whole, forget, open};
use crate::rig::{Chance, touch};
use crate::run::{Run, Sources};

use super::MIB;

pub const IDS: [&str; 1] = ["race"];

struct Race<'a> {
    snapshot: &'a Path,
    size: u64,
    generation: u64,
    /// For each page whether its write has been answered.
    written: Vec<AtomicBool>,
    over: AtomicBool,
    bytes: AtomicU64,
    met: AtomicU64,
}

pub fn measure(run: &mut Run) {
    let sources = Sources::new();
    // Asked for other rows, it is there, but brief.
    let asked = run.wants("race");
    let size = run.options.size.min(if asked { 64 } else { 16 } * MIB);
    let mut ours = Contender::ours(&sources.make("race.img", size), false);
    let turns = if run.options.small || !asked { 2 } else { 4 };
    let (mut bytes, mut met) = (0, 0);
    for generation in 0..turns {
        run.check_interrupt();
        let snapshot = ours.rig().snapshot("disk", &format!("g{generation}"));
        touch(&snapshot).unwrap();
        let race = Race {
            snapshot: &snapshot,
            size,
            generation,
            written: (0..size / PAGE).map(|_| AtomicBool::new(false)).collect(),
            over: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            met: AtomicU64::new(0),
        };
        race.run(&ours.live);
        forget(&snapshot);
        check_whole(&snapshot, 0..size, generation);
        check_whole(&ours.live, 0..size, generation + 1);
        race.can_fail(&ours.live);
        bytes += race.bytes.into_inner();
        met += race.met.into_inner();
        if generation > 0 {
            let older = ours.rig().snapshot("disk", &format!("g{}", generation - 1));
            check_whole(&older, 0..size, generation - 1);
            fs::remove_file(older).unwrap();
        }
    }
    println!(
        "\nrace: {} MiB of snapshots compared while all {} MiB were overwritten {turns} times; {met} reads met a writer; no wrong byte",
        bytes / MIB,
        size / MIB
    );
    assert!(met > 0, "no reader ever met a writer: nothing was shown");
}

impl Race<'_> {
    fn run(&self, live: &Path) {
        let (next, order) = (AtomicUsize::new(0), self.runs());
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|number| scope.spawn(move || self.read_until_over(number)))
                .collect();
            let writers: Vec<_> = [true, false]
                .map(|direct| {
                    scope.spawn({
                        let (next, order) = (&next, &order);
                        move || self.write(live, direct, next, order)
                    })
                })
                .into_iter()
                .collect();
            let results: Vec<_> = writers.into_iter().map(|w| w.join()).collect();
            // Also if one has failed, or the readers would go on for ever.
            self.over.store(true, Ordering::SeqCst);
            readers
                .into_iter()
                .for_each(|reader| reader.join().unwrap());
            results.into_iter().for_each(|result| result.unwrap());
        });
    }

    /// All pages in runs of 1 to 16, mixed.
    fn runs(&self) -> Vec<(u64, u64)> {
        let mut chance = Chance(self.generation);
        let mut runs = Vec::new();
        for at in mixed(self.size, 16 * PAGE, self.generation) {
            let mut from = at;
            while from < at + 16 * PAGE {
                let len = ((chance.below(16) + 1) * PAGE).min(at + 16 * PAGE - from);
                runs.push((from, len));
                from += len;
            }
        }
        runs
    }

    fn write(&self, live: &Path, direct: bool, next: &AtomicUsize, order: &[(u64, u64)]) {
        let (file, mut buffer) = (open(live, true, direct), Buffer::new(16 * PAGE as usize));
        while let Some(&(at, len)) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let pages = &mut buffer[..len as usize];
            fill(pages, at, self.generation + 1);
            file.write_all_at(pages, at).unwrap();
            for page in at / PAGE..(at + len) / PAGE {
                self.written[page as usize].store(true, Ordering::SeqCst);
            }
        }
    }

    fn read_until_over(&self, number: u64) {
        let (mut chance, mut at) = (Chance(number), 0);
        let mut file = open(self.snapshot, false, number > 0);
        let mut buffer = Buffer::new(MIB as usize);
        while !self.over.load(Ordering::SeqCst) {
            let len = match number {
                2 => {
                    at = chance.below(self.size / PAGE) * PAGE;
                    PAGE.max((chance.below(16) + 1) * PAGE).min(self.size - at)
                }
                _ => MIB.min(self.size - at),
            };
            let before = self.state(at, len);
            let pages = &mut buffer[..len as usize];
            file.read_exact_at(pages, at).unwrap();
            if let Some(wrong) = first_wrong(pages, at, self.generation) {
                panic!("WRONG BYTES at {wrong} of {}", self.snapshot.display());
            }
            self.bytes.fetch_add(len, Ordering::Relaxed);
            // Something was overwritten before or meanwhile, and something was not yet when it began.
            let met = self.state(at, len) > before || (before > 0 && before < len / PAGE);
            self.met.fetch_add(u64::from(met), Ordering::Relaxed);
            at += len;
            if at >= self.size {
                at = 0;
                if number == 0 {
                    forget(self.snapshot);
                    file = open(self.snapshot, false, false);
                }
            }
        }
    }

    /// How many pages of a range have been overwritten.
    fn state(&self, at: u64, len: u64) -> u64 {
        let pages = &self.written[(at / PAGE) as usize..((at + len) / PAGE) as usize];
        let written = pages.iter().filter(|page| page.load(Ordering::SeqCst));
        written.count() as u64
    }

    /// The live volume is not what the snapshot is, and the comparison says so of every page.
    fn can_fail(&self, live: &Path) {
        let (file, mut page) = (open(live, false, true), Buffer::new(PAGE as usize));
        for at in (0..self.size).step_by(PAGE as usize) {
            file.read_exact_at(&mut page, at).unwrap();
            assert!(first_wrong(&page, at, self.generation).is_some());
        }
    }
}
