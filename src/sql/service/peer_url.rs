//! Which URLs etcd takes for those of a member.

/// Whether each of `urls`, of which there must be one, says where a member listens for its peers.
pub fn are_valid(urls: &[String]) -> bool {
    !urls.is_empty() && urls.iter().all(|url| is_valid(url.trim()))
}

/// `http://host:port` without a path, or anything on a Unix socket.
fn is_valid(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once(':') else { return false };
    if url.contains(|c: char| c.is_ascii_control()) || !is_escaped(url) {
        return false;
    }
    match scheme.to_ascii_lowercase().as_str() {
        "http" | "https" => rest.strip_prefix("//").is_some_and(names_port),
        "unix" | "unixs" => true,
        _ => false,
    }
}

/// Whether each `%` is followed by two digits.
fn is_escaped(url: &str) -> bool {
    url.split('%')
        .skip(1)
        .all(|after| after.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)))
}

/// Whether what follows `//` is a host and a port, without a path.
fn names_port(rest: &str) -> bool {
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, after) = rest.split_at(end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let Some((host, port)) = host.rsplit_once(':') else { return false };
    let name = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = name.map_or(!host.contains([':', '[', ']']), |name| !name.contains(['[', ']']));
    let is_plain = !host.contains([' ', '\\', '^', '`', '{', '|', '}']);
    is_host && is_plain && port.bytes().all(|byte| byte.is_ascii_digit()) && !after.starts_with('/')
}
