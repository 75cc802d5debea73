//! Where the frames of an HTTP/2 connection begin, among the bytes that are sent on it, and where another may stand between them.

/// The head of a frame: the length of what follows in three bytes, and six more.
const HEAD: usize = 9;
/// How a client begins, before its first frame, and how much of that follows what would be a frame's head. No frame begins so:
/// this one's type would be unknown.
const PREFACE: &[u8; HEAD] = b"PRI * HTT";
const PREFACE_REST: u32 = 15;
/// The types of the frames that a block of headers may take, and the flag of the last. Nothing may stand between these.
const HEADERS: u8 = 1;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Follows the frames of one direction.
#[derive(Default)]
pub(super) struct Frames {
    head: [u8; HEAD],
    /// How much of `head` is known.
    known: u8,
    /// Bytes left of the frame whose head was last.
    left: u32,
    /// That frame is to be continued by the next.
    continues: bool,
}

impl Frames {
    /// Whether another frame may stand here: one is over, with its continuations, and none has begun.
    pub(super) fn is_between(&self) -> bool {
        self.known == 0 && self.left == 0 && !self.continues
    }

    /// Goes past `bytes`.
    pub(super) fn pass(&mut self, mut bytes: &[u8]) {
        loop {
            let skipped = bytes.len().min(self.left as usize);
            self.left -= skipped as u32;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return;
            }
            bytes = self.read_head(bytes);
        }
    }

    /// Reads what there is of a head; the rest.
    fn read_head<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let known = usize::from(self.known);
        let (new, rest) = bytes.split_at(bytes.len().min(HEAD - known));
        self.head[known..known + new.len()].copy_from_slice(new);
        self.known += new.len() as u8;
        if usize::from(self.known) == HEAD {
            self.known = 0;
            self.begin();
        }
        rest
    }

    /// Begins the frame whose head is known.
    fn begin(&mut self) {
        let [high, middle, low, kind, flags, ..] = self.head;
        if self.head == *PREFACE {
            self.left = PREFACE_REST;
        } else {
            self.left = u32::from_be_bytes([0, high, middle, low]);
            self.continues = matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) && flags & END_HEADERS == 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(length: usize) -> Vec<u8> {
        let head = (length as u32).to_be_bytes();
        [&head[1..], &[0; 6], &vec![0xff; length]].concat()
    }

    #[test]
    fn a_clients_preface_is_no_frame() {
        let mut frames = Frames::default();
        frames.pass(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        assert!(frames.is_between());
        frames.pass(b"\0\0\0\x04\0\0\0\0");
        assert!(!frames.is_between());
        frames.pass(b"\0");
        assert!(frames.is_between());
    }

    #[test]
    fn nothing_stands_between_headers_and_their_continuation() {
        let mut frames = Frames::default();
        for (kind, flags, is_over) in
            [(1, 4, true), (1, 1, false), (9, 0, false), (9, 4, true), (0, 1, true), (5, 0, false)]
        {
            frames.pass(&[0, 0, 1, kind, flags, 0, 0, 0, 1, 0xff]);
            assert_eq!(frames.is_between(), is_over, "type {kind} with flags {flags}");
        }
    }

    proptest! {
        /// However the bytes are cut, the ends of frames are where they are, and nowhere else.
        #[test]
        fn frames_end_where_they_end(
            lengths in proptest::collection::vec(prop_oneof![0usize..20, 16_000usize..70_000], 1..20),
            cuts in proptest::collection::vec(prop_oneof![1usize..12, 1usize..40_000], 1..60),
        ) {
            let all = lengths.iter().map(|length| frame(*length));
            let ends: Vec<usize> = all.clone().scan(0, |end, frame| { *end += frame.len(); Some(*end) }).collect();
            let bytes: Vec<u8> = all.flatten().collect();
            let (mut frames, mut at) = (Frames::default(), 0);
            for cut in cuts.iter().cycle() {
                prop_assert_eq!(frames.is_between(), at == 0 || ends.contains(&at), "after {} bytes", at);
                if at == bytes.len() {
                    break;
                }
                let next = bytes.len().min(at + cut);
                frames.pass(&bytes[at..next]);
                at = next;
            }
        }
    }
}
