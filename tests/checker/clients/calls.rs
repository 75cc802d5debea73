//! Unary calls, noted down with what came back.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};

use super::super::{
    context::Context,
    record::{Call, Target},
};
use crate::support::{
    client::Client,
    operation::{Operation, Outcome, execute},
    random::Generator,
};

/// How long a client waits for an answer before it gives up.
const PATIENCE: Duration = Duration::from_secs(4);

/// A worker that makes calls.
pub struct Caller {
    pub worker: usize,
    pub context: Arc<Context>,
    pub random: Generator,
    clients: Vec<(Target, Client)>,
}

impl Caller {
    pub fn new(worker: usize, context: &Arc<Context>) -> Self {
        let connect = |(target, endpoint): &(Target, String)| (*target, Client::new(endpoint));
        let mut random = Generator::new(context.seed_of(worker));
        random.unknown_enums = false;
        Self { worker, context: Arc::clone(context), random, clients: context.targets.iter().map(connect).collect() }
    }

    /// Makes a call to one of the servers and notes it down.
    pub async fn call(&mut self, operation: Operation) -> Option<Outcome> {
        let (target, client) = self.random.pick(&self.clients);
        let timeline = &self.context.timeline;
        let begin = timeline.tick();
        let outcome = timeout(PATIENCE, execute(&client, &operation)).await.ok();
        let end = timeline.tick();
        if let Some(Ok(answer)) = &outcome
            && let Some(header) = answer.header()
        {
            self.context.answered(target, begin, header.revision);
        }
        self.context.notes.call(Call { worker: self.worker, target, begin, end, operation, outcome: outcome.clone() });
        outcome
    }

    /// A pause of a random length.
    pub async fn pause(&mut self, longest: u64) {
        sleep(Duration::from_millis(1 + self.random.below(longest as usize) as u64)).await;
    }
}
