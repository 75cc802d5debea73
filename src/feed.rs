//! Follows the upstream and is the only writer of a store.
