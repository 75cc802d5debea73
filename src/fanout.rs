//! Delivers events to watchers: cursors over the history and the index from ranges to watchers.
