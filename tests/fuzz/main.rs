//! Whatever bytes a reader of ours is given: no panic, no hang, no memory without bound, and nothing taken
//! that breaks the rules of what it is taken for.
//!
//! Method: inputs that a real engine made, mutated from a printed seed, fed to the targets of
//! [`targets`] (one of them only in a build with the feature `planted`). An input is decided by the seed and its number alone, so any of them repeats alone, or where
//! inputs share a session, with those of its group before it. A watchdog ends the process when one takes too long, an allocator that counts when all of them
//! take too much memory; the number of the execution is on disk before it begins.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `STILLFRAME_FUZZ_SECONDS` | seconds of each target, 2 by default |
//! | `STILLFRAME_FUZZ_EXECS` | instead: executions of each target, in all runs with one state together |
//! | `STILLFRAME_FUZZ_STATE` | a directory in which the campaign is kept, to go on with it later |
//! | `STILLFRAME_FUZZ_TARGET` | only this target |
//! | `STILLFRAME_FUZZ_SEED` | the seed, decimal; the time by default, or what the state says |
//! | `STILLFRAME_FUZZ_REPLAY` | with target and seed: only the execution of this number |
//! | `STILLFRAME_FUZZ_INPUT` | with the target: only the bytes of this file |
//! | `STILLFRAME_FUZZ_EXPORT` | write the seeds into this directory |

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod mutate;
mod targets;

use std::alloc::System;
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cap::Cap;

use crate::mutate::{Chance, mutated};
use crate::targets::{ALL, Target, fuse};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, MEMORY_MAX);

/// Most memory of all targets together, in bytes; they need a tenth of it. Who asks for more gets none, which
/// ends the process.
const MEMORY_MAX: usize = 512 << 20;
/// Longest time of one execution on a busy machine.
const HANG: Duration = Duration::from_secs(90);
/// Executions after which a state is written.
const SAVE_EVERY: u64 = 2048;
/// After so many executions every verdict of a target must have been seen.
const ENOUGH: u64 = 3000;

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn number(name: &str) -> Option<u64> {
    let text = setting(name)?;
    let parsed = text.parse();
    Some(parsed.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The seed when none is given: a run says something of the change that is tested, and of nothing else.
const SEED: u64 = 20_261_122;

/// How far a campaign has come.
struct State {
    file: Option<PathBuf>,
    seed: u64,
    next: u64,
    seconds: f64,
}

impl State {
    fn load(target: &str) -> State {
        let file = setting("STILLFRAME_FUZZ_STATE").map(|dir| {
            fs::create_dir_all(&dir).unwrap();
            PathBuf::from(dir).join(target)
        });
        let text = file.as_ref().and_then(|file| fs::read_to_string(file).ok());
        let mut words = text.as_deref().unwrap_or("").split_whitespace();
        let seed = words.next().and_then(|w| w.parse().ok());
        let fresh = || number("STILLFRAME_FUZZ_SEED").unwrap_or(SEED);
        State {
            file,
            seed: seed.unwrap_or_else(fresh),
            next: words.next().and_then(|w| w.parse().ok()).unwrap_or(0),
            seconds: words.next().and_then(|w| w.parse().ok()).unwrap_or(0.0),
        }
    }

    fn save(&self) {
        if let Some(file) = &self.file {
            let part = file.with_extension("part");
            fs::write(
                &part,
                format!("{} {} {:.1}\n", self.seed, self.next, self.seconds),
            )
            .unwrap();
            fs::rename(part, file).unwrap();
        }
    }
}

/// What a running target is doing, for the watchdog.
struct Now {
    target: &'static str,
    seed: u64,
    execution: AtomicU64,
    /// Milliseconds since `began`; when the execution started.
    since: AtomicU64,
    began: Instant,
    done: AtomicBool,
}

/// Takes a target from under the watchdog.
struct Done(Arc<Now>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::SeqCst);
    }
}

static RUNNING: Mutex<Vec<Arc<Now>>> = Mutex::new(Vec::new());

/// Panics of threads that are none of ours belong to the session of the FUSE target.
fn watch_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("");
        if name.starts_with("fuse") || name.starts_with("fuser") || name.is_empty() {
            fuse::PANICS.lock().unwrap().push(info.to_string());
        }
        before(info);
    }));
}

fn watch_hangs() {
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_millis(500));
            for now in RUNNING.lock().unwrap().iter() {
                let at = now.began.elapsed().as_millis() as u64;
                let took = at.saturating_sub(now.since.load(Ordering::SeqCst));
                if !now.done.load(Ordering::SeqCst) && took > HANG.as_millis() as u64 {
                    let execution = now.execution.load(Ordering::SeqCst);
                    eprintln!("HANG: an execution takes more than {HANG:?}");
                    eprintln!("{}", how_to_repeat(now.target, now.seed, execution));
                    std::process::abort();
                }
            }
        }
    });
}

fn how_to_repeat(target: &str, seed: u64, execution: u64) -> String {
    format!(
        "repeat it with: STILLFRAME_FUZZ_TARGET={target} STILLFRAME_FUZZ_SEED={seed} \
         STILLFRAME_FUZZ_REPLAY={execution} cargo test --features planted --test fuzz -- --nocapture"
    )
}

fn hex(bytes: &[u8]) -> String {
    let line = |(i, line): (usize, &[u8])| {
        let hex: Vec<String> = line.iter().map(|b| format!("{b:02x}")).collect();
        format!("{:6x}  {}\n", i * 32, hex.join(" "))
    };
    bytes.chunks(32).enumerate().map(line).collect()
}

/// What inputs belong to a target: the engine's, and those that found something.
fn seeds_of(target: &Target) -> Vec<Vec<u8>> {
    let mut seeds = (target.seeds)();
    seeds.extend(found(target).into_iter().map(|(_, bytes)| bytes));
    seeds
}

/// Inputs that showed a fault once, or reach what mutations of the others seldom reach.
fn found(target: &Target) -> Vec<(String, Vec<u8>)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/found")
        .join(target.name);
    let Ok(files) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap()))
        .collect()
}

/// Runs what is given an input; on a panic says how to do that again, and panics.
fn guarded<T>(
    target: &Target,
    input: &[u8],
    repeat: &dyn Fn() -> String,
    run: &dyn Fn() -> T,
) -> T {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let file = std::env::temp_dir().join(format!("stillframe-fuzz-{}", target.name));
        let kept = fs::write(&file, input).is_ok();
        eprintln!(
            "FAILED: {} with {} bytes:\n{}",
            target.name,
            input.len(),
            hex(input)
        );
        eprintln!("{}", repeat());
        if kept {
            eprintln!("or with: STILLFRAME_FUZZ_INPUT={}", file.display());
        }
        std::panic::resume_unwind(panic)
    })
}

/// Runs one input.
fn execute(target: &Target, input: &[u8], repeat: &dyn Fn() -> String) -> &'static str {
    guarded(target, input, repeat, &|| (target.run)(input))
}

/// Runs one input alone.
fn execute_alone(target: &Target, input: &[u8], repeat: &dyn Fn() -> String) -> &'static str {
    let verdict = execute(target, input, repeat);
    guarded(target, input, repeat, &target.reset);
    verdict
}

/// Fuzzes one target; returns a line about it.
fn fuzz(target: &'static Target) -> String {
    let seeds = seeds_of(target);
    let mut state = State::load(target.name);
    // A group begins with its first input, also where a campaign goes on.
    state.next -= state.next % target.group;
    let input_of = |state: &State, n: u64| {
        mutated(
            &seeds,
            target.tokens,
            target.max_len,
            &mut Chance::of(state.seed, n),
        )
    };
    let repeat = |seed: u64, n: u64| move || how_to_repeat(target.name, seed, n);
    if let Some(n) = number("STILLFRAME_FUZZ_REPLAY") {
        let mut verdict = "";
        for n in n - n % target.group..=n {
            let input = input_of(&state, n);
            println!("{n}:\n{}", hex(&input));
            verdict = execute(target, &input, &repeat(state.seed, n));
        }
        (target.reset)();
        return format!("{}: {verdict}", target.name);
    }
    let upto = number("STILLFRAME_FUZZ_EXECS");
    let limit = Duration::from_secs(number("STILLFRAME_FUZZ_SECONDS").unwrap_or(2));
    let now = Arc::new(Now {
        target: target.name,
        seed: state.seed,
        execution: AtomicU64::new(0),
        since: AtomicU64::new(0),
        began: Instant::now(),
        done: AtomicBool::new(false),
    });
    RUNNING.lock().unwrap().push(Arc::clone(&now));
    // Also when it fails: the others go on.
    let _done = Done(Arc::clone(&now));
    // Before each execution: what a process that dies at once was doing.
    let journal = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", target.name));
    let journal = Journal::new(&journal, target.name, state.seed);
    let (first, before) = (state.next, state.seconds);
    let mut verdicts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut requests = 0;
    let mut input = Vec::new();
    loop {
        let elapsed = now.began.elapsed();
        state.seconds = before + elapsed.as_secs_f64();
        let enough = match upto {
            Some(upto) => state.next >= upto,
            None => elapsed >= limit,
        };
        let n = state.next;
        if enough || n.is_multiple_of(target.group) {
            // How the last group ended is no less a verdict than that of an input.
            let last = repeat(state.seed, n.saturating_sub(1));
            guarded(target, &input, &last, &target.reset);
        }
        if enough || n.is_multiple_of(SAVE_EVERY) {
            state.save();
        }
        if enough {
            break;
        }
        now.execution.store(n, Ordering::SeqCst);
        now.since
            .store(elapsed.as_millis() as u64, Ordering::SeqCst);
        journal.begin(n);
        input = input_of(&state, n);
        if target.name == fuse::TARGET.name {
            requests += fuse::requests(&input);
        }
        *verdicts
            .entry(execute(target, &input, &repeat(state.seed, n)))
            .or_default() += 1;
        state.next += 1;
    }
    let done = state.next - first;
    for verdict in verdicts.keys() {
        assert!(
            target.reaches.contains(verdict),
            "{}: {verdict} is not listed",
            target.name
        );
    }
    for reach in target.reaches {
        let seen = verdicts.contains_key(reach);
        assert!(
            seen || done < ENOUGH,
            "{}: no input was '{reach}'",
            target.name
        );
    }
    let rate = done as f64 / now.began.elapsed().as_secs_f64().max(0.001);
    let counted = match requests {
        0 => String::new(),
        n => format!(", {n} requests"),
    };
    format!(
        "{}: {done} executions{counted} ({} in all, {:.0} s), {rate:.0} a second, seed {}, {} seeds: {verdicts:?}",
        target.name,
        state.next,
        state.seconds,
        state.seed,
        seeds.len(),
    )
}

/// The number of the execution that runs, on disk.
struct Journal(fs::File);

impl Journal {
    fn new(path: &std::path::Path, target: &str, seed: u64) -> Journal {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = fs::File::create(path).unwrap();
        println!(
            "{target}: if the process dies, {} says what it was doing; seed {seed}",
            path.display()
        );
        Journal(file)
    }

    fn begin(&self, execution: u64) {
        use std::os::unix::fs::FileExt;
        let _ = self
            .0
            .write_all_at(format!("{execution:20}\n").as_bytes(), 0);
    }
}

fn chosen() -> Vec<&'static Target> {
    let wanted = setting("STILLFRAME_FUZZ_TARGET");
    let picked: Vec<&Target> = ALL
        .iter()
        .filter(|t| wanted.as_deref().is_none_or(|name| name == t.name))
        .collect();
    assert!(!picked.is_empty(), "there is no target {wanted:?}");
    picked
}

fn export(dir: &str) {
    for target in chosen() {
        let dir = PathBuf::from(dir).join(target.name);
        fs::create_dir_all(&dir).unwrap();
        for seed in seeds_of(target) {
            let name = blake3::hash(&seed).to_hex()[..16].to_owned();
            fs::write(dir.join(name), &seed).unwrap();
        }
    }
}

#[test]
fn whatever_bytes_a_reader_is_given() {
    watch_panics();
    if let Some(dir) = setting("STILLFRAME_FUZZ_EXPORT") {
        return export(&dir);
    }
    if let Some(file) = setting("STILLFRAME_FUZZ_INPUT") {
        let bytes = fs::read(file).unwrap();
        println!("{}", execute_alone(chosen()[0], &bytes, &String::new));
        return;
    }
    watch_hangs();
    for target in chosen() {
        for (name, input) in found(target) {
            execute_alone(target, &input, &|| name.clone());
        }
    }
    // One on each core, the slowest first.
    let queue = Mutex::new(chosen());
    let failed = AtomicBool::new(false);
    let work = || {
        loop {
            let Some(target) = queue.lock().unwrap().pop() else {
                return;
            };
            match catch_unwind(AssertUnwindSafe(|| fuzz(target))) {
                Ok(line) => println!("{line}"),
                Err(_) => failed.store(true, Ordering::SeqCst),
            }
        }
    };
    thread::scope(|scope| {
        let workers = thread::available_parallelism().map_or(1, |n| n.get());
        for n in 0..workers {
            thread::Builder::new()
                .name(format!("target-{n}"))
                .spawn_scoped(scope, work)
                .unwrap();
        }
    });
    println!("at most {} MiB of memory", ALLOCATOR.max_allocated() >> 20);
    assert!(!failed.load(Ordering::SeqCst), "see above");
}

/// The harness itself: the bound on memory is one.
#[test]
fn nobody_gets_more_memory_than_there_is() {
    let reserved = |len| Vec::<u8>::new().try_reserve_exact(len).is_ok();
    assert!(reserved(1 << 20));
    assert!(!reserved(MEMORY_MAX));
}

/// The harness itself: what seeds are made of is the store that the engine made, byte for byte.
#[test]
fn a_log_taken_apart_is_put_together_again() {
    assert!(targets::log::is_faithful());
}
