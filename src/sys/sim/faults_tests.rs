//! That each fault of the simulator does what it says, and nothing else.

use std::collections::BTreeSet;
use std::io::ErrorKind;

use crate::sys::disk::{Dir, Disk, Open};
use crate::sys::sim::{Fault, Op, SimWorld, What};

fn fault(what: What, under: &'static str, nth: u64, lasting: bool) -> Fault {
    Fault {
        what,
        ops: &[],
        under,
        nth,
        lasting,
    }
}

fn bytes(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size().unwrap() as usize];
    disk.read_exact_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_fault_strikes_where_and_as_often_as_it_is_told() {
    let world = SimWorld::new(1);
    let (a, b) = (world.add_disk("d/a", 512), world.add_disk("e/b", 512));
    world.inject(fault(What::Errno(libc::EIO), "d", 3, false));
    for _ in 0..2 {
        a.write_all_at(0, &[b"x"]).unwrap();
        b.write_all_at(0, &[b"x"]).unwrap();
    }
    assert!(a.size().is_err(), "the third there, of any kind");
    assert_eq!((a.size().unwrap(), world.struck()), (512, 1));
    world.inject(Fault {
        ops: &[Op::Sync],
        ..fault(What::Errno(libc::EIO), "d/a", 2, true)
    });
    a.sync_data().unwrap();
    assert!(a.sync_data().is_err() && a.sync_data().is_err());
    a.write_all_at(0, &[b"y"]).unwrap();
    b.sync_data().unwrap();
    assert_eq!(world.struck(), 3);
    world.clear_faults();
    a.sync_data().unwrap();
    world.inject(fault(What::Errno(libc::EIO), "d", 1, true));
    assert!(world.dir("d").list().is_err() && world.dir("d").open("a", Open::Read).is_err());
    world.kill();
    assert_eq!(
        world.dir("d").list().unwrap(),
        ["a"],
        "faults end with the life"
    );
}

#[test]
fn a_short_write_stores_a_true_prefix_and_a_short_read_says_so() {
    let mut lengths = BTreeSet::new();
    for seed in 0..50 {
        let world = SimWorld::new(seed);
        let disk = world.add_disk("a", 4096);
        world.inject(fault(What::Short(libc::ENOSPC), "", 1, false));
        let e = disk.write_all_at(0, &[&[1; 1000], &[1; 1000]]).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
        let written = bytes(&*disk).iter().filter(|b| **b == 1).count();
        assert!(written < 2000);
        assert!(bytes(&*disk)[..written].iter().all(|b| *b == 1), "a prefix");
        lengths.insert(written);
        disk.write_all_at(0, &[&[2; 4096]]).unwrap();
        world.inject(fault(What::Short(libc::EIO), "", 1, false));
        let mut buf = [0; 100];
        let e = disk.read_exact_at(0, &mut buf).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::UnexpectedEof);
        assert!(buf[99] == 0, "not all of it");
    }
    assert!(lengths.len() > 10, "{lengths:?}");
}

#[test]
fn a_lost_write_is_acknowledged_and_gone_after_the_cut() {
    let mut seen = BTreeSet::new();
    for seed in 0..50 {
        let world = SimWorld::new(seed);
        let disk = world.add_disk("a", 8192);
        disk.write_all_at(0, &[&[1; 8192]]).unwrap();
        disk.sync_data().unwrap();
        world.inject(fault(What::Lost, "", 1, false));
        disk.write_all_at(0, &[&[2; 4096]]).unwrap();
        disk.write_all_at(4096, &[&[3; 4096]]).unwrap();
        disk.sync_data().unwrap();
        seen.insert(bytes(&*disk)[0]);
        world.power_cut();
        let left = world.peek("a").unwrap();
        assert_eq!((left[0], left[4095], left[4096]), (1, 1, 3));
    }
    assert_eq!(seen, BTreeSet::from([1, 2]), "noticed at once or not");
}

#[test]
fn a_misdirected_write_lands_elsewhere() {
    let mut places = BTreeSet::new();
    for seed in 0..50 {
        let world = SimWorld::new(seed);
        let (a, b) = (world.add_disk("d/a", 8192), world.add_disk("d/b", 8192));
        world.add_disk("e/c", 8192);
        world.inject(fault(What::Misdirected, "", 1, false));
        a.write_all_at(0, &[&[2; 512]]).unwrap();
        a.sync_data().unwrap();
        b.sync_data().unwrap();
        world.power_cut();
        assert_eq!(world.struck(), 1);
        assert!(
            world.peek("e/c").unwrap().iter().all(|b| *b == 0),
            "of that directory"
        );
        for name in ["a", "b"] {
            let there = world.peek(&format!("d/{name}")).unwrap();
            if let Some(at) = there.iter().position(|b| *b == 2) {
                assert!(there[at..at + 512].iter().all(|b| *b == 2));
                places.insert((name, at));
            }
        }
    }
    assert!(places.len() > 10, "{places:?}");
    assert!(places.iter().any(|(name, _)| *name == "b"));
}

#[test]
fn a_lost_device_is_cut_and_the_other_goes_on() {
    let mut left = BTreeSet::new();
    for seed in 0..50 {
        let world = SimWorld::new(seed);
        let (a, b) = (world.add_disk("d/a", 512), world.add_disk("e/b", 512));
        a.write_all_at(0, &[&[1; 512]]).unwrap();
        b.write_all_at(0, &[&[1; 512]]).unwrap();
        world.lose_device("d");
        assert!(a.read_exact_at(0, &mut [0]).is_err() && a.sync_data().is_err());
        assert!(world.dir("d").list().is_err());
        b.write_all_at(0, &[&[2; 512]]).unwrap();
        world.kill();
        assert_eq!(world.peek("e/b").unwrap()[0], 2, "nobody cut that one");
        left.insert(world.peek("d/a").unwrap()[0]);
        world.disk("d/a").unwrap().write_all_at(0, &[b"x"]).unwrap();
    }
    assert!(left.contains(&0) && left.contains(&1), "{left:?}");
}

#[test]
fn a_fork_shares_nothing_that_is_changed_later() {
    let world = SimWorld::new(1);
    let disk = world.add_disk("a", 4096);
    disk.write_all_at(0, &[&[1; 512]]).unwrap();
    let fork = world.fork(7);
    disk.write_all_at(0, &[&[2; 512]]).unwrap();
    fork.disk("a")
        .unwrap()
        .write_all_at(512, &[&[3; 512]])
        .unwrap();
    assert_eq!(
        world.peek("a").unwrap()[..1024],
        [[2; 512], [0; 512]].concat()
    );
    assert_eq!(
        fork.peek("a").unwrap()[..1024],
        [[1; 512], [3; 512]].concat()
    );
    let states = |seed| {
        let fork = world.fork(seed);
        fork.power_cut();
        fork.peek("a").unwrap()
    };
    assert!(
        (0..20).all(|seed| states(seed) == states(seed)),
        "a seed is a state"
    );
    assert!((0..50).map(states).collect::<BTreeSet<_>>().len() > 5);
}
