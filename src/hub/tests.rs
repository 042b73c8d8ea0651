#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::{HubConfig, Secret};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

fn repo(id: &str, revision: &str, file: Option<&str>) -> Reference {
    Reference::Repo(RepoReference { id: id.into(), revision: revision.into(), file: file.map(str::to_owned) })
}

#[test]
fn references() {
    let cases = [
        ("owner/name", repo("owner/name", "main", None)),
        ("gpt2", repo("gpt2", "main", None)),
        ("owner/name@v1.0", repo("owner/name", "v1.0", None)),
        ("owner/name@refs/pr/3", repo("owner/name", "refs/pr/3", None)),
        ("owner/name:Q4_K_M", repo("owner/name", "main", Some("Q4_K_M"))),
        ("owner/name@v1:sub/file.gguf", repo("owner/name", "v1", Some("sub/file.gguf"))),
        ("", Reference::Other),
        ("/absolute/path", Reference::Other),
        ("./here", Reference::Other),
        ("../up", Reference::Other),
        ("a/b/c", Reference::Other),
        ("folder/model.gguf", Reference::Other),
        ("model.safetensors", Reference::Other),
        ("owner/na me", Reference::Other),
        ("owner/..", Reference::Other),
        ("owner/name@../../x", Reference::Other),
        ("owner/name@", Reference::Other),
        ("owner/name:../x.gguf", Reference::Other),
        ("owner/name:", Reference::Other),
    ];
    for (text, expected) in cases {
        assert_eq!(Reference::parse(text), expected, "{text:?}");
    }
    assert_eq!(Reference::parse(&"a".repeat(97)), Reference::Other);
}

/// Files of a repository, what is asked of it, and what is chosen or the words of the refusal.
#[test]
fn selection() {
    let checkpoint = "README.md config.json generation_config.json model.safetensors onnx/model.onnx pytorch_model.bin \
                      tokenizer.json tokenizer_config.json chat_template.jinja";
    let sharded = "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors \
                   model.safetensors.index.json tokenizer.json";
    let ggufs = "README.md m-Q4_K.gguf m-Q4_K_M.gguf m-Q8_0.gguf mmproj-m-Q8_0.gguf big-F16-00001-of-00002.gguf \
                 big-F16-00002-of-00002.gguf";
    let cases: [(&str, Option<&str>, &str); 17] = [
        (
            checkpoint,
            None,
            "config.json + generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja + model.safetensors",
        ),
        (sharded, None, "config.json + tokenizer.json + index model.safetensors.index.json"),
        ("config.json w.safetensors", None, "config.json +  + w.safetensors"),
        ("config.json a.safetensors b.safetensors", None, "error: expected model.safetensors.index.json or one"),
        ("README.md m.gguf config.json", None, "m.gguf"),
        ("m-Q4_0.gguf mmproj-f16.gguf", None, "m-Q4_0.gguf"),
        (ggufs, Some("Q4_K_M"), "m-Q4_K_M.gguf"),
        (ggufs, Some("q4_k"), "m-Q4_K.gguf"),
        (ggufs, Some("m-Q8_0.gguf"), "m-Q8_0.gguf"),
        (ggufs, Some("Q5_0"), "error: no GGUF file is or fits `Q5_0`; there are: m-Q4_K.gguf, m-Q4_K_M.gguf"),
        (ggufs, Some("F16"), "error: `big-F16-00001-of-00002.gguf` is one part of a split GGUF file"),
        (ggufs, None, "error: has several GGUF files: m-Q4_K.gguf"),
        ("a-Q4_0.gguf b-Q4_0.gguf", Some("Q4_0"), "error: `Q4_0` fits several GGUF files: a-Q4_0.gguf, b-Q4_0.gguf"),
        (
            "pytorch_model.bin",
            None,
            "error: expected config.json with safetensors weights, or a GGUF file, found: pytorch",
        ),
        ("", None, "error: expected config.json with safetensors weights, or a GGUF file, found: no file"),
        ("../../x.gguf", None, "error: expected config.json"),
        ("/x.gguf", Some("/x.gguf"), "error: no GGUF file is or fits"),
    ];
    for (files, wanted, expected) in cases {
        let files: Vec<String> = files.split_whitespace().map(str::to_owned).collect();
        let found = match select::select(&files, wanted) {
            Err(reason) => format!("error: {reason}"),
            Ok(Selection::Gguf(file)) => file,
            Ok(Selection::Checkpoint { config, metadata, weights }) => {
                let weights = match weights {
                    select::Weights::Files(files) => files.join(" "),
                    select::Weights::Index(index) => format!("index {index}"),
                };
                format!("{config} + {} + {weights}", metadata.join(" "))
            }
        };
        let same = if expected.starts_with("error: ") { found.starts_with(expected) } else { found == expected };
        assert!(same, "{files:?} {wanted:?}\nexpected {expected}\nfound    {found}");
    }
}

#[test]
fn shards_of_an_index() {
    let files: Vec<String> = ["a.safetensors", "b.safetensors"].map(str::to_owned).to_vec();
    let cases = [
        (
            r#"{"weight_map":{"x":"b.safetensors","y":"a.safetensors","z":"b.safetensors"}}"#,
            "a.safetensors b.safetensors",
        ),
        (r#"{"weight_map":{"x":"c.safetensors"}}"#, "error: names `c.safetensors`"),
        (r#"{"weight_map":{"x":"../a.safetensors"}}"#, "error: names `../a.safetensors`"),
        (r#"{"weight_map":{"x":1}}"#, "error: expected file names"),
        (r#"{"weight_map":{}}"#, "error: names no file"),
        (r#"{}"#, "error: `weight_map`"),
        ("{", "error: EOF"),
    ];
    for (index, expected) in cases {
        match (select::shards_of_index(index, &files), expected.strip_prefix("error: ")) {
            (Ok(shards), None) => assert_eq!(shards.join(" "), expected),
            (Err(reason), Some(part)) => assert!(reason.contains(part), "{index}: {reason}"),
            (found, _) => panic!("{index}: expected {expected}, found {found:?}"),
        }
    }
}

/// A Hub on this machine: answers as the real one does for the files that it is given.
struct FakeHub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl FakeHub {
    fn start(status: u16, files: &'static [(&'static str, &'static str)]) -> FakeHub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), status, files, &seen);
            }
        });
        FakeHub { endpoint, requests }
    }
}

fn answer(mut stream: TcpStream, status: u16, files: &[(&str, &str)], seen: &Mutex<Vec<String>>) {
    let lines: Vec<String> =
        BufReader::new(&stream).lines().map(Result::unwrap).take_while(|line| !line.is_empty()).collect();
    let path = lines[0].split(' ').nth(1).unwrap().to_owned();
    let header = |name: &str| {
        lines.iter().find_map(|line| line.to_ascii_lowercase().strip_prefix(name).map(|value| value.trim().to_owned()))
    };
    seen.lock().unwrap().push(format!("{path} {}", header("authorization:").unwrap_or_default()));
    let listing: Vec<_> = files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
    let listing = serde_json::json!({ "sha": COMMIT, "siblings": listing }).to_string();
    let file = files.iter().find(|(name, _)| path.ends_with(&format!("/resolve/{COMMIT}/{name}")));
    let (status, extra, body) = match (status, path.contains("/api/"), file) {
        (200, true, _) => (200, String::new(), listing.as_str()),
        (200, false, Some((name, text))) => {
            let range = header("range:").unwrap();
            let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            let start: usize = start.parse().unwrap();
            let end = end.parse().map_or(text.len(), |end: usize| end + 1);
            let extra = format!(
                "ETag: \"{name}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{}\r\n",
                end - 1,
                text.len()
            );
            (206, extra, &text[start..end])
        }
        (200, false, None) => (404, String::new(), ""),
        (status, ..) => (status, String::new(), ""),
    };
    let length = body.len();
    write!(stream, "HTTP/1.1 {status} X\r\n{extra}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .unwrap();
}

fn source(name: &str, cache: &Path, endpoint: &str, offline: bool) -> ModelSource {
    ModelSource {
        name: Some(name.to_owned()),
        revision: None,
        models_dir: cache.join("models"),
        hub: HubConfig {
            cache_dir: cache.to_owned(),
            token: Some(Secret::new("t0ken")),
            endpoint: endpoint.to_owned(),
            offline,
        },
    }
}

#[test]
fn a_repository_is_fetched_once_and_then_found_offline() {
    let hub = FakeHub::start(
        200,
        &[
            ("config.json", "{}"),
            ("README.md", "words"),
            ("model.safetensors.index.json", r#"{"weight_map":{"a":"w-1.safetensors","b":"w-2.safetensors"}}"#),
            ("w-1.safetensors", "one"),
            ("w-2.safetensors", "two"),
            ("w-3.safetensors", "not named by the index"),
        ],
    );
    let cache = tempfile::tempdir().unwrap();
    let online = source("owner/name", cache.path(), &hub.endpoint, false);
    let located = locate(&online).unwrap();
    assert_eq!(located.name, "owner/name");
    let text = |file: &str| std::fs::read_to_string(located.path.join(file)).ok();
    assert_eq!((text("w-1.safetensors").as_deref(), text("w-2.safetensors").as_deref()), (Some("one"), Some("two")));
    assert_eq!((text("config.json").as_deref(), text("README.md"), text("w-3.safetensors")), (Some("{}"), None, None));
    let requests = hub.requests.lock().unwrap().clone();
    assert!(requests[0].starts_with("/api/models/owner/name/revision/main"), "{requests:?}");
    assert!(requests.iter().all(|request| request.ends_with("bearer t0ken")), "{requests:?}");

    assert_eq!(locate(&online).unwrap(), located);
    assert_eq!(hub.requests.lock().unwrap().len(), requests.len(), "the second search needs no network");
    let by_commit = format!("owner/name@{COMMIT}");
    for name in ["owner/name", by_commit.as_str()] {
        assert_eq!(locate(&source(name, cache.path(), "http://127.0.0.1:1", true)).unwrap(), located);
    }
}

#[test]
fn an_interrupted_download_is_resumed() {
    let hub = FakeHub::start(200, &[("m-Q4_0.gguf", "0123456789")]);
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--owner--name/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    // What an interrupted run leaves. That its beginning survives shows that only the rest was fetched.
    std::fs::write(blobs.join("m-Q4_0.part"), "abcd").unwrap();
    let located = locate(&source("owner/name:q4_0", cache.path(), &hub.endpoint, false)).unwrap();
    assert_eq!(std::fs::read_to_string(located.path).unwrap(), "abcd456789");
}

#[test]
fn refusals_say_what_to_do() {
    let cases: [(u16, bool, &[&str]); 4] = [
        (401, false, &["owner/name", "401", "HF_TOKEN"]),
        (403, false, &["owner/name", "403", "HF_TOKEN"]),
        (404, false, &["no revision `main` of owner/name", "404"]),
        (200, true, &["owner/name", "HF_HUB_OFFLINE"]),
    ];
    for (status, offline, expected) in cases {
        let hub = FakeHub::start(status, &[]);
        let cache = tempfile::tempdir().unwrap();
        let error = locate(&source("owner/name", cache.path(), &hub.endpoint, offline)).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "{status}: {error:?} lacks {part:?}");
        }
        assert!(!error.contains("t0ken"));
        assert_eq!(hub.requests.lock().unwrap().is_empty(), offline);
    }
}

#[test]
fn a_snapshot_that_lost_a_blob_is_not_used() {
    let cache = tempfile::tempdir().unwrap();
    let root = cache.path().join("models--owner--name");
    let snapshot = root.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(root.join("refs")).unwrap();
    std::fs::write(root.join("refs/main"), COMMIT).unwrap();
    std::os::unix::fs::symlink("../../blobs/gone", snapshot.join("m.gguf")).unwrap();
    let offline = source("owner/name", cache.path(), "http://127.0.0.1:1", true);
    let error = locate(&offline).unwrap_err().to_string();
    assert!(error.contains("cached m.gguf"), "{error}");
    std::fs::create_dir_all(root.join("blobs")).unwrap();
    std::fs::write(root.join("blobs/gone"), "back").unwrap();
    assert_eq!(locate(&offline).unwrap().path, snapshot.join("m.gguf"));
}

#[test]
fn the_models_folder_and_paths_come_before_the_hub() {
    let cache = tempfile::tempdir().unwrap();
    let models = cache.path().join("models");
    std::fs::create_dir_all(&models).unwrap();
    let file = models.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    std::fs::write(&file, "").unwrap();
    let mut offline = source("SmolLM2-135M-Instruct", cache.path(), "http://127.0.0.1:1", true);
    let expected = Located { path: file.clone(), name: DEFAULT_MODEL.into() };
    assert_eq!(locate(&offline).unwrap(), expected);
    offline.name = None;
    assert_eq!(locate(&offline).unwrap(), expected);
    let path = file.to_str().unwrap();
    offline.name = Some(path.into());
    assert_eq!(locate(&offline).unwrap(), Located { path: file.clone(), name: path.into() });

    std::fs::write(models.join("SmolLM2-135M-Instruct.Q8_0.gguf"), "").unwrap();
    offline.name = None;
    assert!(matches!(locate(&offline), Err(HubError::Ambiguous { .. })));
    offline.name = Some("no/such/file.gguf".into());
    assert!(matches!(locate(&offline), Err(HubError::NotAModel(_))));
}
