//! Talking to etcd: endpoints and failover, typed calls for the feed, raw calls for forwarding, and what the upstream can be trusted with.
