//! The Auth service, as far as it goes without users: authentication is off and cannot be switched on yet.

use tonic::{Code, Request, Response};

use super::Services;
use crate::{
    proto::etcdserverpb::{
        AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse, AuthRoleAddRequest,
        AuthRoleAddResponse, AuthRoleDeleteRequest, AuthRoleDeleteResponse, AuthRoleGetRequest, AuthRoleGetResponse,
        AuthRoleGrantPermissionRequest, AuthRoleGrantPermissionResponse, AuthRoleListRequest, AuthRoleListResponse,
        AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse, AuthStatusRequest, AuthStatusResponse,
        AuthUserAddRequest, AuthUserAddResponse, AuthUserChangePasswordRequest, AuthUserChangePasswordResponse,
        AuthUserDeleteRequest, AuthUserDeleteResponse, AuthUserGetRequest, AuthUserGetResponse,
        AuthUserGrantRoleRequest, AuthUserGrantRoleResponse, AuthUserListRequest, AuthUserListResponse,
        AuthUserRevokeRoleRequest, AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse,
        auth_server::Auth,
    },
    status::Status,
};

/// The revision that etcd's auth store has before its first change.
const AUTH_REVISION: u64 = 1;

const UNSUPPORTED: Status =
    Status::fixed(Code::Unimplemented, "etcdserver: the embedded store has no authentication, users or roles yet");
const NOT_ENABLED: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: authentication is not enabled");
const NO_USER: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: user name not found");
const NO_ROLE: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: role name not found");

/// What an RPC comes to.
type Answer<T> = Result<Response<T>, tonic::Status>;

#[tonic::async_trait]
impl Auth for Services {
    async fn auth_status(&self, _: Request<AuthStatusRequest>) -> Answer<AuthStatusResponse> {
        let header = Some(self.engine.state().header());
        Ok(Response::new(AuthStatusResponse { header, enabled: false, auth_revision: AUTH_REVISION }))
    }

    async fn auth_disable(&self, _: Request<AuthDisableRequest>) -> Answer<AuthDisableResponse> {
        Ok(Response::new(AuthDisableResponse { header: Some(self.engine.state().header()) }))
    }

    async fn user_list(&self, _: Request<AuthUserListRequest>) -> Answer<AuthUserListResponse> {
        Ok(Response::new(AuthUserListResponse { header: Some(self.engine.state().header()), users: Vec::new() }))
    }

    async fn role_list(&self, _: Request<AuthRoleListRequest>) -> Answer<AuthRoleListResponse> {
        Ok(Response::new(AuthRoleListResponse { header: Some(self.engine.state().header()), roles: Vec::new() }))
    }

    async fn auth_enable(&self, _: Request<AuthEnableRequest>) -> Answer<AuthEnableResponse> {
        Err(UNSUPPORTED.into())
    }

    async fn authenticate(&self, _: Request<AuthenticateRequest>) -> Answer<AuthenticateResponse> {
        Err(NOT_ENABLED.into())
    }

    async fn user_add(&self, _: Request<AuthUserAddRequest>) -> Answer<AuthUserAddResponse> {
        Err(UNSUPPORTED.into())
    }

    async fn user_get(&self, _: Request<AuthUserGetRequest>) -> Answer<AuthUserGetResponse> {
        Err(NO_USER.into())
    }

    async fn user_delete(&self, _: Request<AuthUserDeleteRequest>) -> Answer<AuthUserDeleteResponse> {
        Err(NO_USER.into())
    }

    async fn user_change_password(
        &self,
        _: Request<AuthUserChangePasswordRequest>,
    ) -> Answer<AuthUserChangePasswordResponse> {
        Err(NO_USER.into())
    }

    async fn user_grant_role(&self, _: Request<AuthUserGrantRoleRequest>) -> Answer<AuthUserGrantRoleResponse> {
        Err(NO_USER.into())
    }

    async fn user_revoke_role(&self, _: Request<AuthUserRevokeRoleRequest>) -> Answer<AuthUserRevokeRoleResponse> {
        Err(NO_USER.into())
    }

    async fn role_add(&self, _: Request<AuthRoleAddRequest>) -> Answer<AuthRoleAddResponse> {
        Err(UNSUPPORTED.into())
    }

    async fn role_get(&self, _: Request<AuthRoleGetRequest>) -> Answer<AuthRoleGetResponse> {
        Err(NO_ROLE.into())
    }

    async fn role_delete(&self, _: Request<AuthRoleDeleteRequest>) -> Answer<AuthRoleDeleteResponse> {
        Err(NO_ROLE.into())
    }

    async fn role_grant_permission(
        &self,
        _: Request<AuthRoleGrantPermissionRequest>,
    ) -> Answer<AuthRoleGrantPermissionResponse> {
        Err(NO_ROLE.into())
    }

    async fn role_revoke_permission(
        &self,
        _: Request<AuthRoleRevokePermissionRequest>,
    ) -> Answer<AuthRoleRevokePermissionResponse> {
        Err(NO_ROLE.into())
    }
}
