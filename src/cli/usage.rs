//! Arguments that cannot be used: one line on standard error and exit status 64, instead of a parser's paragraph.

use std::process::ExitCode;

use clap::error::ErrorKind;

use super::{EXIT_FAILURE, EXIT_USAGE};

/// Prints what the parser has to say. Help and version that were asked for go to standard output with status 0.
pub fn report(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            if error.print().is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(EXIT_FAILURE)
            }
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(EXIT_USAGE)
        }
        _ => {
            complain(&one_line(&error.render().to_string()));
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// Prints one line to standard error.
pub fn complain(line: &str) {
    use std::io::Write;
    // Nobody is left to tell when standard error is gone.
    let _ = writeln!(std::io::stderr().lock(), "millpond: {}", line.replace('\n', " "));
}

/// The parser's message and tips without its usage summary.
fn one_line(rendered: &str) -> String {
    let told = rendered.split("\n\nUsage:").next().unwrap_or(rendered);
    let told = told.split("\n\nFor more information").next().unwrap_or(told);
    let parts = told.lines().map(str::trim).filter(|part| !part.is_empty());
    let mut line = String::new();
    for part in parts {
        let part = part.strip_prefix("error: ").unwrap_or(part);
        let glue = if line.is_empty() || line.ends_with(':') { "" } else { ";" };
        let space = if line.is_empty() { "" } else { " " };
        line = format!("{line}{glue}{space}{part}");
    }
    line
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn line(arguments: &[&str]) -> String {
        let error = Cli::try_parse_from([&["millpond"], arguments].concat()).unwrap_err();
        one_line(&error.render().to_string())
    }

    #[test]
    fn an_unknown_flag_is_named_with_its_neighbour() {
        let line = line(&["serve", "--endpoint", "a:1"]);
        assert_eq!(line, "unexpected argument '--endpoint' found; tip: a similar argument exists: '--endpoints'");
    }

    #[test]
    fn a_missing_value_is_named() {
        assert!(line(&["serve", "--listen"]).starts_with("a value is required for '--listen <IP:PORT>'"));
        assert_eq!(
            line(&["serve", "--listen", "a", "--listen", "b"]),
            "the argument '--listen <IP:PORT>' cannot be used multiple times"
        );
    }

    #[test]
    fn an_unknown_command_is_named() {
        let line = line(&["sevre"]);
        assert!(line.starts_with("unrecognized subcommand 'sevre'; tip: ") && line.contains("'serve'"), "{line}");
    }
}
