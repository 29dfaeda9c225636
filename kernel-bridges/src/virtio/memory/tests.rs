//! Guest addresses, and what is behind them.

use std::os::fd::AsFd as _;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use stord_aio::Errno;

use super::*;

fn mapping(pages: usize) -> Arc<Mapping> {
    let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    let len = 4096 * pages;
    ftruncate(&file, i64::try_from(len).unwrap()).unwrap();
    Mapping::new(file.as_fd(), 0, len, Access::Write).unwrap()
}

fn region(addr: u64, len: u64) -> Region {
    Region {
        addr,
        len,
        writable: true,
        mapping: mapping(4),
        offset: 0,
    }
}

#[test]
fn more_than_a_file_has_is_not_mapped() {
    let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&file, 8192).unwrap();
    let map = |offset, len| Mapping::new(file.as_fd(), offset, len, Access::Write);
    assert_eq!(map(0, 8193).unwrap_err(), Errno::EINVAL);
    assert_eq!(map(8192, 1).unwrap_err(), Errno::EINVAL);
    assert_eq!(map(0, 0).unwrap_err(), Errno::EINVAL);
    assert_eq!(map(u64::MAX, 2).unwrap_err(), Errno::EINVAL);
    let (all, part) = (map(0, 8192).unwrap(), map(4100, 96).unwrap());
    all.buffer().write_at(4100, b"odd");
    assert_eq!(part.buffer().slice(0..3).to_vec(), b"odd");
    assert_eq!(part.len(), 96);
}

#[test]
fn memory_outlives_its_region() {
    let map = GuestMap::new();
    map.change(|regions| regions.insert(region(0, 4096)))
        .unwrap();
    let local = map.local();
    let held = local.contiguous(0, 8, Access::Write).unwrap();
    map.change(|regions| regions.remove(0, 1));
    assert!(local.contiguous(0, 8, Access::Write).is_err());
    held.write_at(0, b"still");
    assert_eq!(held.slice(0..5).to_vec(), b"still");
}

#[test]
fn regions_do_not_overlap_and_make_sense() {
    let mut regions = Regions::default();
    regions.insert(region(0x1000, 0x2000)).unwrap();
    regions.insert(region(0x4000, 0x1000)).unwrap();
    for (addr, len) in [
        (0x1000, 0x2000),
        (0x0, 0x1001),
        (0x2fff, 1),
        (0x2000, 0x3000),
        (0x0, 0x4000),
    ] {
        let refused = regions.insert(region(addr, len));
        assert_eq!(refused, Err(BadRegion::Overlap), "{addr:#x} {len:#x}");
    }
    for (addr, len, offset) in [
        (0x8000, 0, 0),
        (0x8000, 0x4001, 0),
        (0x8000, 0x1000, 0x3001),
        (0x8000, 0x1000, usize::MAX),
        (u64::MAX, 2, 0),
    ] {
        let odd = Region {
            offset,
            ..region(addr, len)
        };
        assert_eq!(regions.insert(odd), Err(BadRegion::Invalid));
    }
    regions.insert(region(0x3000, 0x1000)).unwrap();
    regions.insert(region(u64::MAX, 1)).unwrap();
    let places: Vec<u64> = regions.iter().map(|region| region.addr).collect();
    assert_eq!(places, [0x1000, 0x3000, 0x4000, u64::MAX]);
    let at = |addr| regions.find(addr).map(|region| region.addr);
    assert_eq!(at(0xfff), None);
    assert_eq!(at(0x1000), Some(0x1000));
    assert_eq!(at(0x2fff), Some(0x1000));
    assert_eq!(at(0x3000), Some(0x3000));
    assert_eq!(at(0x5000), None);
    assert_eq!(at(u64::MAX), Some(u64::MAX));
    let mut regions = regions;
    assert_eq!(regions.remove(0x2fff, 2), 2);
    assert_eq!(regions.remove(0x1000, 0), 0);
    assert_eq!(regions.remove(0x5000, u64::MAX), 1);
    assert_eq!(regions.iter().count(), 1);
}

#[test]
fn a_range_may_span_regions_that_touch() {
    let map = GuestMap::new();
    map.change(|regions| {
        regions.insert(region(0x1000, 0x1000)).unwrap();
        regions.insert(region(0x2000, 0x1000)).unwrap();
        regions.insert(region(0x4000, 0x1000)).unwrap();
        let read_only = Region {
            writable: false,
            ..region(0x5000, 0x1000)
        };
        regions.insert(read_only).unwrap();
        regions.insert(region(u64::MAX - 0xfff, 0x1000)).unwrap();
    });
    let local = map.local();
    let resolve = |addr, len, access| {
        let mut out = IoVec::new();
        local
            .resolve(addr, len, access, &mut out)
            .map(|()| out.buffers().iter().map(IoBuffer::len).collect::<Vec<_>>())
    };
    let write = Access::Write;
    assert_eq!(resolve(0x1ffe, 4, write), Ok(vec![2, 2]));
    assert_eq!(resolve(0x1000, 0x2000, write), Ok(vec![0x1000, 0x1000]));
    assert_eq!(resolve(0x4ffe, 4, Access::Read), Ok(vec![2, 2]));
    assert_eq!(resolve(u64::MAX, 1, write), Ok(vec![1]));
    for (addr, len, access) in [
        (0x1000, 0x2001, write),
        (0xfff, 2, write),
        (0x4ffe, 4, write),
        (0x5000, 1, write),
        (0x3000, 1, Access::Read),
        (u64::MAX, 2, write),
        (u64::MAX, u32::MAX, write),
    ] {
        let fault = Fault {
            addr,
            len: len.into(),
            access,
        };
        assert_eq!(resolve(addr, len, access), Err(fault));
    }
    assert!(local.contiguous(0x1ffe, 4, write).is_err());
    assert!(local.contiguous(0x1ffe, 2, write).is_ok());
}
