//! Long work within a task: what walks over many records lets other tasks go on meanwhile.
//!
//! Nearly everything that is done in memory takes microseconds, and a few threads do it all. But a sort or a filter looks at every
//! record of its range, and one revision may delete a whole keyspace: a million records would keep all else on the thread waiting.

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::block_in_place,
};

/// Records that are walked over without ado: to sort so many takes about half a millisecond, to apply them some ten. To let others
/// go on costs the waking of a thread.
const SHORT: u64 = 16 << 10;

/// Does `work`, which walks over that many records. If they are many, another thread takes over what this one had yet to do;
/// a runtime that has but one thread has no other, and waits.
pub(crate) fn walk<T>(records: u64, work: impl FnOnce() -> T) -> T {
    let has_others =
        || Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    if records > SHORT && has_others() { block_in_place(work) } else { work() }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// The work waits for what another task does, and there is one worker thread.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn others_go_on_while_many_records_are_walked_over() {
        let (send, receive) = mpsc::channel();
        let long = tokio::spawn(async move {
            tokio::spawn(async move { send.send(7).unwrap() });
            walk(SHORT + 1, || receive.recv().unwrap())
        });
        assert_eq!(long.await.unwrap(), 7);
    }

    #[tokio::test]
    async fn where_there_is_one_thread_it_does_the_work() {
        assert_eq!(walk(u64::MAX, || 7), 7);
    }

    #[test]
    fn no_runtime_is_needed() {
        assert_eq!(walk(u64::MAX, || 7), 7);
    }
}
