//! How many keys to ask of an etcd at a time, where a list comes in pages.

use tonic::Code;

use crate::status::Status;

/// No page is made smaller than this because of failures, which may have other reasons: fewer keys only where they weigh more.
const SMALLEST_AFTER_FAILURE: i64 = 256;
const LIGHTEST_AFTER_FAILURE: usize = 1 << 20;
/// How much smaller the next page is when one could not be had.
const SHRINKING: i64 = 4;

/// The answer is larger than wanted, and was not waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// The bytes that it announced.
    pub announced: usize,
}

/// Whether the server says that its answer would be too large: Go's gRPC library sends no message above 2 GiB, and limits can be
/// set.
pub fn is_refusal_of_size(status: &Status) -> bool {
    status.code == Code::ResourceExhausted && *status != Status::TOO_MANY_REQUESTS
}

/// How large the pages of a list are to be.
#[derive(Clone, Copy, Debug)]
pub struct Sizing {
    /// Keys in the first page.
    pub first: i64,
    /// Keys in the largest.
    pub largest: i64,
    /// What a page should weigh.
    pub bytes: usize,
}

/// The size of the next page. It follows what keys weigh: it grows at most twofold from page to page, since what comes next in
/// the keyspace may be much heavier, and shrinks at once. What has failed is remembered until lists succeed again.
#[derive(Clone, Copy, Debug)]
pub struct PageSize {
    sizing: Sizing,
    keys: i64,
    most: i64,
    bytes: usize,
}

impl PageSize {
    /// For a first list.
    pub fn new(sizing: Sizing) -> Self {
        Self { sizing, keys: sizing.first, most: sizing.largest, bytes: sizing.bytes }
    }

    /// How many keys to ask for.
    pub fn keys(&self) -> i64 {
        self.keys
    }

    /// Notes that a list begins.
    pub fn begin(&mut self) {
        self.keys = self.sizing.first.min(self.most);
    }

    /// Notes that a page of so many keys weighed so many bytes, or was announced to.
    pub fn weighed(&mut self, keys: i64, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let ideal = keys.saturating_mul(self.bytes as i64) / bytes.max(1);
        self.keys = ideal.min(self.keys.saturating_mul(2)).min(self.most).max(1);
    }

    /// Notes that a page of so many keys was refused for its size.
    pub fn refused(&mut self, keys: i64) {
        self.keys = (keys / SHRINKING).max(1);
    }

    /// Notes that the list failed with the page, perhaps because of its size: no later one is as large.
    pub fn failed(&mut self) {
        self.most = self.most.min((self.keys / SHRINKING).max(SMALLEST_AFTER_FAILURE));
        self.bytes = self.bytes.min((self.bytes / SHRINKING as usize).max(LIGHTEST_AFTER_FAILURE));
    }

    /// Notes that the list is whole.
    pub fn finished(&mut self) {
        self.most = self.most.saturating_mul(2).min(self.sizing.largest);
        self.bytes = self.bytes.saturating_mul(2).min(self.sizing.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZING: Sizing = Sizing { first: 100, largest: 10_000, bytes: 1_000_000 };

    fn sizes<const N: usize>(size: &mut PageSize, bytes_per_key: usize) -> [i64; N] {
        std::array::from_fn(|_| {
            let keys = size.keys();
            size.weighed(keys, keys as usize * bytes_per_key);
            keys
        })
    }

    #[test]
    fn pages_grow_twofold_and_shrink_at_once() {
        let mut size = PageSize::new(SIZING);
        assert_eq!(sizes(&mut size, 1), [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(sizes(&mut size, 1000), [10_000, 1000, 1000]);
        assert_eq!(sizes(&mut size, 500_000), [1000, 2, 2]);
        assert_eq!(sizes(&mut size, 5_000_000), [2, 1, 1]);
        size.weighed(0, 0);
        assert_eq!(size.keys(), 1);
    }

    #[test]
    fn a_refused_page_is_asked_for_in_smaller_ones() {
        let mut size = PageSize::new(SIZING);
        size.refused(100);
        assert_eq!(size.keys(), 25);
        size.refused(3);
        assert_eq!(size.keys(), 1);
    }

    #[test]
    fn what_failed_is_remembered_until_lists_succeed() {
        let mut size = PageSize::new(SIZING);
        let _: [i64; 8] = sizes(&mut size, 1);
        size.failed();
        size.begin();
        assert_eq!(sizes(&mut size, 1), [100, 200, 400, 800, 1600, 2500, 2500]);
        for most in [625, 256, 256] {
            size.failed();
            size.begin();
            let reached: [i64; 9] = sizes(&mut size, 1);
            assert_eq!(reached[8], most);
        }
        size.finished();
        assert_eq!(sizes(&mut size, 1), [256, 512, 512]);
    }

    #[test]
    fn pages_of_heavy_keys_get_lighter_after_failures() {
        let mut size = PageSize::new(Sizing { bytes: 16 << 20, ..SIZING });
        for keys in [16, 4, 1, 1] {
            let reached: [i64; 2] = sizes(&mut size, 1 << 20);
            assert_eq!(reached[1], keys);
            size.failed();
            size.begin();
        }
        size.finished();
        assert_eq!(sizes(&mut size, 1 << 20), [100, 2]);
    }
}
