//! Where watchers begin: what a new one is told that the present is.

use std::time::Duration;

use super::{Cache, Prefix, consensus::Tense};
use crate::{
    feed::serializable_question,
    proto::{etcdserverpb::RangeResponse, paths},
    store::{Responder, Revision},
};

/// For a member to say how far it has got by itself.
const MEMBER_DEADLINE: Duration = Duration::from_secs(1);

impl Cache {
    /// As [`Cache::begin`], where there is nothing to wait for.
    pub fn begin_at_once(&self, prefix: &Prefix, names_start: bool) -> Option<(Responder, Revision)> {
        let may_begin = self.is_settled_for(prefix, self.heard()) && (!names_start || self.is_level(prefix));
        may_begin.then(|| self.present(prefix))
    }

    /// Waits until a watcher may begin on the view of `prefix`, and gives who answers and the present. One that names its
    /// start needs a view with all that clients were told of: as in etcd, what it catches up with reaches the present that its
    /// creation shows.
    pub async fn begin(&self, prefix: &Prefix, names_start: bool) -> (Responder, Revision) {
        self.settled(prefix).await;
        if names_start && !self.is_level(prefix) {
            // One that stays behind is the feed's concern: what it has can be sent meanwhile.
            let _ = self.reach(prefix, prefix.floor(), self.0.settings.floor_patience).await;
        }
        self.present(prefix)
    }

    /// Who answers and the present, for a watcher of what no view has. The cluster says; if it cannot, because it has no quorum, what
    /// one member says is as much as etcd's own watchers begin on. Once somebody has waited in vain for the cluster, others do not, until
    /// it answers again. Waits as long as nobody says anything.
    pub async fn begin_unseen(&self) -> (Responder, Revision) {
        loop {
            // The cluster is asked all the same: by its answer it is known that it answers again.
            tokio::select! {
                biased;
                Some(proof) = self.consensus().ask(Tense::Present) => {
                    self.note_told(proof.revision, proof.connection);
                    return (proof.responder, proof.revision);
                }
                Some(word) = self.ask_a_member(), if self.consensus().is_unanswered() => return word,
                else => {}
            }
        }
    }

    /// Who answers and the present, as far as one member knows, and clients were told. Of the cluster it proves nothing.
    async fn ask_a_member(&self) -> Option<(Responder, Revision)> {
        let (at, question) = (self.upstream().preferred(&[])?, serializable_question());
        let asked = self.upstream().unary_numbered(at, paths::RANGE, &question, MEMBER_DEADLINE);
        let (answer, connection): (RangeResponse, _) = asked.await.ok()?;
        let header = answer.header?;
        self.note_told(Revision(header.revision), connection);
        Some(((&header).into(), self.told().max(Revision(header.revision))))
    }
}
