//! The I/O contexts of the process: the main one, those of `iothread` objects, and a few shared by exports that name none.
//!
//! Lives on the control thread.

use std::cell::{Cell, RefCell};
use std::io;

use stord_aio::{Context, ContextConfig, PollParams, PoolLimits};
use stord_qmp::Error;

/// Exports that ask for several contexts without naming them share at most this many.
const MAX_SHARED: usize = 16;

/// The process's I/O contexts.
pub struct Contexts {
    main: Context,
    shared: RefCell<Vec<Context>>,
    iothreads: RefCell<Vec<IoThread>>,
    /// The batch size and pool limits of the contexts that are no iothreads.
    main_loop: Cell<(u32, PoolLimits)>,
}

struct IoThread {
    id: String,
    context: Context,
    users: usize,
}

impl Contexts {
    /// Starts the main context.
    ///
    /// # Errors
    /// The thread or its event sources cannot be made.
    pub fn start() -> io::Result<Self> {
        Ok(Self {
            main: Context::start(config("io-main"))?,
            shared: RefCell::default(),
            iothreads: RefCell::default(),
            main_loop: Cell::new((0, PoolLimits::DEFAULT)),
        })
    }

    /// The context that opens images and serves what has no context of its own.
    pub fn main(&self) -> Context {
        self.main.clone()
    }

    /// Up to `wanted` contexts for an export that names none, the main one first; as many as there are CPUs, at most.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn shared(&self, wanted: usize) -> io::Result<Vec<Context>> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let wanted = wanted.clamp(1, MAX_SHARED.min(cpus));
        let mut shared = self.shared.borrow_mut();
        while shared.len() + 1 < wanted {
            let name = format!("io-{}", shared.len() + 1);
            let (batch, pool) = self.main_loop.get();
            shared.push(Context::start(ContextConfig {
                batch,
                pool,
                ..config(&name)
            })?);
        }
        Ok(std::iter::once(self.main())
            .chain(shared.iter().take(wanted - 1).cloned())
            .collect())
    }

    /// Sets, for every context that is no iothread, the most operations it submits at once, 0 being its own choice, and the limits of
    /// its blocking jobs.
    pub fn set_main_loop(&self, batch: u32, pool: PoolLimits) {
        self.main_loop.set((batch, pool));
        for context in std::iter::once(&self.main).chain(self.shared.borrow().iter()) {
            context.set_batch(batch);
            context.set_pool_limits(pool);
        }
    }

    /// Starts the context of an `iothread` object; `batch` is the most operations it submits at once, 0 its own choice.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn add_iothread(
        &self,
        id: &str,
        poll: PollParams,
        batch: u32,
        pool: PoolLimits,
    ) -> Result<(), Error> {
        let context = Context::start(ContextConfig {
            poll,
            batch,
            pool,
            ..config(&format!("IO {id}"))
        })
        .map_err(|source| Error::generic(format!("Could not start iothread '{id}': {source}")))?;
        self.iothreads.borrow_mut().push(IoThread {
            id: id.to_owned(),
            context,
            users: 0,
        });
        Ok(())
    }

    /// Whether there is such an `iothread` object.
    pub fn has_iothread(&self, id: &str) -> bool {
        self.iothreads
            .borrow()
            .iter()
            .any(|iothread| iothread.id == id)
    }

    /// The context of an `iothread` object, which cannot be removed until [`release`](Self::release).
    ///
    /// # Errors
    /// There is no such object.
    pub fn acquire(&self, id: &str) -> Result<Context, Error> {
        let mut iothreads = self.iothreads.borrow_mut();
        let iothread = iothreads
            .iter_mut()
            .find(|iothread| iothread.id == id)
            .ok_or_else(|| Error::generic(format!("Cannot find iothread {id}")))?;
        iothread.users += 1;
        Ok(iothread.context.clone())
    }

    /// Undoes one [`acquire`](Self::acquire).
    pub fn release(&self, id: &str) {
        if let Some(iothread) = self
            .iothreads
            .borrow_mut()
            .iter_mut()
            .find(|iothread| iothread.id == id)
        {
            iothread.users = iothread.users.saturating_sub(1);
        }
    }

    /// Ends the context of an `iothread` object.
    ///
    /// # Errors
    /// There is no such object, or an export uses it.
    pub fn remove_iothread(&self, id: &str) -> Result<(), Error> {
        let mut iothreads = self.iothreads.borrow_mut();
        let at = iothreads
            .iter()
            .position(|iothread| iothread.id == id)
            .ok_or_else(|| Error::generic(format!("object '{id}' not found")))?;
        if iothreads[at].users > 0 {
            return Err(Error::generic(format!(
                "object '{id}' is in use, can not be deleted"
            )));
        }
        let iothread = iothreads.remove(at);
        drop(iothreads);
        iothread.context.stop();
        Ok(())
    }

    /// Ends every context, after the work in it.
    pub fn stop(self) {
        let iothreads = self
            .iothreads
            .into_inner()
            .into_iter()
            .map(|iothread| iothread.context);
        for context in iothreads.chain(self.shared.into_inner()) {
            context.stop();
        }
        self.main.stop();
    }
}

fn config(name: &str) -> ContextConfig {
    ContextConfig {
        name: name.to_owned(),
        ..ContextConfig::default()
    }
}
