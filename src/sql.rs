//! An etcd v3 server over SQL; SQLite is the embedded default.
