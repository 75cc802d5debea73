//! Request headers as HPACK, without a table of the answers' headers.

use crate::grpc;

/// The header block of every request, as HPACK: spelled out and indexed the first time, four indices ever after.
pub struct Headers {
    spelled: Vec<u8>,
    indexed: Vec<u8>,
    first: bool,
}

/// Static HPACK entries: `:method: POST`, `:scheme: http`.
const POST_HTTP: [u8; 2] = [0x83, 0x86];
/// HPACK's default table size, which holds our five entries with room to spare.
const DEFAULT_TABLE: u32 = 4096;

impl Headers {
    /// For calls to that path.
    pub fn new(authority: &str, path: &str) -> Self {
        let mut spelled = POST_HTTP.to_vec();
        let user_agent = concat!("millpond-bench/", env!("CARGO_PKG_VERSION"));
        // Each entry: the static table's index of its name (0: the name follows), the name, the value.
        let entries = [
            (4, "", path),
            (1, "", authority),
            (31, "", grpc::MEDIA_TYPE),
            (58, "", user_agent),
            (0, "te", "trailers"),
        ];
        for (index, name, value) in entries {
            spelled.push(0x40 | index);
            if index == 0 {
                push_text(&mut spelled, name);
            }
            push_text(&mut spelled, value);
        }
        let newest_first = (62u8..).take(entries.len()).map(|index| 0x80 | index);
        let indexed = POST_HTTP.into_iter().chain(newest_first.collect::<Vec<_>>().into_iter().rev()).collect();
        Self { spelled, indexed, first: true }
    }

    /// The block of the next request.
    pub fn next(&mut self) -> Vec<u8> {
        if std::mem::replace(&mut self.first, false) { self.spelled.clone() } else { self.indexed.clone() }
    }

    /// A peer with a smaller table gets an empty one and the block spelled out each time, which is valid everywhere.
    pub fn limit_table(&mut self, size: u32) {
        if size < DEFAULT_TABLE {
            const TABLE_OF_ZERO: u8 = 0x20;
            self.spelled.insert(0, TABLE_OF_ZERO);
            self.indexed = self.spelled.clone();
        }
    }
}

/// A text without Huffman coding; long ones take a second length byte or more.
fn push_text(out: &mut Vec<u8>, text: &str) {
    const FULL: usize = 0x7f;
    if text.len() < FULL {
        out.push(text.len() as u8);
    } else {
        out.push(FULL as u8);
        let mut rest = text.len() - FULL;
        while rest >= 0x80 {
            out.push((rest % 0x80) as u8 | 0x80);
            rest /= 0x80;
        }
        out.push(rest as u8);
    }
    out.extend_from_slice(text.as_bytes());
}
