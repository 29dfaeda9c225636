//! stord: serves disk images to the host as files and block devices, under QMP control.
//!
//! Started with options, or under the name `qemu-storage-daemon`, it is that daemon; started with
//! a word, it does what the word says (`stord mount`).

mod attach;
mod chardev;
mod client;
mod cmdline;
mod daemon;
mod daemonize;
mod image;
mod lifecycle;
mod monitor;
mod mount;
mod notify;
mod objects;
mod pidfile;
mod presence;
mod ps;
mod remote;
mod report;
mod serve;
mod subcommand;
mod trace;
mod umount;
mod unbuilt;
mod upgrade;

use std::ffi::OsString;
use std::process::ExitCode;

use cmdline::Outcome;
use daemonize::Half;
use report::Origin;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let argv0 = args.next().unwrap_or_else(|| OsString::from("stord"));
    let args: Vec<OsString> = args.collect();
    report::set_program(&argv0.to_string_lossy());
    trace::install();
    if report::program() != cmdline::help::REFERENCE_NAME && subcommand::is_meant(&args) {
        return subcommand::run(&argv0, &args);
    }
    let command_line = match cmdline::read(args.clone()) {
        Outcome::Run(command_line) => command_line,
        Outcome::Print(text) => {
            report::print(&text);
            return ExitCode::SUCCESS;
        }
        Outcome::Usage(message) => {
            report::usage(&argv0.to_string_lossy(), &message);
            return ExitCode::FAILURE;
        }
    };
    let background = if command_line.daemonize {
        match daemonize::detach(&argv0, &args) {
            Ok(Half::Starter(status)) => return status,
            Ok(Half::Daemon(background)) => Some(background),
            Err(error) => {
                Origin::none().error(&error);
                return ExitCode::FAILURE;
            }
        }
    } else {
        None
    };
    daemon::run(command_line, background)
}
