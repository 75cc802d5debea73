//! The roster's rules: clusters, standing, authentication.

use super::*;
use crate::upstream::Version;

const A: EndpointId = EndpointId(0);
const B: EndpointId = EndpointId(1);
const C: EndpointId = EndpointId(2);

fn roster(endpoints: usize) -> Roster {
    let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
    Roster::new((0..endpoints).map(|index| format!("etcd-{index}")).collect(), metrics)
}

fn report(cluster_id: u64) -> Report {
    Report {
        version: Some(Version::new(3, 7, 1)),
        has_leader: true,
        is_learner: false,
        cluster_id,
        member_id: 1,
        raft_term: 2,
        auth: AuthState::Off,
    }
}

fn secured(cluster_id: u64) -> Report {
    Report { auth: AuthState::On, ..report(cluster_id) }
}

fn standings(roster: &Roster) -> Vec<Standing> {
    roster.health().borrow().endpoints.iter().map(|endpoint| endpoint.standing).collect()
}

fn answer(roster: &mut Roster, at: EndpointId, report: Report) {
    let epoch = roster.epoch();
    roster.record(at, epoch, Ok(report));
}

fn fail(roster: &mut Roster, at: EndpointId) {
    let epoch = roster.epoch();
    roster.record(at, epoch, Err("connection refused".to_owned()));
}

#[test]
fn the_first_configured_endpoint_that_answers_sets_the_cluster() {
    let mut roster = roster(3);
    answer(&mut roster, C, report(7));
    answer(&mut roster, B, report(5));
    assert_eq!(standings(&roster), [Standing::Examining; 3], "the first has not concluded");
    fail(&mut roster, A);
    assert_eq!(standings(&roster), [Standing::Down, Standing::Well, Standing::Foreign]);
    assert_eq!(roster.health().borrow().cluster_id, Some(5));
    answer(&mut roster, A, report(7));
    assert_eq!(standings(&roster), [Standing::Foreign, Standing::Well, Standing::Foreign], "it stays with the cluster");
}

#[test]
fn a_stranger_does_not_take_over_when_the_cluster_is_gone() {
    let mut roster = roster(2);
    answer(&mut roster, A, report(5));
    answer(&mut roster, B, report(6));
    fail(&mut roster, A);
    answer(&mut roster, B, report(6));
    assert_eq!(standings(&roster), [Standing::Down, Standing::Foreign]);
    assert!(!roster.health().borrow().reachable);
}

#[test]
fn a_replaced_cluster_is_adopted_once_all_reachable_members_agree() {
    let mut roster = roster(3);
    for at in [A, B, C] {
        answer(&mut roster, at, report(5));
    }
    answer(&mut roster, A, report(9));
    assert_eq!(standings(&roster), [Standing::Foreign, Standing::Well, Standing::Well]);
    fail(&mut roster, B);
    answer(&mut roster, C, report(9));
    assert_eq!(standings(&roster), [Standing::Well, Standing::Down, Standing::Well]);
    assert_eq!(roster.health().borrow().cluster_id, Some(9));
    answer(&mut roster, B, report(5));
    assert_eq!(standings(&roster)[1], Standing::Foreign, "what was left behind is the stranger now");
}

#[test]
fn preference_is_in_configured_order_among_the_able() {
    let mut roster = roster(3);
    answer(&mut roster, A, Report { has_leader: false, ..report(5) });
    answer(&mut roster, B, report(5));
    answer(&mut roster, C, report(5));
    let health = roster.health();
    let preferred = |avoid: &[EndpointId]| health.borrow().preferred(avoid);
    assert_eq!(preferred(&[]), Some(B), "a member without a leader is second choice");
    assert_eq!(preferred(&[B]), Some(C));
    assert_eq!(preferred(&[B, C]), Some(A));
    assert_eq!(preferred(&[A, B, C]), None);
    assert!(roster.suspect(B));
    assert!(!roster.suspect(B), "no news");
    assert_eq!(health.borrow().preferred(&[]), Some(C));
    assert!(health.borrow().undecided(&[]) && !health.borrow().undecided(&[B]));
    answer(&mut roster, A, report(5));
    assert_eq!(roster.health().borrow().preferred(&[]), Some(A), "back in configured order");
}

#[test]
fn authentication_is_on_if_one_member_says_so_and_off_if_all_do() {
    let mut roster = roster(2);
    assert_eq!(roster.auth().now(), AuthState::Unknown);
    answer(&mut roster, A, report(5));
    answer(&mut roster, B, report(5));
    assert_eq!(roster.auth().now(), AuthState::Off);
    answer(&mut roster, B, secured(5));
    assert_eq!(roster.auth().now(), AuthState::On);
    fail(&mut roster, A);
    fail(&mut roster, B);
    assert_eq!(roster.auth().now(), AuthState::On, "what was known last holds");
    answer(&mut roster, A, report(5));
    answer(&mut roster, B, report(5));
    assert_eq!(roster.auth().now(), AuthState::Off);
}

#[test]
fn a_foreign_member_has_no_say_in_authentication() {
    let mut roster = roster(2);
    answer(&mut roster, A, report(5));
    answer(&mut roster, B, secured(6));
    assert_eq!(roster.auth().now(), AuthState::Off);
}

#[test]
fn during_a_change_authentication_is_not_off_and_older_answers_do_not_count_after_it() {
    let mut roster = roster(1);
    answer(&mut roster, A, report(5));
    let before = roster.epoch();
    roster.hold();
    assert_eq!(roster.auth().now(), AuthState::Changing);
    answer(&mut roster, A, report(5));
    assert_eq!(roster.auth().now(), AuthState::Changing, "the change may still come");
    roster.release();
    assert_eq!(roster.auth().now(), AuthState::Changing, "nobody was asked since");
    roster.record(A, before, Ok(report(5)));
    assert_eq!(roster.auth().now(), AuthState::Changing, "this was asked before");
    answer(&mut roster, A, secured(5));
    assert_eq!(roster.auth().now(), AuthState::On);
    roster.hold();
    assert_eq!(roster.auth().now(), AuthState::On, "it cannot come on twice");
    roster.release();
    answer(&mut roster, A, report(5));
    assert_eq!(roster.auth().now(), AuthState::Off);
}
