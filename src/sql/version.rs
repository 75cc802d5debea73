//! Versions: what the store says of its own, and whether what a client names is one.

/// The etcd whose API this is: clients switch features on by it.
pub const SERVER: &str = "3.7.1";

/// What such an etcd says of its storage.
pub const STORAGE: &str = "3.7.0";

/// What such an etcd says of its cluster.
pub const CLUSTER: &str = "3.7";

/// Whether etcd can read this: `3.6`, or `3.6.0` with or without a pre-release (`-rc.0`) and a build (`+x`).
pub fn is_version(text: &str) -> bool {
    is_whole(text) || is_whole(&format!("{text}.0"))
}

fn is_whole(text: &str) -> bool {
    let (text, build) = split(text, '+');
    let (numbers, pre_release) = split(text, '-');
    let is_suffix = |text: &str| text.is_empty() || text.split('.').all(is_identifier);
    numbers.split('.').count() == 3 && numbers.split('.').all(is_number) && is_suffix(pre_release) && is_suffix(build)
}

/// What comes before and after the first `at`.
fn split(text: &str, at: char) -> (&str, &str) {
    text.split_once(at).unwrap_or((text, ""))
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<i64>().is_ok()
}

fn is_identifier(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}
