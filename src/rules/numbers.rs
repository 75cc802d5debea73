//! The numbers of a record that requests ask about, wherever the record is kept.

/// Which number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// How many times the key was written since its creation.
    Version,
    /// The revision of the key's creation.
    Create,
    /// The revision at which the key got its value.
    Mod,
    /// The lease that the key hangs on, or zero.
    Lease,
}

/// What has the numbers of a record. Each is asked for by itself, since some records have to look for theirs.
pub trait Numbers {
    /// One of them.
    fn number_of(&self, which: Number) -> i64;
}
