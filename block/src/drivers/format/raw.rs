//! `raw`: the bytes of the file child, or a window on them.

use stord_aio::Errno;
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevOptionsRaw;
use stord_qmp::schema::create::PreallocMode;

use crate::driver::{
    ChildId, Extent, ExtentKind, FILE, Format, IoFuture, Limits, Lookup, WritePlan, ZeroFlags,
};
use crate::graph::{Children, Claim, Permissions};

/// Sizes given by the user are multiples of this.
const SECTOR: u64 = 512;

/// The `raw` driver.
pub struct Raw {
    children: Children,
    offset: u64,
    /// The window's fixed length, if the user gave one.
    size: Option<u64>,
}

impl Raw {
    /// Opens the window that `options` describe on the file child.
    ///
    /// # Errors
    /// The window does not lie within the file.
    pub fn open(children: Children, options: &BlockdevOptionsRaw) -> Result<Self, Error> {
        let file_size = children.size(FILE);
        let offset = non_negative(options.offset.unwrap_or(0), "offset")?;
        let size = options
            .size
            .map(|size| non_negative(size, "size"))
            .transpose()?;
        if offset > file_size {
            return Err(Error::generic(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({file_size})"
            )));
        }
        if let Some(size) = size {
            if offset.checked_add(size).is_none_or(|end| end > file_size) {
                return Err(Error::generic(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the containing \
                     file ({file_size})"
                )));
            }
            if !size.is_multiple_of(SECTOR) {
                return Err(Error::generic(format!(
                    "Specified size is not multiple of {SECTOR}"
                )));
            }
        }
        Ok(Self {
            children,
            offset,
            size,
        })
    }

    fn window(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        Ok(Lookup::Ready(Extent {
            kind: ExtentKind::Data {
                child: FILE,
                offset: self.below(offset)?,
            },
            len,
        }))
    }

    fn below(&self, offset: u64) -> Result<u64, Errno> {
        offset.checked_add(self.offset).ok_or(Errno::EFBIG)
    }
}

fn non_negative(value: i64, name: &str) -> Result<u64, Error> {
    u64::try_from(value).map_err(|_| {
        Error::generic(format!(
            "Value '{value}' is out of range for parameter '{name}'"
        ))
    })
}

impl Format for Raw {
    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn length(&self) -> u64 {
        self.size
            .unwrap_or_else(|| self.children.size(FILE).saturating_sub(self.offset))
    }

    fn is_plain(&self) -> bool {
        self.offset == 0 && self.size.is_none()
    }

    fn map_read(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        self.window(offset, len)
    }

    fn load<'a>(&'a self, _offset: u64) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn map_write(&self, offset: u64, len: u64) -> Result<Lookup<Extent>, Errno> {
        self.window(offset, len)
    }

    fn prepare_write<'a>(&'a self, _offset: u64, _len: u64) -> IoFuture<'a, WritePlan> {
        // Every write is an overwrite.
        Box::pin(async { Err(Errno::EINVAL) })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            self.children
                .write_zeroes(FILE, self.below(offset)?, len, flags)
                .await
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        Box::pin(async move { self.children.discard(FILE, self.below(offset)?, len).await })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status_of_child(&self) -> bool {
        true
    }

    fn truncate<'a>(&'a self, size: u64, exact: bool, preallocation: PreallocMode) -> IoFuture<'a> {
        Box::pin(async move {
            if self.size.is_some() {
                return Err(Errno::ENOTSUP);
            }
            let below = self.below(size)?;
            self.children
                .truncate(FILE, below, exact, preallocation)
                .await
        })
    }

    /// Without metadata of its own, it needs and shares just what its parents do, but for the length of what it is a window on.
    fn child_claim(
        &self,
        _child: ChildId,
        wanted: Permissions,
        shared: Permissions,
        _writable: bool,
    ) -> Claim {
        // A window moves with the end of the file, or does not lie within it any more.
        let is_window = self.offset > 0 || self.size.is_some();
        let refused = if is_window {
            Permissions::RESIZE
        } else {
            Permissions::empty()
        };
        Claim {
            permissions: wanted,
            shared: shared - refused,
        }
    }

    fn check_resize(&self, _size: u64) -> Result<(), Error> {
        match self.size {
            Some(_) => Err(Error::generic("Cannot resize fixed-size raw disks")),
            None => Ok(()),
        }
    }
}
