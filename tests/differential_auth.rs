//! With authentication on, nobody sees what etcd would not show: the same calls by the same users, compared with etcd.

mod support;

use millpond::proto::{
    authpb::{Permission, permission::Type},
    etcdserverpb as pb,
};
use support::{
    client::Client,
    etcd::Cluster,
    operation::Failure,
    subject::{Subject, Twins},
    toolchain::Release,
    watching::{WatchStream, create},
};

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
