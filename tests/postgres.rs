//! A PostgreSQL on a filesystem on `live.img`, under load, while the daemon is killed.
//!
//! Goal: a clone of each snapshot that was taken meanwhile is a database that starts by itself and holds
//! every transaction that was acknowledged before the instant, none that was begun after it, and none
//! in part; after each kill the live one does, too.
//!
//! Method: ext4 on a loop device on `live.img` holds the data directory (with page checksums). Four
//! sessions write numbered rows into a ledger, one a transaction, and note what was acknowledged;
//! pgbench runs beside them. A clone is looked at as after a power cut: the filesystem's journal is
//! replayed, the lock file of the server that is not there is removed, the server recovers, the rows are
//! counted, pgbench's books must balance, and after a clean stop every page's checksum and the filesystem
//! are checked. `STILLFRAME_PG_SNAPSHOTS`, `STILLFRAME_PG_KILLS` and `STILLFRAME_PG_SEED` choose a longer run.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rig::{
    Attached, Chance, PATIENCE, Rig, Running, can_loop, can_mount, ended, eventually, good, must,
    setting, skip, touch,
};

const SIZE: u64 = 640 << 20;
const SESSIONS: usize = 4;

/// Where PostgreSQL's programs are and who may run them (it refuses root).
#[derive(Clone)]
struct Postgres {
    bin: PathBuf,
    user: u32,
    group: u32,
}

impl Postgres {
    fn find() -> Option<Postgres> {
        let dirs = fs::read_dir("/usr/lib/postgresql").ok()?;
        let mut found: Vec<PathBuf> = dirs.map(|dir| dir.unwrap().path().join("bin")).collect();
        found.retain(|bin| bin.join("pgbench").exists() && bin.join("initdb").exists());
        found.sort();
        let passwd = fs::read_to_string("/etc/passwd").ok()?;
        let line = passwd.lines().find(|line| line.starts_with("postgres:"))?;
        let mut ids = line.split(':').skip(2).map(|id| id.parse::<u32>());
        Some(Postgres {
            bin: found.pop()?,
            user: ids.next()?.ok()?,
            group: ids.next()?.ok()?,
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.uid(self.user).gid(self.group).current_dir("/");
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C");
        command.stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn must(&self, program: &str, args: &[&str]) -> String {
        let out = self.command(program).args(args).output().unwrap();
        good(&out, &format!("{program} {args:?}"))
    }
}

/// A server on a data directory; it does not outlive the test.
struct Server {
    postgres: Postgres,
    data: PathBuf,
    pid: Option<u32>,
}

impl Server {
    /// Starts it and waits until it has recovered.
    fn start(postgres: &Postgres, data: &Path) -> Server {
        let place = data.to_str().unwrap();
        let options = format!(
            "-c listen_addresses= -c unix_socket_directories={place} -c shared_buffers=16MB \
             -c dynamic_shared_memory_type=mmap -c max_wal_size=64MB -c min_wal_size=32MB \
             -c checkpoint_timeout=30s -c autovacuum_naptime=5s"
        );
        let (log, patience) = (data.join("server.log"), PATIENCE.as_secs().to_string());
        let args = ["-D", place, "-w", "-t", &patience, "-o", &options];
        let mut command = postgres.command("pg_ctl");
        let out = command.args(args).arg("-l").arg(&log).arg("start").output();
        let out = out.unwrap();
        let said = fs::read_to_string(&log).unwrap_or_default();
        good(&out, &format!("pg_ctl start; the server said:\n{said}"));
        let lock = fs::read_to_string(data.join("postmaster.pid")).unwrap();
        Server {
            postgres: postgres.clone(),
            data: data.to_owned(),
            pid: Some(lock.lines().next().unwrap().parse().unwrap()),
        }
    }

    fn client(&self, program: &str) -> Command {
        let mut command = self.postgres.command(program);
        command.arg("-h").arg(&self.data).args(["-U", "postgres"]);
        command
    }

    #[track_caller]
    fn ask(&self, sql: &str) -> String {
        let mut psql = self.client("psql");
        let out = psql.args(["-XqAt", "-d", "postgres", "-c", sql]).output();
        good(&out.unwrap(), sql).trim().to_owned()
    }

    /// What a clean stop leaves has every page right.
    fn stop(mut self) {
        let place = self.data.to_str().unwrap().to_owned();
        self.postgres
            .must("pg_ctl", &["-D", &place, "-w", "-m", "fast", "stop"]);
        self.pid = None;
        self.postgres
            .must("pg_checksums", &["--check", "-D", &place]);
    }

    /// Ends it as if the machine had stopped. It does nothing any more for its data directory, which
    /// may not answer.
    fn quit(&mut self) {
        let Some(pid) = self.pid.take() else { return };
        let mut all = children(pid);
        all.push(pid);
        // Not killed: then its shared memory would stay.
        let _ = Command::new("kill")
            .args(["-s", "QUIT", &pid.to_string()])
            .output();
        eventually("the server and its workers end", || {
            all.iter().all(|&pid| ended(pid))
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(pid) = self.pid.take() {
            let mut all = children(pid);
            all.push(pid);
            for name in ["QUIT", "KILL"] {
                for pid in &all {
                    let _ = Command::new("kill")
                        .args(["-s", name, &pid.to_string()])
                        .output();
                }
                for _ in 0..400 {
                    if all.iter().all(|&pid| ended(pid)) {
                        return;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
    }
}

fn children(of: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1));
        if parent.and_then(|parent| parent.parse().ok()) == Some(of) {
            found.push(pid);
        }
    }
    found
}

/// What each session has begun and what was acknowledged to it: numbers of rows, from 1, without gaps.
#[derive(Default)]
struct Ledger {
    begun: [AtomicU64; SESSIONS],
    acknowledged: [AtomicU64; SESSIONS],
}

type Levels = [u64; SESSIONS];

fn levels(of: &[AtomicU64; SESSIONS]) -> Levels {
    std::array::from_fn(|i| of[i].load(Ordering::SeqCst))
}

/// The sessions and pgbench, until they are told to end or the server is gone.
struct Load {
    sessions: Vec<JoinHandle<()>>,
    over: Arc<AtomicBool>,
    bench: Running,
}

impl Load {
    fn start(server: &Server, ledger: &Arc<Ledger>) -> Load {
        let over = Arc::new(AtomicBool::new(false));
        let sessions = (0..SESSIONS).map(|who| {
            let mut psql = server.client("psql");
            psql.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]);
            psql.stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null());
            let (psql, ledger) = (psql.spawn().unwrap(), Arc::clone(ledger));
            let over = Arc::clone(&over);
            std::thread::spawn(move || session(who, psql, &ledger, &over))
        });
        let sessions = sessions.collect();
        let mut bench = server.client("pgbench");
        bench.args(["-n", "-c", "2", "-T", "86400", "postgres"]);
        bench.stdout(Stdio::null()).stderr(Stdio::null());
        Load {
            sessions,
            over,
            bench: Running(bench.spawn().unwrap()),
        }
    }

    fn end(self) {
        self.over.store(true, Ordering::SeqCst);
        drop(self.bench);
        for session in self.sessions {
            session.join().unwrap();
        }
    }
}

fn session(who: usize, psql: Child, ledger: &Ledger, over: &AtomicBool) {
    let mut psql = Running(psql);
    let mut asks = psql.0.stdin.take().unwrap();
    let mut answers = BufReader::new(psql.0.stdout.take().unwrap());
    let mut line = String::new();
    while !over.load(Ordering::SeqCst) {
        let n = ledger.acknowledged[who].load(Ordering::SeqCst) + 1;
        ledger.begun[who].store(n, Ordering::SeqCst);
        let sql = format!(
            "INSERT INTO ledger VALUES ({who}, {n}, repeat('{who}.{n} ', 40)) RETURNING n;\n"
        );
        line.clear();
        let said = asks
            .write_all(sql.as_bytes())
            .and_then(|()| answers.read_line(&mut line));
        // The server is gone: this one was not acknowledged.
        if said.is_err() || line.trim() != n.to_string() {
            return;
        }
        ledger.acknowledged[who].store(n, Ordering::SeqCst);
    }
}

/// Asserts that a database holds what it must and nothing that it cannot; returns where each session is.
#[track_caller]
fn verify(server: &Server, what: &str, at_least: Levels, at_most: Levels) -> Levels {
    let torn =
        server.ask("SELECT count(*) FROM ledger WHERE pad <> repeat(who || '.' || n || ' ', 40)");
    assert_eq!(torn, "0", "{what}: rows with a wrong content");
    let found: Levels = std::array::from_fn(|who| {
        let sql = format!("SELECT count(*), coalesce(max(n), 0) FROM ledger WHERE who = {who}");
        let said = server.ask(&sql);
        let (count, last) = said.split_once('|').unwrap();
        assert_eq!(count, last, "{what}: session {who} has gaps");
        let last = last.parse().unwrap();
        assert!(
            (at_least[who]..=at_most[who]).contains(&last),
            "{what}: session {who} is at {last}, not in {}..={}",
            at_least[who],
            at_most[who]
        );
        last
    });
    let books = server.ask(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
         (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)",
    );
    let sums: Vec<&str> = books.split('|').collect();
    assert!(
        sums.iter().all(|sum| *sum == sums[0]),
        "{what}: the books say {books}"
    );
    found
}

/// A snapshot and what must, and what can at most, be in it.
struct Point {
    name: String,
    at_least: Levels,
    at_most: Levels,
}

/// Waits until the sessions have done so much more together.
fn progress(ledger: &Ledger, more: u64) {
    let sum = || levels(&ledger.acknowledged).iter().sum::<u64>();
    let goal = sum() + more;
    eventually("the sessions go on", || sum() >= goal);
}

/// Removes what a server that ended without a word has left to keep others out.
fn unlock(data: &Path) {
    for name in ["postmaster.pid", ".s.PGSQL.5432", ".s.PGSQL.5432.lock"] {
        let _ = fs::remove_file(data.join(name));
    }
}

/// The live filesystem with its server and load.
struct Live {
    attached: Attached,
    server: Server,
    load: Load,
}

fn go_live(rig: &Rig, postgres: &Postgres, ledger: &Arc<Ledger>) -> Live {
    let mut attached = Attached::new(&rig.live("db"));
    attached.mount(&rig.at("fs"));
    let data = rig.at("fs").join("data");
    unlock(&data);
    let server = Server::start(postgres, &data);
    let (at_least, at_most) = (levels(&ledger.acknowledged), levels(&ledger.begun));
    let found = verify(&server, "live", at_least, at_most);
    for (who, last) in found.into_iter().enumerate() {
        ledger.acknowledged[who].store(last, Ordering::SeqCst);
    }
    let load = Load::start(&server, ledger);
    Live {
        attached,
        server,
        load,
    }
}

fn prepare(rig: &Rig, postgres: &Postgres) {
    for dir in ["fs", "copy"] {
        fs::create_dir(rig.at(dir)).unwrap();
    }
    let mut attached = Attached::new(&rig.live("db"));
    must("mkfs.ext4", &["-q", &attached.device]);
    attached.mount(&rig.at("fs"));
    let data = rig.at("fs").join("data");
    fs::create_dir(&data).unwrap();
    std::os::unix::fs::chown(&data, Some(postgres.user), Some(postgres.group)).unwrap();
    fs::set_permissions(&data, Permissions::from_mode(0o700)).unwrap();
    let place = data.to_str().unwrap();
    postgres.must(
        "initdb",
        &["-k", "-A", "trust", "-U", "postgres", "-D", place],
    );
    let server = Server::start(postgres, &data);
    let mut init = server.client("pgbench");
    good(
        &init
            .args(["-i", "-q", "-s", "2", "postgres"])
            .output()
            .unwrap(),
        "pgbench -i",
    );
    server.ask("CREATE TABLE ledger (who int, n bigint, pad text, PRIMARY KEY (who, n))");
    server.stop();
    attached.detach();
}

/// Starts the clone of a snapshot as a database of its own and holds it against what is known.
fn check_point(rig: &Rig, postgres: &Postgres, point: &Point) {
    let clone = rig
        .mnt()
        .join("db/clones")
        .join(format!("{}.img", point.name));
    fs::hard_link(rig.snapshot("db", &point.name), &clone).unwrap();
    let mut attached = Attached::new(&clone);
    attached.mount(&rig.at("copy"));
    let data = rig.at("copy").join("data");
    unlock(&data);
    let server = Server::start(postgres, &data);
    verify(&server, &point.name, point.at_least, point.at_most);
    server.ask("INSERT INTO ledger VALUES (99, 1, '')");
    server.stop();
    attached.unmount();
    must("e2fsck", &["-fn", &attached.device]);
    attached.detach();
    fs::remove_file(&clone).unwrap();
}

/// The files of a mount that has died with its daemon cannot be unmounted in an orderly way.
fn after_the_kill(rig: &Rig, live: Live) {
    let Live {
        mut attached,
        mut server,
        load,
    } = live;
    server.quit();
    load.end();
    drop(server);
    let fs = rig.at("fs");
    eventually("the filesystem on the dead image is unmounted", || {
        let out = Command::new("umount").arg(&fs).output().unwrap();
        out.status.success() || !rig::is_mounted(&fs)
    });
    attached.mounted = None;
    attached.detach();
}

#[test]
fn a_clone_of_each_snapshot_is_a_database_with_all_that_was_acknowledged() {
    let (snapshots, kills) = (
        setting("STILLFRAME_PG_SNAPSHOTS", 6),
        setting("STILLFRAME_PG_KILLS", 2),
    );
    let seed = setting("STILLFRAME_PG_SEED", 20_261_121);
    let Some(postgres) = Postgres::find() else {
        skip("no PostgreSQL in /usr/lib/postgresql, or no user postgres");
        return;
    };
    if !can_mount() || !can_loop() {
        return;
    }
    println!(
        "STILLFRAME_PG_SEED={seed} STILLFRAME_PG_SNAPSHOTS={snapshots} STILLFRAME_PG_KILLS={kills}"
    );
    let (mut rig, mut chance) = (Rig::new(), Chance(seed));
    // The server's user has to get through to its data.
    let top = rig.at("x");
    fs::set_permissions(top.parent().unwrap(), Permissions::from_mode(0o711)).unwrap();
    assert_ne!(fs::metadata("/proc/self").unwrap().uid(), postgres.user);
    let source = rig.source("db.raw", SIZE);
    rig.mount_with(&["--volume", &format!("db={}", source.to_str().unwrap())]);
    prepare(&rig, &postgres);

    let ledger = Arc::new(Ledger::default());
    let mut points = Vec::new();
    let mut live = go_live(&rig, &postgres, &ledger);
    let mut killed = 0;
    for n in 0..snapshots {
        progress(&ledger, 20 + chance.below(400));
        let at_least = levels(&ledger.acknowledged);
        let name = format!("s{n}");
        touch(&rig.snapshot("db", &name)).unwrap();
        let at_most = levels(&ledger.begun);
        points.push(Point {
            name,
            at_least,
            at_most,
        });
        // Spread evenly over the run.
        if (n + 1) * kills >= (killed + 1) * snapshots {
            progress(&ledger, chance.below(300));
            rig.kill();
            killed += 1;
            after_the_kill(&rig, live);
            rig.mount();
            live = go_live(&rig, &postgres, &ledger);
        }
    }
    assert_eq!(killed, kills, "more kills than snapshots");
    progress(&ledger, 100);
    live.load.end();
    let levels_now = levels(&ledger.acknowledged);
    verify(
        &live.server,
        "live at the end",
        levels_now,
        levels(&ledger.begun),
    );
    live.server.stop();
    live.attached.detach();

    for point in &points {
        check_point(&rig, &postgres, point);
    }
    let rows: u64 = levels_now.iter().sum();
    println!(
        "{} clones started, {killed} kills, {rows} acknowledged rows",
        points.len()
    );
    assert_eq!(points.len() as u64, snapshots);
    rig.umount();
}
