//! The Auth service, as far as it goes without users: authentication is off and cannot be switched on yet. What etcd refuses
//! without looking for a user or a role is refused as there.

use tonic::{Code, Request, Response};

use super::Services;
use crate::{
    proto::authpb::Permission,
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
    rules::KeyRange,
    status::Status,
};

/// The revision that etcd's auth store has before its first change.
const AUTH_REVISION: u64 = 1;

const UNSUPPORTED: Status =
    Status::fixed(Code::Unimplemented, "etcdserver: the embedded store has no authentication, users or roles yet");
const NOT_ENABLED: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: authentication is not enabled");
const NO_USER: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: user name not found");
const NO_ROLE: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: role name not found");

const NO_ROOT: Status = Status::fixed(Code::FailedPrecondition, "etcdserver: root user does not exist");
const ROLE_EMPTY: Status = Status::fixed(Code::InvalidArgument, "etcdserver: role name is empty");
const NO_PERMISSION: Status = Status::fixed(Code::InvalidArgument, "etcdserver: permission not given");
const BAD_RANGE: Status = Status::fixed(Code::InvalidArgument, "etcdserver: invalid auth management");
const LONG_PASSWORD: Status = Status::fixed(Code::Unknown, "bcrypt: password length exceeds 72 bytes");

/// The longest password, in bytes.
const PASSWORD_LIMIT: usize = 72;

/// Refuses a password that etcd cannot hash, which it does before it looks at anything else.
fn check_password(password: &str) -> Result<(), Status> {
    if password.len() > PASSWORD_LIMIT { Err(LONG_PASSWORD) } else { Ok(()) }
}

/// Whether a permission is for a key, or for a range with something in it or with no end.
fn is_range(permission: &Permission) -> bool {
    !permission.key.is_empty() && !KeyRange::from_request(&permission.key, &permission.range_end).is_empty()
}

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
        Err(NO_ROOT.into())
    }

    async fn authenticate(&self, _: Request<AuthenticateRequest>) -> Answer<AuthenticateResponse> {
        Err(NOT_ENABLED.into())
    }

    async fn user_add(&self, request: Request<AuthUserAddRequest>) -> Answer<AuthUserAddResponse> {
        let AuthUserAddRequest { name, password, options, .. } = request.into_inner();
        if !options.is_some_and(|options| options.no_password) {
            check_password(&password)?;
        }
        Err(if name.is_empty() { Status::USER_EMPTY } else { UNSUPPORTED }.into())
    }

    async fn user_get(&self, _: Request<AuthUserGetRequest>) -> Answer<AuthUserGetResponse> {
        Err(NO_USER.into())
    }

    async fn user_delete(&self, _: Request<AuthUserDeleteRequest>) -> Answer<AuthUserDeleteResponse> {
        Err(NO_USER.into())
    }

    async fn user_change_password(
        &self,
        request: Request<AuthUserChangePasswordRequest>,
    ) -> Answer<AuthUserChangePasswordResponse> {
        check_password(&request.into_inner().password)?;
        Err(NO_USER.into())
    }

    async fn user_grant_role(&self, _: Request<AuthUserGrantRoleRequest>) -> Answer<AuthUserGrantRoleResponse> {
        Err(NO_USER.into())
    }

    async fn user_revoke_role(&self, _: Request<AuthUserRevokeRoleRequest>) -> Answer<AuthUserRevokeRoleResponse> {
        Err(NO_USER.into())
    }

    async fn role_add(&self, request: Request<AuthRoleAddRequest>) -> Answer<AuthRoleAddResponse> {
        Err(if request.into_inner().name.is_empty() { ROLE_EMPTY } else { UNSUPPORTED }.into())
    }

    async fn role_get(&self, _: Request<AuthRoleGetRequest>) -> Answer<AuthRoleGetResponse> {
        Err(NO_ROLE.into())
    }

    async fn role_delete(&self, _: Request<AuthRoleDeleteRequest>) -> Answer<AuthRoleDeleteResponse> {
        Err(NO_ROLE.into())
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Answer<AuthRoleGrantPermissionResponse> {
        let Some(permission) = request.into_inner().perm else { return Err(NO_PERMISSION.into()) };
        Err(if is_range(&permission) { NO_ROLE } else { BAD_RANGE }.into())
    }

    async fn role_revoke_permission(
        &self,
        _: Request<AuthRoleRevokePermissionRequest>,
    ) -> Answer<AuthRoleRevokePermissionResponse> {
        Err(NO_ROLE.into())
    }
}
