//! Files: whole transfers, ends of files, large and scattered requests, on both engines.

mod engines;

use engines::both;
use stord_aio::{Engine, File, IoBuffer, IoVec};

fn scratch(engine: Engine) -> File {
    File::new(tempfile::tempfile().expect("a scratch file").into(), engine)
}

#[test]
fn what_was_written_is_read_back() {
    both(|which| {
        for engine in [Engine::Auto, Engine::Threads, Engine::Uring] {
            let context = which.start();
            let result = context.block_on(move || async move {
                let file = scratch(engine);
                let pattern: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
                let mut source = IoVec::new();
                for part in pattern.chunks(4096) {
                    source.push(IoBuffer::copy_of(part));
                }
                file.write(512, source, true).await?;
                file.fsync(false).await?;
                let target = IoBuffer::zeroed(20_000);
                let count = file.read(0, target.clone().into()).await?;
                assert_eq!(count, 10_512, "short only at the end of the file");
                assert!(target.slice(0..512).is_zero());
                assert_eq!(target.slice(512..10_512).to_vec(), pattern);
                Ok::<_, stord_aio::Errno>(())
            });
            assert_eq!(result, Ok(Ok(())), "{which:?} {engine:?}");
            context.stop();
        }
    });
}
