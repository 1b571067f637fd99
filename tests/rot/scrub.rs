//! The scrub: finds rot, mends what has a good copy, names the rest, goes on where it was.

use std::collections::BTreeSet;

use stillframe::error::Kind;
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::Disk;
use stillframe::sys::sim::SimWorld;
use stillframe::volume::audit::{self, Severity};
use stillframe::volume::{Engine, ScrubOptions, Share, VolumeOptions};

use crate::stage::{PAGE, compare, env, name, settings, views};

const OPTIONS: ScrubOptions = ScrubOptions {
    volume: None,
    percent: 100,
    rate: 0,
    repair: true,
    restart: false,
};

fn page(byte: u8) -> Vec<u8> {
    (0..PAGE).map(|i| byte ^ (i % 251) as u8).collect()
}

/// A volume of four pages with a snapshot `s` of 1, 2, 3, 4, overwritten, of which the first page is
/// again what it was and the second one is in a clone; the third is also in the older snapshot `r`.
fn scene() -> (SimWorld, MemoryIndexHome, std::sync::Arc<Engine>) {
    let world = SimWorld::new(3);
    let index = MemoryIndexHome::new();
    let disk = world.add_disk("a", 4 * PAGE as u64);
    disk.write_all_at(0, &[&page(1), &page(2), &page(3), &page(4)])
        .unwrap();
    disk.sync_data().unwrap();
    Engine::create(&env(&world, &index), &settings()).unwrap();
    let engine = Engine::open(env(&world, &index), settings()).unwrap();
    let v = name("a");
    let live = engine
        .add_volume(&v, "a", VolumeOptions::default())
        .unwrap();
    let at = |n: u64| n * PAGE as u64;
    let take = |n: &str| engine.take_snapshots(&[(v.clone(), name(n))]).unwrap();
    take("r");
    // The third page once differs and comes back: two records with the same content.
    live.write_at(at(2), &page(30), true).unwrap();
    take("q");
    live.write_at(at(2), &page(3), true).unwrap();
    take("s");
    for n in 0..4 {
        live.write_at(at(n), &page(50 + n as u8), true).unwrap();
    }
    live.write_at(at(0), &page(1), true).unwrap();
    engine.clone_snapshot(&v, &name("s"), &name("c")).unwrap();
    let clone = engine.open_clone(&v, &name("c")).unwrap();
    clone.write_at(at(1), &page(99), true).unwrap();
    clone.write_at(at(1), &page(2), true).unwrap();
    clone.flush().unwrap();
    drop(clone);
    live.flush().unwrap();
    while engine.maintain().unwrap() {}
    (world, index, engine)
}

/// Every place of a page's content in the log.
fn places(world: &SimWorld, content: &[u8]) -> Vec<(String, u64)> {
    use stillframe::sys::disk::Dir;
    let mut found = Vec::new();
    let mut names = world.dir("store/log").list().unwrap();
    names.sort();
    for file in names {
        let path = format!("store/log/{file}");
        let bytes = world.peek(&path).unwrap();
        for at in (0..bytes.len()).step_by(PAGE) {
            if bytes[at..].starts_with(content) {
                found.push((path.clone(), at as u64));
            }
        }
    }
    found
}

fn rot(world: &SimWorld, place: &(String, u64)) {
    let byte = world.peek(&place.0).unwrap()[place.1 as usize + 17];
    world.poke(&place.0, place.1 + 17, &[byte ^ 4]);
}

/// From the source, from a clone, from another record; what has no copy is named, and only it fails.
#[test]
fn what_has_a_good_copy_is_mended_and_the_rest_is_named() {
    let (world, index, engine) = scene();
    let good = views(&engine);
    let spots: Vec<_> = (1..=4).map(|n| places(&world, &page(n))).collect();
    assert_eq!(
        spots.iter().map(Vec::len).collect::<Vec<_>>(),
        [1, 1, 2, 1],
        "{spots:?}"
    );
    for list in &spots {
        rot(&world, &list[0]);
    }
    let failed = compare(&views(&engine), &good, "before");
    let pages: BTreeSet<usize> = failed.iter().map(|(_, page)| *page).collect();
    assert_eq!(pages, BTreeSet::from([0, 1, 2, 3]), "{failed:?}");
    assert!(!engine.known_damage().is_empty());

    // A look alone changes nothing.
    let look = ScrubOptions {
        repair: false,
        ..OPTIONS
    };
    let seen = engine.scrub(&look, &mut |_| {}).unwrap();
    assert_eq!((seen.found, seen.mended), (4, 0));
    let done = engine.scrub(&OPTIONS, &mut |_| {}).unwrap();
    assert_eq!((done.found, done.mended), (4, 3));
    assert_eq!(done.grains, seen.grains);
    let failed = compare(&views(&engine), &good, "after");
    let pages: BTreeSet<usize> = failed.iter().map(|(_, page)| *page).collect();
    assert_eq!(pages, BTreeSet::from([3]), "{failed:?}");
    let damage = engine.known_damage();
    let named: BTreeSet<&str> = damage.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(named, BTreeSet::from(["a@q", "a@r", "a@s", "a/c"]));
    for finding in &damage {
        assert_eq!(
            finding
                .ranges
                .iter()
                .map(|r| (r.start, r.length))
                .collect::<Vec<_>>(),
            [(3 * PAGE as u64, PAGE as u64)]
        );
    }

    // It is known after a restart, the audit says the same, and deleting ends it.
    engine.close().unwrap();
    drop(engine);
    let audit = audit::offline(&env(&world, &index), Share::ALL, 1).unwrap();
    let wrong = audit.findings.iter();
    let wrong: BTreeSet<&str> = wrong
        .filter(|f| f.severity != Severity::Note)
        .map(|f| f.name.as_str())
        .collect();
    assert_eq!(wrong, named);
    let engine = Engine::open(env(&world, &index), settings()).unwrap();
    assert_eq!(engine.known_damage(), damage);
    let v = name("a");
    engine.delete_clone(&v, &name("c")).unwrap();
    for snapshot in ["q", "r", "s"] {
        engine.delete_snapshot(&v, &name(snapshot)).unwrap();
    }
    assert_eq!(engine.known_damage(), []);
    engine.close().unwrap();
    drop(engine);
    let audit = audit::offline(&env(&world, &index), Share::ALL, 1).unwrap();
    assert!(
        audit.findings.iter().all(|f| f.severity == Severity::Note),
        "{:#?}",
        audit.findings
    );
}

/// However it ends in the middle of mending, nothing is worse, and the next one mends it.
#[test]
fn mending_may_be_cut_off_anywhere() {
    let mut cuts = 0;
    for n in 0.. {
        let (world, index, engine) = scene();
        let good = views(&engine);
        for content in 1..=3 {
            rot(&world, &places(&world, &page(content))[0]);
        }
        world.die_at(n);
        let done = engine.scrub(&OPTIONS, &mut |_| {});
        let died = world.is_dead();
        drop(engine);
        match n % 2 {
            0 => world.kill(),
            _ => world.power_cut(),
        }
        index.power_cut(n);
        let engine = Engine::open(env(&world, &index), settings()).unwrap();
        compare(&views(&engine), &good, &format!("cut at {n}"));
        engine.scrub(&OPTIONS, &mut |_| {}).unwrap();
        let failed = compare(&views(&engine), &good, &format!("mended after {n}"));
        assert_eq!(failed, [], "cut at {n}");
        if !died {
            assert_eq!(done.unwrap().mended, 3);
            break;
        }
        cuts += 1;
    }
    assert!(cuts > 10, "{cuts}");
}

/// A scrub that was cut off goes on where it was, a second one beside it is refused, and one of a
/// volume reads nothing else.
#[test]
fn a_scrub_goes_on_where_it_was() {
    let stage = crate::stage::Stage::new(5, 160);
    let engine = crate::stage::open(&stage.world, &stage.index);
    let whole = engine.scrub(&OPTIONS, &mut |_| {}).unwrap();
    assert!(whole.grains > 20 && whole.position.is_none());
    let mut first = None;
    // The store is closed under it, at its first news.
    let restart = ScrubOptions {
        restart: true,
        rate: 1 << 30,
        ..OPTIONS
    };
    let refused = engine.scrub(&restart, &mut |state| {
        if first.is_none() {
            first = Some(state.grains);
            let again = engine.scrub(&OPTIONS, &mut |_| {}).unwrap_err();
            assert_eq!(again.kind(), Kind::Busy);
            stage.world.die_at(0);
        }
    });
    let refused = refused.map(|_| ());
    drop(engine);
    stage.world.kill();
    stage.index.kill(1);
    let engine = crate::stage::open(&stage.world, &stage.index);
    let v = ScrubOptions {
        volume: Some(name("b")),
        ..OPTIONS
    };
    let of_b = engine.scrub(&v, &mut |_| {}).unwrap();
    assert!(of_b.grains > 0 && of_b.grains < whole.grains);
    let part = ScrubOptions {
        percent: 30,
        ..OPTIONS
    };
    let some = engine.scrub(&part, &mut |_| {}).unwrap();
    assert!(
        some.grains < whole.grains * 6 / 10,
        "{} of {}",
        some.grains,
        whole.grains
    );
    println!(
        "first news after {first:?} of {} grains, then {refused:?}",
        whole.grains
    );
    engine.close().unwrap();
    let refused = engine.scrub(&OPTIONS, &mut |_| {}).unwrap_err();
    assert_eq!(refused.kind(), Kind::Interrupted);
}

/// What a reader met and a scrub finds readable again is forgotten.
#[test]
fn what_passes_is_forgotten() {
    let (world, _index, engine) = scene();
    let place = &places(&world, &page(4))[0];
    rot(&world, place);
    views(&engine);
    assert!(!engine.known_damage().is_empty());
    // The same bit again.
    rot(&world, place);
    let some = ScrubOptions {
        percent: 99,
        ..OPTIONS
    };
    engine.scrub(&some, &mut |_| {}).unwrap();
    assert!(!engine.known_damage().is_empty(), "not all was read");
    let done = engine.scrub(&OPTIONS, &mut |_| {}).unwrap();
    assert_eq!(done.found, 0);
    assert_eq!(engine.known_damage(), []);
}

/// A record that is mended says nothing of another one of the same block.
#[test]
fn what_is_mended_does_not_hide_what_is_not() {
    let (world, _index, engine) = scene();
    rot(&world, &places(&world, &page(30))[0]);
    rot(&world, &places(&world, &page(3))[1]);
    let done = engine.scrub(&OPTIONS, &mut |_| {}).unwrap();
    assert_eq!((done.found, done.mended), (2, 1));
    let damage = engine.known_damage();
    let named: Vec<&str> = damage.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(named, ["a@q"]);
}

/// Whoever is told how far it is may ask, or take his time: nobody waits for him.
#[test]
fn who_is_told_of_a_scrub_holds_up_nobody() {
    let (_, _, engine) = scene();
    let mut told = 0;
    let mut news = |state: &stillframe::volume::ScrubState| {
        let now = engine.scrub_state();
        assert!(now.running && now.grains >= state.grains);
        assert!(engine.known_damage().is_empty());
        told += 1;
    };
    engine.scrub(&OPTIONS, &mut news).unwrap();
    assert!(told > 1, "{told}");
}

/// The file in which it keeps what it knows may say anything.
#[test]
fn a_foreign_state_of_the_scrub_does_no_harm() {
    let (world, index, engine) = scene();
    let good = views(&engine);
    engine.scrub(&OPTIONS, &mut |_| {}).unwrap();
    engine.close().unwrap();
    drop(engine);
    let text = String::from_utf8(world.peek("store/scrub").unwrap()).unwrap();
    let known = |volume: u32, grain: u64| {
        format!(
            r#"{{"volume":{volume},"epoch":{0},"before":{0},"grain":{grain},"seen":0}}"#,
            u64::MAX
        )
    };
    let mut all = Vec::new();
    for volume in [0, 1, 2, 1 << 31, (1 << 31) + 1, u32::MAX] {
        for grain in [u64::MAX, u64::MAX - 1, 1 << 62, 1 << 51, 0] {
            all.push(known(volume, grain));
        }
    }
    let known = format!(r#""known":[{}]"#, all.join(","));
    let text = text.replace(r#""known":[]"#, &known);
    let position = format!(r#""position":[1,{}]"#, u64::MAX);
    let text = text.replace(r#""position":null"#, &position);
    assert!(text.contains(&known) && text.contains(&position), "{text}");
    let disk = world.disk("store/scrub").unwrap();
    disk.set_size(0).unwrap();
    disk.write_all_at(0, &[text.as_bytes()]).unwrap();
    let engine = Engine::open(env(&world, &index), settings()).unwrap();
    drop(engine.known_damage());
    engine.scrub(&OPTIONS, &mut |_| {}).unwrap();
    drop(engine.known_damage());
    assert_eq!(compare(&views(&engine), &good, "after"), []);
}
