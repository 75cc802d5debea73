//! The effective settings as TOML, in the order of the help, each with where it came from. The text can be fed back as a
//! settings file and then gives the same settings.

use std::fmt::Write;

use super::{
    Loaded,
    settings::{Group, SETTINGS, Setting},
};

/// Writes all settings; those without a value as comments.
pub fn to_toml(loaded: &Loaded) -> Result<String, toml::ser::Error> {
    let values = toml::Table::try_from(&loaded.config)?;
    let mut out = String::new();
    let mut group: Option<Group> = None;
    for setting in SETTINGS {
        if group != Some(setting.group) {
            let gap = if group.is_some() { "\n" } else { "" };
            let _ = writeln!(out, "{gap}# {}", setting.group.title());
            group = Some(setting.group);
        }
        let _ = writeln!(out, "{}", line(setting, values.get(setting.name), loaded));
    }
    Ok(out)
}

fn line(setting: &Setting, value: Option<&toml::Value>, loaded: &Loaded) -> String {
    match value {
        Some(value) => format!("{} = {value}  # {}", setting.name, loaded.origin(setting.name)),
        None => format!("# {} is unset: {}", setting.name, setting.default_text()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Sources};
    use super::*;

    #[test]
    fn shown_settings_read_back() {
        let mut sources = Sources::default();
        for (name, value) in
            [("prefixes", "/b,/a\"#\\"), ("max-response-bytes", "5MiB"), ("data-dir", "a b"), ("log-format", "json")]
        {
            sources.flags.insert(name.to_owned(), vec![value.to_owned()]);
        }
        let loaded = Loaded::load(&sources).unwrap();
        let text = to_toml(&loaded).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), loaded.config, "{text}");
    }
}
