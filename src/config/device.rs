//! Which device computes, and how much of its memory is taken.

use clap::{Args, ValueEnum};
use kvern_kernels::{Device, PrefillKernel};
use kvern_models::LoadFormat;

/// Most tokens of a step where none were asked for: on a CPU a step of so many takes a fraction of a second, on a GPU it fills
/// the matrix units.
const STEP_TOKENS_CPU: u32 = 512;
const STEP_TOKENS_GPU: u32 = 2048;
/// Whether launches begin early where nothing is said: not until a GPU has measured that decoding gets faster by it.
const PROGRAMMATIC_LAUNCHES: bool = false;
/// Seed of dummy weights.
const DUMMY_SEED: u64 = 0;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU where there is one, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// GPU number.
    Cuda(usize),
}

/// The device and its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    pub choice: DeviceChoice,
    /// Thousandths of a GPU's free memory that are taken.
    pub memory_utilization: u32,
    pub load_format: LoadFormat,
    /// Launches on a GPU may begin while the one before them ends.
    pub programmatic_launches: bool,
    pub prefill_attention: PrefillKernel,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        DeviceConfig {
            choice: DeviceChoice::Auto,
            memory_utilization: 900,
            load_format: LoadFormat::Files,
            programmatic_launches: PROGRAMMATIC_LAUNCHES,
            prefill_attention: PrefillKernel::Auto,
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub(super) struct DeviceArgs {
    /// auto (the first GPU, or the CPU where there is none), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    device: DeviceChoice,
    /// Share of the GPU's free memory to take, for weights, workspace and the KV cache
    #[arg(long, value_name = "0..1", default_value = "0.9", visible_alias = "gpu-memory-utilization", value_parser = parse_share)]
    memory_utilization: u32,
    /// auto reads the model's files; dummy makes random weights for a config.json (to serve, a tokenizer too), for measuring
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LoadFormatArg::Auto)]
    load_format: LoadFormatArg,
    /// Launches on a GPU may begin while the one before them ends; auto is off until a GPU has measured it
    #[arg(long, value_name = "WHEN", hide = true, value_enum, default_value_t = WhenArg::Auto)]
    programmatic_launches: WhenArg,
    /// Kernel of prompts' attention on a GPU, for measuring: portable, or hopper on compute capability 9.0, where heads and blocks fit it
    #[arg(long, value_name = "KERNEL", value_enum, default_value_t = PrefillAttentionArg::Auto, hide = true)]
    prefill_attention: PrefillAttentionArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LoadFormatArg {
    Auto,
    Dummy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WhenArg {
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PrefillAttentionArg {
    Auto,
    Portable,
    Hopper,
}

impl DeviceArgs {
    pub(super) fn config(&self) -> DeviceConfig {
        let load_format = match self.load_format {
            LoadFormatArg::Auto => LoadFormat::Files,
            LoadFormatArg::Dummy => LoadFormat::Dummy { seed: DUMMY_SEED },
        };
        let programmatic_launches = match self.programmatic_launches {
            WhenArg::Auto => PROGRAMMATIC_LAUNCHES,
            WhenArg::On => true,
            WhenArg::Off => false,
        };
        let prefill_attention = match self.prefill_attention {
            PrefillAttentionArg::Auto => PrefillKernel::Auto,
            PrefillAttentionArg::Portable => PrefillKernel::Portable,
            PrefillAttentionArg::Hopper => PrefillKernel::Hopper,
        };
        let (choice, memory_utilization) = (self.device, self.memory_utilization);
        DeviceConfig { choice, memory_utilization, load_format, programmatic_launches, prefill_attention }
    }
}

/// Tokens of a step: what was asked for, or what suits the device, and at least one for each running request.
pub(super) fn step_tokens(asked: Option<u32>, sequences: u32, device: &Device) -> u32 {
    let usual = if device.is_gpu() { STEP_TOKENS_GPU } else { STEP_TOKENS_CPU };
    asked.unwrap_or(usual.max(sequences))
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    let number = |text: &str| text.parse().map(DeviceChoice::Cuda).ok();
    let choice = match text {
        "auto" => Some(DeviceChoice::Auto),
        "cpu" => Some(DeviceChoice::Cpu),
        "cuda" => Some(DeviceChoice::Cuda(0)),
        _ => text.strip_prefix("cuda:").and_then(number),
    };
    choice.ok_or_else(|| format!("expected auto, cpu or cuda:N, found `{text}`"))
}

/// A share as typed, above 0 and at most 1, in thousandths.
fn parse_share(text: &str) -> Result<u32, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.001..=1.0).contains(&value) => Ok((value * 1000.0).round() as u32),
        _ => Err(format!("expected a number above 0 and at most 1, found `{text}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_as_typed() {
        let known = [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ];
        for (text, choice) in known {
            assert_eq!(parse_device(text), Ok(choice));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0"] {
            assert_eq!(parse_device(text), Err(format!("expected auto, cpu or cuda:N, found `{text}`")));
        }
    }

    #[test]
    fn shares_as_typed() {
        assert_eq!((parse_share("0.9"), parse_share("1")), (Ok(900), Ok(1000)));
        for text in ["0", "1.1", "-0.5", "90%", "nan"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
    }
}
