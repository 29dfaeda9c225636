//! `stord qmp`: a client of monitors for people, of stord's and of QEMU's alike.

mod complete;
mod connection;
mod output;
mod schema;
mod shell;
mod words;

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;
use stord_qmp::Error;

use crate::report::{self, Origin};
use connection::{Connection, EventSink, Failure};
use schema::Schema;

/// Have a daemon's monitor do a command, or open a shell.
///
/// The result is printed as JSON. If the monitor refuses, its message is printed and the exit status is 1.
/// Without a command there is a shell, with completion and history.
#[derive(Debug, Args)]
pub struct QmpArgs {
    /// The monitor: the path of its socket, or HOST:PORT.
    socket: String,
    /// The command.
    command: Option<String>,
    /// Its arguments: KEY=VALUE (KEY.MEMBER=VALUE for nested ones), or one JSON object.
    #[arg(value_name = "KEY=VALUE", allow_hyphen_values = true)]
    arguments: Vec<String>,
    /// Print events, one a line, after the command if there is one, until the daemon ends.
    #[arg(long)]
    watch: bool,
}

/// Does what the arguments say, and returns the exit status.
pub fn run(args: &QmpArgs) -> ExitCode {
    if args.command.is_none() && !args.watch {
        return shell::run(&args.socket);
    }
    match converse(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            Origin::none().error(&error);
            ExitCode::FAILURE
        }
    }
}

fn converse(args: &QmpArgs) -> Result<(), Error> {
    let colours = output::wants_colours();
    let events: EventSink = match args.watch {
        true => Box::new(move |event| {
            let text = format!("{}\n", output::event(event, colours));
            // Nobody reads any more: there is nothing left to watch for.
            if std::io::stdout().write_all(text.as_bytes()).is_err() {
                std::process::exit(0);
            }
        }),
        false => Box::new(|_: &Value| {}),
    };
    let error = |failure: Failure| Error::generic(failure.message());
    let mut connection = Connection::open(&args.socket, events).map_err(error)?;
    if let Some(command) = &args.command {
        let schema = match words::is_plain(&args.arguments) {
            true => Schema::default(),
            false => {
                let described = connection.execute("query-qmp-schema", None);
                Schema::new(described.map_err(error)?)
            }
        };
        let arguments = words::arguments(&args.arguments, command, &schema)?;
        let result = connection.execute(command, arguments).map_err(error)?;
        report::print(&format!("{}\n", output::pretty(&result, colours)));
    }
    if args.watch {
        connection.wait_for_end();
    }
    Ok(())
}
