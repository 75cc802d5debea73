//! The Lock service: a queue of keys under a name, whose oldest holds the lock.

use tonic::{Code, Request, Response};

use super::{Services, session};
use crate::{
    proto::{
        etcdserverpb::{DeleteRangeRequest, RangeRequest},
        v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse, lock_server::Lock},
    },
    rules::validate,
    sql::{Engine, quota, range::evaluate, transaction::Transaction},
    status::Status,
};

const SESSION_EXPIRED: Status = Status::fixed(Code::Unknown, "mutex: session is expired");

#[tonic::async_trait]
impl Lock for Services {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, tonic::Status> {
        let locked = lock(&self.engine, request.into_inner()).await;
        Ok(Response::new(locked.map_err(session::without_code)?))
    }

    async fn unlock(&self, request: Request<UnlockRequest>) -> Result<Response<UnlockResponse>, tonic::Status> {
        let key = request.into_inner().key;
        let request = DeleteRangeRequest { key, ..Default::default() };
        let unlock = async {
            validate::delete(&request)?;
            let delete = move |transaction: &mut Transaction<'_>| {
                quota::admit(transaction, false)?;
                transaction.delete_range(&request)
            };
            self.engine.write(0, delete).await
        };
        let mut header = unlock.await.map_err(session::without_code)?.header;
        self.engine.state().fill(&mut header);
        Ok(Response::new(UnlockResponse { header }))
    }
}

async fn lock(engine: &Engine, request: LockRequest) -> Result<LockResponse, Status> {
    let lease = session::lease_or_new(engine, request.lease).await?;
    let prefix = session::prefix_of(&request.name);
    let key = session::key_of(&prefix, lease);
    let (entered, place, _) = session::enter(engine, key.clone(), bytes::Bytes::new(), lease).await?;
    let leave = session::Leave::new(engine, &place);
    let (_, owner) = session::oldest(engine, &prefix).await?;
    let mut header = Some(entered);
    if owner.is_some_and(|owner| owner.create_revision != place.revision) {
        session::wait_for_turn(engine, &prefix, &place).await?;
        let own = RangeRequest { key: key.clone(), ..Default::default() };
        let found = engine.read(move |store, at| evaluate(store, &own, at)).await?;
        if found.kvs.is_empty() {
            return Err(SESSION_EXPIRED);
        }
        header = found.header;
        engine.state().fill(&mut header);
    }
    leave.stay();
    Ok(LockResponse { header, key })
}
