//! The dependencies are what `deny.toml` allows: licences, sources, banned crates, one version of each.
//!
//! The same as `cargo deny check bans licenses sources`, for machines without cargo-deny.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
    sync::LazyLock,
};

use serde::Deserialize;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    id: String,
    license: Option<String>,
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    req: String,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
}

#[derive(Deserialize)]
struct Rules {
    graph: Graph,
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Named>,
    skip: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

static RULES: LazyLock<Rules> = LazyLock::new(|| toml::from_str(include_str!("../deny.toml")).unwrap());

/// Every package that a build for the targets of deny.toml uses.
static PACKAGES: LazyLock<Vec<Package>> = LazyLock::new(|| {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--format-version=1", "--locked"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    for target in &RULES.graph.targets {
        command.args(["--filter-platform", target]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Metadata = serde_json::from_slice(&output.stdout).unwrap();
    let used: BTreeSet<String> = metadata.resolve.nodes.into_iter().map(|node| node.id).collect();
    metadata.packages.into_iter().filter(|package| used.contains(&package.id)).collect()
});

fn assert_none(what: &str, found: &[String]) {
    assert!(PACKAGES.len() > 50, "cargo metadata told of {} packages only", PACKAGES.len());
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn every_licence_is_allowed() {
    let refused = PACKAGES.iter().filter(|package| {
        let license = package.license.as_deref().unwrap_or_default();
        !License { tokens: &tokens(license) }.allows()
    });
    let named: Vec<String> = refused.map(|p| format!("{} {}: {:?}", p.name, p.version, p.license)).collect();
    assert_none("licences that deny.toml does not allow", &named);
}

#[test]
fn every_dependency_comes_from_the_registry() {
    let is_known = |source: &str| source.starts_with("registry+") && source.ends_with("/crates.io-index");
    let foreign = PACKAGES.iter().filter(|p| p.source.as_deref().is_some_and(|source| !is_known(source)));
    let named: Vec<String> = foreign.map(|p| format!("{} {}: {:?}", p.name, p.version, p.source)).collect();
    assert_none("dependencies from elsewhere", &named);
}

#[test]
fn no_banned_crate_is_used() {
    let banned = |package: &&Package| RULES.bans.deny.iter().any(|ban| ban.name == package.name);
    let named: Vec<String> = PACKAGES.iter().filter(banned).map(|p| format!("{} {}", p.name, p.version)).collect();
    assert_none("crates that deny.toml bans", &named);
}

#[test]
fn no_dependency_of_ours_takes_any_version() {
    let ours = PACKAGES.iter().filter(|package| package.source.is_none());
    let open = ours.flat_map(|package| &package.dependencies).filter(|dependency| dependency.req == "*");
    assert_none("dependencies without a version", &open.map(|d| d.name.clone()).collect::<Vec<_>>());
}

#[test]
fn there_is_one_version_of_each_but_for_known_ones() {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in PACKAGES.iter() {
        versions.entry(&package.name).or_default().push(&package.version);
    }
    versions.retain(|_, versions| versions.len() > 1);
    // An entry `name@1.2` takes the versions that start so out of the count.
    let is_skipped = |name: &str, version: &str| {
        let named = |skip: &Named| {
            let (of, at) = skip.name.split_once('@').unwrap_or((&skip.name, ""));
            of == name && version.starts_with(at)
        };
        RULES.bans.skip.iter().any(named)
    };
    let left = |(name, versions): (&&str, &Vec<&str>)| {
        let left: Vec<&str> = versions.iter().filter(|version| !is_skipped(name, version)).copied().collect();
        (left.len() > 1).then(|| format!("{name}: {}", left.join(", ")))
    };
    assert_none("several versions of a crate", &versions.iter().filter_map(left).collect::<Vec<_>>());
    for skip in &RULES.bans.skip {
        let name = skip.name.split('@').next().unwrap_or_default();
        assert!(versions.contains_key(name), "deny.toml skips {}, of which there is one version now", skip.name);
        assert!(!skip.reason.is_empty(), "deny.toml says why it skips {}", skip.name);
    }
}

/// A licence expression: names, AND, OR (also written as a slash), WITH and brackets.
struct License<'a> {
    tokens: &'a [String],
}

impl License<'_> {
    fn allows(mut self) -> bool {
        let allowed = self.any();
        allowed && self.tokens.is_empty()
    }

    fn any(&mut self) -> bool {
        let mut allowed = self.all();
        while self.take("OR") || self.take("/") {
            allowed |= self.all();
        }
        allowed
    }

    fn all(&mut self) -> bool {
        let mut allowed = self.one();
        while self.take("AND") {
            allowed &= self.one();
        }
        allowed
    }

    fn one(&mut self) -> bool {
        if self.take("(") {
            let allowed = self.any();
            return self.take(")") && allowed;
        }
        let Some((name, rest)) = self.tokens.split_first() else { return false };
        self.tokens = rest;
        if self.take("WITH") {
            // No exception is on the list; what carries one is offered without it too.
            self.tokens = self.tokens.get(1..).unwrap_or_default();
            return false;
        }
        RULES.licenses.allow.contains(name)
    }

    fn take(&mut self, token: &str) -> bool {
        let is_next = self.tokens.first().is_some_and(|next| next == token);
        if is_next {
            self.tokens = &self.tokens[1..];
        }
        is_next
    }
}

fn tokens(expression: &str) -> Vec<String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " / ");
    spaced.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn licence_expressions_are_read_as_written() {
    let allows = |text: &str| License { tokens: &tokens(text) }.allows();
    for text in ["MIT", "MIT/Apache-2.0", "GPL-3.0 OR MIT", "(MIT OR GPL-3.0) AND Unicode-3.0", "MIT AND BSD-3-Clause"]
    {
        assert!(allows(text), "{text}");
    }
    for text in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND GPL-3.0", "(MIT", "MIT MIT", "OR"] {
        assert!(!allows(text), "{text}");
    }
}
