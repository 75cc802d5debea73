//! When answers to pings leave.

use super::*;

const PONG: [u8; 17] = [0, 0, 8, 6, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

/// A frame of data with a payload of so many bytes.
fn data(length: usize) -> Vec<u8> {
    [&(length as u32).to_be_bytes()[1..], &[0; 6], &vec![1; length]].concat()
}

/// A connection, and what left of it.
struct Scene {
    gather: Gather<Scripted>,
    outlet: Outlet<Scripted>,
    taken: Arc<Mutex<Vec<u8>>>,
}

impl Scene {
    fn new(socket: Scripted) -> Self {
        let taken = socket.taken.clone();
        let gather = Gather::new(socket);
        let outlet = gather.outlet();
        Self { gather, outlet, taken }
    }

    /// Sends something; what leaves in that turn.
    fn turn(&mut self, frames: &[u8]) -> Vec<u8> {
        if !frames.is_empty() {
            write(&mut self.gather, frames);
        }
        end_turn(&mut self.outlet, false);
        std::mem::take(&mut self.taken.lock().unwrap())
    }

    /// Runs the connection, which has just answered a ping, until the answer has left; how long that took.
    async fn answered(&mut self) -> Duration {
        write(&mut self.gather, &PONG);
        let begun = Instant::now();
        let left = poll_fn(|cx| {
            self.outlet.end_turn(cx, false);
            if self.taken.lock().unwrap().is_empty() { Poll::Pending } else { Poll::Ready(()) }
        });
        timeout(Duration::from_secs(1), left).await.unwrap();
        assert_eq!(std::mem::take(&mut *self.taken.lock().unwrap()), PONG);
        begun.elapsed()
    }
}

async fn after(milliseconds: u64) {
    tokio::time::advance(Duration::from_millis(milliseconds)).await;
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_a_ping_stays_behind_what_is_sent_and_then_leaves_with_it() {
    let mut scene = Scene::new(Scripted::default());
    for _ in 0..3 {
        assert_eq!(scene.turn(&PONG), b"");
        for _ in 0..4 {
            after(24).await;
            assert_eq!(scene.turn(&[]), b"");
            assert_eq!(scene.turn(&data(60)), data(60));
        }
        after(4).await;
        assert_eq!(scene.turn(&[]), b"", "nothing to leave with");
        assert_eq!(scene.turn(&data(60)), [&data(60)[..], &PONG].concat());
        assert_eq!(scene.turn(&data(60)), data(60));
    }
}

/// A peer that measures how much arrives between its ping and the answer must not find that it takes a tenth of a second.
#[tokio::test(start_paused = true)]
async fn the_answer_to_a_ping_leaves_with_what_shows_a_bandwidth() {
    let mut scene = Scene::new(Scripted::default());
    assert_eq!(scene.turn(&PONG), b"");
    assert_eq!(scene.turn(&data(16_384)), data(16_384));
    assert_eq!(scene.turn(&data(16_384)), [&data(16_384)[..], &PONG].concat());
    assert_eq!(scene.turn(&PONG), b"");
    assert_eq!(scene.turn(&data(100_000)), [&data(100_000)[..], &PONG].concat(), "what is not gathered counts");
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_a_ping_leaves_by_itself_when_nothing_follows_and_the_next_ones_do_not_wait() {
    let mut scene = Scene::new(Scripted::default());
    for _ in 0..2 {
        let waited = scene.answered().await;
        assert!((Duration::from_millis(190)..Duration::from_millis(210)).contains(&waited), "{waited:?}");
        for _ in 0..16 {
            assert_eq!(scene.answered().await, Duration::ZERO);
        }
    }
    assert!(scene.gather.socket.lock().courtesy.is_at_rest(), "an idle connection keeps nothing");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_sends_many_pings_is_answered() {
    let mut scene = Scene::new(Scripted::default());
    for _ in 0..2 {
        for _ in 0..7 {
            assert_eq!(scene.turn(&PONG), b"");
        }
        assert_eq!(scene.turn(&PONG), PONG.repeat(8));
    }
    (0..20).for_each(|_| write(&mut scene.gather, &PONG));
    assert_eq!(scene.turn(b""), PONG.repeat(20));
}

/// No value that looks like the answer to a ping is taken for one, and no answer gets into the middle of a frame.
#[tokio::test(start_paused = true)]
async fn what_is_within_a_frame_stays_there() {
    let mut scene = Scene::new(Scripted::default());
    let frame = [&[0, 0, 51][..], &[0; 6], &PONG.repeat(3)].concat();
    assert_eq!(scene.turn(&PONG), b"");
    after(150).await;
    for piece in std::iter::once(&frame[..9]).chain(frame[9..].chunks(17)) {
        let is_last = piece.as_ptr_range().end == frame.as_ptr_range().end;
        let expected = if is_last { [piece, &PONG].concat() } else { piece.to_vec() };
        assert_eq!(scene.turn(piece), expected);
    }
}

/// The time for which an answer waits may end in the middle of a frame for which the socket has no room.
#[tokio::test(start_paused = true)]
async fn an_answer_that_is_late_leaves_after_the_frame_that_is_in_its_way() {
    let script = [40_000, 0, usize::MAX];
    let mut scene = Scene::new(Scripted { script: script.into(), ..Scripted::default() });
    assert_eq!(scene.turn(&PONG), b"");
    let frame = data(100_000);
    let mut cx = Context::from_waker(Waker::noop());
    let written = Pin::new(&mut scene.gather).poll_write(&mut cx, &frame);
    assert!(matches!(written, Poll::Ready(Ok(40_000))));
    after(300).await;
    assert_eq!(scene.turn(&[]), frame[..40_000]);
    assert!(Pin::new(&mut scene.gather).poll_write(&mut cx, &frame[40_000..]).is_pending());
    assert_eq!(scene.turn(&[]), b"");
    assert_eq!(scene.turn(&frame[40_000..]), [&frame[40_000..], &PONG].concat());
}
