//! The program as a person at a terminal meets it: settings and where they come from, error lines, help, signals.

mod support;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    time::Duration,
};

use assert_cmd::assert::OutputAssertExt;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

fn millpond(arguments: &[&str]) -> Command {
    let mut command = support::process::millpond();
    command.args(arguments);
    command
}

/// Standard output of a run that must succeed.
fn output(command: &mut Command) -> String {
    String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
}

/// The one line on standard error of a run that must end with status 64 and print nothing else.
fn usage_error(command: &mut Command) -> String {
    let assert = command.assert().code(64).stdout("");
    let text = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(text.ends_with('\n') && text.lines().count() == 1, "not one line: {text:?}");
    text.trim_end().strip_prefix("millpond: ").expect("the line begins with the program's name").to_owned()
}

fn settings(text: &str) -> toml::Table {
    text.parse().expect("millpond config prints TOML")
}

struct File {
    _dir: TempDir,
    path: PathBuf,
}

fn file(text: &str) -> File {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("millpond.toml");
    std::fs::write(&path, text).unwrap();
    File { _dir: dir, path }
}

impl File {
    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

#[test]
fn flags_beat_the_environment_and_that_beats_the_file() {
    let file = file("history-bytes = '1MiB'\ncache-bytes = '1MiB'\nforward-limit = 1\n");
    let mut command = millpond(&["config", "--config", file.path(), "--history-bytes", "3MiB"]);
    command.env("MILLPOND_HISTORY_BYTES", "2MiB").env("MILLPOND_CACHE_BYTES", "2MiB");
    let text = output(&mut command);
    let shown = settings(&text);
    assert_eq!(shown["history-bytes"].as_str(), Some("3MiB"));
    assert_eq!(shown["cache-bytes"].as_str(), Some("2MiB"));
    assert_eq!(shown["forward-limit"].as_integer(), Some(1));
    assert_eq!(shown["listen"].as_str(), Some("127.0.0.1:23790"));
    assert!(text.contains("# from --history-bytes") && text.contains("# from MILLPOND_CACHE_BYTES"), "{text}");
}

#[test]
fn the_environment_can_name_the_file() {
    let file = file("log-format = 'json'\n");
    let shown = settings(&output(millpond(&["config"]).env("MILLPOND_CONFIG", file.path())));
    assert_eq!(shown["log-format"].as_str(), Some("json"));
}

#[test]
fn lists_come_from_commas_repetition_and_toml() {
    let flags =
        ["config", "--endpoints", "http://a:1,b:2", "--endpoints", "c:3", "--prefixes", "/x/y", "--prefixes", "/x"];
    let shown = settings(&output(&mut millpond(&flags)));
    assert_eq!(shown["endpoints"].to_string(), r#"["a:1", "b:2", "c:3"]"#);
    assert_eq!(shown["prefixes"].to_string(), r#"["/x"]"#);
    let shown = settings(&output(millpond(&["config"]).env("MILLPOND_ENDPOINTS", "a:1, b:2")));
    assert_eq!(shown["endpoints"].to_string(), r#"["a:1", "b:2"]"#);
}

#[test]
fn effective_settings_can_be_fed_back() {
    let flags = [
        "config",
        "--endpoints",
        "a:1",
        "--max-response-bytes",
        "1.5GB",
        "--history-age",
        "1h30m",
        "--check-interval",
        "0",
        "--advertise-client-url",
        "http://pond:2379",
        "--log-level",
        "warn,millpond=debug",
        "--prefixes",
        "/a\"#,/b",
    ];
    let first = output(&mut millpond(&flags));
    let file = file(&first);
    let second = output(&mut millpond(&["config", "--config", file.path()]));
    assert_eq!(settings(&first), settings(&second));
}

#[test]
fn an_unknown_name_is_told_from_every_source() {
    let file = file("[cache]\nbytes = 1\n");
    let line = usage_error(&mut millpond(&["serve", "--config", file.path()]));
    assert!(line.starts_with("cache: no such setting (from "), "{line}");
    let line = usage_error(millpond(&["serve"]).env("MILLPOND_LISTN", "127.0.0.1:0"));
    assert_eq!(line, "listn: no such setting (from MILLPOND_LISTN); did you mean listen?");
    let line = usage_error(&mut millpond(&["serve", "--listn", "127.0.0.1:0"]));
    assert!(line.contains("'--listn'") && line.contains("'--listen'"), "{line}");
}

#[test]
fn every_unreadable_value_is_told_with_its_setting() {
    let cases = [
        ("endpoints", "https://etcd:2379", "TLS"),
        ("endpoints", "etcd", "is not an endpoint"),
        ("listen", "nowhere", "is not an address to listen on"),
        ("admin-listen", "127.0.0.1:99999", "is not an address to listen on"),
        ("advertise-client-url", "pond:2379", "is not a client URL"),
        ("cache-bytes", "many", "is not a size"),
        ("history-bytes", "0", "must be above 0"),
        ("max-request-bytes", "-1", "is not a size"),
        ("max-response-bytes", "endless", "is not a size"),
        ("history-age", "10", "is not a duration"),
        ("progress-interval", "1ms", "must be at least 100ms"),
        ("busy-poll", "1s", "must be at most 10ms"),
        ("connect-timeout", "0", "must be above 0"),
        ("upstream-keepalive-interval", "1s", "must be at least 5s"),
        ("shutdown-grace", "-5s", "is not a duration"),
        ("forward-limit", "0", "is not a whole number of at least 1"),
        ("catch-up-limit", "99999999999999999999", "is not a whole number of at least 1"),
        ("quota-backend-bytes", "big", "is not a size"),
        ("auto-compaction-mode", "yearly", "is neither periodic nor revision"),
        ("auto-compaction-retention", "often", "is neither a duration nor a number of hours"),
        ("log-level", "loud", "is not a level"),
        ("log-format", "xml", "xml"),
    ];
    for (setting, value, problem) in cases {
        let line = usage_error(&mut millpond(&["serve", &format!("--{setting}={value}")]));
        let (told, rest) = line.split_once(": ").unwrap();
        assert!(told == setting && rest.contains(problem), "{line}");
        assert!(rest.ends_with(&format!("(from --{setting})")), "{line}");
    }
}

#[test]
fn contradictions_are_told() {
    let line = usage_error(&mut millpond(&["serve", "--listen", "127.0.0.1:5", "--admin-listen", "127.0.0.1:5"]));
    assert_eq!(line, "admin-listen: 127.0.0.1:5 is taken by listen, which is 127.0.0.1:5 (from --admin-listen)");
    let line = usage_error(&mut millpond(&["serve", "--endpoints", "127.0.0.1:23790"]));
    assert!(line.starts_with("endpoints: 127.0.0.1:23790 is where Millpond itself listens"), "{line}");
    let line = usage_error(millpond(&["serve", "--endpoints", "a:1"]).env("MILLPOND_DATA_DIR", "d"));
    assert_eq!(
        line,
        "data-dir: belongs to the embedded store, which is off because endpoints are set (from MILLPOND_DATA_DIR)"
    );
}

#[test]
fn a_broken_file_is_told_with_its_line() {
    let broken = file("listen = '127.0.0.1:0'\nhistory-bytes = \n");
    let line = usage_error(&mut millpond(&["config", "--config", broken.path()]));
    assert!(line.starts_with("config: ") && line.contains("line 2"), "{line}");
    let wrong = file("history-bytes = true\n");
    let line = usage_error(&mut millpond(&["config", "--config", wrong.path()]));
    assert!(line.starts_with("history-bytes: ") && line.contains("millpond.toml"), "{line}");
    let line = usage_error(&mut millpond(&["config", "--config", "/nonexistent/millpond.toml"]));
    assert_eq!(line, "config: /nonexistent/millpond.toml: No such file or directory (os error 2)");
}

#[test]
fn wrong_arguments_are_told_on_one_line() {
    for arguments in
        [&["fly"][..], &["serve", "now"], &["completions", "teletype"], &["completions"], &["serve", "--listen"]]
    {
        usage_error(&mut millpond(arguments));
    }
    millpond(&[]).assert().code(64);
}

#[test]
fn help_version_and_completions_succeed() {
    assert_eq!(output(&mut millpond(&["--version"])), format!("millpond {}\n", env!("CARGO_PKG_VERSION")));
    assert!(output(&mut millpond(&["--help"])).contains("Examples:"));
    // Where lines break depends on the terminal's width.
    let help = output(&mut millpond(&["serve", "--help"])).split_whitespace().collect::<Vec<_>>().join(" ");
    for words in
        ["Upstream:", "Cache:", "[default: 1.5MiB]", "[default: 256MiB]", "[default: 127.0.0.1:23790]", "Examples:"]
    {
        assert!(help.contains(words), "{words} is missing in:\n{help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(output(&mut millpond(&["completions", shell])).contains("history-bytes"));
    }
}

/// A running `millpond serve` that dies with the test.
struct Serving {
    child: Child,
    log: BufReader<ChildStderr>,
    admin: String,
}

fn serve(arguments: &[&str]) -> Serving {
    let all =
        [&["serve", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json"], arguments].concat();
    let mut command = millpond(&all);
    command.stderr(Stdio::piped()).stdin(Stdio::null());
    // SAFETY: prctl is a plain system call, fit for the time between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let mut child = command.spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let mut serving = Serving { child, log, admin: String::new() };
    let line = serving.wait_for_line("admin-listen");
    serving.admin = line["address"].as_str().unwrap().to_owned();
    serving
}

impl Serving {
    fn wait_for_line(&mut self, words: &str) -> serde_json::Value {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "the log ended before {words:?}");
        }
        serde_json::from_str(&line).expect("log lines are JSON")
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    fn get(&self, path: &str) -> String {
        let mut socket = TcpStream::connect(&self.admin).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Serving {
    /// A client that asks and asks and never reads, so that answers to it stay under way.
    fn ask_without_reading(&self) -> TcpStream {
        let mut socket = TcpStream::connect(&self.admin).unwrap();
        socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        while socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n").is_ok() {}
        socket
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An upstream that refuses connections: being down is no reason not to start.
const NO_UPSTREAM: &str = "--endpoints=127.0.0.1:9";

#[test]
fn without_its_upstream_it_lives_and_is_not_ready() {
    let serving = serve(&[NO_UPSTREAM]);
    assert!(serving.get("/livez").starts_with("HTTP/1.1 200"));
    assert!(serving.get("/readyz").starts_with("HTTP/1.1 503"));
    assert!(serving.get("/metrics").contains("millpond_build_info"));
}

#[test]
fn the_first_signal_ends_it_well() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut serving = serve(&[NO_UPSTREAM]);
        serving.signal(signal);
        assert_eq!(serving.wait().code(), Some(0));
    }
}

#[test]
fn the_second_signal_leaves_at_once() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let mut serving = serve(&[NO_UPSTREAM, "--shutdown-grace=1h"]);
        let _unread = serving.ask_without_reading();
        serving.signal(Signal::TERM);
        serving.wait_for_line("stopping");
        serving.signal(signal);
        assert_eq!(serving.wait().code(), Some(status));
    }
}

#[test]
fn a_taken_address_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let arguments = ["serve", NO_UPSTREAM, "--log-level=off", "--admin-listen", &address.to_string()];
    let assert = millpond(&arguments).assert().code(1);
    let line = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(line.starts_with(&format!("millpond: admin-listen: cannot listen on {address}: ")), "{line}");
}
