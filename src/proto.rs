//! The etcd v3 messages and service stubs, generated at build time from `proto/`, and the paths of methods. Bytes fields
//! are reference-counted.

#![allow(missing_docs, clippy::all)]

pub mod paths;

/// Keys, values and events.
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}
/// Users, roles and permissions.
pub mod authpb {
    tonic::include_proto!("authpb");
}
/// The KV, Watch, Lease, Cluster, Maintenance and Auth services.
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}
/// The Lock service.
pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}
/// The Election service.
pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}
