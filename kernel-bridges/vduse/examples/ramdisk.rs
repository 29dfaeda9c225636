//! A RAM disk of 64 MiB: run it as root after `modprobe -a vduse virtio_vdpa`; Enter removes it.

#![expect(clippy::cast_possible_truncation, reason = "for machines of 64 bits")]

use std::io;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vduse::*;

const SECTORS: u64 = 128 << 10;
/// `VIRTIO_BLK_S_OK`, `VIRTIO_BLK_S_IOERR` and `VIRTIO_BLK_S_UNSUPP`.
const STATUS: [u8; 3] = [0, 1, 2];

fn main() -> io::Result<()> {
    let name: DeviceName = "ramdisk".parse().expect("a good name");
    let control = Control::open()?;
    let capacity = SECTORS.to_le_bytes().to_vec();
    control.create(&DeviceConfig::new(name.clone(), BLOCK_DEVICE, 1, capacity))?;
    let device = Device::open(&name)?;
    device.set_up_queue(0, 128)?;
    let disk = name.clone();
    let user = std::thread::spawn(move || {
        vdpa::add(vdpa::VDUSE, &disk).map_err(io::Error::other)?;
        println!("{:?}", vdpa::block_device(&disk)?);
        io::stdin().read_line(&mut String::new())?;
        vdpa::delete(&disk).map_err(io::Error::other)
    });
    let served = serve(&device, || user.is_finished());
    drop(device);
    let used = user.join().expect("no panic");
    control.destroy(&name).and(served).and(used)
}

fn serve(device: &Device, is_over: impl Fn() -> bool) -> io::Result<()> {
    let mut disk = vec![[0; 512]; SECTORS as usize];
    let kick = EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?;
    let (mut memory, mut queue) = (Memory::new(), None);
    while !is_over() {
        let watched = [device.as_fd(), kick.as_fd()];
        let mut watched = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut watched, PollTimeout::from(100u8))?;
        while let Some(message) = device.read_message()? {
            let mut response = Response::Done;
            match (message.request, &queue) {
                (Request::SetStatus(0), _) => queue = None,
                (Request::SetStatus(status), None) if status & STATUS_DRIVER_OK != 0 => {
                    queue = Some(SplitQueue::new(device, &mut memory, 0)?);
                    device.set_kick(0, Some(kick.as_fd()))?;
                }
                (Request::GetQueueState { .. }, Some(queue)) => {
                    response = Response::QueueState(queue.state());
                }
                _ => {}
            }
            memory.forget();
            device.respond(message.id, response)?;
        }
        let _ = kick.read();
        while let Some(queue) = &mut queue
            && let Some(chain) = queue.pop(device, &mut memory)?
        {
            let written = execute(&chain, disk.as_flattened_mut(), device, &mut memory)?;
            queue.push(device, &mut memory, &chain, written)?;
            queue.notify(device, &mut memory)?;
        }
    }
    Ok(())
}

/// A request is a header, data, and a byte for the status. Gives the number of bytes written to its memory.
fn execute(chain: &Chain, disk: &mut [u8], of: &Device, memory: &mut Memory) -> io::Result<u32> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let (header, data) = chain.readable().split_first().ok_or_else(invalid)?;
    let (status, room) = chain.writable().split_last().ok_or_else(invalid)?;
    let (mut kind, mut sector) = ([0; 4], [0; 8]);
    memory.read(of, header.0, &mut kind)?;
    memory.read(of, header.0 + 8, &mut sector)?;
    let mut at = u64::from_le_bytes(sector).saturating_mul(512) as usize;
    let (pieces, mut result, mut written) = match kind[0] {
        0 => (room, STATUS[0], 1),
        1 => (data, STATUS[0], 1),
        _ => (&[][..], STATUS[2], 1),
    };
    for &(address, length) in pieces {
        let end = at.saturating_add(length as usize);
        match disk.get_mut(at..end) {
            Some(bytes) if kind[0] == 1 => memory.read(of, address, bytes)?,
            Some(bytes) => memory.write(of, address, bytes)?,
            None => result = STATUS[1],
        }
        (at, written) = (end, written + if kind[0] == 0 { length } else { 0 });
    }
    memory.write(of, status.0, &[result])?;
    Ok(written)
}
