//! Watches on etcd and on the server under test over the same history: every response must be the same, event for event.

mod support;

use support::{
    random::{operations, seed},
    script::Script,
    subject::Twins,
    toolchain::Release,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_against_etcd_3_7() {
    scripts_against("3.7.1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_against_etcd_3_6() {
    scripts_against("3.6.14").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_against_etcd_3_5() {
    scripts_against("3.5.33").await;
}

/// Two scripts, each on servers of its own, and further ones while chance made few events.
async fn scripts_against(version: &str) {
    let Some(release) = Release::pinned(version) else { return };
    let seed = seed();
    let (mut responses, mut events) = (0, 0);
    for number in 0..6 {
        if number >= 2 && events > 300 {
            break;
        }
        let mut twins = Twins::start(&release).await;
        let mut script = Script::new(&twins, seed.wrapping_add(number)).await;
        script.play(operations(200)).await;
        twins.subject.assert_well();
        let volume = script.volume();
        responses += volume.0;
        events += volume.1;
    }
    println!("etcd {version}: {responses} watch responses with {events} events");
    assert!(events > 300, "the scripts exercised too little: {events} events");
}
