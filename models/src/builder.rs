//! What blocks are built from: named tensors, checked against the shapes that the configuration gives them, packed on a
//! device.

use kvern_kernels::{Device, Precision, Tensor, Weight};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::weights::Weights;
use crate::{LoadProgress, Progress};

/// Lent to an architecture while it loads.
pub(crate) struct Builder<'a> {
    device: &'a Device,
    config: &'a ModelConfig,
    weights: Weights<'a>,
    precision: Precision,
    progress: Progress<'a>,
    total_bytes: u64,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        device: &'a Device,
        config: &'a ModelConfig,
        weights: Weights<'a>,
        precision: Precision,
        progress: Progress<'a>,
    ) -> Self {
        let total_bytes = weights.remaining_bytes();
        Builder { device, config, weights, precision, progress, total_bytes }
    }

    /// Ends the loading: a tensor that no block took is an error.
    pub(crate) fn finish(self) -> Result<(), LoadError> {
        self.weights.finish()?;
        (self.progress)(LoadProgress { done_bytes: self.total_bytes, total_bytes: self.total_bytes });
        Ok(())
    }

    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.config
    }

    /// The matrices `<name>.weight`, each `[rows, cols]`, stacked in the order of `parts` (name, rows).
    pub(crate) fn matrix(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Weight, LoadError> {
        let names: Vec<String> = parts.iter().map(|(name, _)| format!("{name}.weight")).collect();
        let views = names
            .iter()
            .zip(parts)
            .map(|(name, &(_, rows))| self.weights.matrix(name, rows, cols))
            .collect::<Result<Vec<_>, _>>()?;
        let weight = Weight::pack(self.device, &views, self.precision)?;
        // Taken again per packed weight, in O(tensors): once or twice a layer of work that is far larger.
        let done_bytes = self.total_bytes - self.weights.remaining_bytes();
        (self.progress)(LoadProgress { done_bytes, total_bytes: self.total_bytes });
        Ok(weight)
    }

    /// The vectors `<name>.bias`, each `[rows]`, end to end.
    pub(crate) fn biases(&mut self, parts: &[(String, usize)]) -> Result<Tensor, LoadError> {
        let mut values = Vec::new();
        for (name, rows) in parts {
            values.extend(self.weights.vector(&format!("{name}.bias"), *rows)?);
        }
        Ok(Tensor::from_f32(self.device, values.len(), &values)?)
    }

    /// The vector `name`, `[len]`, as a tensor `[1, len]`.
    pub(crate) fn vector(&mut self, name: &str, len: usize) -> Result<Tensor, LoadError> {
        let values = self.weights.vector(name, len)?;
        Ok(Tensor::from_f32(self.device, len, &values)?)
    }
}
