//! Descriptors that are waited for, on both engines.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::task::Poll;

use nix::sys::eventfd::EventFd;
use stord_aio::{Errno, IoBuffer, IoVec, PollParams, PolledFd, join_all, spawn_local, yield_now};

use crate::engines::{self, both};

fn eventfd() -> (EventFd, PolledFd) {
    let eventfd = EventFd::new().expect("eventfds are there");
    let same = eventfd
        .as_fd()
        .try_clone_to_owned()
        .expect("a descriptor is free");
    (eventfd, PolledFd::new(same).expect("it can be nonblocking"))
}

fn sockets() -> (UnixStream, PolledFd) {
    let (left, right) = UnixStream::pair().expect("sockets are there");
    let right = PolledFd::new(OwnedFd::from(right)).expect("it can be nonblocking");
    (left, right)
}

#[test]
fn a_descriptor_that_becomes_readable_is_told() {
    both(|which| {
        let context = which.start();
        let value = context.block_on(|| async {
            let (writer, polled) = eventfd();
            let counter = IoBuffer::zeroed(8);
            let list = counter.clone().into();
            assert_eq!(polled.try_read(&list), Err(Errno::EAGAIN));
            assert_eq!(polled.read(list.clone()).await, Err(Errno::EAGAIN));
            let thread = std::thread::spawn(move || writer.write(5));
            assert_eq!(polled.readable().await, Ok(()));
            thread.join().expect("no panic").expect("there is room");
            // It still is, and that is told again.
            assert_eq!(polled.readable().await, Ok(()));
            assert_eq!(polled.read(list).await, Ok(8));
            counter.to_vec()
        });
        assert_eq!(value, Ok(5u64.to_ne_bytes().to_vec()));
        context.stop();
    });
}

#[test]
fn a_stream_is_read_and_written_as_it_comes() {
    both(|which| {
        const TOTAL: usize = 3 << 20;
        let context = which.start();
        let (mut left, right) = UnixStream::pair().expect("sockets are there");
        let peer = std::thread::spawn(move || {
            let mut sent = vec![0; TOTAL];
            left.read_exact(&mut sent).expect("the whole stream");
            left.write_all(&sent[..1000]).expect("the reader lives");
            sent
        });
        let echoed = context.block_on(move || async move {
            let polled = PolledFd::new(right.into()).expect("it can be nonblocking");
            let data: Vec<u8> = (0..TOTAL).map(|i| u8::try_from(i % 253).unwrap()).collect();
            let data = IoBuffer::from_vec(data);
            let mut at = 0;
            while at < TOTAL {
                match polled.write(data.slice(at..TOTAL).into()).await {
                    Ok(count) => at += count,
                    Err(Errno::EAGAIN) => polled.writable().await.expect("nobody stops"),
                    Err(errno) => panic!("{errno}"),
                }
            }
            let target = IoBuffer::zeroed(1000);
            let mut at = 0;
            while at < 1000 {
                polled.readable().await.expect("nobody stops");
                at += polled
                    .try_read(&target.slice(at..1000).into())
                    .expect("it is readable");
            }
            polled.readable().await.expect("nobody stops");
            assert_eq!(polled.read(target.clone().into()).await, Ok(0), "the end");
            target.to_vec()
        });
        let sent = peer.join().expect("no panic");
        assert!(
            sent.iter()
                .enumerate()
                .all(|(i, &b)| usize::from(b) == i % 253)
        );
        assert_eq!(echoed.as_deref(), Ok(&sent[..1000]));
        context.stop();
    });
}

#[test]
fn a_transfer_waits_until_the_descriptor_is_ready() {
    both(|which| {
        let context = which.start();
        let (mut peer, polled) = UnixStream::pair().expect("sockets are there");
        let echo = context.run(move || async move {
            let polled = PolledFd::new(polled.into()).expect("it can be nonblocking");
            let buffer = IoBuffer::zeroed(100);
            let (left, right) = (buffer.slice(0..2), buffer.slice(2..100));
            loop {
                let both = [left.clone(), right.clone()].into_iter().collect();
                match polled.read_when_ready(both).await {
                    Ok(0) => return,
                    Ok(count) => {
                        let reply = buffer.slice(0..count).into();
                        assert_eq!(polled.write_when_ready(reply).await, Ok(count));
                    }
                    Err(errno) => panic!("{errno}"),
                }
            }
        });
        for round in 0..500u32 {
            let message = round.to_be_bytes();
            peer.write_all(&message).expect("the echo lives");
            let mut answer = [0; 4];
            peer.read_exact(&mut answer).expect("the echo answers");
            assert_eq!(answer, message);
        }
        drop(peer);
        assert_eq!(engines::wait(echo), Ok(()));
        context.stop();
    });
}

#[test]
fn a_polling_context_sees_descriptors_while_it_spins() {
    both(|which| {
        // It grows to an hour at once, and so never sleeps again once it has slept shortly.
        let context = which.start_polling(PollParams {
            max_ns: 3_600_000_000_000,
            grow: 1_000_000_000,
            shrink: 0,
        });
        let result = context.block_on(|| async {
            let (writer, polled) = eventfd();
            let counter: IoVec = IoBuffer::zeroed(8).into();
            for _ in 0..100 {
                let writer = writer.as_fd().try_clone_to_owned().expect("room");
                let thread = std::thread::spawn(move || {
                    nix::unistd::write(writer, &[1, 0, 0, 0, 0, 0, 0, 0])
                });
                polled.readable().await?;
                assert_eq!(thread.join().expect("no panic"), Ok(8));
                assert_eq!(polled.read_when_ready(counter.clone()).await, Ok(8));
            }
            Ok::<_, Errno>(())
        });
        assert_eq!(result, Ok(Ok(())));
        context.stop();
    });
}

#[test]
fn of_two_that_wait_to_read_one_message_one_goes_on_waiting() {
    both(|which| {
        let context = which.start();
        let read = context.block_on(|| async {
            let (writer, polled) = eventfd();
            let polled = Rc::new(polled);
            let read = Rc::new(Cell::new(0));
            for _ in 0..2 {
                let (polled, read) = (Rc::clone(&polled), Rc::clone(&read));
                spawn_local(async move {
                    let counter = IoBuffer::zeroed(8);
                    let count = polled.read_when_ready(counter.into()).await;
                    assert_eq!(count, Ok(8));
                    read.set(read.get() + 1);
                });
            }
            for expected in 1..=2 {
                writer.write(1).expect("there is room");
                while read.get() < expected {
                    yield_now().await;
                }
                for _ in 0..100 {
                    yield_now().await;
                }
                assert_eq!(read.get(), expected);
            }
            read.get()
        });
        assert_eq!(read, Ok(2));
        context.stop();
    });
}

#[test]
fn more_operations_than_the_ring_has_room_for_all_complete() {
    both(|which| {
        const OPERATIONS: usize = 5000;
        let context = which.start();
        let results = context.block_on(|| async {
            let null = std::fs::File::options().write(true).open("/dev/null");
            let null = PolledFd::new(null.expect("it is there").into()).expect("it is set up");
            let byte = IoBuffer::zeroed(1);
            let writes = (0..OPERATIONS).map(|_| null.write(byte.clone().into()));
            join_all(writes.collect()).await
        });
        assert_eq!(results, Ok(vec![Ok(1); OPERATIONS]));
        context.stop();
    });
}

#[test]
fn several_may_wait_for_one_descriptor() {
    both(|which| {
        let context = which.start();
        let woken = context.block_on(|| async {
            let (mut peer, polled) = sockets();
            let polled = Rc::new(polled);
            let woken = Rc::new(Cell::new(0));
            for _ in 0..3 {
                let (polled, woken) = (Rc::clone(&polled), Rc::clone(&woken));
                spawn_local(async move {
                    polled.readable().await.expect("nobody stops");
                    woken.set(woken.get() + 1);
                });
            }
            assert_eq!(polled.writable().await, Ok(()));
            yield_now().await;
            assert_eq!(woken.get(), 0, "there is nothing to read");
            peer.write_all(b"x").expect("there is room");
            while woken.get() < 3 {
                yield_now().await;
            }
            woken.get()
        });
        assert_eq!(woken, Ok(3));
        context.stop();
    });
}

#[test]
fn a_wait_that_is_given_up_leaves_the_others() {
    both(|which| {
        let context = which.start();
        let result = context.block_on(|| async {
            let (mut peer, polled) = sockets();
            for _ in 0..100 {
                let mut given_up = Box::pin(polled.readable());
                let first = poll_fn(|cx| Poll::Ready(given_up.as_mut().poll(cx))).await;
                assert!(first.is_pending());
            }
            let mut kept = Box::pin(polled.readable());
            assert!(
                poll_fn(|cx| Poll::Ready(kept.as_mut().poll(cx)))
                    .await
                    .is_pending()
            );
            let mut given_up = Box::pin(polled.readable());
            assert!(
                poll_fn(|cx| Poll::Ready(given_up.as_mut().poll(cx)))
                    .await
                    .is_pending()
            );
            drop(given_up);
            peer.write_all(b"x").expect("there is room");
            kept.await
        });
        assert_eq!(result, Ok(Ok(())));
        context.stop();
    });
}

#[test]
fn a_descriptor_is_closed_when_nobody_waits_for_it_any_more() {
    both(|which| {
        let context = which.start();
        let (mut peer, polled) = UnixStream::pair().expect("sockets are there");
        let result = context.block_on(move || async move {
            let polled = PolledFd::new(polled.into()).expect("it can be nonblocking");
            {
                let mut waiting = Box::pin(polled.readable());
                assert!(
                    poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx)))
                        .await
                        .is_pending()
                );
            }
            drop(polled);
        });
        assert_eq!(result, Ok(()));
        // Waits for the close, which may take another turn of the loop.
        assert_eq!(peer.read(&mut [0]).expect("an end, no error"), 0);
        context.stop();
    });
}

#[test]
fn a_regular_file_is_always_ready() {
    both(|which| {
        let context = which.start();
        let file = tempfile::tempfile().expect("a scratch file");
        let result = context.block_on(move || async move {
            let polled = PolledFd::new(file.into()).expect("it can be nonblocking");
            join_all(vec![polled.readable(), polled.readable()]).await
        });
        assert_eq!(result, Ok(vec![Ok(()), Ok(())]));
        context.stop();
    });
}

#[test]
fn waits_end_when_the_context_is_stopped() {
    both(|which| {
        let context = which.start();
        let (ready, is_ready) = stord_aio::sync::oneshot::channel();
        let waits = context.run(|| async {
            let (_peer, polled) = sockets();
            let (_writer, other) = eventfd();
            let _ = ready.send(());
            let first = join_all(vec![polled.readable(), other.readable()]).await;
            (first, polled.readable().await)
        });
        let reads = context.run(|| async {
            let (_peer, polled) = sockets();
            let buffer = IoBuffer::zeroed(10);
            polled.read_when_ready(buffer.into()).await
        });
        assert_eq!(engines::wait(is_ready), Ok(()));
        context.stop();
        let cancelled = Err(Errno::ECANCELED);
        assert_eq!(
            engines::wait(waits),
            Ok((vec![cancelled, cancelled], cancelled))
        );
        assert_eq!(engines::wait(reads), Ok(Err(Errno::ECANCELED)));
    });
}
