//! What blocks are built from: named tensors, checked against the shapes that the configuration gives them, packed on a
//! device; or random ones of those shapes.

use kvern_kernels::{Device, Precision, Tensor, Weight};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::weights::Weights;
use crate::{LoadProgress, Progress};

/// Lent to an architecture while it loads.
pub(crate) struct Builder<'a> {
    device: &'a Device,
    config: &'a ModelConfig,
    source: Source<'a>,
    precision: Precision,
    progress: Progress<'a>,
    total_bytes: u64,
}

/// Where tensors come from.
pub(crate) enum Source<'a> {
    Files(Weights<'a>),
    /// Each matrix takes the next seed.
    Random {
        seed: u64,
    },
}

impl Source<'_> {
    /// A matrix of random numbers, such that products keep the size of what they multiply.
    fn random(seed: &mut u64, device: &Device, rows: usize, cols: usize) -> Result<Weight, LoadError> {
        *seed = seed.wrapping_add(1);
        // The variance of a uniform number is a third of its limit's square.
        let limit = (3.0 / cols as f32).sqrt();
        Ok(Weight::random(device, rows, cols, *seed, limit)?)
    }
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        device: &'a Device,
        config: &'a ModelConfig,
        source: Source<'a>,
        precision: Precision,
        progress: Progress<'a>,
    ) -> Self {
        let total_bytes = match &source {
            Source::Files(weights) => weights.remaining_bytes(),
            Source::Random { .. } => 0,
        };
        Builder { device, config, source, precision, progress, total_bytes }
    }

    /// Ends the loading: a tensor that no block took is an error.
    pub(crate) fn finish(self) -> Result<(), LoadError> {
        if let Source::Files(weights) = self.source {
            weights.finish()?;
        }
        (self.progress)(LoadProgress { done_bytes: self.total_bytes, total_bytes: self.total_bytes });
        Ok(())
    }

    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// The matrices `<name>.weight`, each `[rows, cols]`, stacked in the order of `parts` (name, rows).
    pub(crate) fn matrix(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Weight, LoadError> {
        let weight = match &mut self.source {
            Source::Random { seed } => {
                Source::random(seed, self.device, parts.iter().map(|(_, rows)| rows).sum(), cols)?
            }
            Source::Files(weights) => {
                let names: Vec<String> = parts.iter().map(|(name, _)| format!("{name}.weight")).collect();
                let views = names
                    .iter()
                    .zip(parts)
                    .map(|(name, &(_, rows))| weights.matrix(name, rows, cols))
                    .collect::<Result<Vec<_>, _>>()?;
                Weight::pack(self.device, &views, self.precision)?
            }
        };
        self.report();
        Ok(weight)
    }

    /// The matrix `<name>.weight`, `[rows, cols]`, whose rows are looked up.
    pub(crate) fn table(&mut self, name: &str, rows: usize, cols: usize) -> Result<Weight, LoadError> {
        let weight = match &mut self.source {
            Source::Random { seed } => Source::random(seed, self.device, rows, cols)?,
            Source::Files(weights) => {
                let name = format!("{name}.weight");
                Weight::table(self.device, weights.matrix(&name, rows, cols)?, self.precision)?
            }
        };
        self.report();
        Ok(weight)
    }

    fn report(&mut self) {
        if let Source::Files(weights) = &self.source {
            // Taken again per packed weight, in O(tensors): once or twice a layer of work that is far larger.
            let done_bytes = self.total_bytes - weights.remaining_bytes();
            (self.progress)(LoadProgress { done_bytes, total_bytes: self.total_bytes });
        }
    }

    /// The vectors `<name>.bias`, each `[rows]`, end to end.
    pub(crate) fn biases(&mut self, parts: &[(String, usize)]) -> Result<Tensor, LoadError> {
        let mut values = Vec::new();
        for (name, rows) in parts {
            match &mut self.source {
                Source::Random { .. } => values.resize(values.len() + rows, 0.0),
                Source::Files(weights) => values.extend(weights.vector(&format!("{name}.bias"), *rows)?),
            }
        }
        Ok(Tensor::from_f32(self.device, values.len(), &values)?)
    }

    /// The vector `name`, `[len]`, as a tensor `[1, len]`.
    pub(crate) fn vector(&mut self, name: &str, len: usize) -> Result<Tensor, LoadError> {
        let values = match &mut self.source {
            Source::Random { .. } => vec![1.0; len],
            Source::Files(weights) => weights.vector(name, len)?,
        };
        Ok(Tensor::from_f32(self.device, len, &values)?)
    }
}
