//! The cache's memory: records, the counted copy-on-write index, the history window and views. Pure: no I/O and no clock.
