//! The `stillframe` command: parses, calls [`stillframe::cli`], exits with a documented code.

use std::process::ExitCode;

fn main() -> ExitCode {
    stillframe::cli::main()
}
