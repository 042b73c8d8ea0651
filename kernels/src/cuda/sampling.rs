//! Logits to tokens on a device, so that they need not come to the host: the last thing of a step, and what it waits for.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use kvern_cuda_abi::{NONE, Ptr, SampleBin, SampleParams, TokenBias, TokenCount, launch};
pub use kvern_cuda_abi::{SampleRow, TokenBias as SampleBias, TokenCount as SampleCount};

use super::driver::Element;
use super::memory::{DeviceMemory, Milestone, Pinned};
use super::seen::SeenSlots;
use super::uploads::StepArray;
use super::{CudaDevice, shape};
use crate::device::Backend;
use crate::step_inputs::SampledTokens;
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
///
/// A step's rows are [pushed](Self::push) and [uploaded](Self::upload) before its forward pass is launched, so that the next
/// step's can be while it runs; [`launch`](Self::launch) follows the forward pass, and [`finish`](Self::finish) waits for the
/// oldest step that was launched. Two may be under way.
///
/// Which tokens a sequence with penalties has seen is kept on the device, `rows_max x vocab` numbers of 16 bits: the kernel adds
/// what it samples, and the host brings tokens only where a sequence [begins](Self::knows).
pub struct DeviceSampler {
    rows: StepArray<SampleRow>,
    biases: StepArray<TokenBias>,
    counts: StepArray<TokenCount>,
    /// What was pushed for the next launch.
    new_rows: Vec<SampleRow>,
    new_biases: Vec<TokenBias>,
    new_counts: Vec<TokenCount>,
    /// The rows of them that are on the device.
    staged: Range<usize>,
    scratch: DeviceMemory,
    work: Work,
    /// Of a slot and a token: whether, and how often, the slot's sequence has seen it.
    seen: DeviceMemory,
    slots: SeenSlots,
    tokens: Arc<DeviceMemory>,
    logprobs: DeviceMemory,
    top_tokens: DeviceMemory,
    results: [Results; 2],
    /// Launched and not finished, the oldest first: which results, and how many rows.
    launched: VecDeque<Launched>,
    top_max: usize,
    vocab: usize,
    /// Of the step that was finished last, by row.
    sampled: Vec<SampledRow>,
    top: Vec<(u32, f32)>,
}

/// What the launches of a step leave for each other.
struct Work {
    partials: DeviceMemory,
    bins: DeviceMemory,
    listed: DeviceMemory,
    /// Zeros before each step; the kernels see to that after the first.
    counters: StepArray<u32>,
}

impl Work {
    fn new(gpu: &CudaDevice, rows_max: usize, vocab: usize, top_max: usize) -> Result<Self> {
        let memory = |bytes| DeviceMemory::new(&gpu.driver, "the sampler's scratch", rows_max * bytes);
        let mut counters = StepArray::new(gpu, "the sampler's scratch", rows_max * launch::SAMPLE_COUNTERS)?;
        counters.fill((0..rows_max * launch::SAMPLE_COUNTERS).map(|_| 0))?;
        Ok(Work {
            partials: memory(launch::sample_partials(vocab, top_max) * size_of::<u64>())?,
            bins: memory(launch::SAMPLE_BINS * size_of::<SampleBin>())?,
            listed: memory(launch::SAMPLE_LISTED * size_of::<u64>())?,
            counters,
        })
    }
}

/// The last launch that some row of a step needs; the ones before it are needed as well.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Last {
    Best,
    Weigh,
    Select,
}

impl Last {
    /// As the kernels see it.
    fn of(row: &SampleRow, vocab: usize) -> Last {
        let is_greedy = row.temperature == 0.0 || !(1.0 / row.temperature).is_finite();
        let by_count = row.top_k != 0 && (row.top_k as usize) < vocab;
        match (is_greedy, by_count || row.top_p < 1.0 || row.min_p > 0.0) {
            (true, _) if row.wants_logprob == 0 => Last::Best,
            (false, true) => Last::Select,
            _ => Last::Weigh,
        }
    }
}

/// A step's results on their way to the host.
struct Results {
    tokens: Pinned<u32>,
    logprobs: Pinned<f32>,
    top_tokens: Pinned<u32>,
    done: Milestone,
}

#[derive(Clone, Copy)]
struct Launched {
    results: usize,
    rows: usize,
    with_logprobs: bool,
}

impl Results {
    fn new(gpu: &CudaDevice, rows_max: usize, top_max: usize) -> Result<Self> {
        Ok(Results {
            tokens: Pinned::new(&gpu.driver, rows_max)?,
            logprobs: Pinned::new(&gpu.driver, rows_max * (top_max + 1))?,
            top_tokens: Pinned::new(&gpu.driver, (rows_max * top_max).max(1))?,
            done: gpu.milestone()?,
        })
    }
}

impl DeviceSampler {
    /// For up to `rows_max` rows of `vocab` logits, with up to `top_max` likeliest tokens each; `None` on the CPU, whose
    /// sampler is the server's. Tokens also go to `tokens`, those of the model whose logits are sampled.
    pub fn new(
        device: &Device,
        tokens: SampledTokens,
        rows_max: usize,
        vocab: usize,
        top_max: usize,
    ) -> Result<Option<Self>> {
        let (Backend::Cuda(gpu), SampledTokens(Some(tokens))) = (&device.backend, tokens) else { return Ok(None) };
        const INPUTS: &str = "the sampler's inputs";
        const OUTPUTS: &str = "sampled tokens";
        let entries = ENTRIES.min(rows_max.saturating_mul(vocab)).max(vocab);
        let scratch = rows_max.checked_mul(vocab).and_then(|values| values.checked_mul(4));
        let is_possible = tokens.bytes() >= rows_max * size_of::<u32>() && vocab <= launch::SAMPLE_VOCAB_MAX;
        let (Some(scratch), true) = (scratch, is_possible) else {
            let found = format!("{rows_max} rows of {vocab}");
            return Err(KernelError::shape("sampler", "sizes in range, as of the model's steps", found));
        };
        Ok(Some(DeviceSampler {
            rows: StepArray::new(gpu, INPUTS, rows_max)?,
            biases: StepArray::new(gpu, INPUTS, entries)?,
            counts: StepArray::new(gpu, INPUTS, entries)?,
            new_rows: Vec::with_capacity(rows_max),
            new_biases: Vec::new(),
            new_counts: Vec::new(),
            staged: 0..0,
            scratch: DeviceMemory::new(&gpu.driver, "the sampler's scratch", scratch)?,
            work: Work::new(gpu, rows_max, vocab, top_max)?,
            // Half as many bytes as the scratch, so a size in range.
            seen: DeviceMemory::new(&gpu.driver, "seen tokens of penalties", rows_max * vocab * size_of::<u16>())?,
            slots: SeenSlots::new(rows_max),
            tokens,
            logprobs: DeviceMemory::new(&gpu.driver, OUTPUTS, rows_max * (top_max + 1) * size_of::<f32>())?,
            top_tokens: DeviceMemory::new(&gpu.driver, OUTPUTS, rows_max * top_max * size_of::<u32>())?,
            results: [Results::new(gpu, rows_max, top_max)?, Results::new(gpu, rows_max, top_max)?],
            launched: VecDeque::with_capacity(2),
            top_max,
            vocab,
            sampled: Vec::with_capacity(rows_max),
            top: Vec::new(),
        }))
    }

    /// Begins a step's sampling.
    pub fn begin(&mut self) {
        self.new_rows.clear();
        self.new_biases.clear();
        self.new_counts.clear();
        self.staged = 0..0;
        self.slots.begin();
    }

    /// Whether the device has, or will have once what was launched has run, all tokens that `sequence` has seen before
    /// `position`, so that a row there needs no counts.
    #[must_use]
    pub fn knows(&self, sequence: u64, position: u32) -> bool {
        self.slots.knows(sequence, position)
    }

    /// A sequence has ended, or a step with it has failed: what is kept of it counts no more.
    pub fn forget(&mut self, sequence: u64) {
        self.slots.forget(sequence);
    }

    /// How the next row is sampled: `row`'s places in the lists are set here; tokens of each list are distinct. A row with
    /// penalties names its sequence. `counts` are all tokens that it has seen before the row's position; they are not read where
    /// they are [known](Self::knows).
    ///
    /// # Errors
    /// The sequence is in the step already, or the step has too many rows with penalties.
    pub fn push(
        &mut self,
        mut row: SampleRow,
        biases: impl Iterator<Item = TokenBias>,
        sequence: Option<u64>,
        counts: impl Iterator<Item = TokenCount>,
    ) -> Result<()> {
        let place = sequence.map(|sequence| self.slots.place(sequence, row.position)).transpose()?;
        let anew = place.is_some_and(|place| place.anew);
        (row.seen_slot, row.seen_anew) = (place.map_or(NONE, |place| place.slot), u32::from(anew));
        (row.bias_first, row.count_first) = (self.new_biases.len() as u32, self.new_counts.len() as u32);
        self.new_biases.extend(biases);
        if anew {
            self.new_counts.extend(counts);
        }
        row.bias_count = self.new_biases.len() as u32 - row.bias_first;
        row.count_count = self.new_counts.len() as u32 - row.count_first;
        row.top_logprobs = row.top_logprobs.min(self.top_max as u32);
        self.new_rows.push(row);
        Ok(())
    }

    /// Brings what was pushed to the device with the next launch there.
    pub fn upload(&mut self) -> Result<()> {
        self.stage()
    }

    /// Uploads as many rows after those that were staged as there is room for with their entries.
    fn stage(&mut self) -> Result<()> {
        let first = self.staged.end;
        let Some(base) = self.new_rows.get(first).copied() else {
            self.staged = first..first;
            return Ok(());
        };
        let fits = |row: &SampleRow| {
            let biases = row.bias_first + row.bias_count - base.bias_first;
            let counts = row.count_first + row.count_count - base.count_first;
            biases as usize <= self.biases.capacity() && counts as usize <= self.counts.capacity()
        };
        let count = self.new_rows[first..].iter().take_while(|row| fits(row)).count();
        if count == 0 {
            let expected = format!("at most {} biases, and counts, of one row", self.counts.capacity());
            return Err(KernelError::shape(
                "sampler",
                expected,
                format!("{} and {}", base.bias_count, base.count_count),
            ));
        }
        self.staged = first..first + count;
        let last = self.new_rows[self.staged.end - 1];
        let biases = &self.new_biases[base.bias_first as usize..(last.bias_first + last.bias_count) as usize];
        let counts = &self.new_counts[base.count_first as usize..(last.count_first + last.count_count) as usize];
        let rows = self.new_rows[self.staged.clone()].iter().map(|row| SampleRow {
            bias_first: row.bias_first - base.bias_first,
            count_first: row.count_first - base.count_first,
            ..*row
        });
        self.rows.fill(rows)?;
        self.biases.fill(biases.iter().copied())?;
        self.counts.fill(counts.iter().copied())
    }

    /// Samples what was pushed, of the first rows of `logits`.
    ///
    /// # Errors
    /// Two steps are under way already, or the logits are not those of what was pushed.
    pub fn launch(&mut self, device: &Device, logits: &Tensor) -> Result<()> {
        let gpu = own_gpu(device)?;
        let rows = self.new_rows.len();
        if rows > logits.rows() || logits.cols() != self.vocab || logits.element() != Element::F32 {
            let expected = format!("{rows} rows of {} F32 logits", self.vocab);
            let found = format!("{} of {} {}", logits.rows(), logits.cols(), logits.element());
            return Err(KernelError::shape("sampler", expected, found));
        }
        let results = match self.launched.iter().map(|launched| launched.results).collect::<Vec<_>>()[..] {
            [] => 0,
            [taken] => 1 - taken,
            _ => return Err(KernelError::shape("sampler", "at most two steps under way", "a third")),
        };
        let with_logprobs = self.new_rows.iter().any(|row| row.wants_logprob != 0);
        while !self.staged.is_empty() {
            self.launch_staged(gpu, logits, results, with_logprobs)?;
            self.stage()?;
        }
        self.results[results].done.set(gpu.stream())?;
        self.launched.push_back(Launched { results, rows, with_logprobs });
        Ok(())
    }

    fn launch_staged(&mut self, gpu: &CudaDevice, logits: &Tensor, results: usize, with_logprobs: bool) -> Result<()> {
        let Range { start: first, .. } = self.staged;
        let (count, stride) = (self.staged.len(), self.top_max + 1);
        let (tokens, logprobs) = (self.tokens.at(first * 4), self.logprobs.at(first * stride * 4));
        let top_tokens = self.top_tokens.at(first * self.top_max * 4);
        let params = SampleParams {
            logits: Ptr(logits.ptr().0 + (first * self.vocab * 4) as u64),
            scratch: self.scratch.ptr(),
            rows: self.rows.ptr(),
            biases: self.biases.ptr(),
            counts: self.counts.ptr(),
            mask: Ptr::NULL,
            tokens,
            logprobs,
            top_tokens,
            seen: self.seen.ptr(),
            partials: self.work.partials.ptr(),
            bins: self.work.bins.ptr(),
            listed: self.work.listed.ptr(),
            counters: self.work.counters.ptr(),
            vocab: self.vocab as u32,
            top_stride: self.top_max as u32,
        };
        let grid = shape([count, launch::sample_parts(self.vocab)], launch::SAMPLE_THREADS);
        let (kernels, rows) = (gpu.kernels.sample, &self.new_rows[self.staged.clone()]);
        let last = rows.iter().map(|row| Last::of(row, self.vocab)).max().unwrap_or(Last::Best);
        let Results { tokens: to_tokens, logprobs: to_logprobs, top_tokens: to_top, .. } = &mut self.results[results];
        // SAFETY: there are as many logits, and room for the results of `rows_max` rows, which are not fewer; slots are below
        // `rows_max`, and a launch's are different. Nobody touches the host's results before `done`.
        unsafe {
            gpu.launch(kernels.best, grid, &params)?;
            if last >= Last::Weigh {
                gpu.launch(kernels.weigh, grid, &params)?;
            }
            if last == Last::Select {
                gpu.launch(kernels.select, grid, &params)?;
            }
            to_tokens.copy_from(gpu.stream(), tokens, first, count)?;
            if with_logprobs {
                to_logprobs.copy_from(gpu.stream(), logprobs, first * stride, count * stride)?;
                to_top.copy_from(gpu.stream(), top_tokens, first * self.top_max, count * self.top_max)?;
            }
        }
        Ok(())
    }

    /// The step that was launched last has failed after that: nobody takes its results.
    pub fn abandon(&mut self) {
        self.launched.pop_back();
    }

    /// Waits for the oldest step under way, and gives the tokens of its rows.
    ///
    /// # Errors
    /// The device failed, or none is under way.
    pub fn finish(&mut self) -> Result<&[SampledRow]> {
        let Some(Launched { results, rows, with_logprobs }) = self.launched.pop_front() else {
            return Err(KernelError::shape("sampler", "a step under way", "none"));
        };
        let Results { tokens, logprobs, top_tokens, done } = &mut self.results[results];
        done.wait()?;
        let (stride, top_max) = (self.top_max + 1, self.top_max);
        let tokens = &tokens.read()?[..rows];
        let (logprobs, top_tokens) =
            if with_logprobs { (logprobs.read()?, top_tokens.read()?) } else { (&[][..], &[][..]) };
        let logprob = |at: usize| logprobs.get(at).copied().unwrap_or(f32::NAN);
        self.sampled.clear();
        self.sampled.extend(tokens.iter().enumerate().map(|(row, &token)| SampledRow {
            token: (token != NONE).then_some(token),
            logprob: logprob(row * stride),
        }));
        self.top.clear();
        let places = (0..if with_logprobs { rows } else { 0 }).flat_map(|row| (0..top_max).map(move |n| (row, n)));
        self.top.extend(places.map(|(row, n)| (top_tokens[row * top_max + n], logprob(row * stride + 1 + n))));
        Ok(&self.sampled)
    }

    /// The likeliest tokens of a row of the step that was finished last, with their log-probabilities, likeliest first.
    #[must_use]
    pub fn top(&self, row: usize, count: usize) -> &[(u32, f32)] {
        let count = count.min(self.top_max).min(self.vocab);
        self.top.get(row * self.top_max..row * self.top_max + count).unwrap_or(&[])
    }
}

fn own_gpu(device: &Device) -> Result<&CudaDevice> {
    match &device.backend {
        Backend::Cuda(gpu) => Ok(gpu),
        Backend::Cpu(_) => Err(KernelError::shape("sampler", "the GPU that it was made for", device.describe())),
    }
}
