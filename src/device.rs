//! The device that the settings name: a GPU where there is one, else the CPU.

use crate::config::{DeviceChoice, EngineConfig};
use kvern_kernels::{Device, Element, KernelError, Precision};

/// Opens it. Where `auto` finds no GPU, the log says why in one line, unless the binary is one without CUDA.
///
/// # Errors
/// A GPU that was asked for and is not there, or a level of instructions that the CPU lacks.
pub fn open(engine: &EngineConfig) -> Result<Device, KernelError> {
    let element = match engine.precision {
        Precision::F32 => Element::F32,
        Precision::AsStored | Precision::BF16 => Element::BF16,
    };
    let prefill = engine.device.prefill_attention;
    match engine.device.choice {
        DeviceChoice::Cpu => Device::cpu(engine.cpu),
        DeviceChoice::Cuda(number) => Device::cuda_with(number, element, prefill),
        DeviceChoice::Auto => match Device::cuda_with(0, element, prefill) {
            Ok(device) => Ok(device),
            Err(KernelError::BuiltWithoutCuda) => Device::cpu(engine.cpu),
            Err(error) => {
                tracing::info!(%error, "no GPU to use: the CPU computes");
                Device::cpu(engine.cpu)
            }
        },
    }
}
