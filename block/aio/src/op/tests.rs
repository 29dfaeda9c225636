//! An operation's memory outlives its future, on every engine.

// UNSAFETY: foreign memory, as exports hand it in.
#![expect(unsafe_code, reason = "buffers over foreign memory")]

use std::cell::Cell;
use std::future::poll_fn;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::Poll;

use super::{Action, Completion, Descriptor, Op, Request, When};
use crate::executor::{self, yield_now};
use crate::iovec::IoVec;
use crate::{Context, ContextConfig, IoBuffer};

/// Memory that records what it held when it was freed.
struct Witness {
    memory: *mut [u8; 4],
    at_the_end: Rc<Cell<Option<[u8; 4]>>>,
}

impl Drop for Witness {
    fn drop(&mut self) {
        // SAFETY: `memory` came from `Box::into_raw`, and this is its only owner.
        let memory = unsafe { Box::from_raw(self.memory) };
        self.at_the_end.set(Some(*memory));
    }
}

fn witnessed() -> (IoBuffer, Rc<Cell<Option<[u8; 4]>>>) {
    let at_the_end = Rc::new(Cell::new(None));
    let memory = Box::into_raw(Box::new(*b"...."));
    let owner = Witness {
        memory,
        at_the_end: Rc::clone(&at_the_end),
    };
    // SAFETY: the memory is valid until its owner is dropped, and there is no reference to it.
    let buffer = unsafe { IoBuffer::from_raw(memory.cast(), 4, Rc::new(owner)) };
    (buffer, at_the_end)
}

/// Starts a read of a pipe, which waits until something is written to it.
type Start = fn(Request) -> Op;

/// On the ring, or on a blocking thread of either engine.
fn on_all(test: impl Fn(&Context, Start)) {
    let by_engine: Start = |request| executor::with(|local| local.submit(request));
    let by_thread: Start = |request| executor::with(|local| local.submit_to_pool(request));
    for force_fallback in [false, true] {
        let context = Context::start(ContextConfig {
            name: "soundness".into(),
            force_fallback,
            ..ContextConfig::default()
        })
        .expect("a context starts");
        if context.uses_ring() {
            test(&context, by_engine);
        } else if !force_fallback {
            eprintln!("SKIPPED for the ring: allow io_uring (sysctl kernel.io_uring_disabled=0)");
        }
        test(&context, by_thread);
        context.stop();
    }
}

fn read_of(fd: OwnedFd, buffers: IoVec) -> Request {
    Request {
        descriptor: Descriptor::Local(Rc::new(fd)),
        action: Action::Receive(When::Unspecified),
        buffers,
        batch: 0,
    }
}

async fn poll_once(op: &mut Op) -> Poll<Completion> {
    poll_fn(|cx| Poll::Ready(std::pin::Pin::new(&mut *op).poll(cx))).await
}

async fn wait_for<T: Copy>(cell: &Cell<Option<T>>) -> T {
    loop {
        match cell.get() {
            Some(value) => return value,
            None => yield_now().await,
        }
    }
}

#[test]
fn memory_outlives_a_future_dropped_in_flight() {
    on_all(|context, start| {
        let content = context.block_on(move || async move {
            let (reader, mut writer) = std::io::pipe().expect("pipes are there");
            let (buffer, at_the_end) = witnessed();
            let mut op = start(read_of(reader.into(), buffer.into()));
            assert!(poll_once(&mut op).await.is_pending());
            // By now it has been submitted.
            yield_now().await;
            drop(op);
            for _ in 0..100 {
                yield_now().await;
            }
            assert_eq!(at_the_end.get(), None, "the kernel may still write to it");
            writer.write_all(b"late").expect("somebody reads");
            wait_for(&at_the_end).await
        });
        assert_eq!(content, Ok(*b"late"));
    });
}

#[test]
fn memory_outlives_a_future_dropped_before_it_was_polled() {
    on_all(|context, start| {
        let content = context.block_on(move || async move {
            let (reader, mut writer) = std::io::pipe().expect("pipes are there");
            let (buffer, at_the_end) = witnessed();
            // Scattered, so that the segment array is needed, too.
            let list = [buffer.slice(2..4), buffer.slice(0..1), buffer.slice(1..2)];
            drop(buffer);
            drop(start(read_of(reader.into(), list.into_iter().collect())));
            writer.write_all(b"abcd").expect("somebody reads");
            wait_for(&at_the_end).await
        });
        assert_eq!(content, Ok(*b"cdab"));
    });
}

#[test]
fn a_stopping_context_waits_for_operations_that_nobody_waits_for() {
    let context = Context::start(ContextConfig::default()).expect("a context starts");
    let (reader, mut writer) = std::io::pipe().expect("pipes are there");
    let (tell, told) = std::sync::mpsc::channel();
    let started = context.block_on(move || async move {
        let (buffer, _) = witnessed();
        let told = Told(buffer, tell);
        let ptr = told.0.as_ptr();
        // SAFETY: the owner keeps the buffer.
        let buffer = unsafe { IoBuffer::from_raw(ptr, 4, Rc::new(told)) };
        let request = read_of(reader.into(), buffer.into());
        drop(executor::with(|local| local.submit_to_pool(request)));
    });
    assert_eq!(started, Ok(()));
    let stopper = std::thread::spawn(move || context.stop());
    assert!(told.try_recv().is_err(), "the read has not happened");
    writer.write_all(b"done").expect("somebody reads");
    assert_eq!(told.recv(), Ok(b"done".to_vec()));
    stopper.join().expect("it stops");
}

/// Sends the content of the memory when it is freed.
struct Told(IoBuffer, std::sync::mpsc::Sender<Vec<u8>>);

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.1.send(self.0.to_vec());
    }
}
