//! The overlay's layout, byte by byte and by the word of qemu-img.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::image::diff;

const C: u64 = CLUSTER;

fn extent(start: u64, length: u64, zero: bool) -> DiffExtent {
    DiffExtent {
        start,
        length,
        zero,
    }
}

/// (first, count, zero) of each run.
fn runs(size: u64, extents: &[DiffExtent]) -> Vec<(u64, u64, bool)> {
    let runs = Runs::of(size, extents);
    runs.iter().map(|r| (r.first, r.count, r.zero)).collect()
}

#[test]
fn a_cluster_is_zero_only_if_all_of_it_is_known_to_be() {
    let size = 5 * C + 100;
    assert_eq!(runs(size, &[]), []);
    assert_eq!(runs(size, &[extent(0, C, true)]), [(0, 1, true)]);
    assert_eq!(runs(size, &[extent(0, C - 4096, true)]), [(0, 1, false)]);
    assert_eq!(runs(size, &[extent(4096, C, true)]), [(0, 2, false)]);
    assert_eq!(runs(size, &[extent(5 * C, 100, true)]), [(5, 1, true)]);
    assert_eq!(runs(size, &[extent(4096, 4096, false)]), [(0, 1, false)]);
    let pieces = [
        extent(C - 4096, 4096 + 2 * C + 4096, true),
        extent(3 * C + 4096, 4096, false),
        extent(3 * C + 8192, 2 * C - 8192 + 100, true),
    ];
    let expected = [(0, 1, false), (1, 2, true), (3, 1, false), (4, 2, true)];
    assert_eq!(runs(size, &pieces), expected);
    // All zero, in two pieces that no extent list would have: still known to be zero.
    let halves = [extent(0, 4096, true), extent(4096, C - 4096, true)];
    assert_eq!(runs(size, &halves), [(0, 1, true)]);
}

#[test]
fn tables_are_only_where_they_are_needed_and_every_cluster_is_counted() {
    let gib = 1 << 30;
    let size = 100 * gib + 1;
    let extents = [
        extent(0, 4096, false),
        extent(50 * gib - C, 2 * C, false),
        extent(60 * gib, 600 << 20, true),
        extent(100 * gib, 1, false),
    ];
    let layout = Layout::new(size, &extents).unwrap();
    assert_eq!(layout.virtual_size(), 100 * gib + 512);
    assert_eq!(layout.l1_entries, 201);
    assert_eq!(layout.tables, [0, 99, 100, 120, 121, 200]);
    assert_eq!(layout.data.end - layout.data.start, 4);
    assert_eq!(layout.file_size(), (1 + 1 + 1 + 1 + 6 + 4) * C);
    let data = layout.data.start;
    assert_eq!(layout.l2_entry(0), (data * C) | COPIED);
    assert_eq!(layout.l2_entry(1), 0);
    assert_eq!(layout.l2_entry(50 * gib / C), ((data + 2) * C) | COPIED);
    assert_eq!(layout.l2_entry(60 * gib / C), ZERO);
    assert_eq!(layout.l2_entry(100 * gib / C), ((data + 3) * C) | COPIED);
    for (i, cluster) in [0, 50 * gib / C - 1, 50 * gib / C, 100 * gib / C]
        .into_iter()
        .enumerate()
    {
        assert_eq!(layout.guest(i as u64), cluster);
    }
}

#[test]
fn refcounts_have_room_for_themselves_at_every_size() {
    let edges = (1..4).flat_map(|n| (0..6).map(move |d| n * COUNTS - d));
    for others in edges.chain([1, COUNTS * ENTRIES, 3 * COUNTS * ENTRIES]) {
        let (table, blocks) = refcount_clusters(others);
        assert!(blocks * COUNTS >= others + table + blocks, "{others}");
        assert!(table * ENTRIES >= blocks, "{others}");
        // Never a block too many, but where one is there for its own sake.
        assert!((blocks - 1) * COUNTS < others + table + blocks, "{others}");
    }
}

#[test]
fn an_image_too_large_for_the_format_is_refused() {
    let most = 2 << 50;
    assert!(Layout::new(most, &[extent(most - 1, 1, false)]).is_ok());
    assert_eq!(Layout::new(most + 1, &[]).unwrap_err().kind(), Kind::Limit);
}

/// An image in memory.
struct Bytes(Vec<u8>);

impl Image for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let at = offset as usize;
        buf.copy_from_slice(&self.0[at..at + buf.len()]);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        Ok((offset < self.size()).then_some(offset))
    }
    fn next_hole(&self, _offset: u64) -> Result<u64> {
        Ok(self.size())
    }
}

/// Numbers that look random (splitmix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn qemu_img() -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        return true;
    }
    let text = "SKIPPED qcow2 against qemu-img: it is not installed\n";
    assert!(std::env::var_os("STILLFRAME_CI").is_none(), "{text}");
    std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes()).unwrap();
    false
}

fn qemu(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new("qemu-img");
    let out = command.args(args).current_dir(dir).output().unwrap();
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "qemu-img {args:?}: {text}");
    text
}

fn ends() -> Ends {
    Ends {
        backing: "a.img".to_owned(),
        from: Uuid([0xaa; 16]),
        to: Uuid([0xbb; 16]),
    }
}

/// Two contents, what changed by the rules of the engine, and the grain.
fn pair(chance: &mut Chance) -> (Vec<u8>, Vec<u8>, Vec<Range<u64>>, u64) {
    let grain = 4096 << chance.below(5);
    let sizes = [
        0,
        1,
        511,
        512,
        4097,
        65_536,
        65_537,
        1 << 20,
        (1 << 20) + 777,
    ];
    let size = match chance.below(3) {
        0 => sizes[chance.below(sizes.len() as u64) as usize],
        _ => chance.below(6 << 20),
    };
    let other = match chance.below(3) {
        0 => chance.below(6 << 20),
        _ => size,
    };
    let mut a = vec![0; other as usize];
    for at in 0..other / 4096 {
        let at = (at * 4096) as usize;
        let byte = chance.below(3) as u8 * 77;
        a[at..at + 4096].fill(byte);
    }
    let mut b = a.clone();
    b.resize(size as usize, 0);
    let mut grains = std::collections::BTreeSet::new();
    for _ in 0..chance.below(40) {
        if size == 0 {
            break;
        }
        let start = chance.below(size);
        let end = size.min(start + 1 + chance.below(300_000) / (1 + chance.below(60)));
        // Written, made zero, or written as it was.
        match chance.below(5) {
            0 | 1 => b[start as usize..end as usize].fill(chance.next() as u8 | 1),
            2 | 3 => b[start as usize..end as usize].fill(0),
            _ => {}
        }
        grains.extend(start / grain..end.div_ceil(grain));
    }
    if size > other {
        grains.extend(other / grain..size.div_ceil(grain));
    } else if other > size && size % SECTOR != 0 {
        grains.insert((size - 1) / grain);
    }
    let mut changed: Vec<Range<u64>> = Vec::new();
    for g in grains {
        let end = size.min((g + 1) * grain);
        match changed.last_mut() {
            Some(last) if last.end == g * grain => last.end = end,
            _ => changed.push(g * grain..end),
        }
    }
    (a, b, changed, grain)
}

#[test]
fn qemu_restores_the_newer_image_from_the_older_one_and_the_diff() {
    if !qemu_img() {
        return;
    }
    let count = std::env::var("STILLFRAME_DIFFS").map_or(60, |n| n.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (mut zero_clusters, mut longer, mut shorter, mut unaligned) = (0, 0, 0, 0);
    for seed in 0..count {
        let mut chance = Chance(seed);
        let (a, b, changed, grain) = pair(&mut chance);
        let image = Arc::new(Bytes(b.clone()));
        let extents = diff::looked_at(&*image, &changed, grain).unwrap();
        let layout = Arc::new(Layout::new(b.len() as u64, &extents).unwrap());
        zero_clusters += layout.runs.iter().filter(|run| run.zero).count();
        longer += usize::from(b.len() > a.len());
        shorter += usize::from(b.len() < a.len());
        unaligned += usize::from(b.len() % 512 != 0);
        let file = Qcow2::new(image, layout, &ends()).unwrap();
        let mut bytes = vec![0; file.size() as usize];
        file.read_at(0, &mut bytes).unwrap();
        // The same in pieces of any size, whatever was read before.
        for _ in 0..20 {
            let at = chance.below(file.size());
            let len = 1 + chance.below((file.size() - at).min(200_000));
            let mut piece = vec![0xee; len as usize];
            file.read_at(at, &mut piece).unwrap();
            assert!(piece == bytes[at as usize..(at + len) as usize], "{seed}");
        }
        fs::write(dir.path().join("a.img"), &a).unwrap();
        fs::write(dir.path().join("b.img"), &b).unwrap();
        fs::write(dir.path().join("diff.qcow2"), &bytes).unwrap();
        let text = qemu(dir.path(), &["check", "-f", "qcow2", "diff.qcow2"]);
        assert!(text.contains("No errors were found"), "{seed}: {text}");
        let compare = ["compare", "-f", "raw", "-F", "qcow2", "b.img", "diff.qcow2"];
        qemu(dir.path(), &compare);
        qemu(dir.path(), &["convert", "-O", "raw", "diff.qcow2", "c.img"]);
        let mut restored = fs::read(dir.path().join("c.img")).unwrap();
        assert_eq!(restored.len(), b.len().next_multiple_of(512), "{seed}");
        assert!(restored[b.len()..].iter().all(|&byte| byte == 0), "{seed}");
        restored.truncate(b.len());
        assert!(restored == b, "{seed}: the restored image differs");
    }
    // The loop was about something.
    assert!(count < 60 || zero_clusters > 20 && longer > 5 && shorter > 5 && unaligned > 20);
}

#[test]
fn the_header_names_the_older_image_and_both_uuids() {
    let image = Arc::new(Bytes(vec![7; 1000]));
    let extents = [extent(0, 1000, false)];
    let layout = Arc::new(Layout::new(1000, &extents).unwrap());
    let file = Qcow2::new(image.clone(), layout.clone(), &ends()).unwrap();
    let mut bytes = vec![0; 65_536];
    file.read_at(0, &mut bytes).unwrap();
    let has = |needle: &[u8]| bytes.windows(needle.len()).any(|w| w == needle);
    assert!(has(b"QFI\xfb") && has(b"raw") && has(b"a.img"));
    assert!(has(&[[0xaa; 16], [0xbb; 16]].concat()) && has(b"STLF"));
    assert_eq!(bytes[4..8], [0, 0, 0, 3], "the version");
    assert_eq!(bytes[20..24], [0, 0, 0, 16], "clusters of 64 KiB");
    assert_eq!(bytes[24..32], 1024u64.to_be_bytes(), "whole sectors");
    let past = file.read_at(file.size() - 1, &mut [0; 2]).unwrap_err();
    assert_eq!(past.kind(), Kind::Invalid);
    let long = Ends {
        backing: "x".repeat(1024),
        ..ends()
    };
    let refused = Qcow2::new(image, layout.clone(), &long).err().unwrap();
    assert_eq!(refused.kind(), Kind::Limit);
    let other = Arc::new(Bytes(vec![7; 1001]));
    assert!(Qcow2::new(other, layout, &ends()).is_err());
}
