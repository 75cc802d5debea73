//! Tasks without which what is served would no longer be true. Should one of them panic, the process is to end and be started anew,
//! rather than go on as if it still ran.

use std::{future::Future, panic::AssertUnwindSafe};

use futures_util::FutureExt;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// Spawns such tasks, and tells when one has panicked. Clones tell the same.
#[derive(Clone, Default)]
pub(crate) struct Vital(CancellationToken);

impl Vital {
    /// Spawns `task`; `name` is for the log.
    pub(crate) fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let failed = self.0.clone();
        let task = async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                tracing::error!(name, "a task that everything depends on has panicked");
                failed.cancel();
            }
        };
        tokio::spawn(task).abort_handle()
    }

    /// Waits until one of the tasks has panicked.
    pub(crate) async fn failed(&self) {
        self.0.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_told_of_and_one_that_ends_is_not() {
        let vital = Vital::default();
        vital.spawn("ends", async {});
        vital.spawn("aborted", std::future::pending()).abort();
        tokio::task::yield_now().await;
        assert!(vital.failed().now_or_never().is_none());
        vital.spawn("panics", async { panic!("as it should") });
        vital.clone().failed().await;
    }
}
