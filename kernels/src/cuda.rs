//! The CUDA backend: the same ops, put on a stream of a GPU.
//!
//! An op returns when its launch is on the device's stream. Nothing waits for the device but [`Tensor::read`](crate::Tensor::read), the sampler's
//! results, and a write to pinned memory that is still being copied. All memory is allocated when tensors, plans and
//! devices are made; ops allocate nothing.
//!
//! ```text
//! account.rs    a GPU that only counts what is allocated on it
//! driver.rs     what is asked of a GPU: the trait that the real driver and the tests' one implement
//! places.rs     a worker's streams, on all of the device and on a part of it
//! memory.rs     device memory, pinned memory, places in a worker's work
//! kernels.rs    the kernels by their names
//! ops.rs        one launch, or a few, per op
//! products.rs   products of matrices: which kernel for how many rows
//! weights.rs    stored matrices to the device, through pinned memory
//! uploads.rs    arrays that are filled for each step, and their way to the device
//! inputs.rs     a step's ids, positions, slots and sampled rows
//! attention.rs  the division of a step's attention, and its launches
//! prefix.rs     sequences of a step that begin with the same blocks
//! graphs.rs     launches of decode steps, captured once per batch size
//! sampling.rs   logits to tokens
//! seen.rs       whose seen tokens are where, for penalties
//! ```

pub mod driver;

pub(crate) mod account;

pub(crate) mod attention;
pub(crate) mod graphs;
pub(crate) mod inputs;
mod kernels;
pub(crate) mod memory;
mod ops;
pub(crate) mod places;
mod prefix;
mod products;
pub(crate) mod sampling;
mod seen;
pub(crate) mod uploads;
pub(crate) mod weights;

use std::sync::{Arc, Mutex, PoisonError};

use account::{Allocations, CountingDriver};
use driver::{Driver, Element, Kernel, LaunchShape, Part, Stream, StreamPriority};
use kernels::Kernels;
use kvern_cuda_abi::KernelParams;
use memory::{DeviceMemory, Milestone};
pub(crate) use ops::{add_rms_norm, attention, embed, gather_rows, rms_norm, rope_and_store, silu_mul};
use places::{Places, SHARES};
pub(crate) use products::matmul;
use uploads::StepUploads;
use weights::Loader;

use crate::device::DeviceShare;
use crate::{GpuOptions, KernelError, Result};

/// What [`PrefillKernel::Auto`] is: the kernel for sm_90a has not run on a GPU yet.
const AUTO_PREFILL: PrefillKernel = PrefillKernel::Portable;

/// Scratch of cuBLASLt's products: what NVIDIA asks for on Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Room for quantized weights that are widened before a product of many rows: a stretch that stays in the second-level cache of
/// an H100 (50 MB) beside what the product reads.
const WIDENED_BYTES: usize = 24 << 20;

/// Which kernel does prompts' attention on a GPU in 16-bit types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PrefillKernel {
    /// What is known to be best.
    #[default]
    Auto,
    /// The one that any GPU can run.
    Portable,
    /// The one for compute capability 9.0: heads of 64, 96, 128 or 256 values of 16 bits, in blocks of a multiple of 8
    /// positions that makes whole tiles. Anything else is refused.
    Hopper,
}

impl PrefillKernel {
    /// Whether it is the one for 9.0.
    ///
    /// # Errors
    /// It was asked for, and the device or the type of activations is another.
    fn is_hopper(self, compute_capability: (u32, u32), element: Element) -> Result<bool> {
        let has_it = compute_capability == (9, 0) && element != Element::F32;
        match self {
            PrefillKernel::Auto => Ok(has_it && AUTO_PREFILL == PrefillKernel::Hopper),
            PrefillKernel::Portable => Ok(false),
            PrefillKernel::Hopper if has_it => Ok(true),
            PrefillKernel::Hopper => {
                let found = match compute_capability {
                    (9, 0) => format!("activations in {element}"),
                    (major, minor) => format!("compute capability {major}.{minor}"),
                };
                let expected = "expected compute capability 9.0, and activations in bf16 or f16";
                Err(KernelError::Unsupported(format!("{expected}, for attention by wgmma, found {found}")))
            }
        }
    }
}

/// A GPU as one worker has it, and what its launches need; cloning shares it.
#[derive(Clone)]
pub(crate) struct CudaDevice(Arc<Gpu>);

pub(crate) struct Gpu {
    pub(crate) driver: Arc<dyn Driver>,
    places: Places,
    /// Of activations, of weights that are not quantized, and of K and V.
    pub(crate) element: Element,
    pub(crate) kernels: Kernels,
    /// Launches may begin while the one before ends.
    pub(super) early: bool,
    /// As asked.
    prefill: PrefillKernel,
    /// Prompts' attention is by the kernel for sm_90a, where heads and blocks fit it.
    pub(crate) is_prefill_hopper: bool,
    /// Of products.
    workspace: DeviceMemory,
    widened: DeviceMemory,
    idle: Mutex<Milestone>,
    pub(super) uploads: Arc<Mutex<StepUploads>>,
    loader: Arc<Mutex<Loader>>,
    /// The driver, where it only counts.
    counter: Option<Arc<CountingDriver>>,
}

impl std::ops::Deref for CudaDevice {
    type Target = Gpu;
    fn deref(&self) -> &Gpu {
        &self.0
    }
}

impl CudaDevice {
    pub(crate) fn new(driver: Arc<dyn Driver>, options: GpuOptions) -> Result<Self> {
        let kernels = Kernels::new(driver.as_ref(), options.element)?;
        let places = Places::new(driver.as_ref(), StreamPriority::Normal, None)?;
        let loader = Arc::new(Mutex::new(Loader::new(&driver, places.current().stream)?));
        CudaDevice::with_places(driver, options, kernels, loader, places)
    }

    /// A device whose driver only counts, and tells what.
    pub(crate) fn counting(driver: Arc<CountingDriver>, options: GpuOptions) -> Result<Self> {
        let mut device = CudaDevice::new(Arc::clone(&driver) as Arc<dyn Driver>, options)?;
        let gpu = Arc::get_mut(&mut device.0).expect("a new device has one owner");
        gpu.counter = Some(driver);
        Ok(device)
    }

    /// What was allocated where it is only counted.
    pub(crate) fn allocations(&self) -> Option<Allocations> {
        self.counter.as_ref().map(|counter| counter.allocations())
    }

    /// The same GPU with streams of its own, one of them on `part`, for a second worker.
    pub(crate) fn second(&self, priority: StreamPriority, part: Option<Part>) -> Result<Self> {
        let Gpu { driver, kernels, loader, .. } = &*self.0;
        let places = Places::new(driver.as_ref(), priority, part)?;
        CudaDevice::with_places(Arc::clone(driver), self.options(), kernels.clone(), Arc::clone(loader), places)
    }

    fn with_places(
        driver: Arc<dyn Driver>,
        options: GpuOptions,
        kernels: Kernels,
        loader: Arc<Mutex<Loader>>,
        places: Places,
    ) -> Result<Self> {
        let GpuOptions { element, programmatic_launches: early, prefill } = options;
        let is_prefill_hopper = prefill.is_hopper(driver.properties().compute_capability, element)?;
        let workspace = DeviceMemory::new(&driver, "workspace of products", WORKSPACE_BYTES)?;
        let widened = DeviceMemory::new(&driver, "workspace of products", WIDENED_BYTES)?;
        let milestone = || Milestone::new(&driver, places.iter().map(|place| place.stream));
        let (idle, copied) = (Mutex::new(milestone()?), milestone()?);
        let uploads = Arc::new(Mutex::new(StepUploads::new(&driver, copied)));
        Ok(CudaDevice(Arc::new(Gpu {
            driver,
            places,
            element,
            kernels,
            early,
            prefill,
            is_prefill_hopper,
            workspace,
            widened,
            idle,
            uploads,
            loader,
            counter: None,
        })))
    }

    /// For the start-up banner.
    pub(crate) fn describe(&self) -> String {
        let properties = self.driver.properties();
        let (major, minor) = properties.compute_capability;
        let prefill = match (self.is_prefill_hopper, self.prefill) {
            (true, PrefillKernel::Hopper) => ", prefill by wgmma",
            (true, _) => ", prefill by wgmma where blocks fit",
            (false, _) => "",
        };
        let all = properties.multiprocessors;
        let part = self.places.part().map(|part| format!(", all or {} of {all} multiprocessors", part.multiprocessors));
        format!("{} (sm_{major}{minor}, {}{prefill}{})", properties.name, self.element, part.unwrap_or_default())
    }
}

impl Gpu {
    /// For a device like this one.
    pub(crate) fn options(&self) -> GpuOptions {
        GpuOptions { element: self.element, programmatic_launches: self.early, prefill: self.prefill }
    }

    /// Whether prompts' attention has to be by the kernel for sm_90a, and another one is no answer.
    pub(crate) fn needs_hopper(&self) -> bool {
        self.prefill == PrefillKernel::Hopper
    }

    /// The shares of the device that there are.
    pub(crate) fn shares(&self) -> &'static [DeviceShare] {
        &SHARES[..self.places.len()]
    }

    /// What is put on the device from now on has this share of it, and begins after all that was put there before.
    ///
    /// # Errors
    /// As of [`Device::move_to`](crate::Device::move_to).
    pub(crate) fn move_to(&self, share: DeviceShare) -> Result<()> {
        self.places.move_to(self.driver.as_ref(), share)
    }

    /// The number of the share that work has now.
    pub(super) fn share(&self) -> usize {
        self.places.at()
    }

    /// What work is put on now.
    pub(crate) fn stream(&self) -> Stream {
        self.places.current().stream
    }

    /// What of the device work has now, where that is not all.
    pub(super) fn part(&self) -> Option<Part> {
        self.places.current().part
    }

    /// What work runs on, by share.
    pub(super) fn multiprocessors(&self) -> impl Iterator<Item = usize> {
        let all = self.driver.properties().multiprocessors;
        self.places.iter().map(move |place| place.part.map_or(all, |part| part.multiprocessors as usize))
    }

    /// A place in the work that is put on the device.
    pub(super) fn milestone(&self) -> Result<Milestone> {
        Milestone::new(&self.driver, self.places.iter().map(|place| place.stream))
    }

    /// As [`milestone`](Self::milestone); it also keeps when the device passed it.
    pub(crate) fn timed_milestone(&self) -> Result<Milestone> {
        Milestone::timed(&self.driver, self.places.iter().map(|place| place.stream))
    }

    /// Puts what was filled of arrays of the step on its way to the device; what is put there after that has it.
    pub(super) fn bring_inputs(&self) -> Result<()> {
        uploads::lock(&self.uploads).bring(self.stream())
    }

    /// Puts a launch on the device.
    ///
    /// # Safety
    /// Shape and parameters are what the kernel takes, and memory that they name lives until the launch has run.
    pub(crate) unsafe fn launch<P: KernelParams>(&self, kernel: Kernel, shape: LaunchShape, params: &P) -> Result<()> {
        // SAFETY: parameter structs are plain data without padding.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<P>()) };
        let shape = LaunchShape { early: self.early, ..shape };
        self.bring_inputs()?;
        // SAFETY: the caller's promise.
        unsafe { self.driver.launch(self.stream(), kernel, shape, bytes, &P::LAYOUT) }
    }

    /// Waits until all that was put on the device is done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.set(self.stream())?;
        idle.wait()
    }

    /// What loads weights; one at a time.
    fn loader(&self) -> std::sync::MutexGuard<'_, Loader> {
        self.loader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A launch of `grid` blocks of `threads` threads.
pub(crate) fn shape(grid: [usize; 2], threads: usize) -> LaunchShape {
    let narrow = |size: usize| u32::try_from(size).expect("sizes of a launch are below 2^32, as ids and slots are");
    LaunchShape { grid: grid.map(narrow), threads: narrow(threads), shared_bytes: 0, early: false }
}
