//! The Cluster service: one member, which is all there is.

use tonic::{Code, Request, Response};

use super::{Services, peer_url};
use crate::{
    proto::etcdserverpb::{
        Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
        MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
        cluster_server::Cluster,
    },
    status::Status,
};

const BAD_URLS: Status = Status::fixed(Code::InvalidArgument, "etcdserver: given member URLs are invalid");
const NOT_FOUND: Status = Status::fixed(Code::NotFound, "etcdserver: member not found");
const NOT_LEARNER: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: can only promote a learner member");
const ONE_MEMBER: Status =
    Status::fixed(Code::FailedPrecondition, "etcdserver: not capable: the embedded store has one member, always");

impl Services {
    fn is_self(&self, id: u64) -> Result<(), Status> {
        if id == self.engine.state().identity.member_id { Ok(()) } else { Err(NOT_FOUND) }
    }
}

#[tonic::async_trait]
impl Cluster for Services {
    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, tonic::Status> {
        Err(if peer_url::are_valid(&request.into_inner().peer_ur_ls) { ONE_MEMBER } else { BAD_URLS }.into())
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, tonic::Status> {
        self.is_self(request.into_inner().id)?;
        Err(ONE_MEMBER.into())
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, tonic::Status> {
        self.is_self(request.into_inner().id)?;
        Err(ONE_MEMBER.into())
    }

    async fn member_list(&self, _: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, tonic::Status> {
        let state = self.engine.state();
        let member = Member {
            id: state.identity.member_id,
            name: state.options.member_name.clone(),
            client_ur_ls: state.options.client_urls.clone(),
            ..Default::default()
        };
        // etcd's answer carries no revision either.
        Ok(Response::new(MemberListResponse { header: Some(state.header_at(0)), members: vec![member] }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, tonic::Status> {
        self.is_self(request.into_inner().id)?;
        Err(NOT_LEARNER.into())
    }
}
