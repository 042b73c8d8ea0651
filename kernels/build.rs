//! Lists the compiled CUDA kernels, for the driver to include; only in a build with the feature `cuda`.
//!
//! They are compiled by `make cuda`, not here: that needs a compiler of 100 MB, and they change seldom.
//! KVERN_CUDA_FATBINS names another folder. Without kernels the build goes on with a warning, unless
//! KVERN_REQUIRE_CUDA=1.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=KVERN_CUDA_FATBINS");
    println!("cargo::rerun-if-env-changed=KVERN_REQUIRE_CUDA");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let folder = env::var_os("KVERN_CUDA_FATBINS").map_or_else(built_folder, PathBuf::from);
    println!("cargo::rerun-if-changed={}", folder.display());
    let fatbins = fatbins(&folder);
    for fatbin in &fatbins {
        println!("cargo::rerun-if-changed={}", fatbin.display());
    }
    if fatbins.is_empty() {
        let text = format!("expected CUDA kernels in {}, found none: run `make cuda`", folder.display());
        if env::var("KVERN_REQUIRE_CUDA").is_ok_and(|value| value == "1") {
            println!("cargo::error={text}");
            std::process::exit(1);
        }
        println!("cargo::warning={text}; this binary will refuse to open a GPU");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    fs::write(out.join("fatbins.rs"), listing(&fatbins)).expect("cargo's own folder can be written");
}

/// Where `make cuda` puts them.
fn built_folder() -> PathBuf {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    package.parent().expect("the package lies in the workspace").join("target/cuda/fatbin")
}

/// The fatbins of a folder in the order of their names; none where there is no folder.
fn fatbins(folder: &Path) -> Vec<PathBuf> {
    let Ok(folder) = folder.canonicalize() else { return Vec::new() };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "fatbin")).collect();
    found.sort();
    found
}

/// An expression of type `&[(&str, &[u8])]`: names and bytes, aligned as the driver's headers are.
fn listing(fatbins: &[PathBuf]) -> String {
    let rows = fatbins.iter().map(|path| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let path = path.to_str().expect("a path that Rust's source can hold");
        format!("    ({name:?}, &Aligned(*include_bytes!({path:?})).0),\n")
    });
    format!("&[\n{}]\n", rows.collect::<String>())
}
