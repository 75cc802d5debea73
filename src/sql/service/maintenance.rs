//! The Maintenance service.

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response};

use super::Services;
use crate::{
    proto::etcdserverpb::{
        AlarmMember, AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse, DowngradeInfo,
        DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse,
        MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, SnapshotResponse, StatusRequest, StatusResponse,
        alarm_request::AlarmAction, downgrade_request::DowngradeAction, maintenance_server::Maintenance,
    },
    sql::{alarms::Alarm, hash, snapshot, transaction::Transaction, version},
    status::Status,
};

const TOO_MANY: Status = Status::fixed(Code::ResourceExhausted, "etcdserver: too many alarms");
const BAD_TRANSFEREE: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: bad leader transferee");
const BAD_DOWNGRADE: Status = Status::fixed(Code::InvalidArgument, "etcdserver: invalid downgrade target version");
const NO_VERSION: Status = Status::fixed(Code::InvalidArgument, "etcdserver: wrong downgrade target version format");
const UNKNOWN_ACTION: Status = Status::fixed(Code::Unknown, "etcdserver: unknown method");

#[tonic::async_trait]
impl Maintenance for Services {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, tonic::Status> {
        let request = request.into_inner();
        let alarm = Alarm { kind: request.alarm, member_id: request.member_id };
        let alarms = match AlarmAction::try_from(request.action) {
            Ok(AlarmAction::Get) => self.engine.state().alarms().of(alarm.kind).map(AlarmMember::from).collect(),
            Ok(action) => self.switch_alarm(action, alarm).await?.into_iter().map(AlarmMember::from).collect(),
            Err(_) => Vec::new(),
        };
        Ok(Response::new(AlarmResponse { header: Some(self.engine.state().header()), alarms }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, tonic::Status> {
        let size = self.engine.read(|store, _| Ok(store.size()?)).await?;
        let state = self.engine.state();
        let index = state.position().current.cast_unsigned();
        Ok(Response::new(StatusResponse {
            header: Some(state.header()),
            version: version::SERVER.to_owned(),
            db_size: size.total,
            leader: state.identity.member_id,
            raft_index: index,
            raft_term: state.identity.term,
            raft_applied_index: index,
            errors: state.alarms().of(0).map(describe).collect(),
            db_size_in_use: size.used,
            is_learner: false,
            storage_version: version::STORAGE.to_owned(),
            db_size_quota: state.options.quota_bytes,
            downgrade_info: Some(DowngradeInfo::default()),
        }))
    }

    async fn defragment(&self, _: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, tonic::Status> {
        let size = self
            .engine
            .alone(|store| {
                store.defragment()?;
                store.size()
            })
            .await?;
        self.engine.state().set_size(size.total);
        tracing::info!(bytes = size.total, "defragmented");
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    async fn hash(&self, _: Request<HashRequest>) -> Result<Response<HashResponse>, tonic::Status> {
        let (hash, revision) = self.engine.read(|store, at| Ok((hash::whole(store, at)?, at.current))).await?;
        Ok(Response::new(HashResponse { header: Some(self.engine.state().header_at(revision)), hash }))
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, tonic::Status> {
        let revision = request.into_inner().revision;
        let hashed = self.engine.read(move |store, at| hash::at(store, at, revision)).await?;
        let header = Some(self.engine.state().header_at(hashed.current));
        let hash::Hashed { hash, compact_revision, hash_revision, .. } = hashed;
        Ok(Response::new(HashKvResponse { header, hash, compact_revision, hash_revision }))
    }

    type SnapshotStream = ReceiverStream<Result<SnapshotResponse, tonic::Status>>;

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, tonic::Status> {
        Ok(Response::new(snapshot::stream(&self.engine).await?))
    }

    async fn move_leader(
        &self,
        request: Request<MoveLeaderRequest>,
    ) -> Result<Response<MoveLeaderResponse>, tonic::Status> {
        if request.into_inner().target_id != self.engine.state().identity.member_id {
            return Err(BAD_TRANSFEREE.into());
        }
        Ok(Response::new(MoveLeaderResponse { header: None }))
    }

    async fn downgrade(
        &self,
        request: Request<DowngradeRequest>,
    ) -> Result<Response<DowngradeResponse>, tonic::Status> {
        let DowngradeRequest { action, version } = request.into_inner();
        match DowngradeAction::try_from(action) {
            // None is ever under way; as in etcd, that is no error.
            Ok(DowngradeAction::Cancel) => {
                let header = Some(self.engine.state().header());
                Ok(Response::new(DowngradeResponse { header, version: version::CLUSTER.to_owned() }))
            }
            // There is no older version to go back to, 3.6 neither.
            Ok(_) if version::is_version(&version) => Err(BAD_DOWNGRADE.into()),
            Ok(_) => Err(NO_VERSION.into()),
            Err(_) => Err(UNKNOWN_ACTION.into()),
        }
    }
}

impl Services {
    /// Turns an alarm on or off, and returns it if etcd would: when turned on, or off and it was on.
    async fn switch_alarm(&self, action: AlarmAction, alarm: Alarm) -> Result<Option<Alarm>, Status> {
        let activates = action == AlarmAction::Activate;
        if alarm.kind == i32::from(AlarmType::None) || !activates && !self.engine.state().alarms().contains(alarm) {
            return Ok(None);
        }
        let switch = move |transaction: &mut Transaction<'_>| match activates {
            true if transaction.alarms().are_full() && !transaction.alarms().contains(alarm) => Err(TOO_MANY.into()),
            true => transaction.activate(alarm).map(|()| true),
            false => transaction.deactivate(alarm),
        };
        let shown = self.engine.write(0, switch).await?;
        Ok(shown.then_some(alarm))
    }
}

/// An alarm as etcd's Status prints it: what is 0 is left out, and a type without a name is a number.
fn describe(alarm: Alarm) -> String {
    let member = if alarm.member_id == 0 { String::new() } else { format!("memberID:{} ", alarm.member_id) };
    let kind = AlarmType::try_from(alarm.kind).map_or(alarm.kind.to_string(), |kind| kind.as_str_name().to_owned());
    format!("{member}alarm:{kind}")
}
