//! With authentication on, nobody sees what etcd would not show: the same calls by the same users, compared with etcd.

mod support;

use std::time::Duration;

use millpond::proto::{
    authpb::{Permission, permission::Type},
    etcdserverpb as pb,
};
use support::{
    client::{Client, http_get},
    etcd::Cluster,
    millpond::Millpond,
    operation::Failure,
    subject::{Subject, Twins},
    toolchain::Release,
    watching::{WatchStream, create},
};
use tokio::time::timeout;
use tonic::Code;

/// A user with a password: `root`, who may everything, and `reader`, who may read `open/`.
async fn add_user(client: &Client, name: &str, role: &str) -> Result<(), tonic::Status> {
    let mut auth = client.auth.clone();
    let user = pb::AuthUserAddRequest { name: name.into(), password: "pass".into(), ..Default::default() };
    auth.user_add(user).await?;
    auth.role_add(pb::AuthRoleAddRequest { name: role.into() }).await?;
    auth.user_grant_role(pb::AuthUserGrantRoleRequest { user: name.into(), role: role.into() }).await?;
    Ok(())
}

async fn switch_on(client: &Client) {
    client.put("open/a", "1").await.unwrap();
    client.put("secret/a", "2").await.unwrap();
    add_user(client, "root", "root").await.unwrap();
    add_user(client, "reader", "reading").await.unwrap();
    let perm = Permission { perm_type: Type::Read as i32, key: "open/".into(), range_end: "open0".into() };
    let grant = pb::AuthRoleGrantPermissionRequest { name: "reading".into(), perm: Some(perm) };
    client.auth.clone().role_grant_permission(grant).await.unwrap();
    client.auth.clone().auth_enable(pb::AuthEnableRequest {}).await.unwrap();
}

async fn token_of(client: &Client, name: &str) -> String {
    let request = pb::AuthenticateRequest { name: name.into(), password: "pass".into() };
    client.auth.clone().authenticate(request).await.unwrap().into_inner().token
}

/// A read as someone with this token; `None` for no token at all.
async fn read(client: &Client, token: Option<&str>, key: &str, end: &str, serializable: bool) -> Result<i64, Failure> {
    let message = pb::RangeRequest {
        key: key.to_owned().into(),
        range_end: end.to_owned().into(),
        serializable,
        ..Default::default()
    };
    let mut request = tonic::Request::new(message);
    if let Some(token) = token {
        request.metadata_mut().insert("token", token.parse().unwrap());
    }
    Ok(client.kv.clone().range(request).await?.into_inner().count)
}

/// The first two answers to a watch, as `(created, canceled, reason)`, or how the stream ended.
async fn watch(client: &Client, token: Option<&str>, key: &str, end: &str) -> Result<(bool, bool, String), Failure> {
    let metadata: Vec<(&'static str, &str)> = token.map(|token| ("token", token)).into_iter().collect();
    let stream = WatchStream::open_with(client, &metadata).await;
    stream.create(create(key.to_owned(), end.to_owned(), 0));
    support::client::eventually("an answer to the watch", async || {
        if let Some(Err(status)) = stream.end() {
            return Some(Err(Failure::from(status)));
        }
        let first = stream.responses().into_iter().next()?;
        Some(Ok((first.created, first.canceled, first.cancel_reason)))
    })
    .await
}

/// Everything that is tried, under a name for the failure's message.
async fn trials(client: &Client) -> Vec<(String, String)> {
    let (root, reader) = (token_of(client, "root").await, token_of(client, "reader").await);
    let tokens = [("nobody", None), ("a liar", Some("no.1")), ("root", Some(&*root)), ("reader", Some(&*reader))];
    let mut told = Vec::new();
    for (who, token) in tokens {
        for (key, end) in
            [("open/a", ""), ("open/", "open0"), ("secret/a", ""), ("open/", "\0"), ("\0", "\0"), ("open/x", "open/b")]
        {
            for serializable in [true, false] {
                let answer = read(client, token, key, end, serializable).await;
                told.push((
                    format!("{who} reads {key:?} to {end:?}, serializable: {serializable}"),
                    format!("{answer:?}"),
                ));
            }
            let answer = watch(client, token, key, end).await;
            told.push((format!("{who} watches {key:?} to {end:?}"), format!("{answer:?}")));
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_sees_more_through_the_proxy_than_etcd_shows() {
    let mut twins = Twins::start(&Release::newest()).await;
    let (reference, subject) = (twins.reference.client(0), twins.subject.client());
    // Warm: what is cached before authentication is switched on is what could leak.
    subject.get("secret/a").await.unwrap();
    switch_on(&reference).await;
    switch_on(&subject).await;
    let (expected, found) = (trials(&reference).await, trials(&subject).await);
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found);
    }
    assert!(expected.iter().any(|(_, answer)| answer.contains("permission denied")), "some were refused");
    twins.subject.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switched_on_elsewhere_it_holds_within_seconds_and_open_watches_end() {
    let mut twins = Twins::start(&Release::newest()).await;
    let subject = twins.subject.client();
    let open = WatchStream::open(&subject).await;
    open.create(create("secret/", "secret0", 0));
    open.until_count(1).await;
    switch_on(&twins.subject.etcd.client(0)).await;
    support::client::eventually("a refusal", async || read(&subject, None, "secret/a", "", true).await.err()).await;
    if twins.subject.millpond.is_some() {
        let ended = open.until_end().await.expect_err("the watch ends");
        assert_eq!(ended.code(), tonic::Code::Unavailable, "so that the client comes back with its token");
    }
    twins.subject.assert_well();
}

/// The version of a secured member is read over HTTP, which a client port may do without: the member was then taken for
/// dead, and every call failed for as long as authentication was on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secured_member_that_speaks_no_http_is_served() {
    let etcd = Cluster::builder(Release::newest()).flag("--listen-client-http-urls=http://127.0.0.1:0").start().await;
    let mut subject = Subject::before(etcd, &[]).await;
    let client = subject.client();
    client.put("open/a", "1").await.unwrap();
    switch_on(&client).await;
    let token = token_of(&client, "reader").await;
    // Longer than the probes take to find the member in its new state.
    support::millpond::breathe(3000).await;
    assert_eq!(read(&client, Some(&token), "open/a", "", true).await, Ok(1));
    subject.assert_well();
}

/// An attempt costs nothing but itself: what is open goes on, from memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_to_switch_it_on_that_is_refused_ends_no_watch() {
    let cluster = Cluster::single(Release::newest()).await;
    let mut millpond = Millpond::start(&[cluster.endpoint(0)], &[]).await;
    let client = millpond.client();
    let stream = WatchStream::watching(&client, create("k", "l", 0)).await;
    stream.until_count(1).await;
    for round in 0..3 {
        let refused = client.auth.clone().auth_enable(pb::AuthEnableRequest {}).await.unwrap_err();
        assert_eq!(refused.message(), "etcdserver: root user does not exist");
        let (status, _) = http_get(&millpond.endpoint, "/v3/auth/enable").await.unwrap();
        assert_eq!(status, 501);
        let later = WatchStream::watching(&client, create("k", "l", 0)).await;
        later.until_count(1).await;
        let revision = client.put("k", format!("{round}")).await.unwrap();
        later.until_revisions(&[revision]).await;
        assert!(stream.revisions().len() <= round + 1 && later.end().is_none());
        stream
            .until("the event", |responses| responses.iter().map(|one| one.events.len()).sum::<usize>() > round)
            .await;
        assert_eq!(millpond.metric("millpond_server_watch_streams").await, 2.0, "both are served from memory");
    }
    assert!(stream.end().is_none());
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switched_off_again_watches_return_to_memory() {
    let cluster = Cluster::single(Release::newest()).await;
    let mut millpond = Millpond::start(&[cluster.endpoint(0)], &[]).await;
    let client = millpond.client();
    switch_on(&client).await;
    let token = token_of(&client, "root").await;
    let stream = WatchStream::open_with(&client, &[("token", &token)]).await;
    stream.create(create("k", "l", 0));
    stream.until_count(1).await;
    assert_eq!(millpond.metric("millpond_server_watch_streams").await, 0.0, "it is the upstream's");
    let mut disable = tonic::Request::new(pb::AuthDisableRequest {});
    disable.metadata_mut().insert("token", token.parse().unwrap());
    cluster.client(0).auth.clone().auth_disable(disable).await.unwrap();
    assert_eq!(stream.until_end().await.unwrap_err().code(), Code::Unavailable);
    let stream = WatchStream::watching(&client, create("k", "l", 0)).await;
    stream.until_count(1).await;
    assert_eq!(millpond.metric("millpond_server_watch_streams").await, 1.0, "it is served from memory");
    millpond.assert_well();
}

/// The cluster refuses the question by which consistent reads are proven. That says who is to answer them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switched_on_elsewhere_consistent_reads_do_not_wait_for_a_proof() {
    let cluster = Cluster::single(Release::newest()).await;
    let mut millpond = Millpond::start(&[cluster.endpoint(0)], &["--read-timeout=60s"]).await;
    switch_on(&cluster.client(0)).await;
    let client = millpond.client();
    let token = token_of(&cluster.client(0), "root").await;
    let reads = async {
        (read(&client, Some(&token), "open/a", "", false).await, read(&client, None, "open/a", "", false).await)
    };
    let (mine, a_strangers) = timeout(Duration::from_secs(30), reads).await.expect("both are answered");
    assert_eq!(mine.unwrap(), 1);
    assert_eq!(a_strangers.unwrap_err(), read(&cluster.client(0), None, "open/a", "", false).await.unwrap_err());
    millpond.assert_well();
}
