//! The tenants of the scenarios, of equal weight and without limits, and the keys file that knows them.

/// One tenant and its key, which have the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tenant {
    Light,
    Flood,
    A,
    B,
    C,
    D,
}

const ALL: [Tenant; 6] = [Tenant::Light, Tenant::Flood, Tenant::A, Tenant::B, Tenant::C, Tenant::D];
/// The 16 bytes `kvern-benchmark-`.
const SALT: &str = "6b7665726e2d62656e63686d61726b2d";

impl Tenant {
    fn name(self) -> &'static str {
        &self.secret()["bench-".len()..]
    }

    /// What the tenant's requests carry.
    pub(crate) fn secret(self) -> &'static str {
        match self {
            Tenant::Light => "bench-light",
            Tenant::Flood => "bench-flood",
            Tenant::A => "bench-a",
            Tenant::B => "bench-b",
            Tenant::C => "bench-c",
            Tenant::D => "bench-d",
        }
    }

    /// SHA-256 of the salt's bytes and the secret, as `printf kvern-benchmark-bench-a | sha256sum` says it.
    fn hash(self) -> &'static str {
        match self {
            Tenant::Light => "1e60f77b89e40b3a7ba59a2ff4472c42edb15833fd2866389563c701d60354cb",
            Tenant::Flood => "ff425f58bfdb41d261a032d6732992eee6caec487d0041a83349bde2e1834eb3",
            Tenant::A => "55b66608c4cdce49992bd12f0acdcfac0996ab492c491f212b9c73f8a0ab6513",
            Tenant::B => "cde62c68bb07d9e1526df78ae7458351f51d340f4e415ac05312c19827ee3404",
            Tenant::C => "233ccae57d97aa78fff1cda79ce3cae44f3d970d144043f2bd7c4ba566ad2465",
            Tenant::D => "b641d2a26130f8d7575ddeb69d9dddcb5f99f5c71dcd4335be6737487fce3263",
        }
    }
}

/// The text of a keys file with all tenants.
pub(crate) fn file() -> String {
    let entry = |tenant: Tenant| {
        format!("[[key]]\nname = \"{}\"\nsecret = \"sha256:{SALT}:{}\"\n", tenant.name(), tenant.hash())
    };
    ALL.map(entry).concat()
}
