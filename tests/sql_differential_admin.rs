//! What an operator asks of a store, and calls that do not exist, sent to a real etcd and to the SQL engine.

mod support;

use millpond::proto::etcdserverpb as pb;
use support::{
    client::Client,
    pair::{Pair, tell},
};

/// Compares, step by step, what a play told on either side.
async fn same(play: impl AsyncFn(&Client) -> Vec<String>) -> Vec<String> {
    let Some(pair) = Pair::start().await else { return Vec::new() };
    let (expected, found) = tokio::join!(play(&pair.reference), play(&pair.subject));
    assert_eq!(expected.len(), found.len());
    let steps = expected.iter().zip(&found).enumerate().filter(|(_, (expected, found))| expected != found);
    let differences: Vec<_> =
        steps.map(|(step, (expected, found))| format!("step {step}: etcd {expected}, the engine {found}")).collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    pair.stop().await;
    expected
}

/// Alarms in one order, which etcd's answers are not in.
async fn alarm(client: &Client, action: pb::alarm_request::AlarmAction, member_id: u64, alarm: i32) -> String {
    let request = pb::AlarmRequest { action: action.into(), member_id, alarm };
    let mut answer = client.maintenance.clone().alarm(request).await;
    if let Ok(answer) = &mut answer {
        answer.get_mut().alarms.sort_by_key(|alarm| (alarm.alarm, alarm.member_id));
    }
    tell(answer)
}

/// The errors that a status lists, in one order, and however etcd's library for messages spaces them.
async fn errors(client: &Client) -> String {
    let mut errors = client.status().await.unwrap().errors;
    for error in &mut errors {
        *error = error.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    errors.sort();
    errors.join(", ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alarms_are_etcds_whosever_they_are() {
    use pb::alarm_request::AlarmAction::{Activate, Deactivate, Get};
    const NOSPACE: i32 = pb::AlarmType::Nospace as i32;
    const CORRUPT: i32 = pb::AlarmType::Corrupt as i32;
    /// A member that there is not.
    const STRANGER: u64 = 77;
    same(async |client| {
        let own = client.status().await.unwrap().header.unwrap().member_id;
        let steps = [
            (Deactivate, STRANGER, NOSPACE),
            (Activate, STRANGER, NOSPACE),
            (Activate, STRANGER, NOSPACE),
            (Activate, 0, NOSPACE),
            (Activate, own, NOSPACE),
            (Activate, STRANGER, 0),
            (Activate, 0, 0),
            (Activate, 5, 9),
            (Get, 0, 0),
            (Get, STRANGER, NOSPACE),
            (Get, 0, CORRUPT),
            (Deactivate, own, NOSPACE),
            (Deactivate, 78, NOSPACE),
            (Deactivate, STRANGER, CORRUPT),
            (Deactivate, 0, NOSPACE),
            (Deactivate, 0, 0),
            (Get, 0, 0),
            (Deactivate, STRANGER, NOSPACE),
            (Deactivate, STRANGER, NOSPACE),
            (Activate, STRANGER, CORRUPT),
            (Deactivate, STRANGER, CORRUPT),
            (Deactivate, 5, 9),
            (Get, 0, 0),
        ];
        let mut told = Vec::new();
        for (action, member, kind) in steps {
            told.push(alarm(client, action, member, kind).await);
            told.push(errors(client).await);
            told.push(tell(client.put("a", "1").await.map(|_| tonic::Response::new(()))));
        }
        told
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downgrades_are_answered_as_etcd_does() {
    use pb::downgrade_request::DowngradeAction::{Cancel, Enable, Validate};
    // Not 3.6, which etcd would go back to.
    let versions = [
        "",
        "3",
        "3.",
        "three",
        "3.6.x",
        "3.6.0.1",
        "-1.2.3",
        "+3.6.0",
        "3.6.0-a..b",
        "3.6-rc",
        "3.6.0+a b",
        "3. 6.0",
        "3.6.99999999999999999999",
        "3.7",
        "3.7.0",
        "3.7.0-rc.0+x.y",
        "3.5",
        "2.0.1",
        "9.9",
        "3.7-rc.0",
        "3.7.0-",
        "03.07",
    ];
    same(async |client| {
        let mut told = Vec::new();
        let mut actions = vec![(i32::from(Cancel), ""), (Cancel.into(), "three"), (9, "3.6")];
        actions.extend(versions.iter().flat_map(|version| [(Validate.into(), *version), (Enable.into(), *version)]));
        for (action, version) in actions {
            let request = pb::DowngradeRequest { action, version: version.to_owned() };
            told.push(format!("{action} {version:?}: {}", tell(client.maintenance.clone().downgrade(request).await)));
        }
        told
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_without_a_proper_url_are_refused_as_etcd_does() {
    let urls: [&[&str]; 25] = [
        &[],
        &[""],
        &["::bad"],
        &["http://"],
        &["http://a"],
        &["http://a:1/"],
        &["http://a:1/x"],
        &["http:a:1"],
        &["ftp://a:1"],
        &["a:1"],
        &["http://a:1", "b"],
        &["http://a:b"],
        &["http://a:1:2"],
        &["http://[::1]"],
        &["http://a b:1"],
        &["//a:1"],
        &["http://a:1\n/"],
        &["http://%zz:1"],
        &["http://a:1#%zz"],
        &["http://a:1"],
        &[" https://a:2 "],
        &["HTTP://[::1]:3"],
        &["unix:a"],
        &["http://a:?x#y"],
        &["http://u:p@a:1?/"],
    ];
    let told = same(async |client| {
        let mut told = Vec::new();
        for urls in urls {
            let peer_ur_ls = urls.iter().map(|url| (*url).to_owned()).collect();
            // A learner, without which etcd goes on.
            let request = pb::MemberAddRequest { peer_ur_ls, is_learner: true };
            let refused = client.cluster.clone().member_add(request).await.err();
            // What comes of the others is another matter.
            let refused = refused.filter(|status| status.message().contains("URLs are invalid"));
            told.push(format!("{urls:?}: {:?}", refused.map(|status| (status.code(), status.message().to_owned()))));
        }
        told
    })
    .await;
    let taken = told.iter().filter(|told| told.ends_with("None")).count();
    assert!(taken == 0 || taken > 4, "{taken}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_and_roles_that_cannot_be_are_refused_as_etcd_does() {
    use millpond::proto::authpb;
    same(async |client| {
        let mut auth = client.auth.clone();
        let user = |name: &str, password: String, no_password| pb::AuthUserAddRequest {
            name: name.to_owned(),
            password,
            options: Some(authpb::UserAddOptions { no_password }),
            ..Default::default()
        };
        let grant = |perm| pb::AuthRoleGrantPermissionRequest { name: "r".to_owned(), perm };
        let range = |key: &str, end: &str| {
            Some(authpb::Permission { key: key.to_owned().into(), range_end: end.to_owned().into(), perm_type: 0 })
        };
        let long = "p".repeat(73);
        let mut told = vec![
            tell(auth.auth_enable(pb::AuthEnableRequest {}).await),
            tell(auth.user_add(pb::AuthUserAddRequest::default()).await),
            tell(auth.user_add(user("", long.clone(), true)).await),
            tell(auth.user_add(user("", long.clone(), false)).await),
            tell(auth.user_add(user("u", long.clone(), false)).await),
            tell(auth.role_add(pb::AuthRoleAddRequest::default()).await),
        ];
        let change =
            |password| pb::AuthUserChangePasswordRequest { name: "u".to_owned(), password, ..Default::default() };
        for password in [String::new(), "p".to_owned(), long] {
            told.push(tell(auth.user_change_password(change(password)).await));
        }
        let ranges =
            [range("a", ""), range("", ""), range("a", "b"), range("b", "a"), range("b", "\0"), range("\0", "\0")];
        for perm in ranges.into_iter().chain([None, range("", "b"), range("a", "a")]) {
            told.push(tell(auth.role_grant_permission(grant(perm)).await));
        }
        told
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_do_not_exist_are_named_as_etcd_does() {
    let paths = [
        "/etcdserverpb.KV/Nope",
        "/etcdserverpb.Auth/Nope",
        "/v3lockpb.Lock/range",
        "/foo.Bar/Baz",
        "/foo",
        "/",
        "/a/b/c",
        "/etcdserverpb.KV/Range/",
        "/etcdserverpb.KV/",
        "/etcdserverpb.KV/Ran%20ge",
        "//etcdserverpb.KV/Range",
        "/grpc.reflection.v1.ServerReflection/Nope",
        "/etcdserverpb.kv/Range",
    ];
    same(async |client| {
        let mut told = Vec::new();
        for path in paths {
            let mut grpc = tonic::client::Grpc::new(client.channel.clone());
            grpc.ready().await.unwrap();
            let codec = tonic_prost::ProstCodec::<pb::RangeRequest, pb::RangeResponse>::default();
            let answer =
                grpc.unary(tonic::Request::new(pb::RangeRequest::default()), path.parse().unwrap(), codec).await;
            told.push(format!("{path}: {}", tell(answer)));
        }
        told
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_carry_etcds_storage_version() {
    same(async |client| {
        // etcd finds it out some time after its first start.
        let versions = async || {
            let mut pieces = client.maintenance.clone().snapshot(pb::SnapshotRequest {}).await.unwrap().into_inner();
            let mut versions = Vec::new();
            while let Some(piece) = pieces.message().await.unwrap() {
                versions.push(piece.version);
            }
            versions.iter().any(|version| !version.is_empty()).then_some(versions)
        };
        let mut versions = support::client::eventually("a version", versions).await;
        // One piece is the checksum; of how many the rest has is each server's own matter.
        assert!(versions.len() > 1);
        versions.dedup();
        versions
    })
    .await;
}
