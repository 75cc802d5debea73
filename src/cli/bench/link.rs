//! A [`Wire`] on a socket: reads and writes in bursts, from one task per connection.

use std::{cell::RefCell, io};

use tokio::{io::Interest, net::TcpStream};

use super::wire::{Frame, Manners, Wire, WireError};

/// Bytes read from a socket at a time. One buffer serves all connections of a thread.
const READ: usize = 256 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ]);
}

/// Why a connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer broke or ended the connection.
    #[error("{0}")]
    Wire(#[from] WireError),
}

/// One connection to a server.
pub struct Link {
    socket: TcpStream,
    wire: Wire,
    /// The beginning of a frame whose rest has not come yet.
    partial: Vec<u8>,
}

impl Link {
    /// Connects to `host:port`, and waits until the server has said what it takes. All calls go to `path`.
    pub async fn connect(authority: &str, path: &str, manners: Manners) -> Result<Self, LinkError> {
        let socket = TcpStream::connect(authority).await?;
        socket.set_nodelay(true)?;
        let mut link = Self { socket, wire: Wire::new(authority, path, manners), partial: Vec::new() };
        let mut ready = false;
        while !ready {
            link.turn(|_, frame| ready |= frame == Frame::Ready).await?;
        }
        Ok(link)
    }

    /// The framing, for opening calls. What they put out is written by the next [`turn`](Self::turn).
    pub fn wire(&mut self) -> &mut Wire {
        &mut self.wire
    }

    /// Writes what is due, waits until the socket can be read or written, and tells `on` each frame that came. Dropping the
    /// future loses nothing.
    pub async fn turn(&mut self, mut on: impl FnMut(&mut Wire, Frame<'_>)) -> Result<(), LinkError> {
        self.write()?;
        let interest =
            if self.wire.out().is_empty() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
        let ready = self.socket.ready(interest).await?;
        if ready.is_readable() {
            SCRATCH.with_borrow_mut(|scratch| self.read(scratch, &mut on))?;
        }
        self.write()
    }

    fn read(&mut self, scratch: &mut [u8], on: &mut impl FnMut(&mut Wire, Frame<'_>)) -> Result<(), LinkError> {
        let read = match self.socket.try_read(scratch) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(read) => &scratch[..read],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut partial = std::mem::take(&mut self.partial);
        let mut input = if partial.is_empty() {
            read
        } else {
            partial.extend_from_slice(read);
            &partial[..]
        };
        while let Some(frame) = self.wire.next(&mut input)? {
            on(&mut self.wire, frame);
        }
        self.partial = input.to_vec();
        Ok(())
    }

    fn write(&mut self) -> Result<(), LinkError> {
        let out = self.wire.out();
        let mut written = 0;
        while written < out.len() {
            match self.socket.try_write(&out[written..]) {
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        out.drain(..written);
        Ok(())
    }
}
