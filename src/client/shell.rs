//! The shell: lines are commands, with completion, history and events in between.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Context, Editor, ExternalPrinter, Helper};
use serde_json::Value;
use stord_qmp::Error;

use super::complete::complete;
use super::connection::{Connection, EventSink, Failure};
use super::schema::Schema;
use super::{output, words};
use crate::report::{self, Origin, reason};

const HELP: &str = "\
COMMAND [KEY=VALUE ...]   has a command done; nested members are KEY.MEMBER=VALUE
COMMAND {JSON}            the same, with its arguments as JSON
{JSON}                    sends a request as it is
help [COMMAND]            lists the commands, or a command's arguments
exit, or Ctrl-D           leaves; the daemon goes on (its own command 'quit' ends it)
";

/// How many lines are remembered.
const HISTORY_MAX: usize = 1000;

/// Reads commands until there are no more.
pub fn run(place: &str) -> ExitCode {
    let failed = |message: String| {
        Origin::none().error(&Error::generic(message));
        ExitCode::FAILURE
    };
    let config = Config::builder().max_history_size(HISTORY_MAX);
    let config = config.map(|config| {
        config
            .completion_type(rustyline::CompletionType::List)
            .history_ignore_space(true)
            .build()
    });
    let editor = config.and_then(Editor::<Suggestions, FileHistory>::with_config);
    let mut editor = match editor {
        Ok(editor) => editor,
        Err(error) => return failed(format!("cannot read lines: {error}")),
    };
    let colours = output::wants_colours();
    let mut connection = match Connection::open(place, sink(&mut editor, colours)) {
        Ok(connection) => connection,
        Err(failure) => return failed(failure.message().to_owned()),
    };
    let schema = match connection.execute("query-qmp-schema", None) {
        Ok(described) => Schema::new(described),
        Err(failure) => return failed(failure.message().to_owned()),
    };
    editor.set_helper(Some(Suggestions(schema)));
    let history = history_file();
    if let Some(history) = &history {
        // There is none at first.
        let _ = editor.load_history(history);
    }
    if std::io::stdin().is_terminal() {
        report::print(&format!(
            "Connected to {place}. 'help' explains, Ctrl-D leaves.\n"
        ));
    }
    let mut status = ExitCode::SUCCESS;
    loop {
        let line = match editor.readline("qmp> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => {
                status = failed(format!("cannot read a line: {error}"));
                break;
            }
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        // What cannot be remembered can be typed again.
        let _ = editor.add_history_entry(line);
        let schema = editor.helper().map(|helper| &helper.0);
        match obey(
            line,
            &mut connection,
            schema.unwrap_or(&Schema::default()),
            colours,
        ) {
            Ok(true) => {}
            Ok(false) => break,
            Err(failure) => {
                Origin::none().error(&Error::generic(failure.message()));
                if matches!(failure, Failure::Lost(_)) {
                    status = ExitCode::FAILURE;
                    break;
                }
            }
        }
    }
    if let Some(history) = &history
        && let Err(error) = editor.save_history(history)
    {
        let shown = history.display();
        Origin::none().warning(
            &format!("cannot keep the history in '{shown}': {error}"),
            None,
        );
    }
    status
}

/// Does what a line says, and returns whether to go on.
fn obey(
    line: &str,
    connection: &mut Connection,
    schema: &Schema,
    colours: bool,
) -> Result<bool, Failure> {
    let refused = |message: String| Failure::Refused {
        class: String::new(),
        message,
    };
    let result = if line.starts_with('{') {
        let request = serde_json::from_str(line);
        let request = request.map_err(|error| refused(format!("the line is no JSON: {error}")))?;
        connection.request(request)?
    } else {
        let words = words::split(line).map_err(|error| refused(error.message))?;
        let Some((command, rest)) = words.split_first() else {
            return Ok(true);
        };
        match (command.as_str(), rest) {
            ("exit", []) => return Ok(false),
            ("help", []) => {
                let mut text = HELP.to_owned();
                for command in schema.commands() {
                    text.push_str(&format!("  {command}\n"));
                }
                report::print(&text);
                return Ok(true);
            }
            ("help", [command, given @ ..]) => {
                report::print(&help(schema, command, given));
                return Ok(true);
            }
            _ => {}
        }
        let arguments = words::arguments(rest, command, schema);
        let arguments = arguments.map_err(|error| refused(error.message))?;
        connection.execute(command, arguments)?
    };
    report::print(&format!("{}\n", output::pretty(&result, colours)));
    Ok(true)
}

/// A command's arguments, as far as they depend on nothing or on the words given.
fn help(schema: &Schema, command: &str, given: &[String]) -> String {
    let Some(kind) = schema.arguments_of(command) else {
        return format!("There is no command '{command}'.\n");
    };
    let given = given.iter().filter_map(|word| word.split_once('='));
    let given = given.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let members = schema.members(kind, &given.collect());
    if members.is_empty() {
        return format!("{command} takes no arguments.\n");
    }
    let line = |member: super::schema::Member| {
        let kind = schema.describe(&member.kind);
        match member.is_optional {
            true => format!("  [{}={kind}]\n", member.name),
            false => format!("  {}={kind}\n", member.name),
        }
    };
    let lines: String = members.into_iter().map(line).collect();
    format!("{command}\n{lines}")
}

/// Prints events above the line that is being typed.
fn sink(editor: &mut Editor<Suggestions, FileHistory>, colours: bool) -> EventSink {
    match editor.create_external_printer() {
        Ok(mut printer) => Box::new(move |event| {
            // The terminal is gone, and with it whoever could be told.
            let _ = printer.print(format!("{}\n", output::event(event, colours)));
        }),
        Err(_) => Box::new(move |event: &Value| {
            let text = format!("{}\n", output::event(event, colours));
            let _ = std::io::stdout().write_all(text.as_bytes());
        }),
    }
}

/// Where lines are remembered; nowhere for users without a home.
fn history_file() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let state = match variable("XDG_STATE_HOME") {
        Some(state) => PathBuf::from(state),
        None => PathBuf::from(variable("HOME")?).join(".local/state"),
    };
    let directory = state.join("stord");
    if let Err(error) = std::fs::create_dir_all(&directory) {
        let shown = directory.display();
        let reason = reason(&error);
        Origin::none().warning(&format!("cannot make '{shown}': {reason}"), None);
        return None;
    }
    Some(directory.join("qmp-history"))
}

/// What the editor suggests.
struct Suggestions(Schema);

impl Completer for Suggestions {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let line = line.get(..position).unwrap_or(line);
        let (start, mut candidates) = complete(&self.0, line);
        // A word that is complete is followed by the next one.
        if let [only] = &mut *candidates
            && !only.ends_with(['=', '.'])
        {
            only.push(' ');
        }
        Ok((start, candidates))
    }
}

impl Hinter for Suggestions {
    type Hint = String;
}

impl Highlighter for Suggestions {}

impl Validator for Suggestions {}

impl Helper for Suggestions {}
