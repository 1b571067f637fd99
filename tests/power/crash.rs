//! Crash states: what a device may hold when the power goes at a position of its log.
//!
//! Everything before a device's last flush is on its medium. Of what came after it, any part may be, in
//! any order: that is [`Fate`]. The log is walked forward only; the part that is durable is kept as one
//! image that every state shares.

use std::collections::VecDeque;

use crate::disks::{Disk, Event, PAGE};
use crate::filesystems::Kind;
use crate::rig::Chance;

/// What becomes of what a device was told and not yet flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// All of it is lost.
    Drop,
    /// All of it is there.
    Prefix,
    /// Each write is there or not.
    Subset,
    /// All but one write is there.
    AllButOne,
    /// One write is there.
    One,
    /// Of each write any sectors are there.
    Torn512,
    /// Of each write any pages of 4096 bytes are there.
    Torn4096,
}

pub const FATES: [Fate; 7] = [
    Fate::Drop,
    Fate::Prefix,
    Fate::Subset,
    Fate::AllButOne,
    Fate::One,
    Fate::Torn512,
    Fate::Torn4096,
];

struct Medium {
    kind: Kind,
    /// What is durable at the position.
    durable: Disk,
    /// Told since the device's last flush, as indices into the log.
    volatile: Vec<usize>,
}

/// The devices of a recording at a position that only grows.
pub struct Replay<'a> {
    log: &'a [(usize, Event)],
    at: usize,
    media: Vec<Medium>,
}

fn apply(disk: &mut Disk, event: &Event) {
    match event {
        Event::Write { offset, data } => disk.write(*offset, data),
        Event::Zero { offset, len } => disk.zero(*offset, *len),
        Event::Flush => {}
    }
}

impl<'a> Replay<'a> {
    /// From what the disks held when the recording began.
    pub fn new(log: &'a [(usize, Event)], disks: Vec<(Kind, Disk)>) -> Replay<'a> {
        let media = disks.into_iter().map(|(kind, durable)| Medium {
            kind,
            durable,
            volatile: Vec::new(),
        });
        Replay {
            log,
            at: 0,
            media: media.collect(),
        }
    }

    /// Goes on to the position at which the log has so many events.
    pub fn advance(&mut self, to: usize) {
        assert!(to >= self.at, "a replay goes forward");
        for (i, (disk, event)) in self.log.iter().enumerate().take(to).skip(self.at) {
            let medium = &mut self.media[*disk];
            match event {
                Event::Flush => {
                    for i in medium.volatile.drain(..) {
                        apply(&mut medium.durable, &self.log[i].1);
                    }
                }
                _ => medium.volatile.push(i),
            }
        }
        self.at = to;
        for medium in &mut self.media {
            // Into the shared part, so that a state is a cheap copy of what is left.
            let disk = std::mem::replace(&mut medium.durable, Disk::new(0));
            medium.durable = disk.flatten();
        }
    }

    /// How many events of the log have happened.
    pub fn position(&self) -> usize {
        self.at
    }

    /// How many writes the devices were told and have not flushed.
    pub fn volatile(&self) -> usize {
        self.media.iter().map(|m| m.volatile.len()).sum()
    }

    /// One state: each device by a fate of its own.
    pub fn state(&self, fates: &[Fate], chance: &mut Chance) -> Vec<Disk> {
        let media = self.media.iter().zip(fates);
        let make = |(medium, &fate): (&Medium, &Fate)| self.medium(medium, fate, chance);
        media.map(make).collect()
    }

    fn medium(&self, medium: &Medium, fate: Fate, chance: &mut Chance) -> Disk {
        let mut disk = medium.durable.clone();
        let count = medium.volatile.len() as u64;
        let odd = chance.below(count.max(1)) as usize;
        for (n, &i) in medium.volatile.iter().enumerate() {
            let event = &self.log[i].1;
            match fate {
                Fate::Drop => {}
                Fate::Prefix => apply(&mut disk, event),
                Fate::Subset if chance.below(2) == 0 => apply(&mut disk, event),
                Fate::AllButOne if n != odd => apply(&mut disk, event),
                Fate::One if n == odd => apply(&mut disk, event),
                Fate::Torn512 => torn(&mut disk, medium.kind, event, 512, chance),
                Fate::Torn4096 => torn(&mut disk, medium.kind, event, PAGE, chance),
                _ => {}
            }
        }
        disk
    }
}

/// Applies any parts of an event.
fn torn(disk: &mut Disk, kind: Kind, event: &Event, grain: u64, chance: &mut Chance) {
    let (offset, len) = match event {
        Event::Write { offset, data } => (*offset, data.len() as u64),
        Event::Zero { offset, len } => (*offset, *len),
        Event::Flush => return,
    };
    let mut parts: VecDeque<(u64, u64)> = VecDeque::new();
    let mut at = offset;
    while at < offset + len {
        let atomic = kind.is_atomic(at / PAGE);
        let grain = if atomic { PAGE } else { grain };
        // A discard of many megabytes is torn in larger parts, to be quick.
        let grain = grain.max(len / 1024 / PAGE * PAGE);
        let end = (at / grain * grain + grain).min(offset + len);
        parts.push_back((at, end));
        at = end;
    }
    for (from, to) in parts {
        if chance.below(2) == 0 {
            continue;
        }
        match event {
            Event::Write { data, .. } => {
                let part = &data[(from - offset) as usize..(to - offset) as usize];
                disk.write(from, part);
            }
            _ => disk.zero(from, to - from),
        }
    }
}
