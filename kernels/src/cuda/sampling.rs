//! Logits to tokens on a device, so that they need not come to the host: the last thing of a step, and what it waits for.

use kvern_cuda_abi::{NONE, Ptr, SampleParams, TokenBias, TokenCount, launch};
pub use kvern_cuda_abi::{SampleRow, TokenBias as SampleBias, TokenCount as SampleCount};

use super::driver::Element;
use super::memory::{DeviceMemory, Milestone, Pinned, StepArray};
use super::{CudaDevice, shape};
use crate::device::Backend;
use crate::{Device, KernelError, Result, Tensor};

/// Entries of bias, and of counts, that one launch has room for, unless the vocabulary is larger: of one row each token has at
/// most one. Rows beyond that go into another launch.
const ENTRIES: usize = 1 << 19;

/// What a row became.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampledRow {
    /// `None`: the logits hold NaN or +infinity, or nothing finite.
    pub token: Option<u32>,
    /// Of the token under the raw logits; meaningless where it was not asked for.
    pub logprob: f32,
}

/// Draws tokens from logits on a GPU. Semantics are those of the server's CPU sampler.
pub struct DeviceSampler {
    rows: StepArray<SampleRow>,
    biases: StepArray<TokenBias>,
    counts: StepArray<TokenCount>,
    /// What was pushed since the last launch.
    new_rows: Vec<SampleRow>,
    new_biases: Vec<TokenBias>,
    new_counts: Vec<TokenCount>,
    scratch: DeviceMemory,
    tokens: Results<u32>,
    logprobs: Results<f32>,
    top_tokens: Results<u32>,
    done: Milestone,
    top_max: usize,
    vocab: usize,
    /// Of the last step, by row.
    sampled: Vec<SampledRow>,
    top: Vec<(u32, f32)>,
}

/// An array that a kernel writes and the host reads.
struct Results<T: Copy> {
    device: DeviceMemory,
    pinned: Pinned<T>,
}

impl<T: Copy> Results<T> {
    fn new(gpu: &CudaDevice, len: usize) -> Result<Self> {
        let device = DeviceMemory::new(&gpu.driver, "sampled tokens", len * size_of::<T>())?;
        Ok(Results { device, pinned: Pinned::new(&gpu.driver, len.max(1))? })
    }

    /// # Safety
    /// Nothing reads or writes the host's side until the copy is known to be done.
    unsafe fn fetch(&mut self, gpu: &CudaDevice, len: usize) -> Result<()> {
        // SAFETY: both sides are as long; the rest is the caller's promise.
        unsafe { self.pinned.copy_from(gpu.stream, self.device.ptr(), len) }
    }
}

impl DeviceSampler {
    /// For up to `rows_max` rows of `vocab` logits, with up to `top_max` likeliest tokens each; `None` on the CPU, whose
    /// sampler is the server's.
    pub fn new(device: &Device, rows_max: usize, vocab: usize, top_max: usize) -> Result<Option<Self>> {
        let Backend::Cuda(gpu) = &device.backend else { return Ok(None) };
        const WHAT: &str = "the sampler's inputs";
        let entries = ENTRIES.min(rows_max.saturating_mul(vocab)).max(vocab);
        let scratch = rows_max
            .checked_mul(vocab)
            .and_then(|values| values.checked_mul(4))
            .ok_or_else(|| KernelError::shape("sampler", "sizes in range", format!("{rows_max} rows of {vocab}")))?;
        Ok(Some(DeviceSampler {
            rows: StepArray::new(&gpu.driver, WHAT, rows_max)?,
            biases: StepArray::new(&gpu.driver, WHAT, entries)?,
            counts: StepArray::new(&gpu.driver, WHAT, entries)?,
            new_rows: Vec::with_capacity(rows_max),
            new_biases: Vec::new(),
            new_counts: Vec::new(),
            scratch: DeviceMemory::new(&gpu.driver, "the sampler's scratch", scratch)?,
            tokens: Results::new(gpu, rows_max)?,
            logprobs: Results::new(gpu, rows_max * (top_max + 1))?,
            top_tokens: Results::new(gpu, rows_max * top_max)?,
            done: Milestone::new(&gpu.driver)?,
            top_max,
            vocab,
            sampled: Vec::with_capacity(rows_max),
            top: Vec::new(),
        }))
    }

    /// Bytes held on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let inputs = self.rows.bytes() + self.biases.bytes() + self.counts.bytes() + self.scratch.bytes();
        let outputs = [&self.tokens.device, &self.logprobs.device, &self.top_tokens.device];
        inputs + outputs.map(DeviceMemory::bytes).iter().sum::<usize>()
    }

    /// Begins a step's sampling.
    pub fn begin(&mut self) {
        self.new_rows.clear();
        self.new_biases.clear();
        self.new_counts.clear();
        self.sampled.clear();
        self.top.clear();
    }

    /// How the next row of `logits` is sampled. `row`'s places in the lists are set here; tokens of each list are distinct.
    pub fn push(
        &mut self,
        device: &Device,
        logits: &Tensor,
        mut row: SampleRow,
        biases: impl Iterator<Item = TokenBias>,
        counts: impl Iterator<Item = TokenCount>,
    ) -> Result<()> {
        let (first_bias, first_count) = (self.new_biases.len(), self.new_counts.len());
        self.new_biases.extend(biases);
        self.new_counts.extend(counts);
        let full = self.new_biases.len() > self.biases.capacity() || self.new_counts.len() > self.counts.capacity();
        if full && !self.new_rows.is_empty() {
            let (own_biases, own_counts) =
                (self.new_biases.split_off(first_bias), self.new_counts.split_off(first_count));
            self.flush(device, logits)?;
            (self.new_biases, self.new_counts) = (own_biases, own_counts);
            (row.bias_first, row.count_first) = (0, 0);
        } else {
            (row.bias_first, row.count_first) = (first_bias as u32, first_count as u32);
        }
        row.bias_count = self.new_biases.len() as u32 - row.bias_first;
        row.count_count = self.new_counts.len() as u32 - row.count_first;
        row.top_logprobs = row.top_logprobs.min(self.top_max as u32);
        self.new_rows.push(row);
        Ok(())
    }

    /// Samples what was pushed, waits for it, and gives the tokens of all rows since [`begin`](Self::begin).
    pub fn finish(&mut self, device: &Device, logits: &Tensor) -> Result<&[SampledRow]> {
        self.flush(device, logits)?;
        Ok(&self.sampled)
    }

    /// The likeliest tokens of a row that asked for `count`, with their log-probabilities, likeliest first.
    #[must_use]
    pub fn top(&self, row: usize, count: usize) -> &[(u32, f32)] {
        let count = count.min(self.top_max).min(self.vocab);
        self.top.get(row * self.top_max..row * self.top_max + count).unwrap_or(&[])
    }

    /// Launches for the rows that were pushed since the last time, and takes their results.
    fn flush(&mut self, device: &Device, logits: &Tensor) -> Result<()> {
        let Backend::Cuda(gpu) = &device.backend else {
            return Err(KernelError::shape("sampler", "the GPU that it was made for", device.describe()));
        };
        let (first, count) = (self.sampled.len(), self.new_rows.len());
        if count == 0 {
            return Ok(());
        }
        if first + count > logits.rows() || logits.cols() != self.vocab || logits.element() != Element::F32 {
            let expected = format!("{} rows of {} F32 logits", first + count, self.vocab);
            let found = format!("{} of {} {}", logits.rows(), logits.cols(), logits.element());
            return Err(KernelError::shape("sampler", expected, found));
        }
        let wants_logprobs = self.new_rows.iter().any(|row| row.wants_logprob != 0);
        // SAFETY: the last launch's results were waited for, so its copies are done.
        unsafe {
            self.rows.fill(gpu.stream, self.new_rows.iter().copied())?;
            self.biases.fill(gpu.stream, self.new_biases.iter().copied())?;
            self.counts.fill(gpu.stream, self.new_counts.iter().copied())?;
        }
        let params = SampleParams {
            logits: Ptr(logits.ptr().0 + (first * self.vocab * 4) as u64),
            scratch: self.scratch.ptr(),
            rows: self.rows.ptr(),
            biases: self.biases.ptr(),
            counts: self.counts.ptr(),
            mask: Ptr::NULL,
            tokens: self.tokens.device.ptr(),
            logprobs: self.logprobs.device.ptr(),
            top_tokens: self.top_tokens.device.ptr(),
            vocab: self.vocab as u32,
            top_stride: self.top_max as u32,
        };
        // SAFETY: there are as many logits, and room for the results of `rows_max` rows, which are not fewer. Nobody touches the
        // host's results before `done`.
        unsafe {
            gpu.launch(gpu.kernels.sample, shape([count, 1], launch::SAMPLE_THREADS), &params)?;
            self.tokens.fetch(gpu, count)?;
            if wants_logprobs {
                self.logprobs.fetch(gpu, count * (self.top_max + 1))?;
                self.top_tokens.fetch(gpu, count * self.top_max)?;
            }
        }
        self.done.set(gpu.stream)?;
        self.done.wait()?;
        self.take(count, wants_logprobs)?;
        self.new_rows.clear();
        self.new_biases.clear();
        self.new_counts.clear();
        Ok(())
    }

    /// Results from pinned memory, which the next step's overwrite.
    fn take(&mut self, count: usize, with_logprobs: bool) -> Result<()> {
        let stride = self.top_max + 1;
        let tokens = &self.tokens.pinned.read()?[..count];
        let logprobs = if with_logprobs { self.logprobs.pinned.read()? } else { &[] };
        let logprob = |row: usize| logprobs.get(row * stride).copied().unwrap_or(f32::NAN);
        let rows = tokens
            .iter()
            .enumerate()
            .map(|(row, &token)| SampledRow { token: (token != NONE).then_some(token), logprob: logprob(row) });
        self.sampled.extend(rows);
        let top_tokens = if with_logprobs { self.top_tokens.pinned.read()? } else { &[] };
        for row in 0..count {
            for n in 0..self.top_max {
                let token = top_tokens.get(row * self.top_max + n).copied().unwrap_or(NONE);
                self.top.push((token, logprobs.get(row * stride + 1 + n).copied().unwrap_or(f32::NAN)));
            }
        }
        Ok(())
    }
}
