//! Large answers, handed over piece by piece as the client takes them.

use std::{collections::VecDeque, mem::take};

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    answer::{Values, put_record},
    held::{Held, Holder, Rest},
};
use crate::{
    grpc::BodyError,
    server::data::{Data, List},
};

/// Bytes in one piece of copies.
const PIECE: usize = 64 << 10;
/// Bytes in one piece of references, which takes no memory but for records that are overwritten before it has left.
const LONG_PIECE: usize = 256 << 10;

/// Records of an answer, and what stands before and behind them.
pub(super) struct Section {
    /// What stands before the records.
    pub head: Bytes,
    /// The records.
    pub rest: Rest,
    /// How many bytes they take.
    pub length: u64,
    /// How they are handed over.
    pub form: Form,
    /// What stands behind them.
    pub tail: Bytes,
}

/// How records are handed over.
#[derive(Clone, Copy)]
pub(super) enum Form {
    /// As they lie.
    Referred,
    /// Copied together.
    Copied(Values),
}

impl From<Bytes> for Section {
    fn from(head: Bytes) -> Self {
        let (rest, form) = (Rest::List(Vec::new().into_iter()), Form::Referred);
        Self { head, rest, length: 0, form, tail: Bytes::new() }
    }
}

impl Section {
    /// How many bytes the section takes.
    pub fn len(&self) -> u64 {
        self.head.len() as u64 + self.length + self.tail.len() as u64
    }

    /// Appends all of it.
    pub fn copy_to(self, out: &mut BytesMut) {
        let values = match self.form {
            Form::Referred => Values::Sent,
            Form::Copied(values) => values,
        };
        out.put_slice(&self.head);
        self.rest.for_each(|record| put_record(out, record, values));
        out.put_slice(&self.tail);
    }
}

/// Sections, piece by piece.
pub(super) struct Pieces {
    /// What stands around the records of the sections that are not written yet.
    around: VecDeque<Around>,
    /// Their records; none when all are written.
    held: Option<Held>,
}

struct Around {
    head: Bytes,
    form: Form,
    tail: Bytes,
}

impl Pieces {
    /// Puts the records into the care of `holder`.
    pub fn new(holder: &Holder, sections: impl IntoIterator<Item = Section>) -> Self {
        let parts = |section: Section| {
            let Section { head, rest, form, tail, .. } = section;
            (Around { head, form, tail }, rest)
        };
        let (around, rests): (VecDeque<_>, VecDeque<_>) = sections.into_iter().map(parts).unzip();
        Self { around, held: Some(holder.hold(rests)) }
    }

    fn fill(&mut self, piece: &mut List) -> Result<(), BodyError> {
        let Some(held) = &mut self.held else { return Ok(()) };
        while let Some(around) = self.around.front_mut()
            && piece.len() < PIECE
        {
            piece.push_bytes(take(&mut around.head));
            let last = match around.form {
                Form::Referred => held.refer(piece, LONG_PIECE)?,
                Form::Copied(values) => copy(held, values, piece)?,
            };
            if !last {
                return Ok(());
            }
            piece.push_bytes(take(&mut around.tail));
            self.around.pop_front();
        }
        if self.around.is_empty() {
            self.held = None;
        }
        Ok(())
    }
}

impl Iterator for Pieces {
    type Item = Result<Data, BodyError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut piece = List::default();
        if let Err(error) = self.fill(&mut piece) {
            self.held = None;
            return Some(Err(error));
        }
        (!piece.is_empty()).then(|| Ok(piece.into()))
    }
}

/// Appends copies to `piece`. True when they are the last.
fn copy(held: &mut Held, values: Values, piece: &mut List) -> Result<bool, BodyError> {
    let mut copies = BytesMut::with_capacity(PIECE);
    let last = held.hand_out(|record| {
        put_record(&mut copies, record, values);
        copies.len() < PIECE
    })?;
    piece.push_bytes(copies.freeze());
    Ok(last)
}
