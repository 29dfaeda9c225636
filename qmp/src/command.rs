//! The commands and events that exist, as one table: what is in it is executed, listed by
//! `query-commands` and described by `query-qmp-schema`; nothing else is.
//!
//! Handlers are async and run on the thread that polls them; their futures need not be `Send`.

use std::pin::Pin;
use std::rc::Rc;

use serde_json::Value;

use crate::error::{Error, ErrorClass};
use crate::introspect::{Introspection, feature_list};
use crate::schema::control::{CommandInfo, QmpCapabilities};
use crate::schema::introspect::{SchemaInfo, SchemaInfoCommand, SchemaInfoEvent, SchemaMetaType};
use crate::session::{NEGOTIATION, Request, refused_oob};
use crate::visitor::{EventData, Object, Qapi};
use crate::{from_json, to_json};

/// The result of a command, once it is there.
pub type Execution = Pin<Box<dyn Future<Output = Result<Value, Error>>>>;

/// Commands that act on a state `S`, and events.
pub struct Registry<S> {
    commands: Vec<Command<S>>,
    events: Vec<DescribedEvent>,
}

/// A command.
pub struct Command<S> {
    name: &'static str,
    features: &'static [&'static str],
    describe: fn(&mut Introspection) -> SchemaInfoCommand,
    action: Action<S>,
}

enum Action<S> {
    Handle(Handler<S>),
    ListCommands,
    DescribeSchema,
    /// The session has done it.
    Negotiate,
}

type Handler<S> = Box<dyn Fn(Rc<S>, Value) -> Result<Execution, Error>>;

struct DescribedEvent {
    name: &'static str,
    describe: fn(&mut Introspection) -> String,
}

impl<S> Command<S> {
    /// Marks the command with special features, such as `unstable`.
    pub fn features(&mut self, features: &'static [&'static str]) -> &mut Self {
        self.features = features;
        self
    }
}

impl<S> Default for Registry<S> {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Registry<S> {
    /// The commands about commands: `qmp_capabilities`, `query-commands`, `query-qmp-schema`.
    pub fn new() -> Self {
        let mut registry = Self {
            commands: Vec::new(),
            events: Vec::new(),
        };
        registry.insert::<QmpCapabilities, ()>(NEGOTIATION, Action::Negotiate);
        registry.insert::<(), Vec<CommandInfo>>("query-commands", Action::ListCommands);
        registry.insert::<(), Vec<SchemaInfo>>("query-qmp-schema", Action::DescribeSchema);
        registry
    }

    /// Adds a command that takes an `A` and returns an `R`; `()` is no arguments and no result.
    ///
    /// # Panics
    /// The name is taken.
    pub fn add<A, R, F, Fut>(&mut self, name: &'static str, handler: F) -> &mut Command<S>
    where
        A: Object,
        R: Qapi,
        F: Fn(Rc<S>, A) -> Fut + 'static,
        Fut: Future<Output = Result<R, Error>> + 'static,
    {
        let handle: Handler<S> = Box::new(move |state, arguments| {
            let result = handler(state, from_json(arguments)?);
            Ok(Box::pin(async move { Ok(to_json(&result.await?)) }))
        });
        self.insert::<A, R>(name, Action::Handle(handle))
    }

    /// Adds an event.
    pub fn add_event<E: EventData>(&mut self) {
        self.events.push(DescribedEvent {
            name: E::NAME,
            describe: E::introspect,
        });
    }

    /// Begins to execute a command. The future does not borrow the table.
    pub fn execute(&self, state: Rc<S>, request: Request) -> Execution {
        let begun = self.begin(state, request);
        begun.unwrap_or_else(|error| Box::pin(std::future::ready(Err(error))))
    }

    /// Why a command is not executed out of band, which none is.
    pub fn refuse_out_of_band(&self, request: &Request) -> Error {
        match self.find(&request.command) {
            Ok(command) => refused_oob(command.name),
            Err(error) => error,
        }
    }

    /// Every command, in the order they were added.
    pub fn commands(&self) -> Vec<CommandInfo> {
        let info = |command: &Command<S>| CommandInfo {
            name: command.name.to_owned(),
        };
        self.commands.iter().map(info).collect()
    }

    /// Every command, every event, and every type they mention.
    pub fn schema(&self) -> Vec<SchemaInfo> {
        let mut types = Introspection::default();
        let commands = self.commands.iter().map(|command| SchemaInfo {
            meta: SchemaMetaType::Command((command.describe)(&mut types)),
            name: command.name.to_owned(),
            features: feature_list(command.features),
        });
        let mut entities: Vec<_> = commands.collect();
        let events = self.events.iter().map(|event| {
            let arg_type = (event.describe)(&mut types);
            SchemaInfo {
                meta: SchemaMetaType::Event(SchemaInfoEvent { arg_type }),
                name: event.name.to_owned(),
                features: None,
            }
        });
        entities.extend(events);
        entities.extend(types.into_types());
        entities
    }

    fn begin(&self, state: Rc<S>, request: Request) -> Result<Execution, Error> {
        if request.oob {
            return Err(self.refuse_out_of_band(&request));
        }
        let command = self.find(&request.command)?;
        let arguments = Value::Object(request.arguments);
        let value = match &command.action {
            Action::Handle(handle) => return handle(state, arguments),
            Action::Negotiate => to_json(&from_json::<()>(arguments)?),
            Action::ListCommands => {
                from_json::<()>(arguments)?;
                to_json(&self.commands())
            }
            Action::DescribeSchema => {
                from_json::<()>(arguments)?;
                to_json(&self.schema())
            }
        };
        Ok(Box::pin(std::future::ready(Ok(value))))
    }

    fn find(&self, name: &str) -> Result<&Command<S>, Error> {
        let known = self.commands.iter().find(|known| known.name == name);
        known.ok_or_else(|| {
            let message = format!("The command {name} has not been found");
            Error::new(ErrorClass::CommandNotFound, message)
        })
    }

    fn insert<A: Object, R: Qapi>(
        &mut self,
        name: &'static str,
        action: Action<S>,
    ) -> &mut Command<S> {
        let taken = self.commands.iter().any(|known| known.name == name);
        assert!(!taken, "the command {name} is added twice");
        self.commands.push(Command {
            name,
            features: &[],
            describe: |types| SchemaInfoCommand {
                arg_type: A::introspect(types),
                ret_type: R::introspect(types),
                allow_oob: None,
            },
            action,
        });
        self.commands.last_mut().expect("it was just pushed")
    }
}
