//! Requests that have to wait for something: what their tasks do.

use stord_aio::{Errno, IoBuffer, IoVec};
use stord_block::driver::ZeroFlags;
use stord_block::drivers::protocol::nbd::wire::{Command, CommandFlags};

use super::connection::{Connection, SHORT};
use super::extents;
use super::handshake::MetaContext;
use super::payloads::FRONT;
use super::reply::Style;
use super::request::Request;

impl Connection {
    /// Does what gives nothing but a result.
    pub(super) async fn execute(
        &self,
        command: Option<Command>,
        request: &Request,
        payload: Option<&(IoBuffer, usize)>,
    ) -> Result<(), Errno> {
        let backend = &self.service.backend;
        let durable = self.is_durable(request);
        match command {
            Some(Command::Write) => {
                let Some((whole, length)) = payload else {
                    return if durable {
                        backend.flush().await
                    } else {
                        Ok(())
                    };
                };
                let data = whole.slice(FRONT..FRONT + length).into();
                backend.write(request.offset, data, durable).await
            }
            Some(Command::WriteZeroes) => {
                let mut flags = ZeroFlags::empty();
                flags.set(
                    ZeroFlags::MAY_UNMAP,
                    !request.flags.contains(CommandFlags::NO_HOLE),
                );
                flags.set(
                    ZeroFlags::NO_FALLBACK,
                    request.flags.contains(CommandFlags::FAST_ZERO),
                );
                flags.set(ZeroFlags::DURABLE, durable);
                if request.length == 0 {
                    return Ok(());
                }
                backend
                    .write_zeroes(request.offset, request.length, flags)
                    .await
            }
            Some(Command::Trim) => {
                if request.length > 0 {
                    backend.discard(request.offset, request.length).await?;
                }
                if durable {
                    backend.flush().await
                } else {
                    Ok(())
                }
            }
            Some(Command::Flush) => backend.flush().await,
            Some(Command::Cache) => self.cache(request.offset, request.length).await,
            _ => Err(Errno::EINVAL),
        }
    }

    /// Reads a range and forgets it, so that it is in the page cache, and copied up by a node that copies on read.
    async fn cache(&self, offset: u64, length: u64) -> Result<(), Errno> {
        const STEP: usize = 1 << 20;
        let whole = self.payloads.take(STEP);
        let end = offset + length;
        let mut at = offset;
        let mut result = Ok(());
        while at < end && result.is_ok() {
            let part = usize::try_from(end - at).map_or(STEP, |left| left.min(STEP));
            let memory = whole.slice(FRONT..FRONT + part).into();
            result = self.service.backend.read(at, memory).await;
            at += part as u64;
        }
        self.payloads.put(whole);
        result
    }

    pub(super) async fn read(&self, request: &Request) {
        let style = self.service.manner.style;
        let (Ok(length), Ok(size)) = (
            u32::try_from(request.length),
            usize::try_from(request.length),
        ) else {
            return self.reply(request, Err(Errno::EINVAL));
        };
        if length == 0 {
            return self.reply(request, Ok(()));
        }
        let may_have_holes = style != Style::Simple
            && !request.flags.contains(CommandFlags::DF)
            && request.length > SHORT.into();
        if may_have_holes {
            let found = extents::of(
                MetaContext::Allocation,
                &self.service,
                request.offset,
                request.length,
                false,
            )
            .await;
            // Where it cannot be told, there is data.
            if let Ok(found) = found
                && found.iter().any(|extent| extent.is_zero())
                && found.iter().map(|extent| extent.length).sum::<u64>() == request.length
            {
                return self.read_sparse(request, &found).await;
            }
        }
        let whole = self.payloads.take(size);
        let result = self
            .fill(request.offset, &whole.slice(FRONT..FRONT + size))
            .await;
        match result {
            Ok(()) => self.send_data(request, request.offset, whole, size, true),
            Err(errno) => {
                self.payloads.put(whole);
                self.reply(request, Err(errno));
            }
        }
    }

    async fn fill(&self, offset: u64, memory: &IoBuffer) -> Result<(), Errno> {
        let memory: IoVec = memory.clone().into();
        match self.service.backend.try_read(offset, &memory) {
            Some(result) => result,
            None => self.service.backend.read(offset, memory).await,
        }
    }

    /// Sends data with its header in front.
    fn send_data(
        &self,
        request: &Request,
        offset: u64,
        whole: IoBuffer,
        size: usize,
        is_last: bool,
    ) {
        let style = self.service.manner.style;
        let length = u32::try_from(size).expect("a read is at most MAX_PAYLOAD");
        let head = style.read_header(request, offset, length, is_last);
        let start = FRONT - head.as_bytes().len();
        whole.write_at(start, head.as_bytes());
        self.outbox
            .borrow_mut()
            .push_payload(whole, start..FRONT + size);
    }

    /// Sends data where there is some, and word of holes where there is none.
    async fn read_sparse(&self, request: &Request, extents: &[extents::Extent]) {
        let style = self.service.manner.style;
        let mut at = request.offset;
        for (index, extent) in extents.iter().enumerate() {
            let is_last = index + 1 == extents.len();
            let (Ok(length), Ok(size)) =
                (u32::try_from(extent.length), usize::try_from(extent.length))
            else {
                return self.reply(request, Err(Errno::EINVAL));
            };
            if extent.is_zero() {
                let hole = style.hole(request, at, length, is_last);
                self.outbox.borrow_mut().push(hole);
            } else {
                let whole = self.payloads.take(size);
                if let Err(errno) = self.fill(at, &whole.slice(FRONT..FRONT + size)).await {
                    self.payloads.put(whole);
                    return self.reply(request, Err(errno));
                }
                self.send_data(request, at, whole, size, is_last);
            }
            at += extent.length;
        }
    }

    pub(super) async fn status(&self, request: &Request, payload: Option<&(IoBuffer, usize)>) {
        let asked = match payload {
            None => Ok((request.length, self.service.manner.contexts.clone())),
            Some((whole, length)) => {
                let payload = whole.slice(FRONT..FRONT + length).to_vec();
                self.filter(request, &payload)
            }
        };
        let (length, contexts) = match asked {
            Ok(asked) => asked,
            Err(errno) => return self.reply(request, Err(errno)),
        };
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let style = self.service.manner.style;
        let mut chunks = Vec::new();
        for context in contexts {
            match extents::of(context, &self.service, request.offset, length, one).await {
                Ok(found) => chunks.push(extents::encode(style, context, &found)),
                Err(errno) => return self.reply(request, Err(errno)),
            }
        }
        let count = chunks.len();
        if count == 0 {
            return self.reply(request, Ok(()));
        }
        let mut outbox = self.outbox.borrow_mut();
        for (index, chunk) in chunks.into_iter().enumerate() {
            outbox.push(style.status(request, &chunk, index + 1 == count));
        }
    }

    /// What a block status with a payload asks for: a length, and some of the contexts that were agreed on.
    fn filter(&self, request: &Request, payload: &[u8]) -> Result<(u64, Vec<MetaContext>), Errno> {
        let (length, ids) = payload.split_first_chunk().ok_or(Errno::EINVAL)?;
        let length = u64::from_be_bytes(*length);
        let end = request.offset.checked_add(length);
        if length == 0 || end.is_none_or(|end| end > self.service.backend.size()) {
            return Err(Errno::EINVAL);
        }
        let mut contexts = Vec::new();
        let mut chunks = ids.chunks_exact(4);
        for id in &mut chunks {
            let id = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
            let mut agreed = self.service.manner.contexts.iter();
            let context = agreed
                .find(|context| context.id() == id)
                .ok_or(Errno::EINVAL)?;
            if contexts.contains(context) {
                return Err(Errno::EINVAL);
            }
            contexts.push(*context);
        }
        if !chunks.remainder().is_empty() {
            return Err(Errno::EINVAL);
        }
        Ok((length, contexts))
    }
}
