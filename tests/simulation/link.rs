//! The way from the cache to one member: pipes that delay, hold back, cut and reset what goes through them.
//!
//! Bytes keep their order, as TCP sees to. A black hole holds everything back, also the news that the member's process has
//! ended; when it is over, what was held back arrives, or the connection turns out to be dead.

use std::{io, sync::Arc};

use millpond::upstream::{Dial, DialFuture, Io};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    sync::Notify,
    time::sleep,
};

use crate::{dice::Dice, model::server::Node};

/// Bytes in each half of a pipe before its writer waits.
const PIPE: usize = 64 << 10;

/// What is wrong with one direction.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// Nothing arrives.
    pub held: bool,
    /// The longest delay of a piece, in milliseconds.
    pub delay: u64,
    /// The largest piece, in bytes.
    pub piece: usize,
}

impl Way {
    pub const SOUND: Self = Self { held: false, delay: 2, piece: 16 << 10 };
}

#[derive(Debug)]
struct State {
    up: Way,
    down: Way,
    /// Connections older than this count are dead.
    resets: u64,
    /// Connections older than this count die in the middle of the next piece.
    cuts: u64,
}

/// A link to a member. Cheap to clone.
#[derive(Clone)]
pub struct Link(Arc<Shared>);

struct Shared {
    node: Node,
    state: Mutex<State>,
    changed: Notify,
    dice: Mutex<Dice>,
}

/// What a connection remembers of the moment it was opened.
#[derive(Clone)]
struct Connection {
    incarnation: u64,
    resets: u64,
    cuts: u64,
    dead: Arc<Mutex<bool>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Link {
    pub fn new(node: Node, dice: Dice) -> Self {
        let state = State { up: Way::SOUND, down: Way::SOUND, resets: 0, cuts: 0 };
        Self(Arc::new(Shared { node, state: Mutex::new(state), changed: Notify::new(), dice: Mutex::new(dice) }))
    }

    /// Changes how the two directions behave, toward the member and back.
    pub fn set(&self, up: Way, down: Way) {
        let mut state = self.0.state.lock();
        (state.up, state.down) = (up, down);
        drop(state);
        self.touch();
    }

    /// Ends every connection.
    pub fn reset(&self) {
        self.0.state.lock().resets += 1;
        self.touch();
    }

    /// Ends every connection in the middle of what it delivers next.
    pub fn cut(&self) {
        self.0.state.lock().cuts += 1;
        self.touch();
    }

    /// The member's process has ended or begun, or the link has changed.
    pub fn touch(&self) {
        self.0.changed.notify_waiters();
    }

    fn way(&self, direction: Direction) -> Way {
        let state = self.0.state.lock();
        if direction == Direction::Up { state.up } else { state.down }
    }

    fn is_held(&self) -> bool {
        let state = self.0.state.lock();
        state.up.held || state.down.held
    }

    fn is_dead(&self, connection: &Connection) -> bool {
        let (resets, held) = {
            let state = self.0.state.lock();
            (state.resets, state.up.held || state.down.held)
        };
        let incarnation = self.0.node.cluster.look().members[self.0.node.at].incarnation;
        *connection.dead.lock() || (!held && (resets != connection.resets || incarnation != connection.incarnation))
    }

    async fn until(&self, mut holds: impl FnMut() -> bool) {
        loop {
            let changed = self.0.changed.notified();
            if holds() {
                return;
            }
            changed.await;
        }
    }

    async fn open(&self) -> io::Result<Box<dyn Io>> {
        self.until(|| !self.is_held()).await;
        let delay = self.way(Direction::Up).delay;
        let pause = self.0.dice.lock().pause(delay);
        sleep(pause).await;
        let incarnation = {
            let inner = self.0.node.cluster.look();
            let member = &inner.members[self.0.node.at];
            if !member.alive {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            member.incarnation
        };
        let (resets, cuts) = {
            let state = self.0.state.lock();
            (state.resets, state.cuts)
        };
        let connection = Connection { incarnation, resets, cuts, dead: Arc::default() };
        let (client, near) = duplex(PIPE);
        let (far, server) = duplex(PIPE);
        let ((near_read, near_write), (far_read, far_write)) = (split(near), split(far));
        tokio::spawn(self.clone().carry(connection.clone(), Direction::Up, near_read, far_write));
        tokio::spawn(self.clone().carry(connection, Direction::Down, far_read, near_write));
        tokio::spawn(self.0.node.clone().serve(server));
        Ok(Box::new(client))
    }

    /// Carries bytes in one direction until the connection ends.
    async fn carry(
        self,
        connection: Connection,
        direction: Direction,
        mut from: ReadHalf<DuplexStream>,
        mut to: WriteHalf<DuplexStream>,
    ) {
        let mut dice = self.0.dice.lock().fork();
        let carried = async {
            let mut buffer = vec![0; Way::SOUND.piece];
            loop {
                let piece = self.way(direction).piece.min(buffer.len());
                let Ok(read @ 1..) = from.read(&mut buffer[..piece]).await else { break };
                sleep(dice.pause(self.way(direction).delay)).await;
                self.until(|| !self.way(direction).held).await;
                let cut = self.0.state.lock().cuts != connection.cuts;
                let arrives = if cut { read / 2 } else { read };
                if to.write_all(&buffer[..arrives]).await.is_err() || cut {
                    break;
                }
            }
        };
        tokio::select! {
            biased;
            () = self.until(|| self.is_dead(&connection)) => {}
            () = carried => {}
        }
        // Neither side is told more than that it is over.
        *connection.dead.lock() = true;
        self.touch();
    }
}

impl Dial for Link {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(self.open())
    }
}
