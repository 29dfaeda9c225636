//! Objects that users make: iothreads, and the one `main-loop`, which carries properties of the
//! daemon as a whole. Every property that is accepted has an effect.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use stord_aio::PollParams;
use stord_block::Contexts;
use stord_qmp::schema::object::{
    EventLoopBaseProperties, IothreadProperties, ObjectKind, ObjectOptions,
};
use stord_qmp::{Error, identifier};

/// The polling time of an iothread that does not say, in ns.
const DEFAULT_POLL_MAX_NS: u64 = 32_768;

/// The object types and their properties with the types of their values, for `help`.
const TYPES: &[(&str, &[(&str, &str)])] = &[
    (
        "iothread",
        &[
            ("aio-max-batch", "int"),
            ("poll-grow", "int"),
            ("poll-max-ns", "int"),
            ("poll-shrink", "int"),
        ],
    ),
    (
        "main-loop",
        &[
            ("aio-max-batch", "int"),
            ("thread-pool-max", "int"),
            ("thread-pool-min", "int"),
        ],
    ),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Iothread,
    MainLoop,
}

/// The objects that exist.
pub struct Objects {
    contexts: Rc<Contexts>,
    by_id: RefCell<BTreeMap<String, Kind>>,
}

impl Objects {
    /// No objects.
    pub fn new(contexts: Rc<Contexts>) -> Self {
        Self {
            contexts,
            by_id: RefCell::default(),
        }
    }

    /// Makes an object.
    ///
    /// # Errors
    /// Its id is taken or no identifier, a property is out of range, or it cannot be made.
    pub fn add(&self, options: ObjectOptions) -> Result<(), Error> {
        let ObjectOptions { id, kind } = options;
        identifier::check("id", &id)?;
        let made = match &kind {
            ObjectKind::Iothread(_) => Kind::Iothread,
            ObjectKind::MainLoop(_) => Kind::MainLoop,
        };
        if self.by_id.borrow().contains_key(&id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        match kind {
            ObjectKind::Iothread(properties) => self.add_iothread(&id, &properties)?,
            ObjectKind::MainLoop(properties) => self.add_main_loop(&properties)?,
        }
        self.by_id.borrow_mut().insert(id, made);
        Ok(())
    }

    /// Removes an object.
    ///
    /// # Errors
    /// There is none of that id, or it is in use.
    pub fn del(&self, id: &str) -> Result<(), Error> {
        let kind = self.by_id.borrow().get(id).copied();
        match kind {
            None => return Err(Error::generic(format!("object '{id}' not found"))),
            Some(Kind::MainLoop) => {
                return Err(Error::generic(format!(
                    "object '{id}' is in use, can not be deleted"
                )));
            }
            Some(Kind::Iothread) => self.contexts.remove_iothread(id)?,
        }
        self.by_id.borrow_mut().remove(id);
        Ok(())
    }

    fn add_iothread(&self, id: &str, properties: &IothreadProperties) -> Result<(), Error> {
        let poll = PollParams {
            max_ns: non_negative("poll-max-ns", properties.poll_max_ns)?
                .unwrap_or(DEFAULT_POLL_MAX_NS),
            grow: non_negative("poll-grow", properties.poll_grow)?.unwrap_or(0),
            shrink: non_negative("poll-shrink", properties.poll_shrink)?.unwrap_or(0),
        };
        let event_loop = EventLoop::check(&properties.event_loop)?;
        event_loop.refuse_pool("an iothread")?;
        let batch = u32::try_from(event_loop.batch).unwrap_or(u32::MAX);
        self.contexts.add_iothread(id, poll, batch)
    }

    fn add_main_loop(&self, properties: &EventLoopBaseProperties) -> Result<(), Error> {
        if self
            .by_id
            .borrow()
            .values()
            .any(|kind| *kind == Kind::MainLoop)
        {
            return Err(Error::generic("only one main-loop instance allowed"));
        }
        let event_loop = EventLoop::check(properties)?;
        event_loop.refuse_pool("the main loop")?;
        event_loop.refuse_batch("the main loop")
    }
}

/// The properties of an event loop, each in its range.
struct EventLoop {
    batch: u64,
    pool: Option<(u64, u64)>,
}

impl EventLoop {
    const POOL_MIN: u64 = 0;
    const POOL_MAX: u64 = 64;

    fn check(properties: &EventLoopBaseProperties) -> Result<Self, Error> {
        let batch = non_negative("aio-max-batch", properties.aio_max_batch)?.unwrap_or(0);
        let min = non_negative("thread-pool-min", properties.thread_pool_min)?;
        let max = non_negative("thread-pool-max", properties.thread_pool_max)?;
        let pool = (min.unwrap_or(Self::POOL_MIN), max.unwrap_or(Self::POOL_MAX));
        if pool.0 > pool.1 || pool.1 == 0 {
            return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
        }
        Ok(Self {
            batch,
            pool: (min.is_some() || max.is_some()).then_some(pool),
        })
    }

    /// Refuses limits other than those the pool has.
    fn refuse_pool(&self, what: &str) -> Result<(), Error> {
        match self.pool {
            None | Some((Self::POOL_MIN, Self::POOL_MAX)) => Ok(()),
            Some(_) => Err(Error::generic(format!(
                "Parameters 'thread-pool-min' and 'thread-pool-max' of {what} \
                 are not supported by stord yet"
            ))),
        }
    }

    fn refuse_batch(&self, what: &str) -> Result<(), Error> {
        match self.batch {
            0 => Ok(()),
            _ => Err(Error::generic(format!(
                "Parameter 'aio-max-batch' of {what} is not supported by stord yet"
            ))),
        }
    }
}

fn non_negative(name: &str, value: Option<i64>) -> Result<Option<u64>, Error> {
    value
        .map(|value| {
            u64::try_from(value).map_err(|_| {
                Error::generic(format!("{name} value must be in range [0, {}]", i64::MAX))
            })
        })
        .transpose()
}

/// The text that `--object` prints instead of making an object, if its value asks for help.
pub fn help(value: &str) -> Option<String> {
    let words: Vec<&str> = value.split(',').collect();
    if value.starts_with('{') || !words.iter().any(|word| matches!(*word, "help" | "?")) {
        return None;
    }
    let asked = words.first().copied().unwrap_or_default();
    let asked = asked.strip_prefix("qom-type=").unwrap_or(asked);
    match TYPES.iter().find(|(name, _)| *name == asked) {
        Some((name, properties)) => {
            let mut text = format!("{name} options:\n");
            for (property, kind) in *properties {
                text.push_str(&format!("  {property}=<{kind}>\n"));
            }
            Some(text)
        }
        None => {
            let mut text = "List of user creatable objects:\n".to_owned();
            for (name, _) in TYPES {
                text.push_str(&format!("  {name}\n"));
            }
            Some(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects() -> Objects {
        let contexts = Contexts::start().expect("a context can be started");
        Objects::new(Rc::new(contexts))
    }

    fn add(objects: &Objects, text: &str) -> Result<(), String> {
        let options = stord_qmp::from_keyval(text, Some("qom-type")).map_err(|e| e.message)?;
        objects.add(options).map_err(|error| error.message)
    }

    #[test]
    fn iothreads_come_and_go() {
        let objects = objects();
        assert_eq!(add(&objects, "iothread,id=t0,poll-max-ns=5"), Ok(()));
        assert!(add(&objects, "iothread,id=t0").is_err_and(|m| m.contains("duplicate")));
        objects.contexts.acquire("t0").expect("it is there");
        assert!(
            objects
                .del("t0")
                .is_err_and(|e| e.message.contains("in use"))
        );
        objects.contexts.release("t0");
        objects.del("t0").expect("nobody uses it");
        assert!(
            objects
                .del("t0")
                .is_err_and(|e| e.message.contains("not found"))
        );
    }

    #[test]
    fn properties_out_of_range_are_refused() {
        let objects = objects();
        for (text, message) in [
            (
                "iothread,id=a,poll-max-ns=-1",
                "poll-max-ns value must be in range [0, 9223372036854775807]",
            ),
            (
                "iothread,id=a,thread-pool-max=0",
                "bad thread-pool-min/thread-pool-max values",
            ),
            ("iothread,id=1", "Parameter 'id' expects an identifier"),
            (
                "nope,id=a",
                "Parameter 'qom-type' does not accept value 'nope'",
            ),
            ("iothread,id=a,foo=1", "Parameter 'foo' is unexpected"),
            ("iothread", "Parameter 'id' is missing"),
        ] {
            assert_eq!(add(&objects, text), Err(message.to_owned()), "{text}");
        }
    }

    #[test]
    fn there_is_one_main_loop() {
        let objects = objects();
        assert_eq!(add(&objects, "main-loop,id=m"), Ok(()));
        assert_eq!(
            add(&objects, "main-loop,id=n"),
            Err("only one main-loop instance allowed".to_owned())
        );
        assert!(objects.del("m").is_err());
    }

    #[test]
    fn help_lists_types_and_properties() {
        assert_eq!(help("iothread,id=a"), None);
        assert_eq!(
            help("help").as_deref(),
            Some("List of user creatable objects:\n  iothread\n  main-loop\n")
        );
        assert!(help("iothread,help").is_some_and(|text| text.contains("poll-max-ns=<int>")));
    }
}
