//! The rules of the house that a program can check. Each test is one rule over all files; a failure lists every offender.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 120;
const ARCHITECTURE_LINES_MAX: usize = 250;

/// Folders that hold no source of ours.
const SKIPPED: [&str; 8] = ["target", ".git", ".venv", "models-cache", "node_modules", "__pycache__", "shared", "data"];

/// Endings of CUDA and C++ sources.
const CUDA_ENDS: [&str; 3] = [".cu", ".h", ".cpp"];

/// A text file of the repository.
struct File {
    /// Relative to the root, with `/`.
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn in_folder(&self, name: &str) -> bool {
        self.path.split('/').rev().skip(1).any(|part| part == name)
    }

    fn is_cuda(&self) -> bool {
        CUDA_ENDS.iter().any(|end| self.path.ends_with(end))
    }

    /// Code that only tests and benchmarks compile, going by where it is.
    fn is_test(&self, test_modules: &BTreeSet<String>) -> bool {
        let stem = self.path.trim_end_matches(".rs");
        let below = |module: &String| stem == module || stem.starts_with(&format!("{module}/"));
        self.in_folder("tests") || self.in_folder("benches") || test_modules.iter().any(below)
    }

    /// The text without the test module at its end.
    fn production(&self) -> &str {
        let end = self.text.find("#[cfg(test)]\nmod tests {").unwrap_or(self.text.len());
        &self.text[..end]
    }

    /// Numbered lines of code: no comments, no docs.
    fn code<'a>(&self, text: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
        let code =
            |line: &str| line.split("// ").next().map(str::trim_start).is_some_and(|code| !code.starts_with("//"));
        (1..).zip(text.lines()).filter(move |(_, line)| code(line))
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files() -> Vec<File> {
    let mut files = Vec::new();
    walk(&root(), &mut files);
    assert!(files.iter().any(|file| file.path == "tests/tidy.rs"), "the walk missed this very file");
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

fn walk(folder: &Path, files: &mut Vec<File>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (name, path) = (entry.file_name().into_string().unwrap(), entry.path());
        if entry.file_type().unwrap().is_dir() {
            if !SKIPPED.contains(&name.as_str()) {
                walk(&path, files);
            }
            continue;
        }
        let known = [".rs", ".py", ".mjs", ".toml", ".md", ".sh", ".txt", "Makefile", "run", "package-lock.json"];
        if known.iter().chain(&CUDA_ENDS).any(|end| name.ends_with(end)) {
            let path = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
            files.push(File { text: fs::read_to_string(entry.path()).unwrap(), path });
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Modules that are declared `#[cfg(test)] mod name;`, as paths without `.rs`.
fn test_modules(files: &[File]) -> BTreeSet<String> {
    let mut modules = BTreeSet::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let (folder, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
        let stem = name.trim_end_matches(".rs");
        let own = if matches!(stem, "mod" | "lib" | "main") { folder.to_owned() } else { format!("{folder}/{stem}") };
        let lines: Vec<&str> = file.text.lines().map(str::trim).collect();
        for (at, _) in lines.iter().enumerate().filter(|(_, line)| **line == "#[cfg(test)]") {
            let path = lines.get(at + 1).and_then(|line| line.strip_prefix("#[path = \"")?.strip_suffix(".rs\"]"));
            let declared = lines[at + 1..].iter().find_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
            match (path, declared) {
                (Some(path), _) => modules.insert(format!("{folder}/{path}")),
                (None, Some(module)) => modules.insert(format!("{own}/{module}")),
                (None, None) => false,
            };
        }
    }
    modules
}

/// Fails with every offender, if there is any.
fn none(rule: &str, offenders: impl IntoIterator<Item = String>) {
    let offenders: Vec<String> = offenders.into_iter().collect();
    assert!(offenders.is_empty(), "{rule}:\n  {}", offenders.join("\n  "));
}

/// Lines of code in `files` that hold one of `words`.
fn holding<'a>(files: impl IntoIterator<Item = (&'a File, &'a str)>, words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (file, text) in files {
        for (number, line) in file.code(text) {
            if words.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{number}: {}", file.path, line.trim()));
            }
        }
    }
    found
}

#[test]
fn files_and_functions_are_short() {
    let files = files();
    let ends = || [".rs", ".py", ".mjs"].iter().chain(&CUDA_ENDS);
    let sources = || files.iter().filter(|file| ends().any(|end| file.path.ends_with(end)));
    let lines = |file: &File| file.text.lines().count();
    let named = |file: &File| format!("{}: {}", file.path, lines(file));
    none("files of more than 600 lines", sources().filter(|file| lines(file) > LINES_MAX).map(named));
    let architectures = sources().filter(|file| file.path.starts_with("models/src/arch/"));
    none(
        "architectures of 250 lines or more",
        architectures.filter(|file| lines(file) >= ARCHITECTURE_LINES_MAX).map(named),
    );

    let mut long = Vec::new();
    for file in sources().filter(|file| file.is_rust()) {
        let lines: Vec<&str> = file.text.lines().collect();
        for (start, line) in lines.iter().enumerate() {
            let indent = &line[..line.len() - line.trim_start().len()];
            let is_function = line.split_whitespace().take(5).any(|word| word == "fn");
            if !is_function || line.trim_start().starts_with("//") || line.ends_with(';') {
                continue;
            }
            let close = format!("{indent}}}");
            let Some(length) = lines[start..].iter().position(|line| *line == close) else { continue };
            if length + 1 > FUNCTION_LINES_MAX {
                long.push(format!("{}:{}: {} lines", file.path, start + 1, length + 1));
            }
        }
    }
    none("functions of more than 120 lines", long);
}

#[test]
fn no_unwrap_outside_tests() {
    let files = files();
    let tests = test_modules(&files);
    let production = || files.iter().filter(|file| file.is_rust() && !file.is_test(&tests));
    let code = production().map(|file| (file, file.production()));
    none("unwrap outside tests", holding(code, &[".unwrap()", "allow(clippy::unwrap_used)"]));
}

#[test]
fn nothing_is_left_to_do_or_skipped() {
    let files = files();
    let sources = files.iter().filter(|file| file.is_rust() && file.path != "tests/tidy.rs");
    let code = sources.map(|file| (file, file.text.as_str()));
    none("unfinished code or skipped tests", holding(code, &["todo!(", "unimplemented!(", "#[ignore", "dbg!("]));
}

#[test]
fn only_the_configuration_reads_the_environment() {
    let files = files();
    let tests = test_modules(&files);
    let others = files.iter().filter(|file| {
        file.is_rust()
            && !file.is_test(&tests)
            && !file.path.starts_with("src/config/")
            && !file.path.ends_with("build.rs")
    });
    let code = others.map(|file| (file, file.production()));
    none("environment reads outside src/config", holding(code, &["std::env", "env::var", "env::args", "option_env!"]));
}

#[test]
fn one_place_knows_the_backends() {
    let files = files();
    let others = files.iter().filter(|file| {
        let knows =
            ["kernels/src/lib.rs", "tests/tidy.rs"].contains(&file.path.as_str()) || file.path.ends_with("build.rs");
        file.is_rust() && !knows
    });
    let code = others.map(|file| (file, file.text.as_str()));
    none("backend cfg outside kernels/src/lib.rs", holding(code, &["feature = \"cuda\"", "feature = \"nccl\""]));
}

#[test]
fn the_core_is_a_pure_state_machine() {
    let manifest: toml::Table = read("src/core/Cargo.toml").parse().unwrap();
    let dependencies = manifest.get("dependencies").and_then(toml::Value::as_table).map_or(0, toml::Table::len);
    assert_eq!(dependencies, 0, "kvern-core has dependencies");
    let files = files();
    let tests = test_modules(&files);
    let core =
        || files.iter().filter(|file| file.path.starts_with("src/core/") && file.is_rust() && !file.is_test(&tests));
    assert!(core().count() > 5, "the core was not found");
    let impure = [
        "std::time",
        "std::thread",
        "std::fs",
        "std::net",
        "std::env",
        "std::sync",
        "Instant",
        "SystemTime",
        "RandomState",
        "thread_local!",
        "f32",
        "f64",
        "println!",
    ];
    none("impure code in the core", holding(core().map(|file| (file, file.production())), &impure));
    // The order of a hash map differs from run to run: the core may look up in one, never walk it.
    let mut walks = Vec::new();
    for file in core() {
        let code = || file.code(file.production()).map(|(_, line)| line);
        let is_name =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let declared = code().filter(|line| line.contains(": HashMap<") || line.contains(": HashSet<"));
        let names = declared.filter_map(|line| {
            let name = line.split(':').next()?.split_whitespace().last()?;
            is_name(name).then(|| name.to_owned())
        });
        for name in names.collect::<BTreeSet<_>>() {
            let ways = [".iter", ".keys", ".values", ".drain", ".into_iter", ".retain", ".into_keys", ".into_values"];
            let walk = |line: &&str| {
                ways.iter().any(|way| line.contains(&format!("{name}{way}")))
                    || (line.contains(" in ") && line.trim_end().trim_end_matches(" {").ends_with(&name))
            };
            walks.extend(code().filter(walk).map(|line| format!("{}: {}", file.path, line.trim())));
        }
    }
    none("walks over a hash map in the core", walks);
}

#[test]
fn every_module_says_what_it_is_for() {
    let files = files();
    let sources = files.iter().filter(|file| {
        let library = ["src/", "kernels/src/", "kernels/cuda-abi/src/", "kernels/shim/src/", "models/src/"]
            .iter()
            .any(|folder| file.path.starts_with(folder));
        file.is_rust() && library && !file.path.ends_with("tests.rs")
    });
    none("modules without a doc", sources.filter(|file| !file.text.starts_with("//! ")).map(|file| file.path.clone()));
}

#[test]
fn kernels_say_what_they_are_for_and_hide_their_assembly() {
    let files = files();
    let cuda = || files.iter().filter(|file| file.is_cuda());
    assert!(cuda().count() > 10, "the kernels were not found");
    none("kernels without a doc", cuda().filter(|file| !file.text.starts_with("// ")).map(|file| file.path.clone()));
    // The shim has to stand in for every instruction, and its own fibers switch stacks.
    let homes = ["kernels/cuda/ptx.h", "kernels/cuda/ptx_hopper.h", "kernels/cuda/shim/shim.cpp"];
    let others = cuda().filter(|file| !homes.contains(&file.path.as_str())).map(|file| (file, file.text.as_str()));
    none("inline assembly outside ptx.h", holding(others, &["asm(", "asm volatile"]));
}

#[test]
fn no_drawers_for_everything() {
    let files = files();
    let names = ["utils", "util", "helpers", "helper", "misc"];
    let drawers = files.iter().filter(|file| {
        let stem =
            |part: &str| part.trim_end_matches(".rs").trim_end_matches(".py").trim_end_matches(".mjs").to_owned();
        file.path.split('/').any(|part| names.contains(&stem(part).as_str()))
    });
    none("modules that are named for nothing", drawers.map(|file| file.path.clone()));
}

#[test]
fn no_test_sleeps() {
    let files = files();
    let tests = test_modules(&files);
    let tests = files.iter().filter(|file| {
        file.is_rust() && file.is_test(&tests) && !file.in_folder("benches") && file.path != "tests/tidy.rs"
    });
    none("sleeps in tests", holding(tests.map(|file| (file, file.text.as_str())), &["thread::sleep(", "time::sleep("]));
}

#[test]
fn nothing_names_a_machine() {
    let files = files();
    let forbidden = [
        "/root/",
        "/home/",
        "/Users/",
        "/tmp/",
        "/work/",
        "registry.npmjs",
        "pypi.org",
        "pythonhosted.org",
        "static.crates",
        "index.crates",
    ];
    let mut found = Vec::new();
    for file in files.iter().filter(|file| file.path != "tests/tidy.rs") {
        for (number, line) in (1..).zip(file.text.lines()) {
            found.extend(
                forbidden
                    .iter()
                    .filter(|word| line.contains(**word))
                    .map(|word| format!("{}:{number}: {word}", file.path)),
            );
        }
    }
    none("paths of a machine or hosts of a registry", found);
}

#[test]
fn the_changelog_is_kept() {
    let text = read("CHANGELOG.md");
    let (_, rest) = text.split_once("\n## [Unreleased]\n").expect("CHANGELOG.md has a section [Unreleased]");
    let section = rest.split("\n## ").next().unwrap();
    for heading in section.lines().filter_map(|line| line.strip_prefix("### ")) {
        let known = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"];
        assert!(known.contains(&heading), "expected one of {known:?}, found {heading:?}");
    }
}

#[test]
fn every_target_of_the_makefile_is_explained() {
    let text = read("Makefile");
    let phony = text.lines().find_map(|line| line.strip_prefix(".PHONY: ")).unwrap();
    let mut phony: Vec<&str> = phony.split_whitespace().collect();
    let targets = text.lines().filter_map(|line| {
        let (target, rest) = line.split_once(':')?;
        let plain = !target.is_empty() && target.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
        (plain && !rest.starts_with('=')).then_some((target, rest))
    });
    let (mut names, mut mute) = (Vec::new(), Vec::new());
    for (target, rest) in targets {
        names.push(target);
        if !rest.contains("## ") {
            mute.push(target.to_owned());
        }
    }
    none("targets without a `##` for make help", mute);
    names.sort_unstable();
    phony.sort_unstable();
    assert_eq!(names, phony);
    for needed in ["serve", "test", "lint", "bench", "model", "sim", "openapi", "clients", "doc", "help"] {
        assert!(names.contains(&needed), "the target {needed} is missing");
    }
}

/// The README's table of settings is the program's.
#[test]
fn every_setting_is_in_the_readme() {
    let argv = ["kvern", "serve"].map(std::ffi::OsString::from).to_vec();
    let config = kvern::config::Config::resolve(argv, &kvern::config::Environment::default()).unwrap();
    let known: BTreeSet<String> =
        config.describe().lines().map(|row| row.split_whitespace().next().unwrap().to_owned()).collect();
    let readme = read("README.md");
    let (_, section) = readme.split_once("\n## Configuration\n").unwrap();
    let rows =
        section.split("\n## ").next().unwrap().lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let told: BTreeSet<String> = rows.map(|(name, _)| name.to_owned()).collect();
    assert_eq!(told, known);
}

#[test]
fn every_decision_is_listed_in_order() {
    let list = read("docs/adr/README.md");
    let mut files: Vec<String> = fs::read_dir(root().join("docs/adr"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.retain(|file| file != "README.md");
    files.sort();
    for (number, file) in (1..).zip(&files) {
        assert!(file.starts_with(&format!("{number:04}-")), "{file}: expected number {number}");
        assert!(list.contains(&format!("({file})")), "{file} is not in docs/adr/README.md");
        let text = read(&format!("docs/adr/{file}"));
        let parts = [&format!("# {number}. ") as &str, "**Context.**", "**Decision.**", "**Consequences.**"];
        for part in parts {
            assert!(text.contains(part), "{file} lacks {part:?}");
        }
    }
}
