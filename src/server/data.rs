//! What a frame of a body holds: bytes, or references to records, which are copied for the first time on their way into the
//! socket.
//!
//! Neighbours in the index are held by a reference to their leaf. One to each record would write to all of them, and readers
//! on several cores would take them out of each other's caches.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};

use crate::store::{Record, Run};

/// What a frame of a body holds.
#[derive(Debug)]
pub enum Data {
    /// Bytes.
    Bytes(Bytes),
    /// References to records, and what stands around them.
    List(Box<List>),
}

impl Default for Data {
    fn default() -> Self {
        Self::Bytes(Bytes::new())
    }
}

impl From<Bytes> for Data {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<List> for Data {
    fn from(list: List) -> Self {
        Self::List(Box::new(list))
    }
}

impl Buf for Data {
    fn remaining(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::List(list) => list.len,
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::List(list) => list.first(),
        }
    }

    fn chunks_vectored<'a>(&'a self, slots: &mut [IoSlice<'a>]) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.chunks_vectored(slots),
            Self::List(list) => list.fill(slots),
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Bytes(bytes) => bytes.advance(count),
            Self::List(list) => list.advance(count),
        }
    }
}

/// A part of an answer: encoded records one after the other, and what stands around them.
#[derive(Debug, Default)]
pub struct List {
    parts: VecDeque<Part>,
    /// How much of the first slice has been sent.
    sent: usize,
    /// How many bytes are left to send.
    len: usize,
}

/// Some slices of a list, at least one, none of which is empty.
#[derive(Debug)]
enum Part {
    Bytes(Bytes),
    Record(Record),
    Run(Run),
}

impl Part {
    fn first(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Record(record) => record.field(),
            Self::Run(run) => run.get(0).map(Record::field).unwrap_or_default(),
        }
    }

    /// Puts slices into `slots`, and tells into how many of them.
    fn fill<'a>(&'a self, slots: &mut [IoSlice<'a>]) -> usize {
        match self {
            Self::Bytes(_) | Self::Record(_) => {
                slots.iter_mut().take(1).map(|slot| *slot = IoSlice::new(self.first())).count()
            }
            // Nothing else is done here, so that the processor fetches several records at a time.
            Self::Run(run) => {
                slots.iter_mut().zip(run.records()).map(|(slot, record)| *slot = IoSlice::new(record.field())).count()
            }
        }
    }

    /// Leaves out the first slices as long as `count` bytes cover them, and takes those off it. True when no slice is left.
    fn advance(&mut self, count: &mut usize) -> bool {
        match self {
            Self::Bytes(_) | Self::Record(_) => cover(count, self.first()),
            Self::Run(run) => {
                let covered = run.records().take_while(|record| cover(count, record.field())).count();
                run.advance(covered);
                run.is_empty()
            }
        }
    }
}

/// Takes the bytes of `slice` off `count`, if there are so many.
fn cover(count: &mut usize, slice: &[u8]) -> bool {
    let left = count.checked_sub(slice.len());
    *count = left.unwrap_or(*count);
    left.is_some()
}

impl List {
    /// How many bytes are left to send.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends bytes.
    pub fn push_bytes(&mut self, bytes: Bytes) {
        self.push(bytes.len(), Part::Bytes(bytes));
    }

    /// Appends a record, as a field of a `RangeResponse`.
    pub fn push_record(&mut self, record: &Record) {
        self.push(record.field().len(), Part::Record(record.clone()));
    }

    /// Appends neighbouring records, each as a field of a `RangeResponse`.
    pub fn push_run(&mut self, run: Run) {
        self.push(run.sums().wire as usize, Part::Run(run));
    }

    fn push(&mut self, length: usize, part: Part) {
        if length > 0 {
            self.len += length;
            self.parts.push_back(part);
        }
    }

    fn first(&self) -> &[u8] {
        self.parts.front().map(|first| &first.first()[self.sent..]).unwrap_or_default()
    }

    fn fill<'a>(&'a self, slots: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for part in &self.parts {
            filled += part.fill(&mut slots[filled..]);
            if filled == slots.len() {
                break;
            }
        }
        // It may have been sent in part.
        if let Some(first) = slots.first_mut() {
            *first = IoSlice::new(self.first());
        }
        filled
    }

    fn advance(&mut self, count: usize) {
        self.len -= count;
        // From where the first slice begins, so that several are left out in one go.
        self.sent += count;
        while let Some(first) = self.parts.front_mut()
            && first.advance(&mut self.sent)
        {
            self.parts.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::{Revision, Tree};

    fn record(number: usize, size: usize) -> Record {
        let key = format!("k{number:03}");
        Record::new(key.as_bytes(), &vec![b'v'; size], Revision(2), Revision(3), 1, 0)
    }

    /// A list of everything that a list can have, and its bytes.
    fn list(sizes: &[usize]) -> (List, Vec<u8>) {
        let records: Vec<_> = sizes.iter().enumerate().map(|(number, size)| record(number, *size)).collect();
        let tree: Tree = records.iter().cloned().collect();
        let mut list = List::default();
        list.push_bytes(Bytes::from_static(b"head"));
        records.iter().for_each(|record| list.push_record(record));
        list.push_bytes(Bytes::new());
        tree.runs_from(b"").for_each(|run| list.push_run(run));
        let mut last = tree.runs_from(b"").last().into_iter().collect::<Vec<_>>();
        last.iter_mut().for_each(|run| run.truncate(1));
        let expected = last.iter().flat_map(Run::records).map(Record::field).collect::<Vec<_>>().concat();
        last.into_iter().for_each(|run| list.push_run(run));
        list.push_bytes(Bytes::from_static(b"tail"));
        let all = records.iter().map(Record::field).collect::<Vec<_>>().concat();
        (list, [b"head", &all[..], &all, &expected, b"tail"].concat())
    }

    proptest! {
        #[test]
        fn a_list_is_its_bytes_however_it_is_taken(
            sizes in prop::collection::vec(0..40usize, 0..30),
            steps in prop::collection::vec((0..9usize, 0..100usize), 1..200),
        ) {
            let (list, expected) = list(&sizes);
            let mut data = Data::from(list);
            let mut rest = &expected[..];
            for (slots, step) in steps {
                prop_assert_eq!(data.remaining(), rest.len());
                prop_assert_eq!(data.chunk().is_empty(), rest.is_empty());
                let mut slices = vec![IoSlice::new(&[]); slots];
                let filled = data.chunks_vectored(&mut slices);
                let seen = slices[..filled].iter().map(|slice| &**slice).collect::<Vec<_>>().concat();
                prop_assert!(rest.starts_with(data.chunk()) && rest.starts_with(&seen));
                prop_assert!(filled == slots || seen == rest);
                let step = step.min(rest.len());
                data.advance(step);
                rest = &rest[step..];
            }
            prop_assert_eq!(data.copy_to_bytes(rest.len()), rest);
        }
    }
}
