//! What etcd serves over HTTP/1.1 on its client port: `/health` is answered here, everything else is etcd's (`/version`,
//! the JSON gateway under `/v3/`, `/metrics`) and forwarded as it is. The embedded store speaks gRPC only; in front of it `/version`,
//! `/livez` and `/readyz` are answered here too, and the rest is not found, as at an etcd without its gateway. Its alarms are told by
//! `/health`; those of an etcd are its own affair.

use std::sync::Arc;

use ::http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header::ALLOW};
use serde_json::json;

use super::{
    alarms,
    body::Body,
    forward::{answer, passable, pinned},
    health::Readiness,
    listener::Connection,
    observe::{AnswerObserver, Encoding},
    response,
};
use crate::{
    grpc::Incoming,
    status::Status,
    upstream::{Forwarded, RequestBody, Route, Upstream},
};

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
/// Under each of these, a version of etcd has had its JSON gateway.
const GATEWAYS: [&str; 3] = ["/v3/", "/v3beta/", "/v3alpha/"];

/// Answers a request that came over HTTP/1.1. `observer` is told the headers of the gateway's KV answers.
pub async fn call(
    upstream: &Upstream,
    connection: &Connection,
    readiness: &Readiness,
    request: Request<Incoming>,
    observer: Option<Arc<dyn AnswerObserver>>,
) -> Response<Body> {
    if request.uri().path() == "/health" {
        let asks = upstream.is_in_process() && request.method() == Method::GET;
        let alarm =
            if asks { alarms::complaint(upstream, request.uri().query().unwrap_or_default()).await } else { None };
        return health(request.method(), alarm, readiness);
    }
    if upstream.is_in_process() {
        return embedded(upstream, readiness, request.method(), request.uri().path());
    }
    let is_version = request.uri().path() == "/version" && request.method() == Method::GET;
    let call = Gateway::of(request.uri().path());
    let enables_auth = call == Gateway::AuthEnable && request.method() == Method::POST;
    let hold = enables_auth.then(|| upstream.suspect_auth());
    match send(upstream, connection, call, request).await {
        Ok(forwarded) if is_version && forwarded.response.status() == StatusCode::NOT_FOUND => version(upstream),
        Ok(forwarded) => {
            let observer = observer.filter(|_| call == Gateway::Revision);
            // As for a gRPC call: the first may be over.
            let hold = hold.map(|_| upstream.suspect_auth());
            answer(forwarded, Encoding::Json, observer, hold)
        }
        Err(_) if is_version => version(upstream),
        Err(status) => unavailable(&status),
    }
}

/// What a path means to the proxy.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Gateway {
    /// Its answer shows a revision below which nothing may be served from then on.
    Revision,
    Maintenance,
    AuthEnable,
    Other,
}

impl Gateway {
    fn of(path: &str) -> Gateway {
        let call = GATEWAYS.iter().find_map(|gateway| path.strip_prefix(gateway));
        match call.map(|call| call.split_once('/').unwrap_or((call, ""))) {
            Some(("kv" | "lease" | "lock" | "election", _)) => Gateway::Revision,
            Some(("maintenance", method)) if method != "alarm" => Gateway::Maintenance,
            Some(("auth", "enable")) => Gateway::AuthEnable,
            _ => Gateway::Other,
        }
    }
}

async fn send(
    upstream: &Upstream,
    connection: &Connection,
    call: Gateway,
    request: Request<Incoming>,
) -> Result<Forwarded, Status> {
    let mut request = passable(request.map(RequestBody::from));
    // A client may name the server in the request line; etcd is told the path only.
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = path.parse::<Uri>().unwrap_or_default();
    let route = match call {
        Gateway::Maintenance => Route::Member(pinned(upstream, connection).await?),
        Gateway::Revision | Gateway::AuthEnable | Gateway::Other => Route::Preferred,
    };
    upstream.forward_http1(route, request).await
}

/// etcd's `/health`, about this proxy, and an alarm of the store within it.
fn health(method: &Method, alarm: Option<String>, readiness: &Readiness) -> Response<Body> {
    if method != Method::GET {
        return not_allowed();
    }
    let Some(reason) = alarm.or_else(|| (!readiness.is_ready()).then(|| readiness.reason.clone())) else {
        return response::plain(StatusCode::OK, JSON, r#"{"health":"true","reason":""}"#);
    };
    let text = json!({ "health": "false", "reason": reason });
    response::plain(StatusCode::SERVICE_UNAVAILABLE, JSON, format!("{text}\n"))
}

fn not_allowed() -> Response<Body> {
    let mut refusal = response::plain(StatusCode::METHOD_NOT_ALLOWED, TEXT, "Method Not Allowed\n");
    refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
    refusal
}

/// What etcd serves beside its gateway, in front of a server that has none of it.
fn embedded(upstream: &Upstream, readiness: &Readiness, method: &Method, path: &str) -> Response<Body> {
    match path {
        "/version" | "/livez" | "/readyz" if method != Method::GET => not_allowed(),
        "/version" => version(upstream),
        "/readyz" if !readiness.is_ready() => {
            let text = format!("[-]cache failed: {}\n", readiness.reason);
            response::plain(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
        }
        "/livez" | "/readyz" => response::plain(StatusCode::OK, TEXT, "ok\n"),
        _ => response::plain(StatusCode::NOT_FOUND, TEXT, "404 page not found\n"),
    }
}

/// `/version` from what the probes know, where the upstream cannot be asked for it.
fn version(upstream: &Upstream) -> Response<Body> {
    let health = upstream.health();
    let health = health.borrow();
    let known = health.endpoints.iter().filter_map(|endpoint| endpoint.report.as_ref()?.version).min();
    match known {
        None => unavailable(&Status::fixed(tonic::Code::Unavailable, "no etcd has answered yet")),
        Some(version) => {
            let level = format!("{}.{}.0", version.major, version.minor);
            let text = json!({ "etcdserver": version.to_string(), "etcdcluster": level, "storage": level });
            response::plain(StatusCode::OK, JSON, text.to_string())
        }
    }
}

/// A failure as etcd's gateway writes it.
fn unavailable(status: &Status) -> Response<Body> {
    let text = json!({ "error": status.message, "code": status.code as i32, "message": status.message });
    response::plain(StatusCode::SERVICE_UNAVAILABLE, JSON, text.to_string())
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn text(response: Response<Body>) -> String {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn health_speaks_as_etcd_does() {
        let ready = Readiness { cache_warm: true, ..Readiness::default() };
        let response = health(&Method::GET, None, &ready);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(text(response).await, r#"{"health":"true","reason":""}"#);

        let down = Readiness { reason: "no \"etcd\"".to_owned(), ..Readiness::default() };
        let response = health(&Method::GET, None, &down);
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(text(response).await, "{\"health\":\"false\",\"reason\":\"no \\\"etcd\\\"\"}\n");

        let response = health(&Method::POST, None, &ready);
        assert_eq!(
            (response.status(), &response.headers()[ALLOW]),
            (StatusCode::METHOD_NOT_ALLOWED, &HeaderValue::from_static("GET"))
        );
    }

    #[test]
    fn gateway_paths_mean_what_their_calls_mean() {
        for (path, call) in [
            ("/v3/kv/put", Gateway::Revision),
            ("/v3beta/kv/range", Gateway::Revision),
            ("/v3/maintenance/status", Gateway::Maintenance),
            ("/v3/maintenance/alarm", Gateway::Other),
            ("/v3/auth/enable", Gateway::AuthEnable),
            ("/v3/auth/disable", Gateway::Other),
            ("/v3/watch", Gateway::Other),
            ("/v2/keys", Gateway::Other),
            ("", Gateway::Other),
        ] {
            assert_eq!(Gateway::of(path), call, "{path}");
        }
    }
}
