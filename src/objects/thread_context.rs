//! `thread-context`: a thread that does nothing but run where it may, so that others can be made to
//! run there too.

use std::fs;
use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use serde_json::Value;
use stord_qmp::schema::object::ThreadContextProperties;
use stord_qmp::{Error, from_json_member};

use super::class::{Access, Class, Form, Property};
use super::{Object, unknown};
use crate::report::reason;

/// The type.
pub const CLASS: Class = Class {
    name: "thread-context",
    parent: Some("object"),
    form: Form::Creatable,
    properties: &[
        Property::with_access("thread-id", "int", Access::Read),
        Property::with_access("node-affinity", "int", Access::Write),
        Property::new("cpu-affinity", "int"),
    ],
};

/// The thread. It ends when its object does.
pub struct ThreadContext {
    id: Pid,
    /// Dropped first: that ends the thread.
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ThreadContext {
    /// Starts the thread.
    ///
    /// # Errors
    /// It cannot be started, or cannot run there.
    pub fn start(id: &str, properties: &ThreadContextProperties) -> Result<Self, Error> {
        let cpus = match (&properties.cpu_affinity, &properties.node_affinity) {
            (None, None) => None,
            (Some(cpus), None) => Some(set_of(cpus)?),
            (None, Some(nodes)) => Some(set_of_nodes(nodes)?),
            (Some(_), Some(_)) => {
                let message = "Mixing CPU and node affinity not supported";
                return Err(Error::generic(message));
            }
        };
        let (started, starting) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let body = move || {
            // Nobody waits for the id of a thread that was given up.
            let _ = started.send(gettid());
            // Nothing is ever sent: it is the end of the channel that is waited for.
            let _ = ended.recv();
        };
        let failed = |what: &str| Error::generic(format!("Cannot start thread '{id}': {what}"));
        let thread = std::thread::Builder::new()
            .name(format!("TC {id}"))
            .stack_size(64 << 10)
            .spawn(body)
            .map_err(|error| failed(&reason(&error)))?;
        let id = starting.recv().map_err(|_| failed("it ended at once"))?;
        let context = Self {
            id,
            end: Some(end),
            thread: Some(thread),
        };
        if let Some(cpus) = cpus {
            context.run_on(&cpus)?;
        }
        Ok(context)
    }

    fn run_on(&self, cpus: &CpuSet) -> Result<(), Error> {
        sched_setaffinity(self.id, cpus).map_err(|errno| {
            let reason = reason(&errno.into());
            Error::generic(format!("Setting CPU affinity failed: {reason}"))
        })
    }

    fn cpus(&self) -> Result<Vec<usize>, Error> {
        let cpus = sched_getaffinity(self.id).map_err(|errno| {
            let reason = reason(&errno.into());
            Error::generic(format!("Getting CPU affinity failed: {reason}"))
        })?;
        let is_set = |cpu: &usize| cpus.is_set(*cpu).unwrap_or(false);
        Ok((0..CpuSet::count()).filter(is_set).collect())
    }
}

impl Drop for ThreadContext {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}

impl Object for ThreadContext {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        match property {
            "thread-id" => Ok(self.id.as_raw().into()),
            "cpu-affinity" => Ok(self.cpus()?.into()),
            _ => Err(unknown(&CLASS, property)),
        }
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        let numbers: Vec<u16> = from_json_member(property, value)?;
        match property {
            "cpu-affinity" => self.run_on(&set_of(&numbers)?),
            "node-affinity" => self.run_on(&set_of_nodes(&numbers)?),
            _ => Err(unknown(&CLASS, property)),
        }
    }
}

/// The set of these CPUs, as far as the kernel can have them.
fn set_of(cpus: &[u16]) -> Result<CpuSet, Error> {
    if cpus.is_empty() {
        return Err(Error::generic("CPU list is empty"));
    }
    let mut set = CpuSet::new();
    for cpu in cpus {
        // One beyond the set does not exist, which only matters if no other is left.
        let _ = set.set(usize::from(*cpu));
    }
    Ok(set)
}

/// The set of all CPUs of these NUMA nodes.
fn set_of_nodes(nodes: &[u16]) -> Result<CpuSet, Error> {
    if nodes.is_empty() {
        return Err(Error::generic("Node list is empty"));
    }
    let mut cpus = Vec::new();
    for node in nodes {
        let path = format!("/sys/devices/system/node/node{node}/cpulist");
        // A node that does not exist has no CPUs.
        cpus.extend(parse_list(&fs::read_to_string(path).unwrap_or_default()));
    }
    match cpus.is_empty() {
        true => Err(Error::generic("The nodes select no CPUs")),
        false => set_of(&cpus),
    }
}

/// The numbers in a list as the kernel writes it: `0-3,8`.
fn parse_list(text: &str) -> Vec<u16> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_s_lists_are_read() {
        assert_eq!(parse_list("0-2,8,10-11\n"), [0, 1, 2, 8, 10, 11]);
        assert_eq!(parse_list("\n"), Vec::<u16>::new());
    }

    #[test]
    fn thread_runs_where_it_may_and_ends() {
        let properties = ThreadContextProperties {
            cpu_affinity: Some(vec![0, 65535]),
            node_affinity: None,
        };
        let context = ThreadContext::start("t", &properties).expect("there is a CPU 0");
        assert_eq!(context.get("cpu-affinity"), Ok(serde_json::json!([0])));
        let task = format!("/proc/self/task/{}", context.id);
        assert!(fs::exists(&task).expect("proc is mounted"));
        drop(context);
        assert!(!fs::exists(&task).expect("proc is mounted"));
    }
}
