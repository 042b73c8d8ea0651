#![allow(clippy::unwrap_used)]

use super::file::PublicText;
use super::*;
use crate::config::{KeyConfig, KeyTask};
use kvern_core::{ClassId, TenantId};
use proptest::prelude::*;
use std::fmt::Write as _;
use std::time::Duration;

const SALT: &str = "00112233445566778899aabbccddeeff";

fn hashed(secret: &str) -> HashedSecret {
    HashedSecret::new(SALT.parse().unwrap(), secret.as_bytes())
}

/// `HASH` stands for some key's hash, `OTHER` for another one's.
fn parse(text: &str) -> Result<KeyFile, KeyFileError> {
    let text = text.replace("HASH", &hashed("a").to_string()).replace("OTHER", &hashed("b").to_string());
    KeyFile::parse(&text, &ClassNames::default())
}

#[test]
fn a_whole_file() {
    let text = r#"
        [[tenant]]
        name = "acme"
        weight = 3
        kv_floor = 20_000
        kv_ceiling = 200_000

        [[tenant]]
        name = "plain"

        [[key]]
        name = "acme-web"
        secret = "HASH"
        tenant = "acme"
        class = "low"
        highest_class = "high"
        requests_per_minute = 60
        tokens_per_minute = 100_000
        concurrent_requests = 8
        tokens_per_day = 5_000_000

        [[key]]
        name = "bob"
        secret = "OTHER"

        [[shared_prefix]]
        system = "You are kind."

        [[shared_prefix]]
        text = "Once upon"
    "#;
    let tenant =
        |name: &str, weight, kv_floor, kv_ceiling| TenantEntry { name: name.into(), weight, kv_floor, kv_ceiling };
    let web = KeyEntry {
        name: "acme-web".into(),
        secret: hashed("a"),
        tenant: "acme".into(),
        class: ClassId(2),
        highest: ClassId(0),
        limits: Limits {
            requests_per_minute: Some(60),
            tokens_per_minute: Some(100_000),
            concurrent_requests: Some(8),
            tokens_per_day: Some(5_000_000),
        },
    };
    let bob = KeyEntry {
        name: "bob".into(),
        secret: hashed("b"),
        tenant: "bob".into(),
        class: ClassId(1),
        highest: ClassId(1),
        limits: Limits::default(),
    };
    let expected = KeyFile {
        tenants: vec![tenant("acme", 3, 20_000, Some(200_000)), tenant("plain", 1, 0, None)],
        keys: vec![web, bob],
        shared: vec![
            SharedText { line: 27, text: PublicText::System("You are kind.".into()) },
            SharedText { line: 30, text: PublicText::Start("Once upon".into()) },
        ],
    };
    assert_eq!(parse(text), Ok(expected));
    assert_eq!(parse(""), Ok(KeyFile::default()));
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    let key = "[[key]]\nname = \"a\"\nsecret = \"HASH\"\n";
    let in_key = |line: &str| format!("{key}{line}");
    let in_tenant = |line: &str| format!("[[tenant]]\nname = \"a\"\n{line}");
    let in_shared = |line: &str| format!("[[shared_prefix]]\n{line}");
    let cases: Vec<(String, usize, &str)> = vec![
        ("\n\nkey = [".into(), 3, ""),
        ("[key]\nname = \"a\"".into(), 1, "expected a sequence"),
        ("[[keys]]".into(), 1, "unknown field `keys`, expected one of `tenant`, `key`, `shared_prefix`"),
        ("[[key]]\nname = \"a\"".into(), 1, "missing field `secret`"),
        ("[[key]]\nsecret = \"HASH\"".into(), 1, "missing field `name`"),
        ("[[key]]\nname = \"a\"\nsecret = \"kv-abc\"".into(), 3, "`secret`: expected sha256:SALT:HASH"),
        (in_key("wieght = 3"), 4, "unknown field `wieght`"),
        (in_key("tenant = \"a b\""), 4, "`tenant`: expected 1 to 64 letters, digits and ._-:@/, found \"a b\""),
        (in_key("tenant = \"\""), 4, "found \"\""),
        (in_key("class = \"gold\""), 4, "`class`: expected one of `high`, `normal`, `low`, found \"gold\""),
        (
            in_key("highest_class = \"low\""),
            4,
            "`highest_class`: expected a class no less urgent than `class`, found `low`",
        ),
        (in_key("requests_per_minute = 0"), 4, "`requests_per_minute`: expected an integer in [1, "),
        (in_key("tokens_per_minute = -5"), 4, "found -5"),
        (in_key("tokens_per_day = 1.5"), 4, "invalid type: floating point `1.5`"),
        (in_key("concurrent_requests = 9_000_000"), 4, "[1, 1000000], found 9000000"),
        (in_key("tokens_per_day = 99999999999999999999"), 4, ""),
        (
            format!("{key}\n[[key]]\nname = \"a\"\nsecret = \"OTHER\""),
            6,
            "`name`: expected one key of a name, found `a` again",
        ),
        (format!("{key}\n[[key]]\nname = \"b\"\nsecret = \"HASH\""), 7, "`secret`: expected one secret for each key"),
        (format!("{key}name = \"b\""), 4, "duplicate key"),
        (in_tenant("weight = 0"), 3, "`weight`: expected an integer in [1, 65536], found 0"),
        (in_tenant("kv_floor = 9\nkv_ceiling = 8"), 4, "`kv_ceiling`: expected at least `kv_floor` (9), found 8"),
        (in_tenant("\n[[tenant]]\nname = \"a\""), 5, "expected one tenant of a name"),
        (in_shared("system = \"a\"\ntext = \"b\""), 1, "expected one of `system` and `text`, found both"),
        (in_shared(""), 1, "found neither"),
        (in_shared("text = \"\""), 2, "expected a text, found an empty one"),
        (
            "[[shared_prefix]]\ntext = \"a\"\n".repeat(257),
            513,
            "expected at most 256 [[shared_prefix]] entries, found 257",
        ),
    ];
    for (text, line, message) in cases {
        let error = parse(&text).expect_err(&text);
        assert_eq!(error.line, line, "{text}\n{error}");
        assert!(error.message.contains(message), "{text}\n{error} lacks {message:?}");
        assert!(!error.to_string().contains("kv-abc"), "{error}");
    }
}

#[test]
fn ten_thousand_keys_and_no_more() {
    let mut text = String::new();
    for number in 0..10_000 {
        write!(text, "[[key]]\nname = \"k{number}\"\nsecret = \"sha256:{SALT}:{number:064x}\"\n").unwrap();
    }
    let classes = ClassNames::default();
    assert_eq!(KeyFile::parse(&text, &classes).unwrap().keys.len(), 10_000);
    write!(text, "[[key]]\nname = \"z\"\nsecret = \"sha256:{SALT}:{:064x}\"\n", 1 << 20).unwrap();
    let error = KeyFile::parse(&text, &classes).unwrap_err().to_string();
    assert!(error.contains("expected at most 10000 [[key]] entries, found 10001"), "{error}");
}

/// A file with pieces of good ones in any order, and bytes replaced.
fn any_file() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("[[key]]\n".to_owned()),
        Just("[[tenant]]\n".to_owned()),
        Just("[[shared_prefix]]\n".to_owned()),
        Just("name = \"a\"\n".to_owned()),
        Just("weight = 3\n".to_owned()),
        Just(format!("secret = \"{}\"\n", hashed("a"))),
        ("(class|system|text|tenant|tokens_per_day|kv_floor|secret)", "(\"[a-zé:]{0,8}\"|-?[0-9]{1,20}|\\[\\]|\\{\\})")
            .prop_map(|(field, value)| format!("{field} = {value}\n")),
        ".{0,20}",
    ];
    (prop::collection::vec(piece, 0..12), any::<prop::sample::Index>(), prop::option::of(any::<char>())).prop_map(
        |(pieces, at, replaced)| {
            let mut chars: Vec<char> = pieces.concat().chars().collect();
            if let Some(replaced) = replaced.filter(|_| !chars.is_empty()) {
                let at = at.index(chars.len());
                chars[at] = replaced;
            }
            chars.into_iter().collect()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a file holds, there is a table or a line that is wrong.
    #[test]
    fn no_file_panics(text in any_file()) {
        match KeyFile::parse(&text, &ClassNames::default()) {
            Ok(file) => prop_assert!(file.keys.iter().all(|key| key.highest <= key.class)),
            Err(error) => prop_assert!((1..=text.lines().count().max(1) + 1).contains(&error.line), "{error}"),
        }
    }
}

#[test]
fn classes_by_name() {
    let check = |names: &[&str], default: u8| {
        let classes = ClassNames::from_names(names.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(classes.default_class(), ClassId(default), "{names:?}");
        assert_eq!(classes.last(), ClassId(names.len() as u8 - 1));
        for (at, name) in (0..).zip(names) {
            assert_eq!(classes.find(name), Some(ClassId(at)));
        }
        assert_eq!(classes.find("nothing"), None);
    };
    check(&["high", "normal", "low"], 1);
    check(&["only"], 0);
    check(&["chat", "batch"], 0);
    check(&["a", "b", "c", "d", "normal"], 4);
}

/// A keyring with this file.
fn keyring(text: &str) -> Keyring {
    let text = text.replace("HASH", &hashed("a").to_string()).replace("OTHER", &hashed("b").to_string());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let api_keys = ApiKeys::new(vec!["plain".into(), String::new()]);
    Keyring::open(KeyringOptions { api_keys, file: Some(file.path().into()), ..KeyringOptions::default() }).unwrap()
}

#[test]
fn only_whole_secrets_open() {
    let keys = keyring(
        "[[key]]\nname = \"a\"\nsecret = \"HASH\"\ntenant = \"t\"\n[[key]]\nname = \"b\"\nsecret = \"OTHER\"\n\
         [[key]]\nname = \"c\"\nsecret = \"sha256:ffffffffffffffffffffffffffffffff:\
         0000000000000000000000000000000000000000000000000000000000000000\"",
    );
    let tenant = |secret: &[u8]| keys.find(secret).map(|caller| caller.tenant.0);
    let long = [b'a'; 10_000];
    let cases: [(&[u8], Option<u32>); 9] = [
        (b"a", Some(3)),
        (b"b", Some(1)),
        (b"plain", Some(0)),
        (b"", None),
        (b"aa", None),
        (b"plai", None),
        (b"A", None),
        (b"\xff", None),
        (&long, None),
    ];
    for (secret, expected) in cases {
        assert_eq!(tenant(secret), expected, "{:?}", &secret[..secret.len().min(9)]);
    }
    assert!(!keys.is_open() && !keyring("").is_open());
    assert!(Keyring::from(ApiKeys::new(vec![String::new()])).is_open(), "an empty key is none");
    assert!(!Keyring::from(ApiKeys::new(vec!["x".into()])).is_open());
}

#[test]
fn terms_are_within_what_the_key_allows() {
    let keys = keyring(
        "[[key]]\nname = \"a\"\nsecret = \"HASH\"\nhighest_class = \"high\"\n[[key]]\nname = \"b\"\nsecret = \"OTHER\"",
    );
    let (raised, fixed, anyone) = (keys.find(b"a").unwrap(), keys.find(b"b").unwrap(), keys.anyone());
    let class = |caller, class_steps| keys.terms(caller, &Asked { class_steps, ..Asked::default() }).class.0;
    for (steps, expected) in
        [(0, [1, 1, 1]), (-1, [0, 1, 0]), (i64::MIN, [0, 1, 0]), (1, [2, 2, 2]), (i64::MAX, [2, 2, 2])]
    {
        assert_eq!([&raised, &fixed, &anyone].map(|caller| class(caller, steps)), expected, "{steps}");
    }
    let timeout = Some(Duration::from_millis(1_500));
    let terms = keys.terms(&raised, &Asked { timeout, ..Asked::default() });
    assert_eq!((terms.tenant, terms.timeout, terms.shared_tokens), (TenantId(1), timeout, 0));
}

#[test]
fn salts_part_tenants_and_processes() {
    let text = "[[key]]\nname = \"a\"\nsecret = \"HASH\"\n[[key]]\nname = \"b\"\nsecret = \"OTHER\"\n";
    let (keys, other) = (keyring(text), keyring(text));
    let salt = |keys: &Keyring, secret: &[u8], cache_salt: Option<&str>| {
        let asked = Asked { cache_salt: cache_salt.map(str::to_owned), ..Asked::default() };
        keys.terms(&keys.find(secret).unwrap(), &asked).salt
    };
    let salts = [
        salt(&keys, b"a", None),
        salt(&keys, b"b", None),
        salt(&keys, b"plain", None),
        salt(&keys, b"a", Some("x")),
        salt(&keys, b"a", Some("y")),
        salt(&keys, b"b", Some("x")),
        salt(&other, b"a", None),
    ];
    for (at, one) in salts.iter().enumerate() {
        assert!(salts[..at].iter().all(|earlier| earlier != one), "salt {at} is not new");
        assert_ne!(one.0, 0);
    }
    assert_eq!(salt(&keys, b"a", Some("x")), salts[3], "the same again");
}

/// Runs the command; what it wrote on standard output, and what for eyes only.
fn command(task: KeyTask, name: &str, input: &str) -> Result<(String, String), String> {
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let config = KeyConfig { task, name: name.into(), salt: Some(SALT.parse().unwrap()) };
    run_command(&config, &mut input.as_bytes(), &mut out, &mut notes).map_err(|error| error.to_string())?;
    Ok((String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap()))
}

#[test]
fn a_made_key_opens_the_server() {
    let (entry, notes) = command(KeyTask::New, "acme", "").unwrap();
    let secret = notes.trim().rsplit(' ').next().unwrap();
    assert!(!entry.contains(secret), "{entry}");
    assert!(keyring(&entry).find(secret.as_bytes()).is_some(), "{entry}{notes}");
    let given = "a-secret-that-was-there-before";
    for end in ["", "\n", "\r\n", "\nmore"] {
        let (entry, notes) = command(KeyTask::Hash, "acme", &format!("{given}{end}")).unwrap();
        assert_eq!(entry, format!("[[key]]\nname = \"acme\"\nsecret = \"{}\"\n", hashed(given)));
        assert_eq!(notes, "");
    }
    assert!(command(KeyTask::Hash, "acme", "short").unwrap().1.contains("short"));
    for input in [String::new(), "\n".into(), "x".repeat(257), "x".repeat(100_000)] {
        let error = command(KeyTask::Hash, "acme", &input).unwrap_err();
        assert!(error.starts_with("expected a secret of 1 to 256 bytes"), "{error}");
    }
    assert!(command(KeyTask::New, "a b", "").unwrap_err().contains("`name`: expected 1 to 64 letters"));
}
