//! Commands of drivers through the ring.

// UNSAFETY: the function under test.
#![expect(unsafe_code, reason = "a command's memory is known to its caller only")]

use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use stord_aio::{join_all, uring_cmd};

use crate::engines::both;

/// SOCKET_URING_OP_SIOCINQ of linux/io_uring.h: the number of bytes that can be read.
const SIOCINQ: u32 = 0;

#[test]
fn commands_reach_their_driver_and_what_they_need_is_kept() {
    both(|which| {
        let context = which.start();
        let uses_ring = context.uses_ring();
        let socket = UdpSocket::bind("127.0.0.1:0").expect("the loopback interface is up");
        let own = socket.local_addr().expect("it is bound");
        assert_eq!(socket.send_to(b"hello", own).ok(), Some(5));
        let results = context.block_on(move || async move {
            let fd = Rc::new(OwnedFd::from(socket));
            let kept = Rc::new(());
            let commands: Vec<_> = (0..3)
                // SAFETY: this command refers to no memory.
                .map(|_| unsafe { uring_cmd(&fd, SIOCINQ, [0; 80], 0, 0, Rc::clone(&kept) as _) })
                .collect();
            let commands: Option<Vec<_>> = commands.into_iter().collect();
            let commands = commands?;
            assert_eq!(Rc::strong_count(&kept), 4, "while they are in flight");
            let results = join_all(commands).await;
            assert_eq!(Rc::strong_count(&kept), 1);
            Some(results)
        });
        let results = results.expect("the context runs");
        assert_eq!(results.is_some(), uses_ring);
        if let Some(results) = results {
            if results[0] == -libc::EOPNOTSUPP {
                eprintln!("SKIPPED: sockets have commands from Linux 6.7 on");
            } else {
                assert_eq!(results, [5, 5, 5]);
            }
        }
        context.stop();
    });
}
