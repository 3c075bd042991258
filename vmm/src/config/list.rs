//! `key=value,key=value`, as QEMU writes it, and the tables of a configuration file in the same shape: both become
//! [`Settings`], so one grammar and one set of messages serves both. Used on the main thread.

use std::path::PathBuf;

use super::place::{ConfigError, Place};
use super::value;

/// One `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) key: String,
    pub(super) value: String,
    /// Where it was written.
    pub(super) place: Place,
}

/// The keys that may be given more than once; in a file as a list.
pub(super) const REPEATABLE: [&str; 1] = ["forward"];

/// The settings of one option, each key known and, but for [`REPEATABLE`], at most once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    place: Place,
    entries: Vec<Setting>,
}

impl Settings {
    /// Splits the value of a flag. A comma inside a value is written twice. An item without `=` is the value of the key
    /// `bare` if it stands first.
    pub(super) fn parse(place: &Place, text: &str, bare: &str, keys: &[&str]) -> Result<Self, ConfigError> {
        let mut entries = Vec::new();
        for (at, item) in items(text).into_iter().enumerate() {
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if item.is_empty() => {
                    return Err(place.error("an empty item; a comma inside a value is written as two commas"));
                }
                None if at == 0 => (bare.to_owned(), item),
                None if keys.contains(&item.as_str()) => {
                    return Err(place.error(format_args!("\"{item}\" has no value; write {item}=VALUE")));
                }
                None => (item, String::new()),
            };
            entries.push(Setting { key, value, place: place.clone() });
        }
        Self::new(place.clone(), entries, keys)
    }

    /// Settings found elsewhere, checked against the `keys` of this option.
    pub(super) fn new(place: Place, entries: Vec<Setting>, keys: &[&str]) -> Result<Self, ConfigError> {
        for (at, entry) in entries.iter().enumerate() {
            if !keys.contains(&entry.key.as_str()) {
                return Err(unknown_key(&entry.place, &entry.key, keys));
            }
            let repeatable = REPEATABLE.contains(&entry.key.as_str());
            if !repeatable && entries[..at].iter().any(|earlier| earlier.key == entry.key) {
                return Err(entry.place.error(format_args!("{} is given twice; give it once", entry.key)));
            }
        }
        Ok(Self { place, entries })
    }

    /// Where the option as a whole was written.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// How many settings were given.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The setting of `key`, if it was given.
    pub(super) fn get(&self, key: &str) -> Option<&Setting> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// All settings of `key`, in their order.
    pub(super) fn all(&self, key: &str) -> impl Iterator<Item = &Setting> {
        self.entries.iter().filter(move |entry| entry.key == key)
    }

    /// The value of `key` as `parse` understands it, if it was given.
    pub(super) fn value<T>(
        &self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.get(key).map(|entry| parse(&entry.value).map_err(|what| entry.error(what))).transpose()
    }

    /// The switch `key`, or `default`.
    pub(super) fn switch(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.value(key, value::switch)?.unwrap_or(default))
    }

    /// The path `key`, if it was given.
    pub(super) fn path(&self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        self.get(key).map(|entry| entry.place.path(&entry.value)).transpose()
    }
}

impl Setting {
    /// `what` is wrong with this value.
    pub(super) fn error(&self, what: impl std::fmt::Display) -> ConfigError {
        self.place.error(format_args!("{}={}: {what}", self.key, self.value))
    }
}

/// The complaint about a key that does not exist: a guess what was meant, and the ones that do.
pub(crate) fn unknown_key(place: &Place, key: &str, keys: &[&str]) -> ConfigError {
    let guess = value::nearest(key, keys).map(|near| format!("; did you mean \"{near}\"?")).unwrap_or_default();
    place.error(format_args!("unknown key \"{key}\"{guess} (keys: {})", keys.join(", ")))
}

/// Splits at single commas; two commas are one comma of the value.
fn items(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(letter);
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Vec<(String, String)>, String> {
        let place = Place::flag("--disk", text);
        let settings = Settings::parse(&place, text, "path", &["path", "readonly", "serial"]);
        let entries = settings.map_err(|error| error.to_string())?.entries;
        Ok(entries.into_iter().map(|entry| (entry.key, entry.value)).collect())
    }

    #[test]
    fn commas_are_doubled_inside_a_value() {
        for (text, expected) in [
            ("path=a,,b.img,readonly=on", vec![("path", "a,b.img"), ("readonly", "on")]),
            ("path=a,,,readonly=on", vec![("path", "a,"), ("readonly", "on")]),
            ("path=a,,,,b", vec![("path", "a,,b")]),
            ("root.img", vec![("path", "root.img")]),
            ("a,,b.img,readonly=off", vec![("path", "a,b.img"), ("readonly", "off")]),
            ("serial=a=b,path=", vec![("serial", "a=b"), ("path", "")]),
        ] {
            let expected = expected.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn complaints() {
        for (text, line) in [
            (
                "path=x,redonly=on",
                "--disk path=x,redonly=on: unknown key \"redonly\"; did you mean \"readonly\"? \
                 (keys: path, readonly, serial)",
            ),
            ("x,quux", "--disk x,quux: unknown key \"quux\" (keys: path, readonly, serial)"),
            ("x,readonly", "--disk x,readonly: \"readonly\" has no value; write readonly=VALUE"),
            ("path=x,", "--disk path=x,: an empty item; a comma inside a value is written as two commas"),
            ("", "--disk: an empty item; a comma inside a value is written as two commas"),
            ("x,path=y", "--disk x,path=y: path is given twice; give it once"),
            ("=x", "--disk =x: unknown key \"\" (keys: path, readonly, serial)"),
        ] {
            assert_eq!(parse(text), Err(line.to_owned()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_path_can_be_written(path in "[^\0]+") {
            let text = format!("readonly=on,path={}", path.replace(',', ",,"));
            let expected = vec![("readonly".to_owned(), "on".to_owned()), ("path".to_owned(), path)];
            prop_assert_eq!(parse(&text), Ok(expected));
        }

        #[test]
        fn no_text_panics(text in any::<String>(), near in "([a-z]{0,8}=?[a-z]{0,3},{0,3}){0,6}") {
            let _ = (parse(&text), parse(&near));
        }
    }
}
