//! Matrices of activations.

use kvern_cuda_abi::Ptr;

use crate::buffer::Buffer;
use crate::cuda::driver::Element;
use crate::cuda::memory::{DeviceMemory, Pinned};
use crate::cuda::weights::upload;
use crate::device::Backend;
use crate::{Device, KernelError, Result};

/// A row-major matrix of activations, `[rows, cols]`, with room for `capacity` rows. F32 on the CPU; on a GPU of the device's
/// type of activations, or F32 where that is said.
pub struct Tensor {
    data: Data,
    rows: usize,
    cols: usize,
    capacity: usize,
}

enum Data {
    Host(Buffer<f32>),
    Device { memory: DeviceMemory, element: Element },
}

impl Tensor {
    /// Zeros on the CPU, anything on a GPU; `rows` starts at `capacity`. No columns, or a size out of range, is [`Shape`](KernelError::Shape).
    pub fn zeros(device: &Device, capacity: usize, cols: usize) -> Result<Tensor> {
        Tensor::of(device, capacity, cols, false)
    }

    /// As [`zeros`](Self::zeros), of F32 on every device: for logits.
    pub fn f32(device: &Device, capacity: usize, cols: usize) -> Result<Tensor> {
        Tensor::of(device, capacity, cols, true)
    }

    fn of(device: &Device, capacity: usize, cols: usize, f32: bool) -> Result<Tensor> {
        let elements = capacity.checked_mul(cols).filter(|_| cols > 0).ok_or_else(|| {
            KernelError::shape(
                "tensor",
                "at least one column and a size in range",
                format!("{capacity} rows of {cols}"),
            )
        })?;
        let data = match &device.backend {
            Backend::Cpu(_) => Data::Host(Buffer::zeros(elements)?),
            Backend::Cuda(gpu) => {
                let element = if f32 { Element::F32 } else { gpu.element };
                let bytes = elements.checked_mul(element.bytes());
                let bytes = bytes.ok_or_else(|| KernelError::shape("tensor", "a size in range", elements))?;
                Data::Device { memory: DeviceMemory::new(&gpu.driver, "activations", bytes)?, element }
            }
        };
        Ok(Tensor { data, rows: capacity, cols, capacity })
    }

    /// A `[values.len() / cols, cols]` matrix with these values.
    pub fn from_f32(device: &Device, cols: usize, values: &[f32]) -> Result<Tensor> {
        if cols == 0 || !values.len().is_multiple_of(cols) {
            return Err(KernelError::shape(
                "tensor",
                format!("whole rows of {cols}"),
                format!("{} values", values.len()),
            ));
        }
        let rows = values.len() / cols;
        if let Backend::Cuda(gpu) = &device.backend {
            let data = Data::Device { memory: upload(gpu, "a vector", values, gpu.element)?, element: gpu.element };
            return Ok(Tensor { data, rows, cols, capacity: rows });
        }
        let mut tensor = Tensor::zeros(device, rows, cols)?;
        tensor.host_mut().copy_from_slice(values);
        Ok(tensor)
    }

    /// Live rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sets the number of live rows, at most `capacity`; panics beyond it (a caller's bug). Contents are kept.
    pub fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.capacity, "a tensor for {} rows cannot have {rows}", self.capacity);
        self.rows = rows;
    }

    /// Values of the live rows.
    pub(crate) fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Live rows, on the host; of a tensor on the CPU.
    ///
    /// # Panics
    /// For a tensor on a GPU, which [`read`](Self::read) copies.
    #[must_use]
    pub fn host(&self) -> &[f32] {
        match &self.data {
            Data::Host(values) => &values[..self.rows * self.cols],
            Data::Device { .. } => panic!("a tensor on a GPU is read by a copy"),
        }
    }

    /// A copy of the live rows, widened, once all that was put on the device is done: for tests and checks.
    pub fn read(&self, device: &Device) -> Result<Vec<f32>> {
        let (Data::Device { memory, element }, Backend::Cuda(gpu)) = (&self.data, &device.backend) else {
            return Ok(self.host().to_vec());
        };
        let mut pinned = Pinned::<u8>::new(&gpu.driver, self.len() * element.bytes())?;
        // SAFETY: the tensor is as long; the copy is waited for.
        unsafe { pinned.copy_from(gpu.stream(), memory.ptr(), 0, self.len() * element.bytes())? };
        gpu.synchronize()?;
        Ok(element.widen(pinned.read()?))
    }

    /// Live rows, on the host, to write; of a tensor on the CPU.
    ///
    /// # Panics
    /// For a tensor on a GPU.
    #[must_use]
    pub fn host_mut(&mut self) -> &mut [f32] {
        match &mut self.data {
            Data::Host(values) => &mut values[..self.rows * self.cols],
            Data::Device { .. } => panic!("a tensor on a GPU is not written by the host"),
        }
    }

    /// Where it is on a GPU; null on the CPU, where no kernel is launched.
    pub(crate) fn ptr(&self) -> Ptr {
        match &self.data {
            Data::Host(_) => Ptr::NULL,
            Data::Device { memory, .. } => memory.ptr(),
        }
    }

    pub(crate) fn element(&self) -> Element {
        match &self.data {
            Data::Host(_) => Element::F32,
            Data::Device { element, .. } => *element,
        }
    }

    /// Bytes held on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::Host(values) => values.bytes(),
            Data::Device { memory, .. } => memory.bytes(),
        }
    }

    /// Makes room for `rows` live rows or says why not: ops set the rows of their outputs with it.
    pub(crate) fn resize(&mut self, op: &'static str, rows: usize) -> Result<()> {
        if rows > self.capacity {
            let expected = format!("room for {rows} output rows");
            return Err(KernelError::shape(op, expected, format!("a capacity of {}", self.capacity)));
        }
        self.rows = rows;
        Ok(())
    }
}
