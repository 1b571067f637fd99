//! `check`: what the audit says of good and of damaged stores.

use std::collections::BTreeMap;

use stillframe::volume::Share;
use stillframe::volume::audit::{self, Audit, Severity};

use crate::rig::Chance;
use crate::stage::{self, Stage, compare, env, open, views};

fn wrong(audit: &Audit) -> Vec<&audit::Finding> {
    let wrong = audit.findings.iter();
    wrong.filter(|f| f.severity != Severity::Note).collect()
}

/// After a clean stop, a kill, and with the store open, nothing is wrong with a good store.
#[test]
fn a_good_store_has_no_findings() {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for seed in 0..12 {
        let stage = Stage::new(seed, 160);
        for (what, n) in &stage.counts {
            *counts.entry(what.clone()).or_default() += n;
        }
        let audit = audit::offline(&env(&stage.world, &stage.index), Share::ALL, seed).unwrap();
        assert!(wrong(&audit).is_empty(), "{seed}: {:#?}", audit.findings);
        assert!(audit.batches > 20 && audit.segments > 1, "{audit:?}");
        assert_eq!(audit.grains_read, audit.grains_needed);
        assert!(audit.grains_needed > 0);
        // Open, with work after the last checkpoint.
        let engine = open(&stage.world, &stage.index);
        let mut chance = Chance(seed ^ 77);
        let mut more = BTreeMap::new();
        stage::work(&engine, &mut chance, 20, &mut more);
        let audit = engine.audit().unwrap();
        assert!(wrong(&audit).is_empty(), "{seed}: {:#?}", audit.findings);
        let before = views(&engine);
        drop(engine);
        // Killed or cut from power: what is torn or orphaned is no damage.
        let (world, index) = (stage.world.fork(seed), stage.index.fork(seed));
        world.power_cut();
        index.power_cut(seed);
        let audit = audit::offline(&env(&world, &index), Share::ALL, seed).unwrap();
        assert!(wrong(&audit).is_empty(), "{seed}: {:#?}", audit.findings);
        stage.world.kill();
        stage.index.kill(seed);
        let audit = audit::offline(&env(&stage.world, &stage.index), Share::ALL, seed).unwrap();
        assert!(wrong(&audit).is_empty(), "{seed}: {:#?}", audit.findings);
        let engine = open(&stage.world, &stage.index);
        assert_eq!(compare(&views(&engine), &before, "killed"), []);
    }
    println!("work: {counts:?}");
    for what in [
        "write",
        "snapshot",
        "zero",
        "clone",
        "clone written",
        "clone of a clone",
        "deletion",
        "revert",
        "resize",
    ] {
        assert!(
            counts.get(what).is_some_and(|&n| n > 5),
            "{what}: {counts:?}"
        );
    }
}
