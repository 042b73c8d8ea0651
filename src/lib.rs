//! Kvern, a self-hosted LLM inference server.

pub mod admission;
pub mod error;
pub mod http;
pub mod request;
pub mod text;
