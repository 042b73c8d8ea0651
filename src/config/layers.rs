//! One winner per setting: flag, then environment, then file, then default.
//!
//! What the environment and the file say is turned into flags and put in front of the flags that were typed, so that one
//! parser (clap) types all three; before that each is parsed alone, so that an error names the layer it came from.

use super::{ConfigError, Environment};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::Path;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag,
    Environment { variable: String },
    File { path: String },
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag => f.write_str("flag"),
            Origin::Environment { variable } => f.write_str(variable),
            Origin::File { path } => f.write_str(path),
            Origin::Default => f.write_str("default"),
        }
    }
}

/// A setting as it holds, for the table that is printed at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The flag's name, without dashes in front.
    pub name: String,
    pub value: String,
    pub origin: Origin,
}

/// The command line with the other layers in it.
pub(super) struct Layered {
    pub(super) matches: ArgMatches,
    pub(super) settings: Vec<Setting>,
    pub(super) notes: Vec<String>,
}

/// Flags that say the opposite of another; only the positive one is a setting.
const NEGATIONS: [(&str, &str); 1] = [("no-enable-prefix-caching", "enable-prefix-caching")];

/// Merges the layers for the subcommand that `argv` names.
pub(super) fn merge(cli: &Command, argv: Vec<OsString>, environment: &Environment) -> Result<Layered, ConfigError> {
    let typed = cli.clone().try_get_matches_from(&argv)?;
    let (name, typed) = typed.subcommand().expect("clap asks for a subcommand");
    let subcommand = cli.find_subcommand(name).expect("clap matched one of its subcommands");
    let file = match typed.get_one::<std::path::PathBuf>("config").map(|path| path.as_path()) {
        Some(path) => File::read(cli, path)?,
        None => match environment.get("KVERN_CONFIG") {
            Some(path) => File::read(cli, Path::new(path))?,
            None => File::default(),
        },
    };
    let mut notes = Vec::new();
    let mut origins = BTreeMap::new();
    let mut injected: Vec<OsString> = Vec::new();
    for arg in settings_of(subcommand) {
        let long = long_of(arg);
        if is_typed(typed, long) {
            origins.insert(long.to_owned(), Origin::Flag);
            continue;
        }
        let found = match from_environment(arg, environment, &mut notes) {
            Some(found) => Some(found),
            None => file.values.get(long).map(|values| (values.clone(), Origin::File { path: file.path.clone() })),
        };
        let Some((values, origin)) = found else { continue };
        let flags: Vec<OsString> = values.iter().map(|value| format!("--{long}={value}").into()).collect();
        check_alone(arg, &flags, &origin)?;
        injected.extend(flags);
        origins.insert(long.to_owned(), origin);
    }
    // Behind the program and the subcommand, which has no flags before it.
    let mut argv = argv;
    argv.splice(2..2, injected);
    let matches = cli.clone().try_get_matches_from(&argv)?;
    let (_, matches) = matches.subcommand().expect("the same subcommand as before");
    let settings = settings_of(subcommand).map(|arg| shown(arg, matches, &origins)).collect();
    Ok(Layered { matches: matches.clone(), settings, notes })
}

/// The arguments that other layers may set too.
fn settings_of(subcommand: &Command) -> impl Iterator<Item = &Arg> {
    let foreign = |long: &str| matches!(long, "help" | "version" | "config") || negated(long).is_some();
    subcommand.get_arguments().filter(move |arg| arg.get_long().is_some_and(|long| !foreign(long)))
}

fn long_of(arg: &Arg) -> &str {
    arg.get_long().expect("every setting has a long name")
}

/// The setting that a `no-` flag negates.
fn negated(long: &str) -> Option<&'static str> {
    NEGATIONS.iter().find(|(negation, _)| *negation == long).map(|(_, setting)| *setting)
}

fn negation(long: &str) -> Option<&'static str> {
    NEGATIONS.iter().find(|(_, setting)| *setting == long).map(|(negation, _)| *negation)
}

/// Whether a flag, its negation or, for the model, the positional argument was typed.
fn is_typed(typed: &ArgMatches, long: &str) -> bool {
    let was = |long: &str| {
        let id = long.replace('-', "_");
        typed.ids().any(|known| known.as_str() == id) && typed.value_source(&id) == Some(ValueSource::CommandLine)
    };
    was(long) || negation(long).is_some_and(was) || (long == "model" && was("model-given"))
}

/// The value of a setting's variable, a list split at commas.
fn from_environment(arg: &Arg, environment: &Environment, notes: &mut Vec<String>) -> Option<(Vec<String>, Origin)> {
    let long = long_of(arg);
    let variable_of = |long: &str| format!("KVERN_{}", long.replace('-', "_").to_uppercase());
    let variable = variable_of(long);
    if let Some(value) = environment.get(&variable) {
        // Kubernetes sets KVERN_PORT=tcp://... in every pod that runs beside a Service named `kvern`.
        if long == "port" && value.contains("://") {
            notes.push(format!("{variable}={value} is a Service link of Kubernetes, not a port, and is not used"));
            return None;
        }
        let many = arg.get_num_args().is_some_and(|range| range.max_values() > 1);
        let values = if many { value.split(',').map(str::to_owned).collect() } else { vec![value.to_owned()] };
        return Some((values, Origin::Environment { variable }));
    }
    let variable = variable_of(negation(long)?);
    let values = vec![opposite(environment.get(&variable)?)];
    Some((values, Origin::Environment { variable }))
}

fn opposite(value: &str) -> String {
    match value {
        "true" => "false".to_owned(),
        "false" => "true".to_owned(),
        // Left as it is, for the parser to complain about.
        other => other.to_owned(),
    }
}

/// Parses the value of one setting by itself, so that an error can say where the value stands.
fn check_alone(arg: &Arg, flags: &[OsString], origin: &Origin) -> Result<(), ConfigError> {
    let argv = std::iter::once(OsString::from("kvern")).chain(flags.iter().cloned());
    let parsed = Command::new("kvern").arg(arg.clone()).try_get_matches_from(argv);
    parsed.map(drop).map_err(|error| {
        let text = error.to_string();
        // clap's first paragraph names the flag and the value; the rest is about the command line.
        let lines = text.lines().take_while(|line| !line.starts_with("For more") && !line.starts_with("Usage:"));
        let message = lines.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
        let message = message.strip_prefix("error: ").unwrap_or(&message).to_owned();
        ConfigError::BadValue { origin: origin.clone(), message }
    })
}

/// The row of a setting.
fn shown(arg: &Arg, matches: &ArgMatches, origins: &BTreeMap<String, Origin>) -> Setting {
    let long = long_of(arg);
    let raw = |id: &str| -> Vec<String> {
        if matches.ids().all(|known| known.as_str() != id) {
            return Vec::new();
        }
        matches.get_raw(id).into_iter().flatten().map(|value| value.to_string_lossy().into_owned()).collect()
    };
    let mut values = raw(arg.get_id().as_str());
    if long == "model" {
        values.extend(raw("model_given"));
    }
    if negation(long).is_some_and(|negation| raw(&negation.replace('-', "_")) == ["true"]) {
        values = vec!["false".to_owned()];
    }
    let value = match (long, values.len()) {
        (_, 0) => "-".to_owned(),
        ("api-key", count) => format!("{count} hidden"),
        _ => values.join(", "),
    };
    Setting { name: long.to_owned(), value, origin: origins.get(long).cloned().unwrap_or(Origin::Default) }
}

/// The file of `--config`: the values of each key, by the flag's name.
#[derive(Default)]
struct File {
    path: String,
    values: BTreeMap<String, Vec<String>>,
}

impl File {
    fn read(cli: &Command, path: &Path) -> Result<File, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::FileUnreadable { path: shown.clone(), source })?;
        let table: toml::Table =
            text.parse().map_err(|source| ConfigError::FileSyntax { path: shown.clone(), source: Box::new(source) })?;
        let mut values = BTreeMap::new();
        for (key, value) in table {
            let long = key.replace('_', "-");
            let bad = |message: String| ConfigError::BadValue { origin: Origin::File { path: shown.clone() }, message };
            let mut texts = texts_of(&value).ok_or_else(|| {
                bad(format!("`{key}`: expected a text, number, boolean or list of those, found a {}", value.type_str()))
            })?;
            let setting = match negated(&long) {
                Some(setting) => {
                    texts = texts.iter().map(|text| opposite(text)).collect();
                    setting.to_owned()
                }
                None => long,
            };
            if !cli.get_subcommands().flat_map(settings_of).any(|arg| long_of(arg) == setting) {
                return Err(ConfigError::UnknownKey { path: shown, hint: nearest(cli, &setting), key });
            }
            if values.insert(setting, texts).is_some() {
                return Err(bad(format!("`{key}`: the setting stands in the file twice")));
            }
        }
        Ok(File { path: shown, values })
    }
}

fn texts_of(value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) => Some(vec![number.to_string()]),
        toml::Value::Float(number) => Some(vec![number.to_string()]),
        toml::Value::Boolean(yes) => Some(vec![yes.to_string()]),
        toml::Value::Array(items) if items.iter().all(|item| !item.is_array()) => {
            Some(items.iter().map(texts_of).collect::<Option<Vec<_>>>()?.concat())
        }
        _ => None,
    }
}

/// `, did you mean ...?` where a known key is near.
fn nearest(cli: &Command, unknown: &str) -> String {
    let known = cli.get_subcommands().flat_map(settings_of).map(long_of);
    let near = known.map(|long| (edits(unknown, long), long)).min();
    match near {
        Some((distance, long)) if distance <= 2 + unknown.len() / 4 => {
            format!(", did you mean `{}`?", long.replace('-', "_"))
        }
        _ => String::new(),
    }
}

/// Least number of single-byte insertions, deletions and replacements between two names (Levenshtein), O(a x b).
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
