//! When answers to pings leave.

use super::*;

const PONG: [u8; 17] = [0, 0, 8, 6, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

/// The answer to one of several pings.
fn pong(number: u64) -> Vec<u8> {
    [&PONG[..9], &number.to_be_bytes()].concat()
}

fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
    [&(length as u32).to_be_bytes()[1..], &[kind, flags, 0, 0, 0, 1], &vec![1; length]].concat()
}

/// A frame of data with a payload of so many bytes.
fn data(length: usize) -> Vec<u8> {
    frame(0, 0, length)
}

/// Cuts what left into frames; the last may not be whole.
fn frames(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    while let Some(head) = bytes.get(..9) {
        let length = 9 + u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (frame, rest) = bytes.split_at(length.min(bytes.len()));
        frames.push(frame);
        bytes = rest;
    }
    frames
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
    let many: Vec<Vec<u8>> = (0..20).map(pong).collect();
    many.iter().for_each(|pong| write(&mut scene.gather, pong));
    assert_eq!(scene.turn(b""), many[..16].concat(), "four are not many");
    after(300).await;
    assert_eq!(scene.turn(b""), many[16..].concat());
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

/// Each turn of a connection whose peer takes large frames slowly may end within one.
#[tokio::test(start_paused = true)]
async fn an_answer_that_is_late_does_not_wait_for_a_turn_that_ends_between_frames() {
    let script = [100_009, 40_000, 0, 60_009, 40_000];
    let mut scene = Scene::new(Scripted { script: script.into(), ..Scripted::default() });
    assert_eq!(scene.turn(&PONG), b"");
    let frame = data(100_000);
    let mut cx = Context::from_waker(Waker::noop());
    let mut offer = |scene: &mut Scene, bytes: &[u8]| match Pin::new(&mut scene.gather).poll_write(&mut cx, bytes) {
        Poll::Ready(written) => written.unwrap(),
        Poll::Pending => 0,
    };
    assert_eq!(offer(&mut scene, &frame), 100_009);
    assert_eq!(offer(&mut scene, &frame), 40_000 - PONG.len());
    assert_eq!(offer(&mut scene, &frame[40_000 - PONG.len()..]), 0);
    assert_eq!(scene.turn(b""), [&frame[..], &PONG, &frame[..40_000 - PONG.len()]].concat());
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_kept_from_a_write_of_several_slices() {
    let mut scene = Scene::new(Scripted::default());
    let frame = data(300);
    let buffered = [&PONG[..], &frame[..9]].concat();
    let mut both = Buf::chain(&buffered[..], &frame[9..]);
    scene.gather.write_all_buf(&mut both).await.unwrap();
    assert_eq!(scene.turn(b""), frame);
    after(300).await;
    assert_eq!(scene.turn(b""), PONG);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_falls_silent_keeps_nothing() {
    let mut scene = Scene::new(Scripted::default());
    assert_eq!(scene.turn(&PONG), b"");
    after(150).await;
    assert_eq!(scene.turn(&data(60)), [&data(60)[..], &PONG].concat());
    after(100).await;
    assert_eq!(scene.turn(b""), b"");
    assert!(scene.gather.socket.lock().courtesy.is_at_rest());
}

/// Between two peers, through all that wakes a connection.
#[tokio::test(start_paused = true)]
async fn a_ping_on_a_connection_that_is_silent_is_answered() {
    let (near, far) = tokio::io::duplex(1024);
    let (_requests, mut client) = h2::client::handshake(near).await.unwrap();
    let mut pings = client.ping_pong().unwrap();
    tokio::spawn(client);
    let (gather, mut calls) = (Gather::new(far), Calls::default());
    let mut outlet = gather.outlet();
    tokio::spawn(async move {
        let mut server = h2::server::handshake(gather).await.unwrap();
        let mut closed = std::pin::pin!(poll_fn(|cx| server.poll_closed(cx)));
        poll_fn(|cx| calls.poll(cx, &mut outlet, closed.as_mut())).await
    });
    let mut waited = async || {
        let begun = Instant::now();
        timeout(Duration::from_secs(1), pings.ping(h2::Ping::opaque())).await.unwrap().unwrap();
        begun.elapsed()
    };
    assert_eq!(waited().await, Duration::ZERO, "with how the connection begins");
    let waited = waited().await;
    assert!((Duration::from_millis(190)..Duration::from_millis(210)).contains(&waited), "{waited:?}");
}

/// What happens to a connection.
#[derive(Clone, Debug)]
enum Step {
    Send(Vec<Vec<u8>>),
    Ping,
    Turn,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let data = prop_oneof![1usize..600, 15_000usize..17_000, 32_000usize..90_000].prop_map(|length| vec![data(length)]);
    // A block of headers in several frames, sent piece by piece.
    let headers = (1usize..20_000, 0u8..3).prop_map(|(length, more)| {
        let continued = |number: u8| frame(9, if number == more { 4 } else { 0 }, 50);
        std::iter::once(frame(1, if more == 0 { 4 } else { 0 }, length)).chain((1..=more).map(continued)).collect()
    });
    prop_oneof![
        4 => data.prop_map(Step::Send),
        2 => headers.prop_map(Step::Send),
        3 => Just(Step::Ping),
        4 => Just(Step::Turn),
        2 => (1u64..250).prop_map(Step::Pass),
    ]
}

proptest! {
    /// Whatever is sent, and however the socket takes it: all of it arrives in order, and each answer once, in order, where a
    /// frame may stand.
    #[test]
    fn answers_stand_between_frames(
        steps in proptest::collection::vec(step(), 1..60),
        script in proptest::collection::vec(prop_oneof![Just(0usize), 1usize..50, 100usize..40_000], 0..200),
        cuts in proptest::collection::vec(prop_oneof![1usize..30, 1000usize..70_000], 1..20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let (taken, sent, answers) = runtime.block_on(async {
            let mut scene = Scene::new(Scripted { script: script.into(), ..Scripted::default() });
            let (mut sent, mut answers, mut cuts) = (Vec::new(), Vec::new(), cuts.iter().copied().cycle());
            for step in steps {
                match step {
                    Step::Send(frames) => for frame in frames {
                        sent.extend_from_slice(&frame);
                        let mut rest = &frame[..];
                        while !rest.is_empty() {
                            let piece = &rest[..rest.len().min(cuts.next().unwrap())];
                            rest = &rest[piece.len()..];
                            scene.gather.write_all(piece).await.unwrap();
                            end_turn(&mut scene.outlet, false);
                        }
                    }
                    Step::Ping => {
                        answers.push(pong(answers.len() as u64));
                        scene.gather.write_all(answers.last().unwrap()).await.unwrap();
                    }
                    Step::Turn => end_turn(&mut scene.outlet, false),
                    Step::Pass(milliseconds) => after(milliseconds).await,
                }
            }
            after(300).await;
            end_turn(&mut scene.outlet, false);
            scene.gather.shutdown().await.unwrap();
            (scene.turn(b""), sent, answers)
        });
        let (found, others): (Vec<&[u8]>, Vec<&[u8]>) = frames(&taken).into_iter().partition(|frame| frame[3] == 6);
        prop_assert!(others.concat() == sent, "what else was sent is not as it was");
        prop_assert_eq!(found, answers);
        let continues = |frame: &[u8]| matches!(frame[3], 1 | 9) && frame[4] & 4 == 0;
        let all = frames(&taken);
        prop_assert!(all.windows(2).all(|pair| !continues(pair[0]) || pair[1][3] == 9), "a block of headers is interrupted");
    }
}
