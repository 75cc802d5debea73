//! Calls at a fixed rate. Puts carry the time of their sending in the value, so that watchers can tell how long it took to
//! reach them.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::time::timeout_at;

use super::{
    link::{Link, LinkError},
    loads::Delivery,
    requests::{Keys, value},
    tally::Window,
    wire::{Frame, Manners},
};
use crate::{grpc, proto::etcdserverpb::PutRequest};

/// Calls in flight before the writer falls behind its rate instead of piling up more.
const MAX_IN_FLIGHT: usize = 4096;

/// How long to wait for the last answers.
const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// Bytes of the mark and the time at the front of a value.
pub const STAMP: usize = 16;

/// What times are counted from, and a mark that tells this process's values from others.
static ORIGIN: LazyLock<(u64, Instant)> = LazyLock::new(|| (rand::random(), Instant::now()));

/// The mark and this moment.
fn stamp() -> [u8; STAMP] {
    let (mark, origin) = *ORIGIN;
    let mut stamp = [0; STAMP];
    stamp[..8].copy_from_slice(&mark.to_be_bytes());
    stamp[8..].copy_from_slice(&(origin.elapsed().as_nanos() as u64).to_be_bytes());
    stamp
}

/// How long before `now` a value was sent; None for a value that is not ours.
pub fn age(value: &[u8], now: Instant) -> Option<Duration> {
    let (mark, origin) = *ORIGIN;
    let (theirs, rest) = value.split_first_chunk::<8>()?;
    let sent = Duration::from_nanos(u64::from_be_bytes(*rest.first_chunk::<8>()?));
    (u64::from_be_bytes(*theirs) == mark).then(|| now.saturating_duration_since(origin + sent))
}

/// Makes the next request of a writer, gRPC-framed.
pub type NextRequest = Box<dyn FnMut() -> Bytes + Send>;

/// Puts of those keys in random order, stamped.
pub fn stamped_puts(keys: Keys, value_size: usize) -> NextRequest {
    let filler = value(value_size.saturating_sub(STAMP));
    Box::new(move || {
        let mut value = BytesMut::with_capacity(STAMP + filler.len());
        value.put_slice(&stamp());
        value.put_slice(&filler);
        grpc::frame(&PutRequest { key: keys.random(), value: value.freeze(), ..Default::default() })
    })
}

/// A connection on which calls leave at a fixed rate.
pub struct Writer {
    link: Link,
    next: NextRequest,
    in_flight: usize,
}

impl Writer {
    /// Connects to the server that takes the calls.
    pub async fn connect(endpoint: &str, path: &str, next: NextRequest) -> Result<Self, LinkError> {
        Ok(Self { link: Link::connect(endpoint, path, Manners::Quiet).await?, next, in_flight: 0 })
    }

    /// Makes `rate` calls a second until the window ends, then waits for the answers.
    pub async fn run(&mut self, rate: f64, window: Window, delivery: &Delivery) -> Result<(), LinkError> {
        let pause = Duration::from_secs_f64(1.0 / rate.clamp(0.001, 1_000_000.0));
        let mut due = Instant::now();
        while due < window.end {
            while due <= Instant::now() && self.in_flight < MAX_IN_FLIGHT {
                self.call();
                due += pause;
            }
            let wake = due.max(Instant::now()).min(window.end);
            self.answers_until(wake, delivery).await?;
            if Instant::now() >= window.end {
                break;
            }
        }
        let end = Instant::now() + LAST_ANSWERS;
        while self.in_flight > 0 && Instant::now() < end {
            self.answers_until(end, delivery).await?;
        }
        Ok(())
    }

    fn call(&mut self) {
        let request = (self.next)();
        self.link.wire().open(request, true);
        self.in_flight += 1;
    }

    /// Takes answers until that time, or until one burst has come.
    async fn answers_until(&mut self, wake: Instant, delivery: &Delivery) -> Result<(), LinkError> {
        let in_flight = &mut self.in_flight;
        let mut answered = |ok: bool| {
            *in_flight = in_flight.saturating_sub(usize::from(!ok));
            if ok {
                delivery.wrote();
            }
        };
        let turn = self.link.turn(|_, frame| match frame {
            Frame::Data { end, .. } => {
                answered(true);
                if end {
                    answered(false);
                }
            }
            Frame::Headers { end: true, .. } | Frame::Reset { .. } => answered(false),
            Frame::Ready | Frame::Headers { .. } => {}
        });
        timeout_at(wake.into(), turn).await.unwrap_or(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_its_age_and_a_foreign_value_none() {
        let value = [&stamp()[..], b"filler"].concat();
        let later = Instant::now() + Duration::from_secs(5);
        assert!(age(&value, later).unwrap() >= Duration::from_secs(5));
        assert_eq!(age(b"short", later), None);
        assert_eq!(age(&[0; 32], later), None);
    }
}
