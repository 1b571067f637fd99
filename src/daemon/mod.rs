//! The process that serves a mount, and the ways to talk to it.
//!
//! | file | what |
//! | --- | --- |
//! | `launch` | starting a daemon in the background and hearing from it whether it serves |
//! | `serve` | the daemon's life: checks, store, mount, events, clean stop |
//! | `events` | what ends it or has it speak: events, signals, systemd |
//! | `events` | what ends it or has it speak: events, signals, systemd |
//! | `mounted` | its mount: unmounting, and cutting off who does not leave |
//! | `places` | which mountpoint, store and source may be used together |
//! | `store` | what is a store directory; holding one open |
//! | `home` | whether a store is a copy |
//! | `control`, `client`, `protocol` | the control socket: its two ends and what is said |
//! | `answers` | what the control socket answers, and how those who wait hear of the end |
//! | `jobs` | what can be asked of a store, the same with and without a daemon |
//! | `maintenance` | the thread that runs the engine's background work |
//! | `watchdog`, `reporter` | what hangs, and how the store is, also then |
//! | `ticker` | a thread that does something again and again |
//! | `status`, `timestamp` | the state as rows, JSON and metrics |
//! | `logging`, `lines` | where the daemon's log goes, also when that hangs |
//!
//! Promises: a store is served by one process; a mount that is announced as ready serves; every way
//! to end (request, signal, external unmount) goes through the same clean stop, and the lock is let
//! go last. The daemon never looks into its own mount from a thread that serves it.

pub mod answers;
pub mod client;
pub mod control;
pub mod events;
pub mod home;
pub mod jobs;
pub mod launch;
pub mod lines;
pub mod logging;
pub mod maintenance;
pub mod mounted;
pub mod places;
pub mod protocol;
pub mod reporter;
pub mod serve;
pub mod status;
pub mod store;
pub mod ticker;
pub mod timestamp;
pub mod watchdog;
