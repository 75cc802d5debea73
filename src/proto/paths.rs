//! The HTTP paths of the methods that are called or told apart by name.

/// `KV.Range`.
pub const RANGE: &str = "/etcdserverpb.KV/Range";
/// `KV.RangeStream`.
pub const RANGE_STREAM: &str = "/etcdserverpb.KV/RangeStream";
/// `KV.Put`.
pub const PUT: &str = "/etcdserverpb.KV/Put";
/// `KV.Txn`.
pub const TXN: &str = "/etcdserverpb.KV/Txn";
/// `Watch.Watch`.
pub const WATCH: &str = "/etcdserverpb.Watch/Watch";
/// `Cluster.MemberList`.
pub const MEMBER_LIST: &str = "/etcdserverpb.Cluster/MemberList";
/// `Maintenance.Status`.
pub const STATUS: &str = "/etcdserverpb.Maintenance/Status";
/// `Maintenance.Alarm`.
pub const ALARM: &str = "/etcdserverpb.Maintenance/Alarm";
