//! Devices: where tensors live and ops run.

use std::sync::Arc;

use crate::cpu::CpuDevice;
use crate::cuda::PrefillKernel;
use crate::cuda::account::{Allocations, CountingDriver};
use crate::cuda::driver::{Driver, Element, Part, StreamPriority};
use crate::cuda::places::no_part;
use crate::reference::Products;
use crate::{KernelError, Result, cuda, cuda_driver};

/// Instruction-set level of the CPU backend, lowest first. All levels give the same bits, with two exceptions in products of
/// bf16 (BF16 weights, attention with a BF16 cache). Where the machine has AVX512-BF16, subnormal numbers count as zero. And at
/// the level of AMX they are summed in the order of its tile registers, [`Products::Bf16Tiles`], for any number of rows;
/// [`Device::bf16_products`] says which order a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuIsa {
    /// Plain Rust; any machine.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI; BF16 too where the machine has it.
    Avx512,
    /// The same with the tile registers of AMX: int8 and bf16. The bf16 ones are not used, and products of bf16 are those of
    /// [`Avx512`](CpuIsa::Avx512), where they fail a comparison with vectors that is made with the device.
    Amx,
}

/// What the CPU backend runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Compute threads, the caller's included; `None` is one per available core.
    pub threads: Option<usize>,
    /// Forces a level; `None` is the best that the machine has. A level that the machine lacks is an error.
    pub isa: Option<CpuIsa>,
}

/// How a GPU is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuOptions {
    /// Of activations.
    pub element: Element,
    /// Launches may begin while the one before them ends, where the GPU can do that.
    pub programmatic_launches: bool,
    /// Of prompts' attention; one that the GPU cannot run is an error.
    pub prefill: PrefillKernel,
}

impl From<Element> for GpuOptions {
    fn from(element: Element) -> Self {
        GpuOptions { element, programmatic_launches: false, prefill: PrefillKernel::Auto }
    }
}

/// How much of its GPU a worker's work has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceShare {
    /// All multiprocessors, and others' work may be among it.
    #[default]
    Whole,
    /// The worker's part, where it has one.
    Part,
}

/// What a worker beside another one gets of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BesideOptions {
    /// Of a CPU.
    pub threads: usize,
    /// On a GPU, its work goes first.
    pub is_urgent: bool,
    /// Of a GPU, where the worker has a part of its own beside the whole; from [`Device::divide`].
    pub part: Option<Part>,
}

/// A device and its execution resources; cloning shares them. Ops on one device are issued by one thread at a time: an
/// op that finds another one running panics.
#[derive(Clone)]
pub struct Device {
    pub(crate) backend: Backend,
}

#[derive(Clone)]
pub(crate) enum Backend {
    Cpu(Arc<CpuDevice>),
    Cuda(cuda::CudaDevice),
}

impl Device {
    /// The CPU with a thread pool of its own. A level that the machine lacks, or zero threads, is
    /// [`Unsupported`](crate::KernelError::Unsupported).
    pub fn cpu(options: CpuOptions) -> Result<Device> {
        Ok(Device { backend: Backend::Cpu(Arc::new(CpuDevice::new(options, true)?)) })
    }

    /// As [`cpu`](Device::cpu), on a machine that lacks AVX512-BF16 or as if it did: for tests.
    #[doc(hidden)]
    pub fn cpu_without_bf16(options: CpuOptions) -> Result<Device> {
        Ok(Device { backend: Backend::Cpu(Arc::new(CpuDevice::new(options, false)?)) })
    }

    /// GPU number `ordinal` of this machine. A machine or a binary without is an error that says what is missing.
    pub fn cuda(ordinal: usize, options: impl Into<GpuOptions>) -> Result<Device> {
        Device::gpu(cuda_driver::open(ordinal)?, options)
    }

    /// A device like this GPU that only counts what is allocated on it; `None` for a CPU.
    pub fn counting(&self) -> Result<Option<Device>> {
        let Backend::Cuda(gpu) = &self.backend else { return Ok(None) };
        let driver = Arc::new(CountingDriver::new(gpu.driver.properties().clone()));
        let device = cuda::CudaDevice::counting(driver, gpu.options())?;
        Ok(Some(Device { backend: Backend::Cuda(device) }))
    }

    /// What was allocated on a device that only counts; `None` for others.
    #[must_use]
    pub fn allocations(&self) -> Option<Allocations> {
        match &self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(gpu) => gpu.allocations(),
        }
    }

    /// The GPU behind `driver`.
    pub fn gpu(driver: Arc<dyn Driver>, options: impl Into<GpuOptions>) -> Result<Device> {
        Ok(Device { backend: Backend::Cuda(cuda::CudaDevice::new(driver, options.into())?) })
    }

    /// Divides a GPU's multiprocessors in two: at least so many, and the others. A CPU, or a GPU that cannot be divided,
    /// is [`Unsupported`](crate::KernelError::Unsupported).
    pub fn divide(&self, multiprocessors: u32) -> Result<[Part; 2]> {
        match &self.backend {
            Backend::Cpu(cpu) => {
                let text = format!("expected a GPU, whose multiprocessors can be divided, found {}", cpu.describe());
                Err(KernelError::Unsupported(text))
            }
            Backend::Cuda(gpu) => gpu.driver.divide(multiprocessors),
        }
    }

    /// A device for a second worker beside this one: on a GPU, streams of its own over the same memory; on the CPU,
    /// threads of its own at the same level.
    pub fn beside(&self, options: BesideOptions) -> Result<Device> {
        let BesideOptions { threads, is_urgent, part } = options;
        match &self.backend {
            Backend::Cpu(cpu) => Device::cpu(CpuOptions { threads: Some(threads), isa: Some(cpu.isa.level) }),
            Backend::Cuda(gpu) => {
                let priority = if is_urgent { StreamPriority::High } else { StreamPriority::Normal };
                Ok(Device { backend: Backend::Cuda(gpu.second(priority, part)?) })
            }
        }
    }

    /// The shares of the device that work can be given: on a GPU with a part for its worker both, elsewhere the whole.
    #[must_use]
    pub fn shares(&self) -> &'static [DeviceShare] {
        match &self.backend {
            Backend::Cpu(_) => &[DeviceShare::Whole],
            Backend::Cuda(gpu) => gpu.shares(),
        }
    }

    /// What is put on the device from now on has this share of it, and begins after all that was put there before;
    /// nobody waits on the host. At first it is the whole.
    ///
    /// # Errors
    /// A device without a part is asked for one; or the driver's, and then the share is what it was.
    pub fn move_to(&self, share: DeviceShare) -> Result<()> {
        match (&self.backend, share) {
            (Backend::Cpu(_), DeviceShare::Whole) => Ok(()),
            (Backend::Cpu(cpu), DeviceShare::Part) => Err(no_part(&cpu.describe())),
            (Backend::Cuda(gpu), share) => gpu.move_to(share),
        }
    }

    /// Whether it is a GPU.
    #[must_use]
    pub fn is_gpu(&self) -> bool {
        matches!(self.backend, Backend::Cuda(_))
    }

    /// Type of activations on a GPU; `None` on the CPU, where they are F32.
    #[must_use]
    pub fn element(&self) -> Option<Element> {
        match &self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(gpu) => Some(gpu.element),
        }
    }

    /// Bytes of the GPU's memory that are free; `None` on the CPU.
    pub fn free_bytes(&self) -> Result<Option<usize>> {
        match &self.backend {
            Backend::Cpu(_) => Ok(None),
            Backend::Cuda(gpu) => gpu.driver.free_bytes().map(Some),
        }
    }

    /// Waits until all that was put on the device is done; nothing to wait for on the CPU.
    pub fn synchronize(&self) -> Result<()> {
        match &self.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(gpu) => gpu.synchronize(),
        }
    }

    /// For the start-up banner: `cpu (avx512, 2 threads)`; at the level of AMX `amx`, or `amx without bf16 tiles` where these
    /// failed their comparison.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.describe(),
            Backend::Cuda(gpu) => gpu.describe(),
        }
    }

    /// The level that ops run at; `None` on a GPU.
    #[must_use]
    pub fn isa(&self) -> Option<CpuIsa> {
        match &self.backend {
            Backend::Cpu(cpu) => Some(cpu.isa.level),
            Backend::Cuda(_) => None,
        }
    }

    /// How products of bf16, weights' and of a BF16 cache, are summed up: the reference whose bits they have. It is the same
    /// for all devices of a level on one machine; `None` on a GPU.
    #[must_use]
    pub fn bf16_products(&self) -> Option<Products> {
        match &self.backend {
            Backend::Cpu(cpu) => Some(cpu.bf16_products()),
            Backend::Cuda(_) => None,
        }
    }

    /// Host threads of [`Device::parallel_for`], the caller's included; on a GPU the caller's alone.
    #[must_use]
    pub fn threads(&self) -> usize {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.pool.threads(),
            Backend::Cuda(_) => 1,
        }
    }

    /// Runs `work(i)` for `i in 0..tasks` on the device's host threads; returns when all are done. For host-side work
    /// that belongs to a step (sampling). `work` must not call an op. A panic in `work` becomes this call's.
    pub fn parallel_for(&self, tasks: usize, work: &(dyn Fn(usize) + Sync)) {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.pool.run(tasks, &|_, task| work(task)),
            Backend::Cuda(_) => (0..tasks).for_each(work),
        }
    }
}
