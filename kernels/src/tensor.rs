//! Matrices of activations.

use crate::buffer::Buffer;
use crate::device::Backend;
use crate::{Device, KernelError, Result};

/// A row-major matrix of activations, `[rows, cols]`, with room for `capacity` rows. F32 on the CPU.
pub struct Tensor {
    data: Buffer<f32>,
    rows: usize,
    cols: usize,
    capacity: usize,
}

impl Tensor {
    /// Zeros; `rows` starts at `capacity`. No columns, or a size out of range, is [`Shape`](KernelError::Shape).
    pub fn zeros(device: &Device, capacity: usize, cols: usize) -> Result<Tensor> {
        let elements = capacity.checked_mul(cols).filter(|_| cols > 0).ok_or_else(|| {
            KernelError::shape(
                "tensor",
                "at least one column and a size in range",
                format!("{capacity} rows of {cols}"),
            )
        })?;
        match &device.backend {
            Backend::Cpu(_) => Ok(Tensor { data: Buffer::zeros(elements)?, rows: capacity, cols, capacity }),
            Backend::Cuda(_) => Err(KernelError::BuiltWithoutCuda),
        }
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
        let mut tensor = Tensor::zeros(device, values.len() / cols, cols)?;
        tensor.data.copy_from_slice(values);
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

    /// Live rows, on the host. CPU: a borrow of the buffer.
    #[must_use]
    pub fn host(&self) -> &[f32] {
        &self.data[..self.rows * self.cols]
    }

    /// Live rows, on the host, to write.
    #[must_use]
    pub fn host_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.cols]
    }

    /// Bytes held on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.bytes()
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
