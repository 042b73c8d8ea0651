//! The device that the settings name: a GPU where there is one, else the CPU; and what it computes in.

use crate::config::{DeviceChoice, DeviceConfig, EngineConfig};
use kvern_kernels::{Device, Element, Format, GpuOptions, KernelError, KvDType, Precision};
use kvern_models::Checkpoint;

/// Opens it for a model. Where `auto` finds no GPU, the log says why in one line, unless the binary is one without CUDA.
///
/// # Errors
/// A GPU that was asked for and is not there, or a level of instructions that the CPU lacks.
pub fn open(engine: &EngineConfig, checkpoint: &Checkpoint) -> Result<Device, KernelError> {
    let element = element(engine.precision, checkpoint.stored_format());
    let DeviceConfig { programmatic_launches, prefill_attention: prefill, .. } = engine.device;
    let gpu = GpuOptions { element, programmatic_launches, prefill };
    match engine.device.choice {
        DeviceChoice::Cpu => Device::cpu(engine.cpu),
        DeviceChoice::Cuda(number) => Device::cuda(number, gpu),
        DeviceChoice::Auto => match Device::cuda(0, gpu) {
            Ok(device) => Ok(device),
            Err(KernelError::BuiltWithoutCuda) => Device::cpu(engine.cpu),
            Err(error) => {
                tracing::info!(%error, "no GPU to use: the CPU computes");
                Device::cpu(engine.cpu)
            }
        },
    }
}

/// Type of activations on a GPU for a model that is stored in `stored`: what was asked for, else F16 where the model was made
/// in it, as BF16 would drop three of its bits, else BF16, whose range holds what F32 and quantized models have.
#[must_use]
pub fn element(precision: Precision, stored: Option<Format>) -> Element {
    match (precision, stored) {
        (Precision::F32, _) => Element::F32,
        (Precision::F16, _) | (Precision::AsStored, Some(Format::F16)) => Element::F16,
        (Precision::BF16 | Precision::AsStored, _) => Element::BF16,
    }
}

/// How K and V are stored on this device: as was asked, else on a GPU as its activations, and on a CPU in BF16, or F32 with
/// weights of F32.
///
/// # Errors
/// The device does not have what was asked for.
pub fn kv_dtype(engine: &EngineConfig, device: &Device) -> Result<KvDType, KernelError> {
    let (usual, has, where_) = match device.element() {
        Some(element) => {
            let only = KvDType::from(element);
            (only, vec![only], "on a GPU with activations of that type (--dtype)")
        }
        None if engine.precision == Precision::F32 => (KvDType::F32, vec![KvDType::F32, KvDType::BF16], "on a CPU"),
        None => (KvDType::BF16, vec![KvDType::F32, KvDType::BF16], "on a CPU"),
    };
    match engine.kv_dtype {
        Some(asked) if !has.contains(&asked) => {
            let has: Vec<&str> = has.into_iter().map(KvDType::name).collect();
            let expected = format!("auto or {} {where_}", has.join(" or "));
            Err(KernelError::Unsupported(format!("--kv-cache-dtype: expected {expected}, found {asked}")))
        }
        asked => Ok(asked.unwrap_or(usual)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::{Config, Environment};
    use kvern_cuda_shim::device::{Options, ShimDriver};
    use kvern_kernels::CpuOptions;

    #[test]
    fn activations_have_the_type_that_was_asked_for_or_suits_the_model() {
        let cases = [
            (Precision::AsStored, Some(Format::F16), Element::F16),
            (Precision::AsStored, Some(Format::BF16), Element::BF16),
            (Precision::AsStored, Some(Format::F32), Element::BF16),
            (Precision::AsStored, Some(Format::Q4_K), Element::BF16),
            (Precision::AsStored, None, Element::BF16),
            (Precision::F16, Some(Format::BF16), Element::F16),
            (Precision::BF16, Some(Format::F16), Element::BF16),
            (Precision::F32, Some(Format::F16), Element::F32),
        ];
        for (precision, stored, expected) in cases {
            assert_eq!(element(precision, stored), expected, "{precision:?} {stored:?}");
        }
    }

    #[test]
    fn the_cache_has_a_type_of_the_device() {
        let cpu = || Device::cpu(CpuOptions { threads: Some(1), isa: None }).unwrap();
        let gpu = |element| Device::gpu(ShimDriver::new(Options::default()) as _, element).unwrap();
        let check = |device: &Device, args: &[&str], expected: Result<KvDType, &str>| {
            let argv = ["kvern", "serve"].iter().chain(args).map(Into::into).collect();
            let engine = Config::resolve(argv, &Environment::default()).unwrap().engine;
            let found = kv_dtype(&engine, device).map_err(|error| error.to_string());
            assert_eq!(found, expected.map_err(str::to_owned), "{} {args:?}", device.describe());
        };
        check(&cpu(), &[], Ok(KvDType::BF16));
        check(&cpu(), &["--dtype", "f32"], Ok(KvDType::F32));
        check(&cpu(), &["--dtype", "f32", "--kv-cache-dtype", "bf16"], Ok(KvDType::BF16));
        check(&cpu(), &["--dtype", "float16"], Ok(KvDType::BF16));
        let text = "--kv-cache-dtype: expected auto or f32 or bf16 on a CPU, found f16";
        check(&cpu(), &["--dtype", "half", "--kv-cache-dtype", "float16"], Err(text));
        for (element, dtype) in
            [(Element::F32, KvDType::F32), (Element::BF16, KvDType::BF16), (Element::F16, KvDType::F16)]
        {
            let gpu = gpu(element);
            check(&gpu, &[], Ok(dtype));
            check(&gpu, &["--kv-cache-dtype", dtype.name()], Ok(dtype));
            let other = if dtype == KvDType::F16 { KvDType::BF16 } else { KvDType::F16 };
            let text = format!(
                "--kv-cache-dtype: expected auto or {dtype} on a GPU with activations of that type (--dtype), found {other}"
            );
            check(&gpu, &["--kv-cache-dtype", other.name()], Err(&text));
        }
    }
}
