//! The command line for people: `stord mount`, `stord umount`, and what is done to images.

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::attach::detach::{self, DetachArgs};
use crate::attach::hold::{self, HoldArgs};
use crate::attach::ls::{self, LsArgs};
use crate::attach::{self, AttachArgs};
use crate::client::{self, QmpArgs};
use crate::daemonize::{self, Half};
use crate::image::check::{self, CheckArgs};
use crate::image::convert::{self, ConvertArgs};
use crate::image::create::{self, CreateArgs};
use crate::image::info::{self, InfoArgs};
use crate::image::map::{self, MapArgs};
use crate::image::resize::{self, ResizeArgs};
use crate::image::snapshot::{self, SnapshotArgs};
use crate::mount::keeper::{self, KeepArgs};
use crate::mount::{self, MountArgs};
use crate::ps::{self, PsArgs};
use crate::report::Origin;
use crate::serve::{self, ServeArgs};
use crate::umount::{self, UmountArgs};
use crate::upgrade::{self, UpgradeArgs};

/// Serve disk images to this machine.
///
/// With options instead of a command, stord is a daemon with the command line of
/// qemu-storage-daemon: see stord --help.
#[derive(Debug, Parser)]
#[command(name = "stord", version, disable_help_subcommand = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(MountArgs),
    Umount(UmountArgs),
    Upgrade(UpgradeArgs),
    Attach(AttachArgs),
    Detach(DetachArgs),
    Ls(LsArgs),
    #[command(hide = true)]
    Keep(KeepArgs),
    #[command(hide = true)]
    Hold(HoldArgs),
    Create(CreateArgs),
    Convert(ConvertArgs),
    Info(InfoArgs),
    Check(CheckArgs),
    Map(MapArgs),
    Resize(ResizeArgs),
    Serve(ServeArgs),
    Snapshot(SnapshotArgs),
    Qmp(QmpArgs),
    Ps(PsArgs),
}

/// Whether the arguments, the program's name not among them, are for us and not for the daemon.
pub fn is_meant(args: &[OsString]) -> bool {
    args.first()
        .is_some_and(|first| !first.is_empty() && !first.as_encoded_bytes().starts_with(b"-"))
}

/// Does what the arguments say, and returns the exit status.
pub fn run(argv0: &OsStr, args: &[OsString]) -> ExitCode {
    let words = std::iter::once(OsStr::new("stord")).chain(args.iter().map(OsString::as_os_str));
    let command = match CommandLine::try_parse_from(words) {
        Ok(command_line) => command_line.command,
        Err(error) => {
            // Nobody can be told that the stream is closed.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match command {
        Command::Umount(args) => umount::run(&args),
        Command::Upgrade(args) => upgrade::run(argv0, &args),
        Command::Keep(args) => keeper::run(&args),
        Command::Hold(args) => hold::run(&args),
        Command::Detach(args) => detach::run(&args),
        Command::Ls(args) => ls::run(&args),
        Command::Create(args) => create::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Qmp(args) => client::run(&args),
        Command::Ps(args) => ps::run(&args),
        Command::Mount(mount_args) if mount_args.take_over => match daemonize::taking_over(argv0) {
            Ok(background) => mount::run(mount_args, Some(background)),
            Err(error) => {
                Origin::none().error(&error);
                ExitCode::FAILURE
            }
        },
        Command::Serve(serve_args) if serve_args.background => match daemonize::detach(argv0, args)
        {
            Ok(Half::Starter(status)) => status,
            Ok(Half::Daemon(background)) => serve::run(serve_args, Some(background)),
            Err(error) => {
                Origin::none().error(&error);
                ExitCode::FAILURE
            }
        },
        Command::Serve(serve_args) => serve::run(serve_args, None),
        Command::Attach(attach_args) if attach_args.foreground => attach::run(attach_args, None),
        Command::Attach(attach_args) => match daemonize::detach(argv0, args) {
            Ok(Half::Starter(status)) => status,
            Ok(Half::Daemon(background)) => attach::run(attach_args, Some(background)),
            Err(error) => {
                Origin::none().error(&error);
                ExitCode::FAILURE
            }
        },
        Command::Mount(mount_args) if mount_args.foreground => mount::run(mount_args, None),
        Command::Mount(mount_args) => match daemonize::detach(argv0, args) {
            Ok(Half::Starter(status)) => status,
            Ok(Half::Daemon(background)) => mount::run(mount_args, Some(background)),
            Err(error) => {
                Origin::none().error(&error);
                ExitCode::FAILURE
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }

    #[test]
    fn words_are_commands_and_options_are_not() {
        let args = |word: &str| [OsString::from(word)];
        assert!(is_meant(&args("mount")));
        assert!(!is_meant(&args("--blockdev")));
        assert!(!is_meant(&args("-h")));
        assert!(!is_meant(&args("")));
        assert!(!is_meant(&[]));
    }
}
