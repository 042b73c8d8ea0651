//! The machine and the settings that are simulated: from a TOML or JSON file, from the header of a recording, or by default.

use crate::config::ProfileSource;
use crate::replay::{self, ReplayError};
use kvern_core::{ClassSpec, CoreConfig, CostModel, Micros, PoolId, Role, WorkerSpec};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Largest file that is not a recording.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error(transparent)]
    Recording(#[from] ReplayError),
    #[error("{path}: {problem}")]
    Bad { path: String, problem: String },
}

/// What is simulated.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    pub core: CoreConfig,
    /// What a block takes from one pool to another, in microseconds.
    pub transfer_block_us: u64,
    /// Settings of the tenants that are named; others have a weight of 1.
    pub tenants: Vec<TenantRow>,
}

impl Default for Profile {
    /// The server's default settings, 16,384 blocks, and the core's guess of what a step costs: no machine in particular.
    fn default() -> Self {
        let core = CoreConfig {
            step_tokens_max: 512,
            running_max: 256,
            waiting_max: 1024,
            request_tokens_max: 131_072,
            ..CoreConfig::mixed(16_384, 16)
        };
        Profile { core, transfer_block_us: 0, tenants: Vec::new() }
    }
}

/// A tenant as the file has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantRow {
    pub name: String,
    #[serde(default = "one")]
    pub weight: u32,
    #[serde(default)]
    pub floor_blocks: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling_blocks: Option<u32>,
}

fn one() -> u32 {
    1
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RoleRow {
    Mixed,
    Prefill,
    Decode,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkerRow {
    role: RoleRow,
    #[serde(default)]
    pool: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassRow {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttft_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    itl_ms: Option<f64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CostRow {
    step_ps: u64,
    prefill_token_ps: u64,
    prefill_context_ps: u64,
    decode_sequence_ps: u64,
    decode_context_ps: u64,
}

/// A profile as the file has it. What is left out is as in the default profile.
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Rows {
    pools: Vec<u32>,
    block_size: u32,
    step_tokens_max: u32,
    running_max: u32,
    waiting_max: u32,
    /// Left out: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_tokens_max: Option<u64>,
    request_tokens_max: u32,
    prefix_caching: bool,
    bypasses_max: u32,
    overtakes_max: u32,
    chunk_tokens_min: u32,
    ride_along_tokens_max: u32,
    transfer_block_us: u64,
    cost: CostRow,
    worker: Vec<WorkerRow>,
    class: Vec<ClassRow>,
    tenant: Vec<TenantRow>,
}

impl Default for Rows {
    fn default() -> Self {
        Rows::of(&Profile::default())
    }
}

impl Rows {
    fn of(profile: &Profile) -> Self {
        let core = &profile.core;
        let ms = |time: Option<Micros>| time.map(|time| time.0 as f64 / 1e3);
        let CostModel { step_ps, prefill_token_ps, prefill_context_ps, decode_sequence_ps, decode_context_ps } =
            core.cost;
        let worker = |worker: &WorkerSpec| WorkerRow {
            role: match worker.role {
                Role::Mixed => RoleRow::Mixed,
                Role::Prefill => RoleRow::Prefill,
                Role::Decode => RoleRow::Decode,
            },
            pool: worker.pool.0,
        };
        Rows {
            pools: core.pools.clone(),
            block_size: core.block_size,
            step_tokens_max: core.step_tokens_max,
            running_max: core.running_max,
            waiting_max: core.waiting_max,
            queue_tokens_max: Some(core.queue_tokens_max).filter(|tokens| *tokens <= i64::MAX as u64),
            request_tokens_max: core.request_tokens_max,
            prefix_caching: core.prefix_caching,
            bypasses_max: core.bypasses_max,
            overtakes_max: core.overtakes_max,
            chunk_tokens_min: core.chunk_tokens_min,
            ride_along_tokens_max: core.ride_along_tokens_max,
            transfer_block_us: profile.transfer_block_us,
            cost: CostRow { step_ps, prefill_token_ps, prefill_context_ps, decode_sequence_ps, decode_context_ps },
            worker: core.workers.iter().map(worker).collect(),
            class: core
                .classes
                .iter()
                .map(|class| ClassRow { ttft_ms: ms(class.ttft), itl_ms: ms(class.itl) })
                .collect(),
            tenant: profile.tenants.clone(),
        }
    }

    fn profile(self) -> Result<Profile, String> {
        let time = |ms: Option<f64>| match ms {
            Some(ms) if !(0.0..=1e12).contains(&ms) => Err(format!("expected a time in milliseconds, found {ms}")),
            ms => Ok(ms.map(|ms| Micros((ms * 1e3) as u64))),
        };
        let class = |class: &ClassRow| Ok(ClassSpec { ttft: time(class.ttft_ms)?, itl: time(class.itl_ms)? });
        let worker = |worker: &WorkerRow| WorkerSpec {
            role: match worker.role {
                RoleRow::Mixed => Role::Mixed,
                RoleRow::Prefill => Role::Prefill,
                RoleRow::Decode => Role::Decode,
            },
            pool: PoolId(worker.pool),
        };
        let CostRow { step_ps, prefill_token_ps, prefill_context_ps, decode_sequence_ps, decode_context_ps } =
            self.cost;
        let core = CoreConfig {
            pools: self.pools,
            workers: self.worker.iter().map(worker).collect(),
            block_size: self.block_size,
            step_tokens_max: self.step_tokens_max,
            running_max: self.running_max,
            waiting_max: self.waiting_max,
            queue_tokens_max: self.queue_tokens_max.unwrap_or(u64::MAX),
            request_tokens_max: self.request_tokens_max,
            prefix_caching: self.prefix_caching,
            classes: self.class.iter().map(class).collect::<Result<_, String>>()?,
            bypasses_max: self.bypasses_max,
            overtakes_max: self.overtakes_max,
            chunk_tokens_min: self.chunk_tokens_min,
            ride_along_tokens_max: self.ride_along_tokens_max,
            cost: CostModel { step_ps, prefill_token_ps, prefill_context_ps, decode_sequence_ps, decode_context_ps },
            ..Profile::default().core
        };
        match core.problem() {
            Some(problem) => Err(problem),
            None => Ok(Profile { core, transfer_block_us: self.transfer_block_us, tenants: self.tenant }),
        }
    }
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// When the file cannot be read, or does not say what can be simulated.
    pub fn open(source: &ProfileSource) -> Result<Self, ProfileError> {
        let path = match source {
            ProfileSource::Default => return Ok(Profile::default()),
            ProfileSource::File(path) => path.as_path(),
        };
        let shown = path.display().to_string();
        let unreadable = |source| ProfileError::Read { path: shown.clone(), source };
        let mut text = Vec::new();
        File::open(path).map_err(unreadable)?.take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(unreadable)?;
        if text.starts_with(b"KVERNREC") {
            return Profile::of_recording(path);
        }
        Profile::parse(&text).map_err(|problem| ProfileError::Bad { path: shown, problem })
    }

    /// What a server ran with.
    fn of_recording(path: &Path) -> Result<Self, ProfileError> {
        Ok(Profile { core: replay::config_of(path)?, ..Profile::default() })
    }

    /// Reads TOML or JSON.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let text = str::from_utf8(text).map_err(|_| "expected UTF-8, found other bytes".to_owned())?;
        let rows: Rows = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|error| error.to_string())?
        } else {
            toml::from_str(text).map_err(|error| error.to_string())?
        };
        rows.profile()
    }

    /// As a file that says the same.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(&Rows::of(self)).expect("rows of numbers and texts are TOML")
    }
}
