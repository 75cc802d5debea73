//! Is this upstream's history the one that our state came from?
//!
//! The cluster id does not tell: a restore from a backup with the same flags keeps every id, and the restored cluster may
//! already be past our revision.

use std::time::Duration;

use bytes::Bytes;

use super::{
    DEADLINE, End, Feed,
    decode::Page,
    list::Listed,
    seen::{Seen, What},
    serializable_question,
};
use crate::{
    aside,
    proto::{
        etcdserverpb::{RangeRequest, ResponseHeader},
        paths,
    },
    status::Status,
    store::{Entry, Event, EventKind, Record, Revision, Tree, Window},
    upstream::Link,
};

/// What is known of the history upstream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Continuity {
    /// There is no state that could be continued.
    Nothing,
    /// It is ours.
    Proven,
    /// It may be ours; only a comparison of everything can tell.
    Doubtful(&'static str),
    /// It is another one.
    Broken(&'static str),
}

const COMPACTED: Continuity = Continuity::Doubtful("its revision is compacted");
const COME_AND_GONE: Continuity = Continuity::Doubtful("a key may have come and gone in one revision");

/// A member that does not answer sooner is no witness; the cluster is asked then.
const SHORT_DEADLINE: Duration = Duration::from_secs(1);

/// Who is asked for proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Witness {
    /// The cluster, through consensus.
    Cluster,
    /// The member at the other end, as it stands. It may be behind, but what it has, it has of its history.
    Member,
}

impl Feed {
    /// Whether the member at the other end has the last event applied, so that its history is ours, whatever the cluster may
    /// be able to say. False: that is not known.
    pub(super) async fn is_witnessed(&self, link: &Link) -> bool {
        let term = self.writer.store().view().responder.raft_term;
        let answered = link.unary_raw(paths::RANGE, &serializable_question(), SHORT_DEADLINE).await;
        let header = answered.ok().and_then(|message| Page::decode(&message).ok()?.header);
        if header.is_none_or(|header| header.raft_term < term || !self.is_same_cluster(&header)) {
            return false;
        }
        matches!(self.confirm_last(link, Witness::Member).await, Ok(Continuity::Proven))
    }

    fn is_same_cluster(&self, header: &ResponseHeader) -> bool {
        header.cluster_id == self.writer.store().view().responder.cluster_id
    }

    async fn confirm_last(&self, link: &Link, witness: Witness) -> Result<Continuity, End> {
        match self.confirm_state(link, witness).await? {
            broken @ Continuity::Broken(_) => Ok(broken),
            Continuity::Proven => self.confirm_events(link, witness).await,
            doubt => self.doubted(link, witness, doubt).await,
        }
    }

    /// What is left of a doubt about the prefix, given what clients know.
    async fn doubted(&self, link: &Link, witness: Witness, doubt: Continuity) -> Result<Continuity, End> {
        let confirmed = self.confirm_events(link, witness).await?;
        Ok(if matches!(confirmed, Continuity::Broken(_)) { confirmed } else { doubt })
    }

    /// Looks for the events that clients know of, and the view does not: not yet, or because they are of keys that are not cached.
    async fn confirm_events(&self, link: &Link, witness: Witness) -> Result<Continuity, End> {
        let is_unknown = |seen: &Seen| seen.revision > self.writer.position().revision || !self.floor.is_within(seen);
        let mut confirmed = Continuity::Proven;
        for seen in self.floor.events().into_iter().filter(is_unknown) {
            match self.confirm_event(link, witness, &seen).await? {
                Continuity::Proven => {}
                // A comparison of the prefix would not tell either.
                COMPACTED | COME_AND_GONE if !self.floor.is_within(&seen) => {}
                broken @ Continuity::Broken(_) => return Ok(broken),
                doubt => confirmed = doubt,
            }
        }
        Ok(confirmed)
    }

    async fn confirm_event(&self, link: &Link, witness: Witness, seen: &Seen) -> Result<Continuity, End> {
        let found = match self.record_at(link, witness, &seen.key, seen.revision).await? {
            Ok(found) => found,
            Err(doubt) => return Ok(doubt),
        };
        let same = match (seen.what, &found) {
            (What::Put(known), Some(found)) => found.mod_revision() == seen.revision && known.fits(found),
            (What::Delete, None) => match self.record_at(link, witness, &seen.key, seen.revision.previous()).await? {
                Ok(Some(_)) => true,
                // That it is absent proves nothing, unless it was there just before. A transaction can create a key and delete it.
                Ok(None) => return Ok(COME_AND_GONE),
                Err(doubt) => return Ok(doubt),
            },
            _ => false,
        };
        Ok(if same { Continuity::Proven } else { Continuity::Broken("an event that a client knows of is not there") })
    }

    async fn confirm_state(&self, link: &Link, witness: Witness) -> Result<Continuity, End> {
        let Some(entry) = self.writer.last_entry() else { return self.confirm_newest(link, witness).await };
        let confirmed = self.confirm_entry(link, witness, &entry).await?;
        if confirmed != Continuity::Proven {
            return Ok(confirmed);
        }
        // Deletions look alike: a lease that ran out before a restore may run out at the same revision after it.
        if self.writer.has_index() && entry.events.last().is_some_and(|event| event.kind == EventKind::Delete) {
            return self.confirm_newest(link, witness).await;
        }
        // Progress has brought the view further; in another history something may have happened since.
        let quiet_since = entry.revision < self.writer.position().revision;
        if quiet_since { self.confirm_quiet(link, witness, entry.revision).await } else { Ok(confirmed) }
    }

    /// Compares the upstream that answered with `header` to the state. `told`: what clients had been told of before it was
    /// asked. `witnessed`: the last event has been found there.
    pub(super) async fn continuity(
        &self,
        link: &Link,
        header: &ResponseHeader,
        told: Revision,
        witnessed: bool,
    ) -> Result<Continuity, End> {
        let view = self.writer.store().view_owned();
        if !self.is_loaded() {
            return Ok(Continuity::Nothing);
        }
        if !self.is_same_cluster(header) {
            return Ok(Continuity::Broken("the cluster id is another"));
        }
        if header.revision < view.revision().max(told).0 {
            return Ok(Continuity::Broken("the revision went back"));
        }
        if header.raft_term < view.responder.raft_term && told > view.revision() {
            return Ok(Continuity::Broken("the term has fallen, and clients know more than can be compared"));
        }
        if header.raft_term < view.responder.raft_term {
            return self.doubted(link, Witness::Cluster, Continuity::Doubtful("the term has fallen")).await;
        }
        if witnessed { Ok(Continuity::Proven) } else { self.confirm_last(link, Witness::Cluster).await }
    }

    /// Looks for the last event applied, at its revision.
    async fn confirm_entry(&self, link: &Link, witness: Witness, entry: &Entry) -> Result<Continuity, End> {
        let Some(event) = entry.events.last() else { return Ok(Continuity::Doubtful("an entry without events")) };
        let found = match self.record_at(link, witness, event.record.key(), entry.revision).await? {
            Ok(found) => found,
            Err(doubt) => return Ok(doubt),
        };
        match event.kind {
            EventKind::Put if found.as_ref().is_some_and(|found| found.same_version(&event.record)) => {
                Ok(Continuity::Proven)
            }
            EventKind::Delete if found.is_none() => self.confirm_deletion(link, witness, event, entry.revision).await,
            _ => Ok(Continuity::Broken("the last event is not to be found")),
        }
    }

    /// A key that is absent proves nothing; it must have been there just before.
    async fn confirm_deletion(
        &self,
        link: &Link,
        witness: Witness,
        event: &Event,
        revision: Revision,
    ) -> Result<Continuity, End> {
        let before = match self.record_at(link, witness, event.record.key(), revision.previous()).await? {
            Ok(before) => before,
            Err(doubt) => return Ok(doubt),
        };
        let same = match (&before, &event.previous) {
            (Some(before), Some(previous)) => before.same_version(previous),
            (Some(_), None) => !self.writer.has_index(),
            // A transaction can create a key and delete it; what it leaves to compare is what all deletions leave.
            (None, None) => self.writer.has_index(),
            (None, Some(_)) => false,
        };
        Ok(if same { Continuity::Proven } else { Continuity::Broken("the last deletion did not happen there") })
    }

    /// Whether the newest key is as it is here, and nothing has happened since that left a trace.
    async fn confirm_newest(&self, link: &Link, witness: Witness) -> Result<Continuity, End> {
        let view = self.writer.store().view_owned();
        let Some(tree) = &view.tree else { return Ok(Continuity::Doubtful("there is no index")) };
        let Some(newest) = newest(&view.window, tree) else {
            return self.confirm_quiet(link, witness, Revision::ZERO).await;
        };
        match self.record_at(link, witness, newest.key(), view.revision()).await? {
            Ok(Some(found)) if found.same_version(newest) => {
                self.confirm_quiet(link, witness, newest.mod_revision()).await
            }
            Ok(_) => Ok(Continuity::Broken("the newest key is not to be found")),
            Err(doubt) => Ok(doubt),
        }
    }

    /// Whether nothing has happened to the keys after `bound` up to our own revision: there are as many, and none is newer.
    async fn confirm_quiet(&self, link: &Link, witness: Witness, bound: Revision) -> Result<Continuity, End> {
        let view = self.writer.store().view_owned();
        let range = &self.settings.range;
        let newer = RangeRequest {
            key: range.request_key(),
            range_end: range.request_end(),
            revision: view.revision().0,
            min_mod_revision: bound.next().0,
            limit: 1,
            keys_only: true,
            ..Default::default()
        };
        match self.range_at(link, witness, newer).await? {
            Ok(page) => {
                let as_many = view.tree.as_ref().is_none_or(|tree| page.count == tree.len());
                let same = as_many && page.records.is_empty();
                Ok(if same { Continuity::Proven } else { Continuity::Broken("other things have happened there") })
            }
            Err(doubt) => Ok(doubt),
        }
    }

    /// The record of `key` at `revision`, or what it means that the upstream does not tell.
    async fn record_at(
        &self,
        link: &Link,
        witness: Witness,
        key: &[u8],
        revision: Revision,
    ) -> Result<Result<Option<Record>, Continuity>, End> {
        let request = RangeRequest { key: Bytes::copy_from_slice(key), revision: revision.0, ..Default::default() };
        Ok(self.range_at(link, witness, request).await?.map(|page| page.records.into_iter().next()))
    }

    async fn range_at(
        &self,
        link: &Link,
        witness: Witness,
        request: RangeRequest,
    ) -> Result<Result<Page, Continuity>, End> {
        let request = RangeRequest { serializable: witness == Witness::Member, ..request };
        match link.unary_raw(paths::RANGE, &request, DEADLINE).await {
            Ok(message) => Ok(Ok(Page::decode(&message)?)),
            Err(status) if status == Status::COMPACTED => Ok(Err(COMPACTED)),
            Err(status) if status == Status::FUTURE_REVISION && witness == Witness::Member => {
                Ok(Err(Continuity::Doubtful("the member is behind")))
            }
            Err(status) if status == Status::FUTURE_REVISION => Ok(Err(Continuity::Broken("the revision went back"))),
            Err(status) => Err(status.into()),
        }
    }

    /// Whether a list at our own revision is what we have. Where there is nothing to compare, because the keyspace is over
    /// the limit, the term decides.
    pub(super) fn is_same(&self, listed: &Listed, term_held: bool) -> bool {
        let view = self.writer.store().view_owned();
        let (Some(ours), Some(theirs)) = (&view.tree, &listed.tree) else { return term_held };
        let mut pairs = ours.iter_from(b"").zip(theirs.iter_from(b""));
        ours.len() == theirs.len() && aside::walk(ours.len(), || pairs.all(|(ours, theirs)| ours.same_version(theirs)))
    }

    /// When that cannot be read any more: does a new list agree with the old state? Every key that is said not to have
    /// changed since must be as it was here. Where no such key is left to bear witness, the term decides (`term_held`): a
    /// watcher whose next revision is below the compaction is told of it either way, and one whose next revision it is goes on at
    /// etcd itself, too. Gives the reason why it does not agree.
    pub(super) fn disagreement(&self, listed: &Listed, term_held: bool) -> Option<String> {
        let view = self.writer.store().view_owned();
        if listed.revision < view.revision() {
            return Some(format!("the list is at {}, behind {}", listed.revision, view.revision()));
        }
        let (Some(old), Some(new)) = (&view.tree, &listed.tree) else {
            return (!term_held).then(|| "there is no index".into());
        };
        aside::walk(new.len(), || {
            let mut unchanged = new.iter_from(b"").filter(|record| record.mod_revision() <= view.revision()).peekable();
            if unchanged.peek().is_none() && !term_held {
                return Some("no key is left to bear witness".into());
            }
            let differs = |record: &&Record| !old.get(record.key()).is_some_and(|known| known.same_version(record));
            let differing = unchanged.find(differs);
            differing.map(|record| format!("{record:?} was {:?}", old.get(record.key())))
        })
    }
}

/// The record that was written last, of those that are there. The window tells where it reaches back that far.
fn newest<'a>(window: &Window, tree: &'a Tree) -> Option<&'a Record> {
    let still_there = |event: &Event| {
        let found = tree.get(event.record.key())?;
        (event.kind == EventKind::Put && found.mod_revision() == event.record.mod_revision()).then_some(found)
    };
    let recent = window.backwards().find_map(|entry| entry.events.iter().find_map(still_there));
    let of_all = || tree.iter_from(b"").max_by_key(|record| record.mod_revision());
    recent.or_else(|| aside::walk(tree.len(), of_all))
}
