//! A life of an image beside a vector of bytes: whatever the requests are, both read the same, and at the end the check finds nothing.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use stord_aio::{join_all, sim};
use stord_qmp::schema::block::BlockdevRef;
use stord_qmp::schema::create::{BlockdevCreateOptionsQcow2, BlockdevQcow2Version, PreallocMode};

use super::super::check::{Repair, check_children};
use super::super::create::create;
use super::opened::{Image, Setup};
use crate::backend::Backend;
use crate::driver::{FILE, ZeroFlags};
use crate::graph::{Children, Claim, Permissions};
use crate::io;
use crate::job::JobControl;
use crate::testing::{MemoryDisk, leaf};

/// Choices, one byte each; zero when they have run out.
struct Choices(VecDeque<u8>);

impl Choices {
    fn byte(&mut self) -> u8 {
        self.0.pop_front().unwrap_or(0)
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    fn below(&mut self, n: usize) -> usize {
        let wide = usize::from(self.byte()) << 8 | usize::from(self.byte());
        wide % n.max(1)
    }
}

/// A request on a range of bytes.
#[derive(Clone, Copy, Debug)]
enum Request {
    Write(u8),
    Zero(ZeroFlags),
    Discard,
    Read,
}

/// An image and what it must read as.
#[derive(Clone)]
struct Life {
    image: Image,
    model: Rc<RefCell<Vec<u8>>>,
}

impl Life {
    async fn request(self, request: Request, start: usize, len: usize) {
        let (offset, bytes) = (start as u64, len as u64);
        let range = start..start + len;
        match request {
            Request::Write(fill) => {
                let data = vec![fill; len];
                self.image.write(offset, &data).await.expect("writes");
                self.model.borrow_mut()[range].fill(fill);
            }
            Request::Zero(flags) => {
                io::write_zeroes(&self.image.0, offset, bytes, flags)
                    .await
                    .expect("zeroes");
                self.model.borrow_mut()[range].fill(0);
            }
            Request::Discard => {
                io::discard(&self.image.0, offset, bytes)
                    .await
                    .expect("discards");
                let read = self.image.read(offset, len).await.expect("reads");
                for (was, now) in self.model.borrow_mut()[range].iter_mut().zip(read) {
                    assert!(now == 0 || now == *was, "{now:#x} after a discard");
                    *was = now;
                }
            }
            Request::Read => {
                let read = self.image.read(offset, len).await.expect("reads");
                assert!(read == self.model.borrow()[range], "what was read");
            }
        }
    }

    /// A request that `choices` make, and its range.
    fn choose(&self, choices: &mut Choices, fill: u8) -> (Request, usize, usize) {
        let size = self.model.borrow().len();
        let request = match choices.byte() % 8 {
            0..=2 => Request::Write(fill),
            3 => Request::Zero(ZeroFlags::empty()),
            4 => Request::Zero(ZeroFlags::MAY_UNMAP),
            5 | 6 => Request::Discard,
            _ => Request::Read,
        };
        let unit = [1, 512, 4096, 16384][choices.below(4)];
        let start = choices.below(size.div_ceil(unit)) * unit;
        let len = (1 + choices.below(12)) * unit;
        (request, start, len.min(size - start).max(1))
    }

    async fn resize(&self, choices: &mut Choices) {
        let size = 512 * (1 + choices.below(1024));
        io::truncate(&self.image.0, size as u64, true, PreallocMode::Off)
            .await
            .expect("resizes");
        self.model.borrow_mut().resize(size, 0);
    }

    async fn compare(&self) {
        let read = self.image.read_all().await.expect("reads");
        let model = self.model.borrow();
        assert_eq!(read.len(), model.len());
        let differs = read.iter().zip(model.iter()).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the byte that differs");
    }
}

fn options(choices: &mut Choices) -> BlockdevCreateOptionsQcow2 {
    let nowhere = BlockdevRef::Reference("file".to_owned());
    let mut options =
        BlockdevCreateOptionsQcow2::new(nowhere, 512 * (1 + choices.below(512)) as u64);
    let extended = choices.byte().is_multiple_of(4);
    let bits = if extended { 14 } else { 9 + choices.byte() % 6 };
    options.cluster_size = Some(1 << bits);
    options.extended_l2 = Some(extended);
    if !extended && choices.byte().is_multiple_of(4) {
        options.version = Some(BlockdevQcow2Version::V2);
    } else {
        options.refcount_bits = Some(1 << (choices.byte() % 7));
        options.lazy_refcounts = Some(choices.flag());
    }
    options
}

/// Lives the life that the bytes describe.
pub fn live_beside_model(bytes: &[u8]) {
    let mut choices = Choices(bytes.iter().copied().collect());
    let seed = u64::from(choices.byte());
    sim::run(seed, move || async move {
        let file = MemoryDisk::default();
        let options = options(&mut choices);
        let backend = Backend::new("create".to_owned(), leaf(&file));
        backend.root().set_claim(Claim {
            permissions: Permissions::all(),
            shared: Permissions::all(),
        });
        create(&options, &backend, None, &JobControl::default())
            .await
            .expect("creates");
        let setup = || Setup::new(&file);
        let mut life = Life {
            image: setup().open().await.expect("opens"),
            model: Rc::new(RefCell::new(vec![
                0;
                usize::try_from(options.size)
                    .expect("small")
            ])),
        };
        let mut fill = 0u8;
        while !choices.0.is_empty() && fill < 200 {
            fill += 1;
            match choices.byte() % 16 {
                0 => life.image.flush().await.expect("flushes"),
                1 => life.resize(&mut choices).await,
                2 => {
                    life.image.clone().close().await.expect("closes");
                    life.image = setup().open().await.expect("opens");
                }
                3..=8 => {
                    let (request, start, len) = life.choose(&mut choices, fill);
                    life.clone().request(request, start, len).await;
                }
                // Several at once, unless they touch the same bytes; perhaps with a flush.
                number => {
                    let mut taken: Vec<(usize, usize)> = Vec::new();
                    let mut together = Vec::new();
                    for _ in 0..number % 4 + 2 {
                        let (request, start, len) = life.choose(&mut choices, fill);
                        let apart = |&(at, end): &(usize, usize)| start + len <= at || end <= start;
                        if taken.iter().all(apart) {
                            taken.push((start, start + len));
                            together.push(life.clone().request(request, start, len));
                        }
                    }
                    join_all(together).await;
                }
            }
        }
        life.compare().await;
        life.image.clone().close().await.expect("closes");
        let children = Children::new(&["file"]);
        children.edges()[usize::from(FILE.0)].set_node(Some(leaf(&file)));
        let report = check_children(&children, Repair::Nothing)
            .await
            .expect("checks");
        assert_eq!(
            (report.corruptions, report.leaks, report.check_errors),
            (0, 0, 0),
            "{report:?}"
        );
        life.image = setup().open().await.expect("opens");
        life.compare().await;
        life.image.close().await.expect("closes");
    });
}

#[cfg(test)]
mod tests {
    use super::live_beside_model;
    use crate::testing::Random;

    #[test]
    fn lives_chosen_at_random_agree_with_the_model() {
        for seed in 0..60 {
            let mut random = Random::new(seed);
            let bytes: Vec<u8> = (0..40 + random.below(200))
                .map(|_| random.next().to_le_bytes()[0])
                .collect();
            live_beside_model(&bytes);
        }
    }
}
