//! Blocks that architectures are composed of: weights beside the ops that use them.
//!
//! A block is complete at construction and immutable after it; what a forward pass writes lies in the
//! [`Workspace`](workspace::Workspace), which the decoder owns. A block's `forward` issues ops in order and allocates
//! nothing. Every op computes a row from that row alone (attention: from its sequence alone), in an order of summation that
//! does not depend on the batch, so a row's result has the same bits in any batch.

mod attention;
mod decoder;
mod embedding;
mod linear;
mod mlp;
mod norm;
mod workspace;

pub(crate) use attention::{Attention, AttentionSpec};
pub(crate) use decoder::{Decoder, DecoderLayer, DecoderParts};
pub(crate) use embedding::Embedding;
pub(crate) use linear::Linear;
pub(crate) use mlp::Mlp;
pub(crate) use norm::RmsNorm;
