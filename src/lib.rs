//! Kvern, a self-hosted LLM inference server.
//!
//! ```text
//! HTTP -> admission -> engine -> core (plan) -> worker -> model -> kernels -> sampler
//!                         |                                                      |
//! client <- SSE <- detokenizer <- token stream <---------------------------------+
//! ```
//!
//! A request is parsed, validated and tokenized once; after that it is plain data. The core decides, the worker executes,
//! and nothing flows backwards but step results.

pub mod admission;
pub mod bench;
pub mod config;
pub mod device;
pub mod engine;
pub mod error;
pub mod generate;
pub mod http;
pub mod hub;
pub mod keys;
pub mod load;
pub mod record;
pub mod replay;
pub mod request;
pub mod runtime;
pub mod serve;
pub mod simulate;
pub mod telemetry;
pub mod text;
pub mod worker;
