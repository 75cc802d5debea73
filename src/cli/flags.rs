//! One flag per setting, made from the table of settings, so that flags, file and environment cannot drift apart.

use std::{collections::BTreeMap, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::config::{
    Sources,
    settings::{SETTINGS, Setting},
};

/// The settings given as flags, unread: their values are checked together with those from other sources.
#[derive(Clone, Debug, Default)]
pub struct SettingFlags {
    file: Option<PathBuf>,
    values: BTreeMap<String, Vec<String>>,
}

impl SettingFlags {
    /// These flags over the process's environment.
    pub fn sources(&self) -> Sources {
        let readable = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        };
        let environment = std::env::vars_os().filter_map(readable).collect();
        Sources { file: self.file.clone(), environment, flags: self.values.clone() }
    }
}

fn flag(setting: &'static Setting) -> Arg {
    let action = if setting.repeatable { ArgAction::Append } else { ArgAction::Set };
    Arg::new(setting.name)
        .long(setting.name)
        .value_name(setting.value_name)
        .help(format!("{} [default: {}]", setting.help, setting.default_text()))
        .help_heading(setting.group.title())
        .action(action)
}

fn file_flag() -> Arg {
    Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help("Settings as TOML, under the names of the flags. Order of precedence: flags, environment, file")
        .help_heading("Settings")
}

impl Args for SettingFlags {
    fn augment_args(command: Command) -> Command {
        command.arg(file_flag()).args(SETTINGS.iter().map(flag))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one::<PathBuf>("config").cloned();
        for setting in SETTINGS {
            if let Some(values) = matches.get_many::<String>(setting.name) {
                self.values.insert(setting.name.to_owned(), values.cloned().collect());
            }
        }
        Ok(())
    }
}
