//! Buffers and lists of buffers.

use std::os::unix::fs::FileExt as _;
use std::panic::catch_unwind;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use stord_aio::{ExposedMemory, IoBuffer, IoVec, SharedMemory};

fn list(parts: &[&[u8]]) -> IoVec {
    let mut list = IoVec::new();
    for part in parts {
        list.push(IoBuffer::copy_of(part));
    }
    list
}

#[test]
fn new_buffers_are_zero_and_aligned() {
    for len in [1, 100, 4096, 5000, 1 << 20, 64 << 20] {
        let buffer = IoBuffer::zeroed(len);
        assert_eq!(buffer.len(), len);
        assert_eq!(buffer.addr() % 4096, 0);
        assert!(buffer.is_zero());
    }
    let empty = IoBuffer::zeroed(0);
    assert!(empty.is_empty() && empty.is_zero());
    assert_eq!(empty.to_vec(), []);
}

#[test]
fn released_pages_read_as_zeroes_and_no_others() {
    let large = IoBuffer::zeroed(1 << 20);
    large.fill(1);
    large.slice(100..1 << 20).release(0..9000);
    let mut expected = vec![1; 1 << 20];
    expected[4096..8192].fill(0);
    assert!(large.to_vec() == expected);
    large.release(5..4000);
    assert!(large.to_vec() == expected);
    let small = IoBuffer::copy_of(&[1; 8192]);
    small.release(0..8192);
    assert_eq!(small.to_vec(), [1; 8192]);
    assert!(catch_unwind(|| IoBuffer::zeroed(1 << 20).release(0..(1 << 20) + 1)).is_err());
}

#[test]
fn shared_memory_is_the_same_on_every_thread_and_can_be_released() {
    let memory = SharedMemory::zeroed(1 << 20).expect("there is memory");
    let theirs = Arc::clone(&memory);
    thread::spawn(move || theirs.buffer().fill(7))
        .join()
        .expect("it does not panic");
    let buffer = memory.buffer();
    drop(memory);
    assert!(buffer.to_vec() == vec![7; 1 << 20]);
    buffer.slice(8192..1 << 20).release(0..4096);
    let mut expected = vec![7; 1 << 20];
    expected[8192..12288].fill(0);
    assert!(buffer.to_vec() == expected);
}

#[test]
fn any_byte_that_is_not_zero_is_found() {
    for len in [1, 7, 63, 64, 65, 200] {
        for at in 0..len {
            let buffer = IoBuffer::zeroed(len + 3).slice(3..len + 3);
            assert!(buffer.is_zero());
            buffer.write_at(at, &[1]);
            assert!(!buffer.is_zero(), "byte {at} of {len}");
        }
    }
}

#[test]
fn slices_and_clones_share_memory_and_keep_it() {
    let whole = IoBuffer::copy_of(b"0123456789");
    let slice = whole.slice(2..6);
    let deeper = slice.slice(1..3);
    drop((whole, slice.clone()));
    slice.write_at(1, b"xy");
    assert_eq!(deeper.to_vec(), b"xy");
    let mut out = [0; 4];
    slice.read_at(0, &mut out);
    assert_eq!(&out, b"2xy5");
    slice.fill(b'z');
    assert_eq!(deeper.to_vec(), b"zz");
}

#[test]
fn a_vector_is_taken_over_without_copying() {
    let v = vec![5; 100];
    let addr = v.as_ptr().addr();
    let buffer = IoBuffer::from_vec(v);
    assert_eq!(buffer.addr(), addr);
    assert_eq!(buffer.to_vec(), vec![5; 100]);
}

#[test]
fn accesses_outside_panic() {
    let outside: [fn(IoBuffer); 6] = [
        |b| drop(b.slice(5..11)),
        |b| drop(b.slice(11..11)),
        #[expect(clippy::reversed_empty_ranges, reason = "it must be refused")]
        |b| drop(b.slice(5..4)),
        |b| b.write_at(9, b"xx"),
        |b| b.read_at(usize::MAX, &mut [0; 2]),
        |b| drop(IoVec::from(b).slice(0..11)),
    ];
    for access in outside {
        let result = catch_unwind(|| access(IoBuffer::zeroed(10)));
        assert!(result.is_err());
    }
}

#[test]
fn foreign_memory_is_kept_until_the_last_user_is_gone() {
    let owner = Rc::new(());
    let static_memory = Box::leak(vec![3u8; 16].into_boxed_slice());
    let ptr = static_memory.as_mut_ptr();
    let owner_again = Rc::clone(&owner);
    #[expect(unsafe_code, reason = "the constructor under test")]
    // SAFETY: the memory is never freed, and the reference to it is gone.
    let buffer = unsafe { IoBuffer::from_raw(ptr, 16, owner_again) };
    let list: IoVec = buffer.slice(4..8).into();
    drop(buffer);
    assert_eq!(Rc::strong_count(&owner), 2);
    assert_eq!(list.to_vec(), [3; 4]);
    drop(list);
    assert_eq!(Rc::strong_count(&owner), 1);
}

#[test]
fn a_list_is_one_piece_of_memory() {
    let all = list(&[b"abc", b"", b"defg", b"h"]);
    assert_eq!(all.len(), 8);
    assert_eq!(all.buffers().len(), 3, "empty buffers are left out");
    assert_eq!(all.to_vec(), b"abcdefgh");
    for start in 0..=8 {
        for end in start..=8 {
            let slice = all.slice(start..end);
            let expected = &b"abcdefgh"[usize::try_from(start).unwrap()..][..slice.to_vec().len()];
            assert_eq!(slice.to_vec(), expected);
            assert_eq!(slice.len(), end - start);
            assert_eq!(slice.is_empty(), start == end);
        }
    }
    all.write_at(2, b"XYZ");
    let mut out = [0; 5];
    all.read_at(1, &mut out);
    assert_eq!(&out, b"bXYZf");
    all.fill(0);
    assert!(all.is_zero());
}

#[test]
fn copying_does_not_care_where_buffers_end() {
    let from = list(&[b"ab", b"cdefg", b"h"]);
    let to = list(&[b"...", b"....", b"...."]);
    from.copy_to(&to);
    assert_eq!(to.to_vec(), b"abcdefgh...");
}

#[test]
fn alignment_looks_at_every_buffer() {
    let whole = IoBuffer::zeroed(8192);
    let mut all: IoVec = whole.slice(0..4096).into();
    assert!(all.is_aligned(4096, 4096));
    all.push(whole.slice(4096..4608));
    assert!(all.is_aligned(4096, 512) && !all.is_aligned(4096, 4096));
    all.push(whole.slice(5000..5512));
    assert!(all.is_aligned(8, 512) && !all.is_aligned(512, 512));
}

#[test]
fn lists_can_be_joined() {
    let mut all = list(&[b"ab"]);
    all.append(list(&[b"cd", b"ef"]));
    all.append(IoVec::new());
    assert_eq!(all.to_vec(), b"abcdef");
    let collected: IoVec = all.buffers().iter().rev().cloned().collect();
    assert_eq!(collected.to_vec(), b"efcdab");
}

#[test]
fn exposed_memory_is_the_files_and_cannot_be_taken_away() {
    let memory = ExposedMemory::new(c"test", 8192).unwrap();
    let buffer = memory.buffer();
    assert!(buffer.len() == 8192 && buffer.is_zero());
    buffer.store_u16(4096, 0x1234, Ordering::Release);
    let file = std::fs::File::from(memory.file().try_clone_to_owned().unwrap());
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [0x34, 0x12]);
    file.write_all_at(&[1, 2, 3, 4], 8).unwrap();
    assert_eq!(buffer.load_u32(8, Ordering::Acquire), 0x0403_0201);
    assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
    assert!(catch_unwind(|| memory.buffer().load_u16(8191, Ordering::Relaxed)).is_err());
    assert!(catch_unwind(|| memory.buffer().load_u32(6, Ordering::Relaxed)).is_err());
    // Others may have the pages still, so they are not given back.
    buffer.release(0..8192);
    assert_eq!(buffer.load_u16(4096, Ordering::Acquire), 0x1234);
    drop(memory);
    assert_eq!(buffer.load_u16(4096, Ordering::Acquire), 0x1234);
}
