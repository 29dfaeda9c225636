//! The record of requests in flight that the front end keeps for whichever back end comes next (`virtio::in_flight` says what is in
//! it): made here on the front end's request, and taken back when it brings one along.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::message::{FilePart, InFlightShape};
use super::session::Refusal;
use crate::virtio::in_flight::InFlight;
use crate::virtio::memory::Access;
use crate::virtio::memory::mapping::Mapping;

/// The record of all rings, in their order.
#[derive(Clone)]
pub(super) struct InFlightRecord {
    shape: InFlightShape,
    mapping: Arc<Mapping>,
}

impl InFlightRecord {
    /// A record without entries, and its file.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(super) fn create(rings: u16, ring_size: u16) -> Result<(Self, OwnedFd), Refusal> {
        const WHAT: &str = "a record of requests in flight cannot be made";
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"stord-in-flight", flags).map_err(Refusal::system(WHAT))?;
        let file = File::from(file);
        let len = usize::from(rings) * InFlight::size(ring_size);
        file.set_len(len as u64).map_err(Refusal::system(WHAT))?;
        // Nobody can cut it off under us.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(Refusal::system(WHAT))?;
        let part = FilePart {
            size: len as u64,
            offset: 0,
        };
        let file = OwnedFd::from(file);
        let shape = InFlightShape::new(part, rings, ring_size);
        let record = Self::map(shape, &file)?;
        Ok((record, file))
    }

    /// The record that a front end brings along.
    ///
    /// # Errors
    /// It has another length than its shape says.
    pub(super) fn open(shape: InFlightShape, file: &OwnedFd) -> Result<Self, Refusal> {
        let len = usize::from(shape.rings) * InFlight::size(shape.ring_size);
        if shape.part.size < len as u64 {
            return Err(Refusal::InFlight("it is too short for its rings"));
        }
        Self::map(shape, file)
    }

    fn map(shape: InFlightShape, file: &OwnedFd) -> Result<Self, Refusal> {
        let FilePart { size, offset } = shape.part;
        let len = usize::try_from(size).map_err(|_| Refusal::InFlight("it is too long"))?;
        let mapping = Mapping::new(file.as_fd(), offset, len, Access::Write);
        let failed = Refusal::system("the record of requests in flight cannot be mapped");
        Ok(Self {
            shape,
            mapping: mapping.map_err(failed)?,
        })
    }

    /// What the front end has to know of it.
    pub(super) fn shape(&self) -> InFlightShape {
        self.shape
    }

    /// The record of one ring.
    ///
    /// # Errors
    /// The record has none, or not for a ring of that size.
    pub(super) fn of_ring(&self, index: u16, size: u16) -> Result<InFlight, Refusal> {
        let InFlightShape {
            rings, ring_size, ..
        } = self.shape;
        if index >= rings || size > ring_size {
            return Err(Refusal::InFlight("it has no room for the ring"));
        }
        let offset = usize::from(index) * InFlight::size(ring_size);
        let record = InFlight::new(Arc::clone(&self.mapping), offset, ring_size);
        record.ok_or(Refusal::InFlight("it is too short for its rings"))
    }
}
