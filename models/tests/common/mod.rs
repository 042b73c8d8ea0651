//! What several test binaries share; each uses a part of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod allocation;
pub mod gguf_writer;
pub mod repository;

use std::path::PathBuf;

/// The default model's file: `KVERN_TEST_MODEL`, or where `make model` puts it.
pub fn default_model() -> PathBuf {
    let path = std::env::var_os("KVERN_TEST_MODEL").map_or_else(
        || {
            let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
            root.join("../models-cache/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "this test needs the default model at {}: run `make model`", path.display());
    path
}
