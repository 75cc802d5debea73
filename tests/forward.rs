//! Forwarding in front of real etcds: every kind of call, failover, clusters, authentication, HTTP.

mod proxy;
mod support;

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use millpond::{
    proto::{
        etcdserverpb::{
            AlarmRequest, AlarmType, AuthEnableRequest, AuthRoleAddRequest, AuthRoleGetRequest, AuthUserAddRequest,
            AuthUserGrantRoleRequest, AuthenticateRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
            LeaseKeepAliveResponse, MemberListRequest, RangeRequest, SnapshotRequest, StatusRequest,
            WatchCreateRequest, WatchRequest, WatchResponse, alarm_request::AlarmAction, watch_request::RequestUnion,
        },
        v3electionpb::{
            CampaignRequest, LeaderRequest, ProclaimRequest, ResignRequest, election_client::ElectionClient,
        },
        v3lockpb::{LockRequest, UnlockRequest, lock_client::LockClient},
    },
    upstream::{AuthState, Endpoint, EndpointId, Settings, Standing, Upstream, Version},
};
use prometheus::Registry;
use prost::Message;
use proxy::{Options, PATIENCE, Proxy};
use support::{
    client::{Client, eventually, http_get},
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    millpond::Millpond,
    toolchain::{Release, VERSIONS},
};
use tokio::{net::TcpStream, time::timeout};
use tonic::Code;

const AT: EndpointId = EndpointId(0);

async fn etcd() -> Cluster {
    Cluster::single(Release::newest()).await
}

/// A client that sees the frames, for what the stubs hide.
fn raw(address: &str) -> Upstream {
    let endpoint: Endpoint = address.parse().unwrap();
    Upstream::start(Settings::new(vec![endpoint]), &Registry::new()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_calls_pass_and_the_revision_is_known_before_the_client_knows_it() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let client = Client::new(proxy.address());
    for round in 0..20 {
        let revision = client.put(format!("key-{round}"), "value").await.unwrap();
        let noted = proxy.noted.0.lock().unwrap().last().cloned().unwrap();
        assert_eq!(noted.revision, revision);
    }
    let value = vec![7u8; 1 << 20];
    client.put("large", value.clone()).await.unwrap();
    assert_eq!(client.get("large").await.unwrap().kvs[0].value, value);
    let all = RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    assert_eq!(client.range(all).await.unwrap(), cluster.client(0).range(all_keys()).await.unwrap());
    let refused = client.put("", "").await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, "etcdserver: key is not provided"));
}

fn all_keys() -> RangeRequest {
    RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_keep_alive_is_a_transparent_stream_and_honours_half_close() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let client = Client::new(proxy.address());
    let grant = LeaseGrantRequest { ttl: 60, id: 4711 };
    client.lease.clone().lease_grant(grant).await.unwrap();
    let raw = raw(proxy.address());
    let opened = raw.open_catch_up(AT, "/etcdserverpb.Lease/LeaseKeepAlive").await;
    let (sender, mut receiver) = opened.unwrap();
    for (id, ttl) in [(4711, 60), (4711, 60), (1, 0)] {
        sender.send(&LeaseKeepAliveRequest { id }).await.unwrap();
        let answer = receiver.next().await.unwrap().unwrap();
        assert_eq!(LeaseKeepAliveResponse::decode(answer).unwrap().ttl, ttl);
    }
    sender.finish();
    assert_eq!(timeout(PATIENCE, receiver.next()).await.unwrap(), None, "etcd ends the stream with a success");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_waits_and_election_is_observed() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let client = Client::new(proxy.address());
    let lease = async |id| client.lease.clone().lease_grant(LeaseGrantRequest { ttl: 60, id }).await.unwrap();
    lease(1).await;
    lease(2).await;
    let mut lock = LockClient::new(client.channel.clone());
    let mut second = lock.clone();
    let held = lock.lock(LockRequest { name: "l".into(), lease: 1 }).await.unwrap().into_inner().key;
    let mut waiting = tokio::spawn(async move { second.lock(LockRequest { name: "l".into(), lease: 2 }).await });
    assert!(timeout(Duration::from_millis(300), &mut waiting).await.is_err(), "the lock is held");
    lock.unlock(UnlockRequest { key: held }).await.unwrap();
    waiting.await.unwrap().unwrap();

    let mut election = ElectionClient::new(client.channel.clone());
    // etcd answers an observer when there is a leader, not before.
    let mut observer = election.clone();
    let observing = tokio::spawn(async move { observer.observe(LeaderRequest { name: "e".into() }).await });
    let campaign = CampaignRequest { name: "e".into(), lease: 1, value: "first".into() };
    let leader = election.campaign(campaign).await.unwrap().into_inner().leader;
    let mut observed = observing.await.unwrap().unwrap().into_inner();
    let value = async |observed: &mut tonic::Streaming<_>| -> Bytes {
        let seen: millpond::proto::v3electionpb::LeaderResponse = observed.message().await.unwrap().unwrap();
        seen.kv.unwrap().value
    };
    assert_eq!(value(&mut observed).await, "first");
    election.proclaim(ProclaimRequest { leader: leader.clone(), value: "second".into() }).await.unwrap();
    assert_eq!(value(&mut observed).await, "second");
    election.resign(ResignRequest { leader }).await.unwrap();
}

/// A stream tells of revisions again and again, not only at its beginning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_is_older_than_what_a_relayed_stream_has_told() {
    let cluster = etcd().await;
    let mut millpond = Millpond::start(&[cluster.endpoint(0)], &[]).await;
    let (direct, client) = (cluster.client(0), millpond.client());
    direct.lease.clone().lease_grant(LeaseGrantRequest { ttl: 60, id: 1 }).await.unwrap();
    let mut election = ElectionClient::new(direct.channel.clone());
    let campaign = CampaignRequest { name: "e".into(), lease: 1, value: "0".into() };
    let leader = election.campaign(campaign).await.unwrap().into_inner().leader;
    let observing = ElectionClient::new(client.channel.clone()).observe(LeaderRequest { name: "e".into() }).await;
    let mut observed = observing.unwrap().into_inner();
    observed.message().await.unwrap();
    for round in 1..200 {
        let value = round.to_string().into();
        election.proclaim(ProclaimRequest { leader: leader.clone(), value }).await.unwrap();
        let told = observed.message().await.unwrap().unwrap().header.unwrap().revision;
        let read = client.get("elsewhere").await.unwrap().header.unwrap().revision;
        assert!(read >= told, "{read} after {told}");
    }
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_streams_whole() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let client = Client::new(proxy.address());
    for key in 0..50 {
        client.put(format!("key-{key}"), vec![key; 100_000]).await.unwrap();
    }
    let mut stream = client.maintenance.clone().snapshot(SnapshotRequest::default()).await.unwrap().into_inner();
    let (mut size, mut remaining) = (0, u64::MAX);
    while let Some(part) = stream.message().await.unwrap() {
        size += part.blob.len();
        remaining = part.remaining_bytes;
    }
    assert!(size > 5_000_000 && remaining == 0, "{size} bytes, {remaining} remaining");
    assert_eq!(size % 512, 32, "the store is followed by its SHA-256");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_etcd_does_not_know_gets_etcds_own_refusal() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let ask = async |address: &str, path| {
        let link = raw(address).connect(AT).await.unwrap();
        link.unary_raw(path, &SnapshotRequest::default(), PATIENCE).await
    };
    for path in ["/etcdserverpb.KV/Frobnicate", "/future.Service/Call"] {
        let through = ask(proxy.address(), path).await;
        let direct = ask(&cluster.endpoint(0), path).await;
        assert_eq!(through.as_ref().unwrap_err().code, Code::Unimplemented);
        assert_eq!(through, direct);
    }
}

async fn watching(upstream: &Upstream, key: &'static str) -> (impl Drop, millpond::upstream::StreamReceiver) {
    struct Open(#[allow(dead_code, reason = "keeps the stream open")] millpond::upstream::StreamSender<WatchRequest>);
    impl Drop for Open {
        fn drop(&mut self) {}
    }
    let opened = upstream.open_catch_up(AT, "/etcdserverpb.Watch/Watch").await;
    let (sender, mut receiver) = opened.unwrap();
    let create = WatchCreateRequest { key: key.into(), ..Default::default() };
    sender.send(&WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await.unwrap();
    let created = WatchResponse::decode(receiver.next().await.unwrap().unwrap()).unwrap();
    assert!(created.created);
    (Open(sender), receiver)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_etcd_ends_streams_with_unavailable_and_its_return_is_noticed() {
    let mut cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let raw = raw(proxy.address());
    let (_open, mut receiver) = watching(&raw, "key").await;
    cluster.kill(0);
    let end = timeout(PATIENCE, receiver.next()).await.unwrap().unwrap().unwrap_err();
    assert_eq!(end.code, Code::Unavailable, "{end}");
    proxy.until("etcd is gone", |health| !health.reachable).await;
    let status = Client::new(proxy.address()).put("key", "value").await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "there is no connection available"));
    cluster.restart(0).await;
    proxy.until("etcd is back", |health| health.reachable).await;
    Client::new(proxy.address()).put("key", "value").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_move_to_another_endpoint_and_back() {
    let cluster = etcd().await;
    let (first, second) =
        (FaultProxy::start(&cluster.endpoint(0)).await, FaultProxy::start(&cluster.endpoint(0)).await);
    let proxy = Proxy::before(&[&first.endpoint, &second.endpoint]).await;
    let client = Client::new(proxy.address());
    proxy.until_preferred(0).await;
    client.put("key", "0").await.unwrap();
    first.set(Faults { refuse: true, ..Faults::default() });
    first.reset();
    proxy.until_preferred(1).await;
    client.put("key", "1").await.unwrap();
    first.heal();
    proxy.until_preferred(0).await;
    client.put("key", "2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_is_left_and_member_bound_calls_do_not_move() {
    let cluster = etcd().await;
    let (first, second) =
        (FaultProxy::start(&cluster.endpoint(0)).await, FaultProxy::start(&cluster.endpoint(0)).await);
    let mut options = Options::new(&[&first.endpoint, &second.endpoint]);
    options.settings.connect_timeout = Duration::from_millis(500);
    let proxy = options.start().await;
    proxy.until_preferred(0).await;
    let client = Client::new(proxy.address());
    client.status().await.unwrap();
    first.set(Faults { refuse: true, ..Faults::black_hole() });
    first.reset();
    proxy.until_preferred(1).await;
    client.put("key", "value").await.unwrap();
    let status = client.status().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    eventually("the client was asked to reconnect, and is bound anew", async || client.status().await.ok()).await;

    first.heal();
    proxy.until_preferred(0).await;
    first.set(Faults::black_hole());
    proxy.until_preferred(1).await;
    Client::new(proxy.address()).put("key", "value").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_of_another_cluster_is_refused() {
    let (ours, other) = tokio::join!(etcd(), etcd());
    let proxy = Proxy::before(&[&ours.endpoint(0), &other.endpoint(0)]).await;
    let settled = |health: &millpond::upstream::Health| {
        health.endpoints.iter().map(|endpoint| endpoint.standing).eq([Standing::Well, Standing::Foreign])
    };
    let health = proxy.until("the stranger is known", settled).await;
    let ours_id = ours.client(0).status().await.unwrap().header.unwrap().cluster_id;
    assert_eq!(health.cluster_id, Some(ours_id));
    drop(ours);
    proxy.until("ours is gone", |health| !health.reachable).await;
    assert!(Client::new(proxy.address()).put("key", "value").await.is_err());
    assert_eq!(other.client(0).revision().await.unwrap(), 1, "nothing was written to the stranger");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_version_is_recognised_and_authentication_is_seen_however_it_is_switched_on() {
    for version in VERSIONS {
        let Some(release) = Release::pinned(version) else { continue };
        let cluster = Cluster::single(release).await;
        let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
        let health = proxy.until("well", |health| health.reachable && health.auth == AuthState::Off).await;
        let report = health.endpoints[0].report.clone().unwrap();
        assert_eq!(report.version, version.parse().ok());
        assert!(report.has_leader && report.raft_term > 0 && proxy.upstream.gate().progress_is_proof);

        let elsewhere = cluster.client(0);
        let mut auth = elsewhere.auth.clone();
        auth.user_add(AuthUserAddRequest { name: "root".into(), password: "r".into(), ..Default::default() })
            .await
            .unwrap();
        auth.role_add(AuthRoleAddRequest { name: "root".into() }).await.unwrap();
        auth.user_grant_role(AuthUserGrantRoleRequest { user: "root".into(), role: "root".into() }).await.unwrap();
        auth.auth_enable(AuthEnableRequest {}).await.unwrap();
        let health = proxy.until("on", |health| health.auth == AuthState::On).await;
        assert!(health.reachable && health.has_leader);
        let later = proxy.until("a probe later", |health| health.reachable).await;
        let secured = later.endpoints[0].report.clone().unwrap();
        assert_eq!((secured.version, secured.cluster_id), (report.version, report.cluster_id));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authentication_switched_on_through_the_proxy_is_on_before_the_client_knows_and_tokens_pass() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    proxy.until("off", |health| health.auth == AuthState::Off).await;
    let client = Client::new(proxy.address());
    let mut auth = client.auth.clone();
    auth.auth_enable(AuthEnableRequest {}).await.unwrap_err();
    proxy.until("a refused attempt leaves it off", |health| health.auth == AuthState::Off).await;
    let user = AuthUserAddRequest { name: "root".into(), password: "r".into(), ..Default::default() };
    auth.user_add(user).await.unwrap();
    auth.role_add(AuthRoleAddRequest { name: "root".into() }).await.unwrap();
    auth.user_grant_role(AuthUserGrantRoleRequest { user: "root".into(), role: "root".into() }).await.unwrap();
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
    let now = proxy.upstream.auth().now();
    assert!(matches!(now, AuthState::Changing | AuthState::On), "{now:?}: nothing is given to everyone");
    proxy.until("probes agree", |health| health.auth == AuthState::On).await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(proxy.upstream.auth().now(), AuthState::On, "and stay with it");

    let refused = client.get("key").await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, "etcdserver: user name is empty"));
    let login = AuthenticateRequest { name: "root".into(), password: "r".into() };
    let token = auth.authenticate(login).await.unwrap().into_inner().token;
    let mut request = tonic::Request::new(AuthRoleGetRequest { role: "root".into() });
    request.metadata_mut().insert("token", token.parse().unwrap());
    auth.role_get(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_member_list_tells_the_advertised_url_if_there_is_one() {
    let cluster = etcd().await;
    let direct =
        cluster.client(0).cluster.clone().member_list(MemberListRequest::default()).await.unwrap().into_inner();
    for advertised in [None, Some("http://pond:2379".to_owned())] {
        let mut options = Options::new(&[&cluster.endpoint(0)]);
        options.advertised = advertised.clone();
        let proxy = options.start().await;
        let client = Client::new(proxy.address());
        let told = client.cluster.clone().member_list(MemberListRequest::default()).await.unwrap().into_inner();
        let mut expected = direct.clone();
        if let Some(url) = advertised {
            expected.members.iter_mut().for_each(|member| member.client_ur_ls = vec![url.clone()]);
        }
        assert_eq!(told, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_is_served_as_etcd_serves_it() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    proxy.until_preferred(0).await;
    let (status, health) = http_get(proxy.address(), "/health").await.unwrap();
    assert_eq!((status, health.as_str()), (200, r#"{"health":"true","reason":""}"#));
    proxy.readiness.send_modify(|readiness| readiness.upstream_reachable = false);
    assert_eq!(http_get(proxy.address(), "/health").await.unwrap().0, 503);
    for path in ["/version", "/nothing/here"] {
        assert_eq!(
            http_get(proxy.address(), path).await.unwrap(),
            http_get(&cluster.endpoint(0), path).await.unwrap(),
            "{path}"
        );
    }
    let put = r#"{"key":"a2V5","value":"dmFsdWU="}"#;
    let (status, answer) = gateway(proxy.address(), "/v3/kv/put", put).await;
    assert_eq!(status, 200, "{answer}");
    let noted = proxy.noted.0.lock().unwrap().last().cloned().unwrap();
    assert_eq!(noted.revision, cluster.client(0).revision().await.unwrap());
    let (status, answer) = gateway(proxy.address(), "/v3/kv/range", "{}").await;
    assert_eq!(status, 400, "{answer}");
}

async fn post(address: &str, path: &str, body: &str) -> hyper::Response<hyper::body::Incoming> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post(path).header("host", address).body(http_body_util::Full::new(body.to_owned().into()));
    let request: Request<http_body_util::Full<Bytes>> = request.unwrap();
    sender.send_request(request).await.unwrap()
}

async fn gateway(address: &str, path: &str, body: &str) -> (u16, String) {
    let response = post(address, path, body).await;
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

/// It speaks gRPC only. Taken for an upstream that had failed, it kept every call waiting after each such request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_store_is_asked_nothing_over_http() {
    const DIALS: &str = "millpond_upstream_dials_total";
    let cluster = etcd().await;
    let mut millpond = Millpond::start(&[], &[]).await;
    let told = millpond.client().maintenance.clone().status(StatusRequest {}).await.unwrap().into_inner().version;
    // The proxy's own calls within the process have one such connection, which this opens.
    http_get(&millpond.endpoint, "/health").await.unwrap();
    let dials = millpond.metric(DIALS).await;
    for path in ["/health", "/livez", "/readyz", "/v2/keys", "/"] {
        let answers =
            [http_get(&millpond.endpoint, path).await.unwrap(), http_get(&cluster.endpoint(0), path).await.unwrap()];
        assert_eq!(answers[0], answers[1], "{path}");
    }
    let (status, version) = http_get(&millpond.endpoint, "/version").await.unwrap();
    assert_eq!((status, version.contains(&format!(r#""etcdserver":"{told}""#))), (200, true), "{version}");
    for path in ["/v3/kv/range", "/metrics", "/debug/vars"] {
        assert_eq!(
            http_get(&millpond.endpoint, path).await.unwrap(),
            (404, "404 page not found\n".to_owned()),
            "{path}"
        );
    }
    assert_eq!(millpond.metric(DIALS).await, dials);
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_of_the_embedded_store_shows_in_its_health_as_in_etcds() {
    let (cluster, millpond) = (etcd().await, Millpond::start(&[], &[]).await);
    let servers = [(cluster.client(0), cluster.endpoint(0)), (millpond.client(), millpond.endpoint.clone())];
    for (action, well) in [(AlarmAction::Activate, 503), (AlarmAction::Deactivate, 200)] {
        let mut answers = Vec::new();
        for (client, endpoint) in &servers {
            let status = client.maintenance.clone().status(StatusRequest {}).await.unwrap().into_inner();
            let member_id = status.header.unwrap().member_id;
            let request = AlarmRequest { action: action.into(), member_id, alarm: AlarmType::Nospace.into() };
            client.maintenance.clone().alarm(request).await.unwrap();
            let mut told = Vec::new();
            for path in ["/health", "/health?exclude=NOSPACE", "/health?serializable=true&exclude=CORRUPT"] {
                told.push(http_get(endpoint, path).await.unwrap());
            }
            answers.push(told);
        }
        assert_eq!(answers[0], answers[1]);
        assert_eq!(answers[1].iter().map(|(status, _)| *status).collect::<Vec<_>>(), [well, 200, well]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_watch_streams_through() {
    let cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let response = post(proxy.address(), "/v3/watch", r#"{"create_request":{"key":"a2V5"}}"#).await;
    let mut body = response.into_body();
    let created = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(String::from_utf8_lossy(&created).contains("\"created\":true"));
    cluster.client(0).put("key", "value").await.unwrap();
    let event = timeout(PATIENCE, body.frame()).await.unwrap().unwrap().unwrap().into_data().unwrap();
    assert!(String::from_utf8_lossy(&event).contains("\"value\":\"dmFsdWU=\""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_cluster_is_remembered_but_trusted_with_nothing() {
    let mut cluster = etcd().await;
    let proxy = Proxy::before(&[&cluster.endpoint(0)]).await;
    let before = proxy.until("well", |health| health.reachable).await.cluster_id;
    let version = proxy.upstream.gate().lowest;
    assert!(before.is_some() && version > Version::UNKNOWN);
    cluster.kill(0);
    proxy.until("down", |health| !health.reachable).await;
    assert_eq!(proxy.upstream.health().borrow().cluster_id, before);
    assert_eq!(proxy.upstream.gate().lowest, version);
    assert!(!proxy.upstream.gate().progress_is_proof && !proxy.upstream.gate().has_range_stream);
}
