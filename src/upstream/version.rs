//! etcd versions, and what the members' versions allow a cache to rely on.

use std::{fmt, str::FromStr};

/// A server's version. A pre-release sorts below its release.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
    /// False for an alpha, a beta or a release candidate.
    pub release: bool,
}

impl Version {
    /// Below every real version: stands for one that is not known.
    pub const UNKNOWN: Version = Version { major: 0, minor: 0, patch: 0, release: false };

    /// A released version.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch, release: true }
    }

    /// Whether a progress answer of this version at R proves that every event up to R was sent: etcd-io/etcd#15220 and
    /// etcd-io/etcd#17507 are fixed in it. The same gate as in Kubernetes.
    pub fn progress_is_proof(self) -> bool {
        match (self.major, self.minor) {
            (3, 4) => self >= Version::new(3, 4, 31),
            (3, 5) => self >= Version::new(3, 5, 13),
            _ => self >= Version::new(3, 6, 0),
        }
    }

    /// Whether this version has `KV.RangeStream`.
    pub fn has_range_stream(self) -> bool {
        self >= Version::new(3, 7, 0)
    }
}

impl FromStr for Version {
    type Err = ();

    /// Parses `3.7.1` or `3.8.0-alpha.0`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (core, pre) = text.split_once(['-', '+']).unwrap_or((text, ""));
        let mut numbers = core.split('.').map(|part| part.parse::<u32>().map_err(drop));
        let mut next = || numbers.next().unwrap_or(Err(()));
        let version = Version { major: next()?, minor: next()?, patch: next()?, release: pre.is_empty() };
        if numbers.next().is_some() { Err(()) } else { Ok(version) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pre = if self.release { "" } else { "-pre" };
        write!(f, "{}.{}.{}{pre}", self.major, self.minor, self.patch)
    }
}

/// What can be relied on, given the versions of all reachable members.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Gate {
    /// A progress answer proves that every event before it was sent. False when a member's version is not known.
    pub progress_is_proof: bool,
    /// Every reachable member has `KV.RangeStream`.
    pub has_range_stream: bool,
    /// The lowest version; while none is reachable, the lowest that was last seen; [`Version::UNKNOWN`] when one is not known.
    pub lowest: Version,
}

impl Gate {
    /// The gate over the members' versions.
    pub fn over(versions: impl IntoIterator<Item = Version>) -> Gate {
        let versions: Vec<Version> = versions.into_iter().collect();
        let all = |holds: fn(Version) -> bool| !versions.is_empty() && versions.iter().all(|version| holds(*version));
        Gate {
            progress_is_proof: all(Version::progress_is_proof),
            has_range_stream: all(Version::has_range_stream),
            lowest: versions.iter().min().copied().unwrap_or(Version::UNKNOWN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(versions: &[&str]) -> Gate {
        Gate::over(versions.iter().map(|text| text.parse().unwrap_or(Version::UNKNOWN)))
    }

    #[test]
    fn versions_parse_and_order() {
        assert_eq!("3.7.1".parse(), Ok(Version::new(3, 7, 1)));
        assert!("3.7.0-rc.0".parse::<Version>().unwrap() < Version::new(3, 7, 0));
        for bad in ["", "3", "3.7", "3.7.x", "3.7.1.2", "-1.0.0", "99999999999.0.0"] {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }

    #[test]
    fn progress_is_proof_only_where_every_member_has_the_fixes() {
        for good in ["3.4.31", "3.5.13", "3.5.30", "3.6.0", "3.7.1", "3.8.0-alpha.0", "4.0.0"] {
            assert!(gate(&[good]).progress_is_proof, "{good}");
        }
        for bad in ["3.4.30", "3.5.12", "3.5.0", "3.6.0-rc.1", "3.3.27", "2.3.8", "not a version"] {
            assert!(!gate(&[bad]).progress_is_proof, "{bad}");
            assert!(!gate(&["3.7.1", bad]).progress_is_proof, "{bad} beside 3.7.1");
        }
        assert!(!gate(&[]).progress_is_proof);
    }

    #[test]
    fn range_stream_needs_every_member() {
        assert!(gate(&["3.7.0", "3.7.1"]).has_range_stream);
        assert!(!gate(&["3.7.0", "3.6.14"]).has_range_stream);
        assert_eq!(gate(&["3.7.0", "3.6.14"]).lowest, Version::new(3, 6, 14));
        assert_eq!(gate(&[]).lowest, Version::UNKNOWN);
    }
}
