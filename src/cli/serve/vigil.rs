//! Keeps the thread that serves awake while a lone call is under way upstream.
//!
//! A thread that has nothing to do sleeps, and where its core has nothing else to do either, that sleeps too. To wake both takes some 50 µs
//! on a virtual machine, and a write that comes alone waits for that twice: when it comes, and when the upstream has answered.
//! So while one forwarded call is under way, and for a moment after it, the thread keeps looking at its sockets instead, and gives its core to
//! whoever else wants it between two looks. Where there are several calls, or reads and events, there is no need: they keep the
//! thread awake.
//!
//! The price is CPU time. No other thread of the system wanted it, but a quota, a host or a bill counts it. So a wait that is too long is given
//! up, and the next of its kind is not begun; after another one in vain, the next two are not, and so on. Behind a disk that takes
//! several milliseconds for each write, one in seventeen is waited for.
//!
//! It is for one serving thread. Of several, those that have nothing to do sleep at the sockets, and who keeps awake does not hear of these.

use std::{
    num::NonZero,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use prometheus::{Counter, Registry};

use crate::{config::Config, upstream::UnderWay};

/// The next call, once one was answered, is waited for by this much less than an answer: a client that makes one after the other
/// needs less time than an upstream that has to make it last.
const LESS_FOR_THE_NEXT: u32 = 4;
/// After many waits in vain, so many are not begun between one and the next.
const MOST_LEFT_OUT: u8 = 16;

/// How long to keep awake for an answer, by the settings and the machine. None: not at all.
pub(super) fn patience(config: &Config) -> Option<Duration> {
    // A core that the upstream needs to answer is not there to be waited on.
    let has_another_core = || thread::available_parallelism().is_ok_and(|cores| cores > NonZero::<usize>::MIN);
    (!config.busy_poll.is_zero() && config.worker_threads() == 1 && has_another_core()).then_some(config.busy_poll)
}

/// Registers what a vigil counts: seconds that the thread was kept awake.
///
/// # Errors
/// When a metric of that name is registered already.
pub(super) fn metric(registry: &Registry) -> Result<Counter, prometheus::Error> {
    let awake = Counter::new("millpond_busy_poll_seconds_total", "Time kept awake for lone forwarded calls.")?;
    registry.register(Box::new(awake.clone()))?;
    Ok(awake)
}

/// Keeps awake whoever runs this, for at most `patience` at a time, while one of `calls` is under way. Never ends.
pub(super) async fn keep(calls: Arc<UnderWay>, patience: Duration, awake: Counter) {
    let mut vigil = Vigil::new(patience);
    loop {
        calls.first().await;
        let mut last = Instant::now();
        while vigil.goes_on(calls.now(), last) {
            // The first looks at the sockets; the second lets others have the core.
            tokio::task::yield_now().await;
            thread::yield_now();
            let now = Instant::now();
            awake.inc_by((now - last).as_secs_f64());
            last = now;
        }
    }
}

/// Decides whether to keep awake.
struct Vigil {
    answers: Waits,
    next_calls: Waits,
    /// What is being waited for, and since when, if anything is.
    now: Option<(Awaited, Instant)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Answer,
    NextCall,
}

/// The waits of one kind.
struct Waits {
    longest: Duration,
    /// How many are still not to be begun.
    left_out: u8,
    /// How many were not to be begun after the last one in vain; none once one was not in vain.
    caution: u8,
}

impl Vigil {
    fn new(patience: Duration) -> Self {
        let waits = |longest| Waits { longest, left_out: 0, caution: 0 };
        Self { answers: waits(patience), next_calls: waits(patience / LESS_FOR_THE_NEXT), now: None }
    }

    /// Whether to keep awake, with that many calls under way. When not, the next question is whether to begin again.
    fn goes_on(&mut self, under_way: usize, now: Instant) -> bool {
        let awaited = match under_way {
            1 => Some(Awaited::Answer),
            0 if self.now.is_some() => Some(Awaited::NextCall),
            _ => None,
        };
        if let Some((before, since)) = self.now {
            if awaited == Some(before) {
                if self.waits(before).is_in_vain(now - since) {
                    self.now = None;
                }
                return self.now.is_some();
            }
            self.waits(before).caution = 0;
        }
        self.now = awaited.filter(|awaited| self.waits(*awaited).begin()).map(|awaited| (awaited, now));
        self.now.is_some()
    }

    fn waits(&mut self, awaited: Awaited) -> &mut Waits {
        match awaited {
            Awaited::Answer => &mut self.answers,
            Awaited::NextCall => &mut self.next_calls,
        }
    }
}

impl Waits {
    /// Whether to begin one.
    fn begin(&mut self) -> bool {
        let begins = self.left_out == 0;
        self.left_out = self.left_out.saturating_sub(1);
        begins
    }

    /// Whether one that has lasted for `span` is too long; it is over then.
    fn is_in_vain(&mut self, span: Duration) -> bool {
        let is_in_vain = span >= self.longest;
        if is_in_vain {
            self.caution = (2 * self.caution).clamp(1, MOST_LEFT_OUT);
            self.left_out = self.caution;
        }
        is_in_vain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_micros(800);
    const NEXT: Duration = Duration::from_micros(200);
    const STEP: Duration = Duration::from_micros(10);

    /// How long a vigil goes on whose `steps` see so many calls under way each.
    fn kept(vigil: &mut Vigil, steps: impl IntoIterator<Item = usize>) -> Duration {
        let start = Instant::now();
        let mut now = start;
        for under_way in steps {
            if !vigil.goes_on(under_way, now) {
                break;
            }
            now += STEP;
        }
        now - start
    }

    fn steps(under_way: usize, span: Duration) -> impl Iterator<Item = usize> {
        std::iter::repeat_n(under_way, span.div_duration_f64(STEP) as usize)
    }

    fn call() -> impl Iterator<Item = usize> {
        steps(1, PATIENCE / 2)
    }

    #[test]
    fn a_client_that_makes_one_call_after_the_other_finds_it_awake() {
        let mut vigil = Vigil::new(PATIENCE);
        let one = || call().chain(steps(0, NEXT / 2));
        assert_eq!(kept(&mut vigil, (0..100).flat_map(|_| one())), 100 * (PATIENCE / 2 + NEXT / 2));
    }

    #[test]
    fn the_next_call_is_not_waited_for_where_it_does_not_come() {
        let mut vigil = Vigil::new(PATIENCE);
        let lone = || call().chain(steps(0, 10 * NEXT));
        for left_out in [1, 2, 4, 8, MOST_LEFT_OUT, MOST_LEFT_OUT] {
            assert_eq!(kept(&mut vigil, lone()), PATIENCE / 2 + NEXT);
            for _ in 0..left_out {
                assert_eq!(kept(&mut vigil, lone()), PATIENCE / 2);
            }
        }
    }

    #[test]
    fn answers_that_take_long_are_not_waited_for() {
        let mut vigil = Vigil::new(PATIENCE);
        for left_out in [1, 2, 4, 8, MOST_LEFT_OUT, MOST_LEFT_OUT] {
            assert_eq!(kept(&mut vigil, steps(1, 10 * PATIENCE)), PATIENCE);
            for _ in 0..left_out {
                assert_eq!(kept(&mut vigil, steps(1, 10 * PATIENCE)), Duration::ZERO);
            }
        }
    }

    #[test]
    fn after_an_answer_that_came_one_that_takes_long_costs_one_wait() {
        let mut vigil = Vigil::new(PATIENCE);
        for _ in 0..10 {
            assert_eq!(kept(&mut vigil, steps(1, 2 * PATIENCE)), PATIENCE);
            assert_eq!(kept(&mut vigil, call()), Duration::ZERO);
            assert_eq!(kept(&mut vigil, call().chain([0, 2])), PATIENCE / 2 + STEP);
        }
    }

    #[test]
    fn calls_in_company_need_no_vigil() {
        let mut vigil = Vigil::new(PATIENCE);
        assert_eq!(kept(&mut vigil, steps(2, PATIENCE)), Duration::ZERO);
        assert_eq!(kept(&mut vigil, [1, 1, 2, 2, 1]), 2 * STEP);
        assert_eq!(kept(&mut vigil, call()), PATIENCE / 2, "company is no wait that was too long");
    }

    /// Whoever is told of a call late may find it over.
    #[test]
    fn a_call_that_is_over_begins_no_vigil() {
        let mut vigil = Vigil::new(PATIENCE);
        assert_eq!(kept(&mut vigil, steps(0, PATIENCE)), Duration::ZERO);
        assert_eq!(kept(&mut vigil, call()), PATIENCE / 2);
    }

    #[test]
    fn one_thread_of_several_cores_keeps_vigil_unless_told_not_to() {
        let of = |worker_threads, busy_poll| {
            patience(&Config { worker_threads: Some(worker_threads), busy_poll, ..Config::default() })
        };
        let cores = thread::available_parallelism().unwrap().get();
        assert_eq!(of(1, PATIENCE), (cores > 1).then_some(PATIENCE));
        assert_eq!(of(2, PATIENCE), None);
        assert_eq!(of(1, Duration::ZERO), None);
    }
}
